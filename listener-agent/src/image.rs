//! The image and its checksums: applying records, reading with verification.
//!
//! The image holds the volume's bytes and nothing else, so that it can be mounted without nbdcast. Beside it lies one
//! checksum per 4 KiB block. Both are written through the page cache and become durable at a checkpoint; in between, the
//! journal can repair any block that was touched. Checksums are therefore kept in memory until then
//! ([`crate::disk::write_back`]), and die with the process, but for those that no journal has: of copies, and of blocks that
//! are known to be bad.
//!
//! Checksums are handed on, not made anew ([`crate::chain`]): what is applied must have the checksum of its record, and what
//! is read goes out with one that follows from those stored.
//!
//! **Invariant:** callers never apply to and read from the same block at the same time (see
//! [`crate::replica::Replica::next_apply`]); each block's bytes and checksum then always match unless the disk lied.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use protocol::checksum::stored_block_checksum;
use protocol::extents::Extent;
use protocol::message::{Copy, ReadKind, ReadOutcome};
use protocol::ranges::ByteRange;
use protocol::record::{Amended, RecordError};
use protocol::scrub::BlockFound;
use protocol::{BLOCK_BYTES, Record, RecordKind};

use crate::blocks;
use crate::chain::{self, Change, PartChange};
use crate::disk::write_back::WriteBack;
use crate::disk::{RawFile, ReplicaFiles};
use crate::extents::{Budget, Survey};

/// Bytes of a stored checksum.
pub(crate) const CHECKSUM_BYTES: u64 = 4;
const BLOCK: usize = BLOCK_BYTES as usize;
/// Pages of checksums kept in memory: 8 MiB, for 8 GiB of the image.
const CHECKSUM_PAGES_MAX: usize = 2048;

/// Bytes of the checksum file of a volume of `size_bytes`.
#[must_use]
pub fn checksum_file_bytes(size_bytes: u64) -> u64 {
    size_bytes / BLOCK_BYTES * CHECKSUM_BYTES
}

/// The checksums of whole blocks.
pub(crate) fn checksums_of(blocks: ByteRange) -> ByteRange {
    ByteRange { offset: checksum_file_bytes(blocks.offset), length: checksum_file_bytes(blocks.length) }
}

/// What a file can be long, and room to round.
const SIZE_BYTES_MAX: u64 = 1 << 62;

/// Whether a volume or a journal can have this size.
#[must_use]
pub fn is_size_allowed(bytes: u64) -> bool {
    (BLOCK_BYTES..=SIZE_BYTES_MAX).contains(&bytes) && bytes.is_multiple_of(BLOCK_BYTES)
}

/// Whether blocks can be trusted to match their checksums before they are changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// In service: a mismatch means that the disk lied, and must not be papered over.
    Verified,
    /// While the journal is replayed, and after an attempt that a full disk ended halfway: a block may be torn or older
    /// than its checksum, and the records repair it.
    InDoubt,
}

/// Bytes of the image whose blocks match their checksums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The bytes.
    pub data: Bytes,
    /// Their CRC-32, which follows from the stored checksums: if it is that of `data`, nothing changed since.
    pub crc: u32,
}

/// What is stored for a block that is known to be bad: nothing that it holds is to be believed until all of it is written,
/// whatever a crash leaves of image and checksums. A good block may have this checksum too; it is good if it matches.
const KNOWN_BAD: u32 = u32::MAX;

/// The image with its checksums.
#[derive(Clone)]
pub struct Image {
    image: Arc<dyn RawFile>,
    checksums: Arc<WriteBack>,
    /// A sync failed: the system may have thrown away what was written since the one before. The journal has it, and the
    /// replay after a restart repairs it; until then no block is called bad for that.
    sync_failed: Arc<AtomicBool>,
    syncing: Arc<Mutex<()>>,
}

impl Image {
    /// Works on the image and checksum files of a replica. Of two that do, one does not see all that the other did.
    #[must_use]
    pub fn new(files: &ReplicaFiles) -> Image {
        Image::of(files.image.clone(), files.checksums.clone())
    }

