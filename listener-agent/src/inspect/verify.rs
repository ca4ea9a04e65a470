//! Comparing every block of a replica with its checksum, offline. Judges nothing that the journal is about to repair, and
//! changes nothing.

use std::fmt;
use std::io;
use std::path::Path;

use protocol::BLOCK_BYTES;
use protocol::ranges::ByteRange;
use serde::Serialize;

use super::{InspectError, Opened, open};
use crate::directory::JOURNAL;
use crate::image::{Image, checksum_file_bytes};
use crate::recovery::changed_since_checkpoint;

/// What is wrong with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// It does not match its checksum.
    Checksum,
    /// The disk reports an error for it, or for its checksum.
    Unreadable,
}

/// A bad block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct BadBlock {
    /// Its first byte in the volume.
    pub offset: u64,
    /// What is wrong with it.
    pub fault: Fault,
}

impl fmt::Display for BadBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BadBlock { offset, fault } = self;
        let block = offset / BLOCK_BYTES;
        match fault {
            Fault::Checksum => write!(f, "bad block at byte {offset} (block {block})"),
            Fault::Unreadable => write!(f, "unreadable block at byte {offset} (block {block})"),
        }
    }
}

/// What a verification found.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// Blocks looked at.
    pub blocks: u64,
    /// Blocks that the journal will write again at the next start, and that were therefore not judged.
    pub in_journal: u64,
    /// Blocks that are bad.
    pub bad: Vec<BadBlock>,
    /// Bytes that the checksum file has beyond those that are needed. A volume that grows has some until its next
    /// checkpoint; else somebody else made it longer.
    pub checksums_too_long_bytes: u64,
}

const CHUNK_BYTES: u64 = 1 << 20;

/// Compares every block of the replica in `dir` with its checksum; of what is no block of data in either file, nothing is
/// read. Of a replica that was not closed in good order every block that was changed since the last checkpoint may differ
/// from its checksum, which died with the process; its journal repairs these at the next start, and they are not judged.
/// `progress` is told bytes done and bytes in all.
pub fn verify(dir: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport, InspectError> {
    let opened = open(dir)?;
    let failed = |cause| InspectError::Image { path: dir.to_owned(), cause };
    // What the volume grew by since is in the journal.
    let size = opened.superblock.image_bytes;
    let needed = checksum_file_bytes(size);
    let checksum_bytes = opened.files.checksums.length().map_err(failed)?;
    let mut report = VerifyReport {
        blocks: size / BLOCK_BYTES,
        in_journal: 0,
        bad: Vec::new(),
        checksums_too_long_bytes: checksum_bytes - needed,
    };
    let image = Image::new(&opened.files);
    let changed = changed_since_checkpoint(&opened.files, &image, &opened.superblock)
        .map_err(|cause| InspectError::Journal { path: dir.join(JOURNAL), cause })?;
    let unjudged = Unjudged(changed);
    let mut offset = 0;
    while let Some(next) = next_data(&opened, ByteRange { offset, length: size - offset }).map_err(failed)? {
        let end = (next / CHUNK_BYTES + 1) * CHUNK_BYTES;
        let chunk = ByteRange { offset: next, length: end.min(size) - next };
        let is_good = |range| matches!(image.read_verified(range), Ok(Ok(_)));
        if unjudged.touches(chunk) || !is_good(chunk) {
            verify_blocks(&image, chunk, &unjudged, &mut report);
        }
        offset = chunk.end();
        progress(offset, size);
    }
    progress(size, size);
    Ok(report)
}

/// What the journal will write again at the next start.
struct Unjudged(Vec<ByteRange>);

impl Unjudged {
    fn touches(&self, range: ByteRange) -> bool {
        let next = self.0.get(self.0.partition_point(|r| r.end() <= range.offset));
        next.is_some_and(|r| r.overlaps(range))
    }
}

/// The first block of a range that takes space in the image, or whose checksum does. Those before are zeroes with the
/// checksum of zeroes.
fn next_data(opened: &Opened, rest: ByteRange) -> io::Result<Option<u64>> {
    let files = &opened.files;
    let in_image = files.image.allocated_in(rest)?.map(|range| range.offset);
    let checksums = ByteRange { offset: checksum_file_bytes(rest.offset), length: checksum_file_bytes(rest.length) };
    let in_checksums = files.checksums.allocated_in(checksums)?;
    let blocks_per_byte = BLOCK_BYTES / checksum_file_bytes(BLOCK_BYTES);
    let first = in_image.into_iter().chain(in_checksums.map(|range| range.offset * blocks_per_byte)).min();
    Ok(first.map(|offset| offset / BLOCK_BYTES * BLOCK_BYTES))
}

fn verify_blocks(image: &Image, chunk: ByteRange, unjudged: &Unjudged, report: &mut VerifyReport) {
    for offset in (chunk.offset..chunk.end()).step_by(BLOCK_BYTES as usize) {
        let block = ByteRange { offset, length: BLOCK_BYTES };
        if unjudged.touches(block) {
            report.in_journal += 1;
            continue;
        }
        match image.read_verified(block) {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => report.bad.push(BadBlock { offset, fault: Fault::Checksum }),
            Err(_) => report.bad.push(BadBlock { offset, fault: Fault::Unreadable }),
        }
    }
}
