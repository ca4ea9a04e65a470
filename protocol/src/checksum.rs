//! CRC-32 as nbdcast uses it: one over each payload, one over each 4 KiB block of the image, and how one follows from the
//! other without the bytes. What was checked against one is then known to be what the other says, whatever memory the bytes
//! have lain in meanwhile.
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

/// CRC-32 of two parts, from those of each, the second of `second_bytes`.
#[must_use]
pub fn crc32_joined(first: u32, second: u32, second_bytes: u64) -> u32 {
    behind(first, second_bytes) ^ second
}

/// CRC-32 of bytes in which a part with CRC `from` was replaced by one of the same length with CRC `to`; `behind_bytes`
/// follow the part.
#[must_use]
pub fn crc32_changed(whole: u32, from: u32, to: u32, behind_bytes: u64) -> u32 {
    whole ^ behind(from ^ to, behind_bytes)
}

/// CRC-32 of blocks in a row, from their checksums in stored form.
#[must_use]
pub fn crc32_of_blocks(stored: &[u32]) -> u32 {
    let Some((first, rest)) = stored.split_first() else { return 0 };
    let behind_block = behind_block();
    let zero = zero_block_crc();
    rest.iter().fold(first ^ zero, |crc, next| behind_block.of(crc) ^ next ^ zero)
}

/// CRC-32 of so many bytes that are all zero.
#[must_use]
pub fn crc32_of_zeroes(bytes: u64) -> u32 {
    !behind(!0, bytes)
}

/// What a CRC turns into when `bytes` follow whose own CRC is then xor-ed in.
fn behind(crc: u32, bytes: u64) -> u32 {
    let mut first = crc32fast::Hasher::new_with_initial_len(crc, 0);
    first.combine(&crc32fast::Hasher::new_with_initial_len(0, bytes));
    first.finalize()
}

/// [`behind`] for one block, in tables: it is linear, so that each byte of a CRC contributes on its own.
struct BehindBlock([[u32; 256]; 4]);

impl BehindBlock {
    fn of(&self, crc: u32) -> u32 {
        let bytes = crc.to_le_bytes().map(usize::from);
        self.0.iter().zip(bytes).fold(0, |sum, (table, byte)| sum ^ table[byte])
    }
}

fn behind_block() -> &'static BehindBlock {
    static TABLES: OnceLock<BehindBlock> = OnceLock::new();
    TABLES.get_or_init(|| {
        let bits: [u32; 32] = std::array::from_fn(|bit| behind(1 << bit, BLOCK_BYTES));
        let of_byte = |table: usize, byte: usize| {
            (0..8).filter(|bit| byte >> bit & 1 == 1).fold(0, |sum, bit| sum ^ bits[table * 8 + bit])
        };
        BehindBlock(std::array::from_fn(|table| std::array::from_fn(|byte| of_byte(table, byte))))
    })
}

fn zero_block_crc() -> u32 {
    static CRC: OnceLock<u32> = OnceLock::new();
    *CRC.get_or_init(|| crc32(&[0; BLOCK_BYTES as usize]))
}

/// The stored form of the checksum of one block of [`BLOCK_BYTES`]; zero for a block of zeroes.
#[must_use]
pub fn stored_block_checksum(block: &[u8]) -> u32 {
    debug_assert_eq!(block.len() as u64, BLOCK_BYTES);
    stored_of_crc(crc32(block))
}

/// The stored form of the CRC-32 of a block, and the CRC-32 of a block from its stored form.
#[must_use]
pub fn stored_of_crc(crc: u32) -> u32 {
    crc ^ zero_block_crc()
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

    #[test]
    fn no_blocks_have_the_checksum_of_no_bytes() {
        assert_eq!(crc32_of_blocks(&[]), crc32(&[]));
    }

    #[test]
    fn zeroes_need_not_be_looked_at() {
        for bytes in [0, 1, 4096, 12_288] {
            assert_eq!(crc32_of_zeroes(bytes), crc32(&vec![0; bytes as usize]));
        }
    }

    proptest::proptest! {
        #[test]
        fn the_checksum_of_a_whole_follows_from_those_of_its_parts(
            seed in proptest::num::u32::ANY, blocks in 1usize..9, cut in 0usize..4097, length in 0usize..4097,
        ) {
            let mut state = seed | 1;
            let mut byte = || { state = state.wrapping_mul(0x9e37_79b1).rotate_left(9); state as u8 };
            let bytes: Vec<u8> = (0..blocks * 4096).map(|_| byte()).collect();
            let stored: Vec<u32> = bytes.chunks_exact(4096).map(stored_block_checksum).collect();
            assert_eq!(crc32_of_blocks(&stored), crc32(&bytes));
            let (first, second) = bytes.split_at(cut);
            assert_eq!(crc32_joined(crc32(first), crc32(second), second.len() as u64), crc32(&bytes));
            let part = cut.min(4096 - length.min(4096))..(cut + length).min(4096);
            let mut changed = bytes.clone();
            changed[part.clone()].iter_mut().for_each(|b| *b ^= byte());
            let (from, to) = (crc32(&bytes[part.clone()]), crc32(&changed[part.clone()]));
            let behind = (bytes.len() - part.end) as u64;
            assert_eq!(crc32_changed(crc32(&bytes), from, to, behind), crc32(&changed));
        }
    }
}
