//! How ranges of the image are kept, told from three sources that must agree before anything is called zero: the stored
//! checksums, what the filesystem says of the image, and the image's bytes. Changes nothing.
//!
//! A block is a hole only if its stored checksum is that of zeroes *and* the image has a hole there, and zeroes only if
//! its checksum is that of zeroes *and* its bytes were read and are. A checksum alone proves nothing, as other blocks have the
//! same; a hole alone does not either, as it may be a part of the image that was lost, and then a read must come and find
//! that out.

use std::io;

use protocol::BLOCK_BYTES;
use protocol::extents::{self, Allocation, EXTENTS_MAX, Extent};
use protocol::ranges::ByteRange;

use crate::disk::RawFile;
use crate::image::{CHECKSUM_BYTES, checksum_file_bytes, checksums_of};

/// What one answer may cost: records wait for it that share a block with its range.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    /// Bytes of checksums that are read.
    checksum_bytes: u64,
    /// Bytes of the image that are read.
    image_bytes: u64,
}

impl Budget {
    pub(crate) const ANSWER: Budget = Budget { checksum_bytes: 1 << 20, image_bytes: 4 << 20 };

    /// Takes up to `wanted` bytes, at least `least` from what is left of one sort; `None` if nothing is left.
    fn take(left: &mut u64, wanted: u64, least: u64) -> Option<u64> {
        let taken = wanted.min(*left);
        *left = left.saturating_sub(taken.max(least));
        (taken > 0).then_some(taken)
    }
}

/// Checksums are read in parts of this size, bytes: those of 64 MiB of the image.
const CHECKSUM_PART_BYTES: u64 = 64 << 10;
/// What is read of the image at once, bytes. A shorter part is counted as one of this size, for the way there.
const IMAGE_PART_BYTES: u64 = 64 << 10;
const BLOCK: usize = BLOCK_BYTES as usize;

/// Looks at the image and the checksums of a range.
pub(crate) struct Survey<'a> {
    pub(crate) image: &'a dyn RawFile,
    pub(crate) checksums: &'a dyn RawFile,
    pub(crate) budget: Budget,
}

/// Whether there is more to be looked at.
#[derive(PartialEq, Eq)]
enum Step {
    On,
    /// The answer ends here.
    Enough,
}

