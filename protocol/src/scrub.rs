//! What a replica says of each block of a range that is scrubbed, and its form in bytes. Compares nothing.

use bytes::BufMut;

use crate::cursor::{Malformed, Reader};
use crate::{BLOCK_BYTES, RECORD_PAYLOAD_BYTES_MAX};

/// Blocks in one answer, at most.
pub const SCRUB_BLOCKS_MAX: usize = RECORD_PAYLOAD_BYTES_MAX as usize / BLOCK_BYTES as usize;

/// One block as a replica finds it on its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BlockFound {
    /// Its bytes match this stored checksum.
    Sound {
        /// The checksum, in its stored form.
        checksum: u32,
    },
    /// Its bytes do not match their stored checksum.
    Mismatch,
    /// The disk cannot read it.
    Unreadable,
}

/// Writes what was found behind the number of blocks.
pub(crate) fn put_blocks(out: &mut impl BufMut, blocks: &[BlockFound]) {
    out.put_u32_le(blocks.len() as u32);
    for block in blocks {
        match block {
            BlockFound::Sound { checksum } => {
                out.put_u8(0);
                out.put_u32_le(*checksum);
            }
            BlockFound::Mismatch => out.put_u8(1),
            BlockFound::Unreadable => out.put_u8(2),
        }
    }
}

/// Reads what was found. No block at all and too many are malformed.
pub(crate) fn read_blocks(r: &mut Reader<'_>) -> Result<Vec<BlockFound>, Malformed> {
    const FIELD: &str = "blocks";
    let count = r.u32(FIELD)? as usize;
    if !(1..=SCRUB_BLOCKS_MAX).contains(&count) || r.remaining() < count {
        return Err(Malformed { field: FIELD });
    }
    (0..count)
        .map(|_| match r.u8(FIELD)? {
            0 => Ok(BlockFound::Sound { checksum: r.u32(FIELD)? }),
            1 => Ok(BlockFound::Mismatch),
            2 => Ok(BlockFound::Unreadable),
            3..=u8::MAX => Err(Malformed { field: FIELD }),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Vec<BlockFound>, Malformed> {
        let mut r = Reader::new(bytes);
        let blocks = read_blocks(&mut r)?;
        r.finish("blocks")?;
        Ok(blocks)
    }

    #[test]
    fn what_was_found_survives_the_trip() {
        let blocks = [BlockFound::Sound { checksum: 0xdead_beef }, BlockFound::Mismatch, BlockFound::Unreadable];
        for found in [&blocks[..], &[blocks[0]; SCRUB_BLOCKS_MAX]] {
            let mut bytes = Vec::new();
            put_blocks(&mut bytes, found);
            assert_eq!(read(&bytes).as_deref(), Ok(found));
        }
    }

    #[test]
    fn counts_that_cannot_be_are_refused() {
        for (count, rest) in [(0_u32, 0), (SCRUB_BLOCKS_MAX as u32 + 1, SCRUB_BLOCKS_MAX + 1), (u32::MAX, 3), (2, 1)] {
            let mut bytes = count.to_le_bytes().to_vec();
            bytes.resize(4 + rest, 1);
            assert!(read(&bytes).is_err(), "{count} blocks in {rest} bytes");
        }
        assert!(read(&[1, 0, 0, 0, 3]).is_err());
    }
}
