//! How the checksum of a payload becomes those of the blocks that it changes, and how those of blocks become that of what
//! is read of them. Owns the arithmetic of it, and never reads or writes anything.
//!
//! **Invariant:** a checksum that is stored follows from that of the payload and those stored before, and one that is sent
//! follows from stored ones. None is computed from bytes that were checked earlier and have lain in memory since: had they
//! changed there, it would vouch for the change.

use std::ops::Range;

use protocol::BLOCK_BYTES;
use protocol::checksum::{crc32, crc32_changed, crc32_joined, crc32_of_blocks, stored_block_checksum, stored_of_crc};

const BLOCK: usize = BLOCK_BYTES as usize;

/// A part of a block with its CRC-32.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    /// Where in the block.
    within: Range<usize>,
    crc: u32,
}

/// What data that is to be written does to checksums.
#[derive(Debug)]
pub(crate) struct Change {
    /// The first block if it is changed in part.
    head: Option<Part>,
    /// Stored checksums of the blocks that are changed as a whole.
    whole: Vec<u32>,
    /// The last block if it is changed in part, and is not the first.
    tail: Option<Part>,
}

/// A block that is changed in part: its checksum before, as its bytes say, and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PartChange {
    pub(crate) before: u32,
    pub(crate) after: u32,
}

/// Where parts of blocks begin and end: bytes of the first block, and of the last, if these are covered in part.
fn cut(offset: u64, length: usize) -> (usize, usize) {
    let at = (offset % BLOCK_BYTES) as usize;
    let head = if at == 0 && length >= BLOCK { 0 } else { length.min(BLOCK - at) };
    (head, (length - head) % BLOCK)
}

impl Change {
    /// Of `data` that is to be written at `offset`.
    pub(crate) fn of(offset: u64, data: &[u8]) -> Change {
        let (head_bytes, tail_bytes) = cut(offset, data.len());
        let (head, rest) = data.split_at(head_bytes);
        let (whole, tail) = rest.split_at(rest.len() - tail_bytes);
        let at = (offset % BLOCK_BYTES) as usize;
        let part =
            |at: usize, data: &[u8]| (!data.is_empty()).then(|| Part { within: at..at + data.len(), crc: crc32(data) });
        Change {
            head: part(at, head),
            whole: whole.chunks_exact(BLOCK).map(stored_block_checksum).collect(),
            tail: part(0, tail),
        }
    }

    /// CRC-32 of all of the data.
    pub(crate) fn crc(&self) -> u32 {
        let head = self.head.as_ref().map_or(0, |part| part.crc);
        let whole_bytes = self.whole.len() as u64 * BLOCK_BYTES;
        let middle = match (&self.head, self.whole.is_empty()) {
            (_, true) => head,
            (None, false) => crc32_of_blocks(&self.whole),
            (Some(_), false) => crc32_joined(head, crc32_of_blocks(&self.whole), whole_bytes),
        };
        self.tail.as_ref().map_or(middle, |part| crc32_joined(middle, part.crc, part.within.len() as u64))
    }

    /// The stored checksums of all blocks that are touched, the first of them at `first`; `edge` says how one comes out
    /// that is changed in part: given its offset, and what its bytes would do to its checksum.
    pub(crate) fn checksums<E>(
        self,
        first: u64,
        mut edge: impl FnMut(u64, &dyn Fn(&[u8]) -> PartChange) -> Result<u32, E>,
    ) -> Result<Vec<u32>, E> {
        let Change { head, whole: mut checksums, tail } = self;
        if let Some(part) = head {
            checksums.insert(0, edge(first, &|block| part.put_into(block))?);
        }
        if let Some(part) = tail {
            let last = first + checksums.len() as u64 * BLOCK_BYTES;
            checksums.push(edge(last, &|block| part.put_into(block))?);
        }
        Ok(checksums)
    }
}

/// The stored checksums of the blocks that `data` covers whole, if it covers no other, and if its CRC-32 is `crc`.
pub(crate) fn whole_blocks(offset: u64, data: &[u8], crc: u32) -> Option<Vec<u32>> {
    let change = Change::of(offset, data);
    let is_whole = change.head.is_none() && change.tail.is_none();
    (is_whole && change.crc() == crc).then_some(change.whole)
}

impl Part {
    /// What the checksum of a block was, in stored form, and what it is with this part in it.
    fn put_into(&self, block: &[u8]) -> PartChange {
        let before = crc32(block);
        let replaced = crc32(&block[self.within.clone()]);
        let after = crc32_changed(before, replaced, self.crc, (BLOCK - self.within.end) as u64);
        PartChange { before: stored_of_crc(before), after: stored_of_crc(after) }
    }
}