    /// As [`Image::new`], with nothing but the two files.
    pub(crate) fn of(image: Arc<dyn RawFile>, checksums: Arc<dyn RawFile>) -> Image {
        let checksums = Arc::new(WriteBack::new(checksums, CHECKSUM_PAGES_MAX));
        Image { image, checksums, sync_failed: Arc::default(), syncing: Arc::default() }
    }

    /// Makes room for a volume of `size_bytes`; durable after an [`Image::sync`]. Changes no byte that is there.
    pub fn extend(&self, size_bytes: u64) -> io::Result<()> {
        self.image.grow(size_bytes)?;
        self.checksums.grow(checksum_file_bytes(size_bytes))
    }

    /// Makes a volume of `from` bytes one of `to` bytes, the new ones zero: whatever lies there is of another history, or
    /// of nobody. Doing it again has the same effect.
    pub fn grow(&self, from: u64, to: u64) -> io::Result<()> {
        self.image.grow(to)?;
        self.checksums.grow(checksum_file_bytes(to))?;
        let length = to.saturating_sub(from);
        self.image.zero_range(from, length, false)?;
        self.checksums.zero_range(checksum_file_bytes(from), checksum_file_bytes(length), false)
    }

    /// Puts bytes that another replica holds: whole blocks, all zero if no data is given. No journal repairs them, so that
    /// they must outlive the process as they are. Bytes that are not those of the copy's checksum are refused.
    pub fn copy(&self, copy: &Copy) -> io::Result<()> {
        if copy.data.is_empty() {
            self.zero(copy.range, false, Trust::InDoubt)?;
        } else {
            let change = Change::of(copy.range.offset, &copy.data);
            if change.crc() != copy.crc {
                let text = format!("the bytes of copy {} do not match their checksum", copy.id);
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            self.write(copy.range.offset, &copy.data, change, Trust::InDoubt)?;
        }
        self.checksums.write_back_in(checksums_of(copy.range))
    }

    /// Hands to the system what is in memory alone. If there is no space for it, this can be tried again.
    pub fn write_back(&self) -> io::Result<()> {
        self.checksums.write_back()
    }

    /// Sees to it that a range of whole blocks can be written in place: there is space for it (see [`RawFile::reserve`]), and
    /// no block is known to be bad, nor would be after a crash. A replay could not tell whether one was found to be so before
    /// that or after it.
    pub fn reserve(&self, range: ByteRange) -> io::Result<()> {
        let stored = checksums_of(range);
        let (mut now, mut on_disk) = (vec![0; stored.length as usize], vec![0; stored.length as usize]);
        self.checksums.read_at(stored.offset, &mut now)?;
        self.checksums.read_written_at(stored.offset, &mut on_disk)?;
        if [now, on_disk].iter().any(|bytes| checksums_from(bytes).contains(&KNOWN_BAD)) {
            return Err(io::Error::other("a block is known to be bad"));
        }
        self.image.reserve(range)
    }

    /// Writes whole blocks that are nowhere in the journal, and makes them durable. They have no checksums before
    /// [`Image::put_checksums`].
    pub fn write_in_place<'a>(&self, writes: impl Iterator<Item = (u64, &'a Bytes)>) -> io::Result<()> {
        for (offset, data) in writes {
            self.image.write_soon_at(offset, data)?;
        }
        self.sync_with(|| self.image.sync())
    }

    /// Puts the stored checksums of the blocks from `offset` on, which hold what these are of.
    pub fn put_checksums(&self, offset: u64, stored: &[u32]) -> io::Result<()> {
        let bytes: Vec<u8> = stored.iter().flat_map(|checksum| checksum.to_le_bytes()).collect();
        self.checksums.write_at(offset / BLOCK_BYTES * CHECKSUM_BYTES, &bytes)
    }

    /// Whether the blocks from `offset` on hold what these stored checksums are of; their bytes if so.
    pub fn holds(&self, offset: u64, stored: &[u32]) -> Option<Bytes> {
        let mut bytes = vec![0; stored.len() * BLOCK];
        // Some errors pass.
        self.image.read_at(offset, &mut bytes).or_else(|_| self.image.read_at(offset, &mut bytes)).ok()?;
        let is_held =
            bytes.chunks_exact(BLOCK).zip(stored).all(|(block, stored)| stored_block_checksum(block) == *stored);
        is_held.then(|| bytes.into())
    }

    /// As [`Image::put_checksums`], of blocks that may have been found bad later: those keep that mark if they are.
    pub fn put_checksums_again(&self, offset: u64, stored: &[u32]) -> io::Result<()> {
        if self.stored(offset, stored.len())?.contains(&KNOWN_BAD) {
            return self.put_checksums_where_they_match(offset, stored);
        }
        self.put_checksums(offset, stored)
    }

    /// Of the blocks from `offset` on, gives those that hold what these stored checksums are of these checksums. The others
    /// keep theirs. Not durable before [`Image::write_back`] and [`Image::sync`].
    pub fn put_checksums_where_they_match(&self, offset: u64, stored: &[u32]) -> io::Result<()> {
        let blocks = (offset..).step_by(BLOCK).zip(stored);
        let mut matching = blocks.filter(|(at, stored)| self.holds(*at, &[**stored]).is_some());
        matching.try_for_each(|(at, stored)| self.put_checksums(at, &[*stored]))
    }

    /// Makes everything durable that was applied before the last [`Image::write_back`] began.
    pub fn sync(&self) -> io::Result<()> {
        self.sync_with(|| self.image.sync().and_then(|()| self.checksums.sync_written()))
    }

    fn sync_with(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        // The system tells of a loss once: whoever syncs at the same time, or later, must hear of it too.
        let _syncing = self.syncing.lock().expect("no thread panicked with the lock");
        if self.sync_failed.load(Ordering::SeqCst) {
            return Err(io::Error::other("a sync failed before"));
        }
        let outcome = sync();
        self.sync_failed.fetch_or(outcome.is_err(), Ordering::SeqCst);
        outcome
    }

    /// Applies a record. Applying it again has the same effect. What a resize does is [`Image::grow`]. A payload that is
    /// not that of the record's checksum changes nothing and is an error.
    pub fn apply(&self, record: &Record, trust: Trust) -> io::Result<()> {
        let header = &record.header;
        let trust = if self.sync_failed.load(Ordering::SeqCst) { Trust::InDoubt } else { trust };
        match header.kind {
            RecordKind::Write if header.amended => self.apply_amended(record, trust),
            RecordKind::Write => {
                let change = Change::of(header.offset, &record.payload);
                if change.crc() != header.payload_crc {
                    let cause = RecordError::PayloadChecksum { seq: header.seq };
                    return Err(io::Error::new(io::ErrorKind::InvalidData, cause));
                }
                self.write(header.offset, &record.payload, change, trust)
            }
            RecordKind::Trim => self.zero(header.range(), false, trust),
            RecordKind::WriteZeroes => self.zero(header.range(), header.no_hole, trust),
            RecordKind::EpochStart | RecordKind::ViewChange | RecordKind::DirtyChange | RecordKind::Resize => Ok(()),
        }
    }

    /// Blocks that no member could read any more are bad here, too.
    fn apply_amended(&self, record: &Record, trust: Trust) -> io::Result<()> {
        record.check_payload().map_err(|cause| io::Error::new(io::ErrorKind::InvalidData, cause))?;
        let Amended { blocks } = Amended::of(record).map_err(io::Error::other)?;
        blocks.iter().try_for_each(|(offset, bytes)| match bytes {
            Some(bytes) => self.write(*offset, bytes, Change::of(*offset, bytes), trust),
            None => self.mark_bad(*offset),
        })
    }

    /// Puts `data`, of which `change` says what it does to checksums. A block that it covers in part and that is bad stays
    /// as it is, known to be bad: what a part of it would hold is of no use, and might pass for good after a crash.
    fn write(&self, offset: u64, data: &[u8], change: Change, trust: Trust) -> io::Result<()> {
        let (mut from, mut to) = (offset, offset + data.len() as u64);
        let whole = ByteRange { offset, length: data.len() as u64 }.aligned(BLOCK_BYTES);
        let checksums = change.checksums(whole.offset, |edge, put| {
            let checksum = self.change_edge(edge, put, trust)?;
            if checksum.is_none() {
                self.mark_bad(edge)?;
                // The first block, or the last, or both in one.
                if edge <= from {
                    from = edge + BLOCK_BYTES;
                } else {
                    to = edge;
                }
            }
            io::Result::Ok(checksum.unwrap_or(KNOWN_BAD))
        })?;
        if from < to {
            self.image.write_at(from, &data[(from - offset) as usize..(to - offset) as usize])?;
        }
        self.put_checksums(whole.offset, &checksums)
    }

    /// The checksum of a block after it was changed in part, or `None` for one that is bad.
    fn change_edge(&self, edge: u64, put: &dyn Fn(&[u8]) -> PartChange, trust: Trust) -> io::Result<Option<u32>> {
        let mut block = [0; BLOCK];
        // Some errors pass; what a block held is given up only for one that does not.
        let read = self.image.read_at(edge, &mut block).or_else(|_| self.image.read_at(edge, &mut block));
        if read.is_err() {
            return Ok(None);
        }
        let PartChange { before, after } = put(&block);
        let stored = self.stored(edge, 1)?[0];
        let is_bad = match trust {
            Trust::Verified => stored != before,
            // Only what was found bad in service is known to be bad.
            Trust::InDoubt => stored == KNOWN_BAD && before != KNOWN_BAD,
        };
        Ok((!is_bad).then_some(after))
    }

    /// Makes it known, durably, that a block is bad: the journal cannot tell that when the process died.
    fn mark_bad(&self, block: u64) -> io::Result<()> {
        if self.stored(block, 1)?[0] == KNOWN_BAD {
            return Ok(());
        }
        let at = checksums_of(ByteRange { offset: block, length: BLOCK_BYTES });
        self.checksums.write_at(at.offset, &KNOWN_BAD.to_le_bytes())?;
        self.checksums.write_back_in(at)?;
        // A sync that finds no space has lost something all the same: it cannot be tried again.
        self.sync().map_err(io::Error::other)
    }

    fn zero(&self, range: ByteRange, keep_allocated: bool, trust: Trust) -> io::Result<()> {
        let inner_start = range.offset.next_multiple_of(BLOCK_BYTES);
        let inner_end = range.end() / BLOCK_BYTES * BLOCK_BYTES;
        if inner_start >= inner_end {
            return self.write_zeroes(range, trust); // less than two blocks
        }
        for (start, end) in [(range.offset, inner_start), (inner_end, range.end())] {
            if start < end {
                self.write_zeroes(ByteRange { offset: start, length: end - start }, trust)?;
            }
        }
        let inner = inner_end - inner_start;
        self.image.zero_range(inner_start, inner, keep_allocated)?;
        // The stored checksum of a block of zeroes is zero.
        let first = inner_start / BLOCK_BYTES * CHECKSUM_BYTES;
        self.checksums.zero_range(first, checksum_file_bytes(inner), true)
    }

    fn write_zeroes(&self, range: ByteRange, trust: Trust) -> io::Result<()> {
        let zeroes = vec![0; range.length as usize];
        self.write(range.offset, &zeroes, Change::of(range.offset, &zeroes), trust)
    }

    fn stored(&self, offset: u64, blocks: usize) -> io::Result<Vec<u32>> {
        let mut bytes = vec![0; blocks * CHECKSUM_BYTES as usize];
        self.checksums.read_at(offset / BLOCK_BYTES * CHECKSUM_BYTES, &mut bytes)?;
        Ok(checksums_from(&bytes))
    }

    /// The first block of a range of whole blocks that holds anything but zeroes, by its checksum. Looks at no more than
    /// the first 64 MiB.
    pub fn first_written(&self, range: ByteRange) -> io::Result<Option<ByteRange>> {
        let blocks = (range.length / BLOCK_BYTES).min(16 * 1024) as usize;
        let stored = self.stored(range.offset, blocks)?;
        let index = stored.iter().position(|checksum| *checksum != 0);
        Ok(index.map(|i| ByteRange { offset: range.offset + i as u64 * BLOCK_BYTES, length: BLOCK_BYTES }))
    }

    /// Tells of a range what is asked: its bytes, verified, or how it is kept; or has it read ahead, if the system does.
    #[must_use]
    pub fn read(&self, what: ReadKind, range: ByteRange) -> ReadOutcome {
        match what {
            ReadKind::Data => match self.read_verified(range) {
                Ok(Ok(Verified { data, crc })) => ReadOutcome::Data { data, crc },
                Ok(Err(offset)) => ReadOutcome::ChecksumMismatch { offset },
                Err(_) => self
                    .first_unreadable(range)
                    .map_or(ReadOutcome::Failed, |offset| ReadOutcome::Unreadable { offset }),
            },
            ReadKind::Extents => self.extents(range).map_or(ReadOutcome::Failed, ReadOutcome::Extents),
            ReadKind::Prefetch => {
                self.image.read_ahead(range);
                ReadOutcome::Prefetched
            }
            ReadKind::Scrub => self.scrub(range).map_or(ReadOutcome::Failed, ReadOutcome::Scrubbed),
        }
    }

    /// The bytes of a range, verified, if memory has it all; whatever else there is to say, [`Image::read`] says.
    #[must_use]
    pub fn read_cached(&self, range: ByteRange) -> Option<ReadOutcome> {
        let whole = range.aligned(BLOCK_BYTES);
        let mut blocks = vec![0; whole.length as usize];
        let mut stored = vec![0; checksum_file_bytes(whole.length) as usize];
        // Checksums first: they cost no call of the system.
        let has_all = self.checksums.read_cached_at(checksums_of(whole).offset, &mut stored)
            && self.image.read_cached_at(whole.offset, &mut blocks);
        let verified = has_all.then(|| verify(range, whole, blocks, &checksums_from(&stored)))?.ok()?;
        Some(ReadOutcome::Data { data: verified.data, crc: verified.crc })
    }

    /// What the disk holds of each block of a range of whole blocks. An error if the checksums cannot be read, or if blocks
    /// may be anything because a sync failed.
    fn scrub(&self, range: ByteRange) -> io::Result<Vec<BlockFound>> {
        let stored = self.stored(range.offset, (range.length / BLOCK_BYTES) as usize)?;
        let found = blocks::look_at(&*self.image, range, &stored);
        let is_sound = found.iter().all(|block| matches!(block, BlockFound::Sound { .. }));
        if !is_sound && self.sync_failed.load(Ordering::SeqCst) {
            return Err(io::Error::other("a sync failed before"));
        }
        Ok(found)
    }

    /// How a range is kept, from its first byte on: at least one extent, which may all end before the range does. Nothing
    /// is called zero that [`Image::read_verified`] would not read as zeroes.
    pub fn extents(&self, range: ByteRange) -> io::Result<Vec<Extent>> {
        Survey { image: &*self.image, checksums: &*self.checksums, budget: Budget::ANSWER }.of(range)
    }

    /// The first block of a range that the disk reports an error for.
    fn first_unreadable(&self, range: ByteRange) -> Option<u64> {
        let whole = range.aligned(BLOCK_BYTES);
        let mut block = [0; BLOCK];
        (whole.offset..whole.end()).step_by(BLOCK).find(|offset| self.image.read_at(*offset, &mut block).is_err())
    }

    /// The bytes of a range, or the offset of the first block that does not match its checksum.
    pub fn read_verified(&self, range: ByteRange) -> io::Result<Result<Verified, u64>> {
        let whole = range.aligned(BLOCK_BYTES);
        let mut blocks = vec![0; whole.length as usize];
        self.image.read_at(whole.offset, &mut blocks)?;
        let stored = self.stored(whole.offset, blocks.len() / BLOCK)?;
        Ok(verify(range, whole, blocks, &stored))
    }
}

fn checksums_from(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|c| u32::from_le_bytes(*c)).collect()
}

/// What of `blocks`, which are those of the range `whole`, lies in `range`, or the offset of the first block that does not
/// match its checksum.
fn verify(range: ByteRange, whole: ByteRange, blocks: Vec<u8>, stored: &[u32]) -> Result<Verified, u64> {
    let (at, length) = ((range.offset - whole.offset) as usize, range.length as usize);
    match chain::verify(&blocks, stored, at, length) {
        Ok(crc) => Ok(Verified { data: Bytes::from(blocks).slice(at..at + length), crc }),
        Err(index) => Err(whole.offset + index as u64 * BLOCK_BYTES),
    }
}

#[cfg(test)]
mod flip_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod unreadable_tests;
