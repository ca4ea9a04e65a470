//! The image and its checksums: applying records, reading with verification.
//!
//! The image holds the volume's bytes and nothing else, so that it can be mounted without nbdcast. Beside it lies one
//! checksum per 4 KiB block. Both are written through the page cache and become durable at a checkpoint; in between, the
//! journal can repair any block that was touched. Checksums are therefore kept in memory until then
//! ([`crate::disk::write_back`]), and die with the process, but for those that no journal has: of copies, and of blocks that
//! are known to be bad.
//!
//! **Invariant:** callers never apply to and read from the same block at the same time (see
//! [`crate::replica::Replica::next_apply`]); each block's bytes and checksum then always match unless the disk lied.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use protocol::checksum::{crc32, stored_block_checksum};
use protocol::extents::Extent;
use protocol::message::{Copy, ReadKind, ReadOutcome};
use protocol::ranges::ByteRange;
use protocol::{BLOCK_BYTES, Record, RecordKind};

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

/// What was found of blocks that a write covers in part.
struct Edges {
    /// Those that are bad, and stay so.
    broken: Vec<u64>,
    /// Of some the disk reports an error.
    is_unreadable: bool,
}

/// The image with its checksums.
#[derive(Clone)]
pub struct Image {
    image: Arc<dyn RawFile>,
    checksums: Arc<WriteBack>,
    /// A sync failed: the system may have thrown away what was written since the one before. The journal has it, and the
    /// replay after a restart repairs it; until then no block is called bad for that.
    sync_failed: Arc<AtomicBool>,
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
        Image { image, checksums, sync_failed: Arc::default() }
    }

    /// Makes room for a volume of `size_bytes`, durably. Changes no byte that is there.
    pub fn extend(&self, size_bytes: u64) -> io::Result<()> {
        self.image.grow(size_bytes)?;
        self.checksums.grow(checksum_file_bytes(size_bytes))?;
        self.sync()
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
    /// they must outlive the process as they are.
    pub fn copy(&self, copy: &Copy) -> io::Result<()> {
        if copy.data.is_empty() {
            self.zero(copy.range, false, Trust::InDoubt)?;
        } else {
            self.write(copy.range.offset, &copy.data, Trust::InDoubt)?;
        }
        self.checksums.write_back_in(checksums_of(copy.range))
    }

    /// Hands to the system what is in memory alone. If there is no space for it, this can be tried again.
    pub fn write_back(&self) -> io::Result<()> {
        self.checksums.write_back()
    }

    /// Makes everything durable that was applied before the last [`Image::write_back`] began.
    pub fn sync(&self) -> io::Result<()> {
        let outcome = self.image.sync().and_then(|()| self.checksums.sync_written());
        self.sync_failed.fetch_or(outcome.is_err(), Ordering::SeqCst);
        outcome
    }

    /// Applies a record. Applying it again has the same effect. What a resize does is [`Image::grow`].
    pub fn apply(&self, record: &Record, trust: Trust) -> io::Result<()> {
        let header = &record.header;
        let trust = if self.sync_failed.load(Ordering::SeqCst) { Trust::InDoubt } else { trust };
        match header.kind {
            RecordKind::Write => self.write(header.offset, &record.payload, trust),
            RecordKind::Trim => self.zero(header.range(), false, trust),
            RecordKind::WriteZeroes => self.zero(header.range(), header.no_hole, trust),
            RecordKind::EpochStart | RecordKind::ViewChange | RecordKind::DirtyChange | RecordKind::Resize => Ok(()),
        }
    }

    fn write(&self, offset: u64, data: &[u8], trust: Trust) -> io::Result<()> {
        let range = ByteRange { offset, length: data.len() as u64 };
        let whole = range.aligned(BLOCK_BYTES);
        if whole == range {
            let checksums: Vec<u8> =
                data.chunks_exact(BLOCK).flat_map(|b| stored_block_checksum(b).to_le_bytes()).collect();
            self.image.write_at(offset, data)?;
            return self.checksums.write_at(offset / BLOCK_BYTES * CHECKSUM_BYTES, &checksums);
        }
        let mut blocks = vec![0; whole.length as usize];
        let at = (offset - whole.offset) as usize;
        let Edges { broken, is_unreadable } = self.load_edges(&mut blocks, whole, range, trust)?;
        blocks[at..at + data.len()].copy_from_slice(data);
        if is_unreadable {
            // A part of such a block cannot be written, and written whole it can be read again: it must be known to be bad
            // before, whatever happens in between.
            self.store_checksums(whole.offset, &blocks, &broken)?;
            self.checksums.sync_written()?;
            return self.image.write_at(whole.offset, &blocks);
        }
        self.image.write_at(offset, data)?;
        self.store_checksums(whole.offset, &blocks, &broken)
    }

    /// Fills the first and the last block, where `range` covers them only in part; one that cannot be read, with zeroes.
    fn load_edges(&self, blocks: &mut [u8], whole: ByteRange, range: ByteRange, trust: Trust) -> io::Result<Edges> {
        let mut found = Edges { broken: Vec::new(), is_unreadable: false };
        let mut edges = Vec::new();
        if range.offset != whole.offset {
            edges.push(whole.offset);
        }
        let last = whole.end() - BLOCK_BYTES;
        if range.end() != whole.end() && !edges.contains(&last) {
            edges.push(last);
        }
        for edge in edges {
            let at = (edge - whole.offset) as usize;
            let block = &mut blocks[at..at + BLOCK];
            // Some errors pass; what a block held besides is given up only for one that does not.
            if self.image.read_at(edge, block).or_else(|_| self.image.read_at(edge, block)).is_err() {
                block.fill(0);
                found.broken.push(edge);
                found.is_unreadable = true;
                continue;
            }
            let (stored, checksum) = (self.stored(edge, 1)?[0], stored_block_checksum(block));
            let is_broken = match trust {
                Trust::Verified => stored != checksum,
                // Only what was found bad in service is known to be bad; see `store_checksums`.
                Trust::InDoubt => stored == !checksum,
            };
            if is_broken {
                found.broken.push(edge);
            }
        }
        Ok(found)
    }

    fn store_checksums(&self, offset: u64, blocks: &[u8], broken: &[u64]) -> io::Result<()> {
        let checksums: Vec<u8> = blocks
            .chunks_exact(BLOCK)
            .zip((offset..).step_by(BLOCK))
            .flat_map(|(block, at)| {
                let checksum = stored_block_checksum(block);
                // A block that was bad before a partial write is still bad after it: keep it from passing, also
                // through a replay, which knows it again by this very value.
                let kept = if broken.contains(&at) { !checksum } else { checksum };
                kept.to_le_bytes()
            })
            .collect();
        let range = checksums_of(ByteRange { offset, length: blocks.len() as u64 });
        self.checksums.write_at(range.offset, &checksums)?;
        // The journal cannot tell which blocks were bad when the process died.
        if broken.is_empty() { Ok(()) } else { self.checksums.write_back_in(range) }
    }

    fn zero(&self, range: ByteRange, keep_allocated: bool, trust: Trust) -> io::Result<()> {
        let inner_start = range.offset.next_multiple_of(BLOCK_BYTES);
        let inner_end = range.end() / BLOCK_BYTES * BLOCK_BYTES;
        if inner_start >= inner_end {
            let zeroes = vec![0; range.length as usize]; // less than two blocks
            return self.write(range.offset, &zeroes, trust);
        }
        for (start, end) in [(range.offset, inner_start), (inner_end, range.end())] {
            if start < end {
                self.write(start, &vec![0; (end - start) as usize], trust)?;
            }
        }
        let inner = inner_end - inner_start;
        self.image.zero_range(inner_start, inner, keep_allocated)?;
        // The stored checksum of a block of zeroes is zero.
        let first = inner_start / BLOCK_BYTES * CHECKSUM_BYTES;
        self.checksums.zero_range(first, checksum_file_bytes(inner), true)
    }

    fn stored(&self, offset: u64, blocks: usize) -> io::Result<Vec<u32>> {
        let mut bytes = vec![0; blocks * CHECKSUM_BYTES as usize];
        self.checksums.read_at(offset / BLOCK_BYTES * CHECKSUM_BYTES, &mut bytes)?;
        Ok(bytes.as_chunks().0.iter().map(|c| u32::from_le_bytes(*c)).collect())
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
                Ok(Ok(data)) => {
                    let crc = crc32(&data);
                    ReadOutcome::Data { data, crc }
                }
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
        }
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
    pub fn read_verified(&self, range: ByteRange) -> io::Result<Result<Bytes, u64>> {
        let whole = range.aligned(BLOCK_BYTES);
        let mut blocks = vec![0; whole.length as usize];
        self.image.read_at(whole.offset, &mut blocks)?;
        let stored = self.stored(whole.offset, blocks.len() / BLOCK)?;
        let mismatch = blocks.chunks_exact(BLOCK).zip(&stored).position(|(b, s)| stored_block_checksum(b) != *s);
        if let Some(index) = mismatch {
            return Ok(Err(whole.offset + index as u64 * BLOCK_BYTES));
        }
        let at = (range.offset - whole.offset) as usize;
        Ok(Ok(Bytes::from(blocks).slice(at..at + range.length as usize)))
    }
}