impl Survey<'_> {
    /// How the range is kept, from its first byte on: at least one extent, which may all end before the range does.
    pub(crate) fn of(mut self, range: ByteRange) -> io::Result<Vec<Extent>> {
        let whole = range.aligned(BLOCK_BYTES);
        // What is behind the end of a file that was cut off is no hole: it cannot be read.
        if self.image.length()? < whole.end() || self.checksums.length()? < checksum_file_bytes(whole.end()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut found = Vec::new();
        let mut at = whole.offset;
        while at < whole.end() {
            let rest = ByteRange { offset: at, length: whole.end() - at };
            let unknown = self.checksums.allocated_in(checksums_of(rest))?;
            let known_until = unknown.map_or(whole.end(), |unknown| blocks_of(unknown).offset);
            // Where the checksums have a hole they are those of zeroes.
            if self.note_zero_checksums(&mut found, ByteRange { offset: at, length: known_until - at })? == Step::Enough
            {
                break;
            }
            let Some(unknown) = unknown.map(blocks_of) else { break };
            if self.read_checksums(&mut found, unknown)? == Step::Enough {
                break;
            }
            at = unknown.end();
        }
        Ok(clip(found, range.offset - whole.offset, range.length))
    }

    /// Notes blocks whose checksums have to be read.
    fn read_checksums(&mut self, found: &mut Vec<Extent>, blocks: ByteRange) -> io::Result<Step> {
        let mut at = blocks.offset;
        while at < blocks.end() {
            let wanted = checksum_file_bytes(blocks.end() - at).min(CHECKSUM_PART_BYTES);
            let Some(bytes) = Budget::take(&mut self.budget.checksum_bytes, wanted, 0) else { return Ok(Step::Enough) };
            let mut stored = vec![0; bytes as usize];
            self.checksums.read_at(checksum_file_bytes(at), &mut stored)?;
            for same in stored.as_chunks::<CHECKSUM>().0.chunk_by(|a, b| (*a == [0; CHECKSUM]) == (*b == [0; CHECKSUM]))
            {
                let run = ByteRange { offset: at, length: same.len() as u64 * BLOCK_BYTES };
                let step = if same[0] == [0; CHECKSUM] {
                    self.note_zero_checksums(found, run)?
                } else {
                    note(found, run.length, Allocation::Data)
                };
                if step == Step::Enough {
                    return Ok(step);
                }
                at = run.end();
            }
        }
        Ok(Step::On)
    }

    /// Notes blocks whose checksums are those of zeroes: holes where the image has some, else what they hold.
    fn note_zero_checksums(&mut self, found: &mut Vec<Extent>, blocks: ByteRange) -> io::Result<Step> {
        let mut at = blocks.offset;
        while at < blocks.end() {
            let rest = ByteRange { offset: at, length: blocks.end() - at };
            let allocated = self.image.allocated_in(rest)?.map(|a| a.aligned(BLOCK_BYTES));
            let hole_until = allocated.map_or(blocks.end(), |allocated| allocated.offset);
            if note(found, hole_until - at, Allocation::Hole) == Step::Enough {
                return Ok(Step::Enough);
            }
            let Some(allocated) = allocated else { break };
            if self.read_image(found, allocated)? == Step::Enough {
                return Ok(Step::Enough);
            }
            at = allocated.end();
        }
        Ok(Step::On)
    }

    /// Notes blocks by what they hold.
    fn read_image(&mut self, found: &mut Vec<Extent>, blocks: ByteRange) -> io::Result<Step> {
        let mut at = blocks.offset;
        while at < blocks.end() {
            let wanted = (blocks.end() - at).min(IMAGE_PART_BYTES);
            let taken = Budget::take(&mut self.budget.image_bytes, wanted, IMAGE_PART_BYTES);
            let Some(bytes) = taken else { return Ok(Step::Enough) };
            let mut held = vec![0; bytes as usize];
            self.image.read_at(at, &mut held)?;
            for block in held.chunks_exact(BLOCK) {
                let is_zero = block.iter().all(|byte| *byte == 0);
                let allocation = if is_zero { Allocation::Zeroes } else { Allocation::Data };
                if note(found, BLOCK_BYTES, allocation) == Step::Enough {
                    return Ok(Step::Enough);
                }
            }
            at += bytes;
        }
        Ok(Step::On)
    }
}

const CHECKSUM: usize = CHECKSUM_BYTES as usize;

/// The blocks of which any byte of the checksums lies in a range of their file.
fn blocks_of(checksums: ByteRange) -> ByteRange {
    let whole = checksums.aligned(CHECKSUM_BYTES);
    let blocks = |bytes: u64| bytes / CHECKSUM_BYTES * BLOCK_BYTES;
    ByteRange { offset: blocks(whole.offset), length: blocks(whole.length) }
}

/// Appends blocks, unless there are extents enough.
fn note(found: &mut Vec<Extent>, length: u64, allocation: Allocation) -> Step {
    if length > 0 {
        if found.len() == EXTENTS_MAX && found.last().is_some_and(|last| last.allocation != allocation) {
            return Step::Enough;
        }
        extents::push(found, Extent { length, allocation });
    }
    Step::On
}

/// Leaves out what lies before and behind the range that was asked for: `skipped` bytes and what is beyond `length` more.
fn clip(found: Vec<Extent>, mut skipped: u64, mut length: u64) -> Vec<Extent> {
    let mut clipped = Vec::with_capacity(found.len());
    for extent in found {
        let before = skipped.min(extent.length);
        skipped -= before;
        let inside = (extent.length - before).min(length);
        length -= inside;
        if inside > 0 {
            clipped.push(Extent { length: inside, ..extent });
        }
    }
    clipped
}

#[cfg(test)]
mod tests;