/// CRC-32 of the part of whole blocks from `at` on, of `length` bytes, where `blocks` has the stored checksums `stored`;
/// the index of the first block that does not have its own if there is one. Each byte is looked at once, for both.
pub(crate) fn verify(blocks: &[u8], stored: &[u32], at: usize, length: usize) -> Result<u32, usize> {
    let (head_bytes, tail_bytes) = cut(at as u64, length);
    let mut crc = 0;
    let mut inner = 0..stored.len();
    if head_bytes > 0 {
        let block = blocks.get(..BLOCK).ok_or(0_usize)?;
        crc = verify_part(block, stored[0], at..at + head_bytes).ok_or(0_usize)?;
        inner.start = 1;
    }
    if tail_bytes > 0 {
        inner.end -= 1;
    }
    let whole = &blocks[inner.start * BLOCK..inner.end * BLOCK];
    let mismatch =
        whole.chunks_exact(BLOCK).zip(&stored[inner.clone()]).position(|(b, s)| stored_block_checksum(b) != *s);
    if let Some(index) = mismatch {
        return Err(inner.start + index);
    }
    if !inner.is_empty() {
        let of_blocks = crc32_of_blocks(&stored[inner.clone()]);
        crc = if head_bytes == 0 { of_blocks } else { crc32_joined(crc, of_blocks, whole.len() as u64) };
    }
    if tail_bytes > 0 {
        let part = verify_part(&blocks[inner.end * BLOCK..], stored[inner.end], 0..tail_bytes).ok_or(inner.end)?;
        crc = crc32_joined(crc, part, tail_bytes as u64);
    }
    Ok(crc)
}

/// CRC-32 of a part of a block, if the block has its stored checksum.
fn verify_part(block: &[u8], stored: u32, within: Range<usize>) -> Option<u32> {
    let (before, part, behind) = (&block[..within.start], &block[within.clone()], &block[within.end..]);
    let crc = crc32(part);
    let whole = crc32_joined(crc32(before), crc, part.len() as u64);
    let whole = crc32_joined(whole, crc32(behind), behind.len() as u64);
    (stored_of_crc(whole) == stored).then_some(crc)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(seed: u64, length: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let mut byte = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 40) as u8
        };
        (0..length).map(|_| byte()).collect()
    }

    fn stored(blocks: &[u8]) -> Vec<u32> {
        blocks.chunks_exact(BLOCK).map(stored_block_checksum).collect()
    }

    /// The checksums after `data` was put at `at` of `blocks`, and what the change takes the checksums before to be.
    fn put(blocks: &[u8], at: usize, data: &[u8]) -> (Vec<u32>, Vec<u32>) {
        let mut before = stored(blocks);
        let touched = at / BLOCK..(at + data.len()).div_ceil(BLOCK);
        let first = (touched.start * BLOCK) as u64;
        let checksums = Change::of(at as u64, data).checksums(first, |offset, put| {
            let block = offset as usize / BLOCK;
            let PartChange { before: found, after } = put(&blocks[block * BLOCK..][..BLOCK]);
            before[block] = found;
            Ok::<u32, ()>(after)
        });
        let mut after = stored(blocks);
        after.splice(touched, checksums.unwrap());
        (before, after)
    }

    proptest::proptest! {
        #[test]
        fn stored_checksums_follow_from_those_before_and_that_of_the_payload(
            seed in proptest::num::u64::ANY, at in 0usize..3 * BLOCK, length in 1usize..4 * BLOCK,
        ) {
            let mut blocks = bytes(seed, 7 * BLOCK);
            let data = bytes(!seed, length);
            assert_eq!(Change::of(at as u64, &data).crc(), crc32(&data));
            let (before, after) = put(&blocks, at, &data);
            assert_eq!(before, stored(&blocks));
            blocks[at..at + length].copy_from_slice(&data);
            assert_eq!(after, stored(&blocks));
        }

        #[test]
        fn the_checksum_of_what_is_read_follows_from_stored_ones(
            seed in proptest::num::u64::ANY, at in 0usize..BLOCK, length in 1usize..4 * BLOCK, flip in 0usize..5 * BLOCK,
        ) {
            let mut blocks = bytes(seed, (at + length).next_multiple_of(BLOCK));
            let stored = stored(&blocks);
            assert_eq!(verify(&blocks, &stored, at, length), Ok(crc32(&blocks[at..at + length])));
            let flip = flip % blocks.len();
            blocks[flip] ^= 1 << (seed % 8);
            assert_eq!(verify(&blocks, &stored, at, length), Err(flip / BLOCK), "whether it is in the part or beside it");
        }
    }

    #[test]
    fn whole_blocks_at_any_place_have_no_edges() {
        for (offset, length, expected) in [
            (0, BLOCK, (0, 0)),
            (BLOCK_BYTES, 3 * BLOCK, (0, 0)),
            (0, 5, (5, 0)),
            (5, BLOCK, (BLOCK - 5, 5)),
            (5, BLOCK - 5, (BLOCK - 5, 0)),
            (0, BLOCK + 7, (0, 7)),
            (4095, 2 * BLOCK + 1, (1, 0)),
        ] {
            assert_eq!(cut(offset, length), expected, "{offset}+{length}");
        }
    }
}