#[cfg(test)]
mod unreadable_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::file::{Caching, SystemFile};
    use protocol::{Epoch, Position, Seq};

    const SIZE: u64 = 1 << 20;

    struct Fixture {
        dir: tempfile::TempDir,
        image: Image,
    }

    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in [("i", SIZE), ("c", checksum_file_bytes(SIZE))] {
            std::fs::File::create(dir.path().join(name)).unwrap().set_len(bytes).unwrap();
        }
        Fixture { image: open(&dir), dir }
    }

    fn open(dir: &tempfile::TempDir) -> Image {
        let open = |name| Arc::new(SystemFile::open(&dir.path().join(name), Caching::Buffered).unwrap());
        Image::of(open("i"), open("c"))
    }

    /// The process dies, and another comes.
    fn die(f: Fixture) -> Fixture {
        Fixture { image: open(&f.dir), dir: f.dir }
    }

    fn record(kind: RecordKind, offset: u64, length: u64, payload: Vec<u8>) -> Record {
        Record::new(Position { epoch: Epoch(1), seq: Seq(1) }, kind, ByteRange { offset, length }, payload.into())
    }

    fn write(offset: u64, data: &[u8]) -> Record {
        record(RecordKind::Write, offset, data.len() as u64, data.to_vec())
    }

    fn read(f: &Fixture, offset: u64, length: u64) -> Bytes {
        f.image.read_verified(ByteRange { offset, length }).unwrap().expect("checksums match")
    }

    #[test]
    fn writes_of_any_alignment_are_read_back_and_match_their_checksums() {
        let f = fixture();
        let mut model = vec![0; SIZE as usize];
        for (offset, length) in [(0, 4096), (512, 1024), (4095, 2), (8192, 12288), (5000, 9001), (SIZE - 1, 1)] {
            let data = vec![(offset % 251) as u8 + 1; length as usize];
            f.image.apply(&write(offset, &data), Trust::Verified).unwrap();
            model[offset as usize..][..data.len()].copy_from_slice(&data);
        }
        assert_eq!(read(&f, 0, SIZE), model);
        assert_eq!(read(&f, 4095, 2), model[4095..4097]);
    }

    #[test]
    fn zeroed_ranges_read_as_zeroes_to_the_byte() {
        for kind in [RecordKind::Trim, RecordKind::WriteZeroes] {
            let f = fixture();
            f.image.apply(&write(0, &vec![7; SIZE as usize]), Trust::Verified).unwrap();
            let mut model = vec![7; SIZE as usize];
            for (offset, length) in [(100, 50), (4000, 200), (10_000, 20_000), (40_960, 8192)] {
                f.image.apply(&record(kind, offset, length, vec![]), Trust::Verified).unwrap();
                model[offset as usize..(offset + length) as usize].fill(0);
            }
            assert_eq!(read(&f, 0, SIZE), model);
        }
    }

    #[test]
    fn copies_are_whole_blocks_or_zeroes_and_heal_a_bad_block() {
        let f = fixture();
        f.image.apply(&write(0, &[1; 16_384]), Trust::Verified).unwrap();
        f.image.image.write_at(5000, &[9]).unwrap();
        let copy = |offset, length, data: &[u8]| {
            let data = Bytes::copy_from_slice(data);
            f.image.copy(&Copy { id: 1, range: ByteRange { offset, length }, data }).unwrap();
        };
        copy(4096, 4096, &[2; 4096]);
        copy(8192, 8192, &[]);
        assert_eq!(read(&f, 4000, 5000), [&[1; 96][..], &[2; 4096], &[0; 808]].concat());
    }

    #[test]
    fn what_a_volume_grows_by_is_zero_whatever_lay_there() {
        let f = fixture();
        f.image.apply(&write(0, &[1; 3 << 18]), Trust::Verified).unwrap();
        f.image.grow(SIZE / 2, 2 * SIZE).unwrap();
        assert_eq!(read(&f, SIZE / 2 - 1, 2), [1, 0][..]);
        assert!(read(&f, SIZE / 2, SIZE / 2).iter().all(|byte| *byte == 0));
        assert!(read(&f, SIZE, SIZE).iter().all(|byte| *byte == 0));
        f.image.extend(SIZE).unwrap();
        assert_eq!(f.image.image.length().unwrap(), 2 * SIZE);
    }

    #[test]
    fn a_flipped_bit_is_named_and_a_partial_write_does_not_hide_it() {
        let f = fixture();
        f.image.apply(&write(0, &[1; 8192]), Trust::Verified).unwrap();
        f.image.image.write_at(5000, &[9]).unwrap();
        let all = ByteRange { offset: 0, length: 8192 };
        assert_eq!(f.image.read(ReadKind::Data, all), ReadOutcome::ChecksumMismatch { offset: 4096 });
        f.image.apply(&write(4096, &[2; 512]), Trust::Verified).unwrap();
        assert_eq!(f.image.read(ReadKind::Data, all), ReadOutcome::ChecksumMismatch { offset: 4096 });
        f.image.apply(&write(4096, &[2; 4096]), Trust::Verified).unwrap();
        assert!(matches!(f.image.read(ReadKind::Data, all), ReadOutcome::Data { .. }));
    }

    #[test]
    fn a_replay_does_not_make_a_block_good_that_was_found_bad() {
        let f = fixture();
        f.image.apply(&write(0, &[1; 8192]), Trust::Verified).unwrap();
        f.image.image.write_at(5000, &[9]).unwrap();
        let all = ByteRange { offset: 0, length: 8192 };
        let partial = [write(4096, &[2; 512]), write(6000, &[3; 512])];
        for trust in [Trust::Verified, Trust::InDoubt] {
            for record in &partial {
                f.image.apply(record, trust).unwrap();
            }
            assert_eq!(f.image.read(ReadKind::Data, all), ReadOutcome::ChecksumMismatch { offset: 4096 }, "{trust:?}");
        }
        f.image.apply(&write(4096, &[2; 4096]), Trust::InDoubt).unwrap();
        assert!(matches!(f.image.read(ReadKind::Data, all), ReadOutcome::Data { .. }));
    }

    #[test]
    fn checksums_of_records_die_with_the_process_unless_they_were_written_back() {
        let all = ByteRange { offset: 0, length: 8192 };
        for is_written_back in [false, true] {
            let f = fixture();
            let record = write(0, &[1; 8192]);
            f.image.apply(&record, Trust::Verified).unwrap();
            if is_written_back {
                f.image.write_back().unwrap();
            }
            let f = die(f);
            assert_eq!(f.image.read_verified(all).unwrap().is_ok(), is_written_back);
            f.image.apply(&record, Trust::InDoubt).unwrap();
            assert_eq!(read(&f, 0, 8192), [1; 8192][..], "the journal brings them back");
        }
    }

    #[test]
    fn what_no_journal_knows_outlives_the_process() {
        let f = fixture();
        f.image.apply(&write(0, &[1; 65_536]), Trust::Verified).unwrap();
        f.image.write_back().unwrap();
        f.image.image.write_at(5000, &[9]).unwrap();
        let partial = write(4096, &[2; 512]);
        f.image.apply(&partial, Trust::Verified).unwrap();
        let data = Bytes::from(vec![3; 8192]);
        f.image.copy(&Copy { id: 1, range: ByteRange { offset: 8192, length: 8192 }, data }).unwrap();
        f.image.copy(&Copy { id: 2, range: ByteRange { offset: 20_480, length: 4096 }, data: Bytes::new() }).unwrap();

        let f = die(f);
        assert_eq!(read(&f, 8192, 16_384), [&[3; 8192][..], &[1; 4096], &[0; 4096]].concat(), "copies");
        for _ in 0..2 {
            let bad = f.image.read_verified(ByteRange { offset: 4096, length: 4096 }).unwrap();
            assert_eq!(bad, Err(4096), "a block that was found bad is known to be, also to a replay");
            f.image.apply(&partial, Trust::InDoubt).unwrap();
        }
    }
}
