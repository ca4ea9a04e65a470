//! CRC-32 as nbdcast uses it: one over each payload, one over each 4 KiB block of the image.
//!
//! On disk a block's checksum is kept xor-ed with that of a block of zeroes, so that a sparse file of zeroes describes a
//! sparse image of zeroes.

use std::sync::OnceLock;

use crate::BLOCK_BYTES;

/// CRC-32 (IEEE) of `bytes`.
#[must_use]
pub fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// CRC-32 of `bytes` that only those can make who know `salt`.
#[must_use]
pub fn crc32_salted(salt: u32, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(salt);
    hasher.update(bytes);
    hasher.finalize()
}

/// CRC-32 of `first` followed by `second`.
#[must_use]
pub fn crc32_of_two(first: &[u8], second: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(first);
    hasher.update(second);
    hasher.finalize()
}

fn zero_block_crc() -> u32 {
    static CRC: OnceLock<u32> = OnceLock::new();
    *CRC.get_or_init(|| crc32(&[0; BLOCK_BYTES as usize]))
}

/// The stored form of the checksum of one block of [`BLOCK_BYTES`]; zero for a block of zeroes.
#[must_use]
pub fn stored_block_checksum(block: &[u8]) -> u32 {
    debug_assert_eq!(block.len() as u64, BLOCK_BYTES);
    crc32(block) ^ zero_block_crc()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_zeroes_is_stored_as_zero() {
        assert_eq!(stored_block_checksum(&[0; 4096]), 0);
        let mut block = [0; 4096];
        block[4095] = 1;
        assert_ne!(stored_block_checksum(&block), 0);
    }

    #[test]
    fn two_parts_hash_as_one() {
        assert_eq!(crc32_of_two(b"123", b"456789"), 0xcbf4_3926);
    }
}
