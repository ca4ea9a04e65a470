//! Reading the journal after a stop or a crash: which records are in it, and whether any are damaged.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;
use protocol::{BLOCK_BYTES, Epoch, Seq};

use super::group::{ENTRY_HEADER_BYTES, Entry, EntryHeader, Salt};
use super::intents::Intents;
use super::ring::{Ring, Segment};
use super::{HEADER_BYTES, capacity_bytes};
use crate::disk::RawFile;
use crate::disk::aligned::AlignedBuffer;
use crate::superblock::{JournalTail, Superblock};

/// What the journal holds.
#[derive(Debug)]
pub struct Recovered {
    /// The ring with all records found.
    pub ring: Ring,
    /// The place of the last record found, or the one before the tail.
    pub last: Seq,
    /// The group of that record.
    pub last_group: Option<LastGroup>,
}

/// The group that was written last, of which alone it is not certain that all of it became durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastGroup {
    /// Its first record.
    pub first: Seq,
    /// Where it is in the ring.
    pub offset: u64,
}

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// It cannot be read.
    #[error("cannot read the journal: {0}")]
    Io(#[from] io::Error),
    /// Records that were durable are damaged.
    #[error("the journal is damaged at record {at}: records up to {until} were durable and cannot be read")]
    Damaged {
        /// The record that cannot be read.
        at: Seq,
        /// Up to here records are known to have been durable.
        until: Seq,
    },
    /// A record that is sound cannot be used.
    #[error("record {at} of the journal cannot be applied: {cause}")]
    Apply {
        /// Its place.
        at: Seq,
        /// Why.
        cause: io::Error,
    },
}

/// What a scan starts from.
#[derive(Clone, Copy, Debug)]
pub struct ScanStart {
    /// What the checksums of its records start from.
    pub salt: Salt,
    /// Bytes of the ring.
    pub capacity: u64,
    /// Where the superblock says that the journal starts.
    pub tail: JournalTail,
    /// Records up to here were durable for certain.
    pub durable_at_least: Seq,
    /// The replica was closed in good order: all of its records are checkpointed, so none behind can be missed.
    pub closed_in_good_order: bool,
    /// Later records do not count.
    pub end: Seq,
}

impl ScanStart {
    /// Where the scan of a replica with this superblock starts.
    #[must_use]
    pub fn of(superblock: &Superblock) -> ScanStart {
        let last_epoch = superblock.history.entries().last().map_or(Seq(0), |s| s.first_seq);
        let Superblock { views, stable, tracked_seq, unsettled_seq, .. } = superblock;
        // The last one before a log that was cut off was the last of a group that was whole, whatever came over it since.
        let known = [superblock.checkpoint.seq, views.seq, *stable, *tracked_seq, *unsettled_seq, last_epoch];
        ScanStart {
            salt: Salt::of(superblock.identity.uuid),
            capacity: capacity_bytes(superblock.identity.journal_bytes),
            tail: superblock.tail,
            durable_at_least: known.into_iter().fold(Seq(0), Seq::max),
            closed_in_good_order: superblock.clean,
            end: Seq(u64::MAX),
        }
    }
}

/// Reads all records from the tail on and hands each to `on_entry`, in order.
pub fn scan(
    file: &dyn RawFile,
    start: ScanStart,
    on_entry: &mut dyn FnMut(Entry) -> io::Result<()>,
) -> Result<Recovered, RecoverError> {
    let mut window = Window { salt: start.salt, file, capacity: start.capacity, offset: 0, bytes: Bytes::new() };
    let mut segments: VecDeque<Segment> = VecDeque::new();
    let mut intents = Intents::default();
    let mut next = start.tail.seq;
    let mut generation = start.tail.generation;
    let mut epoch = Epoch(0);
    let mut at = start.tail.offset;
    let mut scanned_bytes = 0;
    let mut last_group = None;
    while scanned_bytes <= start.capacity && next <= start.end {
        let after = After { seq: next, generation, epoch };
        let Some((offset, header, entry)) = next_record(&mut window, at, after)? else { break };
        (generation, epoch) = (header.generation, header.record.epoch);
        scanned_bytes += header.entry_bytes();
        at = offset + header.entry_bytes();
        if header.group_first == next {
            last_group = Some(LastGroup { first: next, offset });
        }
        let group_end = at.next_multiple_of(BLOCK_BYTES);
        match segments.back_mut() {
            Some(group) if header.group_first == group.first && offset < group.offset + group.bytes + BLOCK_BYTES => {
                group.bytes = group_end - group.offset;
                group.last = next;
            }
            Some(_) | None => {
                segments.push_back(Segment { offset, bytes: group_end - offset, first: next, last: next });
            }
        }
        let range = header.record.range();
        match entry.intent {
            Some(_) => intents.note(range, next),
            None => intents.note_change(range),
        }
        on_entry(entry).map_err(|cause| RecoverError::Apply { at: next, cause })?;
        next = next.next();
    }
    let last = Seq(next.0 - 1);
    if last < start.durable_at_least {
        return Err(RecoverError::Damaged { at: next, until: start.durable_at_least });
    }
    if !start.closed_in_good_order
        && let Some(until) = durable_behind(&mut window, next, generation)?
    {
        return Err(RecoverError::Damaged { at: next, until });
    }
    let write_offset = at.next_multiple_of(BLOCK_BYTES);
    Ok(Recovered { ring: Ring::new(start.capacity, segments, intents, write_offset), last, last_group })
}

/// Makes a group and what is packed behind it unfindable.
pub fn erase_group(file: &dyn RawFile, offset: u64) -> io::Result<()> {
    let mut nothing = AlignedBuffer::with_capacity(BLOCK_BYTES as usize);
    nothing.put(&[0; BLOCK_BYTES as usize]);
    file.write_durable_at(HEADER_BYTES + offset, nothing.as_slice())
}

/// What the next record is known by.
#[derive(Clone, Copy)]
struct After {
    seq: Seq,
    /// It has no lower one.
    generation: u64,
    /// Likewise.
    epoch: Epoch,
}

impl After {
    fn counts(&self, header: &EntryHeader) -> bool {
        header.record.seq == self.seq && header.generation >= self.generation && header.record.epoch >= self.epoch
    }
}

/// The next record, packed at `at`, at the next block, or at the start of the ring.
fn next_record(window: &mut Window<'_>, at: u64, after: After) -> io::Result<Option<(u64, EntryHeader, Entry)>> {
    let block = at.next_multiple_of(BLOCK_BYTES);
    let mut candidates = vec![at];
    if block != at {
        candidates.push(block);
    }
    if block != 0 {
        candidates.push(0);
    }
    for offset in candidates {
        let Some(bytes) = window.get(offset, ENTRY_HEADER_BYTES as u64)? else { continue };
        let header = EntryHeader::decode(window.salt, &bytes).filter(|header| after.counts(header));
        let Some(header) = header else { continue };
        let Some(body) = window.get(offset + ENTRY_HEADER_BYTES as u64, header.body_bytes())? else { continue };
        if let Some(entry) = header.with_body(body) {
            return Ok(Some((offset, header, entry)));
        }
    }
    Ok(None)
}

/// Looks for a group that was written after record `missing` had become durable; returns the last record that was
/// durable then.
fn durable_behind(window: &mut Window<'_>, missing: Seq, generation: u64) -> io::Result<Option<Seq>> {
    let mut found = None;
    let mut offset = 0;
    while let Some(bytes) = window.get(offset, ENTRY_HEADER_BYTES as u64)? {
        if let Some(entry) = EntryHeader::decode(window.salt, &bytes)
            && entry.generation >= generation
            && entry.group_first > missing
        {
            found = found.max(Some(Seq(entry.group_first.0 - 1)));
        }
        offset += BLOCK_BYTES;
    }
    Ok(found)
}

/// Reads the ring in large pieces.
struct Window<'a> {
    salt: Salt,
    file: &'a dyn RawFile,
    capacity: u64,
    offset: u64,
    bytes: Bytes,
}

const WINDOW_BYTES: u64 = 2 << 20;

impl Window<'_> {
    /// The bytes at `offset` of the ring; `None` if they would leave it.
    fn get(&mut self, offset: u64, length: u64) -> io::Result<Option<Bytes>> {
        if offset.checked_add(length).is_none_or(|end| end > self.capacity) {
            return Ok(None);
        }
        let held = self.offset..self.offset + self.bytes.len() as u64;
        if !(held.start <= offset && offset + length <= held.end) {
            let mut bytes = vec![0; length.max(WINDOW_BYTES).min(self.capacity - offset) as usize];
            self.file.read_at(HEADER_BYTES + offset, &mut bytes)?;
            (self.offset, self.bytes) = (offset, bytes.into());
        }
        let start = (offset - self.offset) as usize;
        Ok(Some(self.bytes.slice(start..start + length as usize)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::file::{Caching, SystemFile};
    use crate::journal::group::{encode, tests::SALT, tests::write};
    use protocol::Record;

    const CAPACITY: u64 = 256 * 1024;

    struct Journal {
        _dir: tempfile::TempDir,
        file: SystemFile,
        ring: Ring,
        end: Seq,
    }

    impl Journal {
        #[allow(clippy::disallowed_types, reason = "the test brings the file that the product is handed")]
        fn new() -> Journal {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("journal");
            std::fs::File::create(&path).unwrap().set_len(HEADER_BYTES + CAPACITY).unwrap();
            let file = SystemFile::open(&path, Caching::Buffered).unwrap();
            Journal { _dir: dir, file, ring: Ring::empty(CAPACITY), end: Seq(u64::MAX) }
        }

        /// Writes a group and returns its offset.
        fn append(&mut self, generation: u64, records: &[Record]) -> u64 {
            let bytes = encode(SALT, generation, records).unwrap();
            let (first, last) = (records[0].seq(), records[records.len() - 1].seq());
            let offset = self.ring.take(bytes.len() as u64, first, last).expect("room");
            self.file.write_at(HEADER_BYTES + offset, bytes.as_slice()).unwrap();
            offset
        }

        fn flip(&self, offset: u64) {
            let mut byte = [0];
            self.file.read_at(HEADER_BYTES + offset, &mut byte).unwrap();
            self.file.write_at(HEADER_BYTES + offset, &[byte[0] ^ 1]).unwrap();
        }

        fn scan_from(&self, offset: u64, seq: u64) -> Result<(Vec<u64>, Recovered), RecoverError> {
            let tail = JournalTail { offset, seq: Seq(seq), generation: 1 };
            let start = ScanStart {
                salt: SALT,
                capacity: CAPACITY,
                tail,
                durable_at_least: Seq(0),
                closed_in_good_order: false,
                end: self.end,
            };
            let mut found = Vec::new();
            let recovered = scan(&self.file, start, &mut |r| {
                found.push(r.record.seq().0);
                Ok(())
            })?;
            Ok((found, recovered))
        }
    }

    #[test]
    fn an_empty_journal_holds_nothing() {
        let (found, recovered) = Journal::new().scan_from(0, 1).unwrap();
        assert_eq!((found, recovered.last), (vec![], Seq(0)));
    }

    #[test]
    fn groups_are_found_over_the_end_of_the_ring() {
        let mut j = Journal::new();
        for seq in 1..=30 {
            if seq > 8 {
                j.ring.release_before(Seq(seq - 8));
            }
            j.append(1, &[write(seq, 20_000)]);
        }
        let (offset, first) = j.ring.tail_after(Seq(23), Seq(31));
        let (found, recovered) = j.scan_from(offset, first.0).unwrap();
        assert_eq!(found, (first.0..=30).collect::<Vec<_>>());
        let mut rings = (recovered.ring, j.ring.clone());
        rings.1.release_before(first);
        assert_eq!(rings.0.used_bytes(), rings.1.used_bytes());
        assert_eq!(rings.0.take(4096, Seq(31), Seq(31)), rings.1.take(4096, Seq(31), Seq(31)));
    }

    #[test]
    fn a_torn_last_group_ends_the_log_at_its_first_broken_record() {
        let mut j = Journal::new();
        j.append(1, &[write(1, 100)]);
        let group = j.append(1, &[write(2, 100), write(3, 9000), write(4, 100)]);
        j.flip(group + 5000);
        let (found, recovered) = j.scan_from(0, 1).unwrap();
        assert_eq!((found, recovered.last), (vec![1, 2], Seq(2)));
    }

    #[test]
    fn after_a_torn_tail_new_records_are_found_and_old_ones_are_not() {
        let mut j = Journal::new();
        let group = j.append(1, &[write(1, 100), write(2, 9000), write(3, 100)]);
        j.flip(group + 5000);
        let (_, recovered) = j.scan_from(0, 1).unwrap();
        j.ring = recovered.ring;
        // Record 2 comes again, shorter; the old record 3 still lies sound behind it.
        j.append(2, &[write(2, 50)]);
        let (found, _) = j.scan_from(0, 1).unwrap();
        assert_eq!(found, [1, 2]);
    }

    #[test]
    fn what_was_cut_off_is_not_found_again_whatever_comes_in_its_place() {
        let mut j = Journal::new();
        j.append(1, &[write(1, 100)]);
        let offset = j.append(1, &[write(2, 100), write(3, 100), write(4, 100)]);
        let (found, recovered) = j.scan_from(0, 1).unwrap();
        assert_eq!((found, recovered.last_group), (vec![1, 2, 3, 4], Some(LastGroup { first: Seq(2), offset })));
        j.end = Seq(1);
        let (found, recovered) = j.scan_from(0, 1).unwrap();
        assert_eq!((found, recovered.last), (vec![1], Seq(1)));
        j.end = Seq(u64::MAX);
        erase_group(&j.file, offset).unwrap();
        let (found, _) = j.scan_from(0, 1).unwrap();
        assert_eq!(found, [1]);
        // One record comes in its place; what was packed behind the first of those that were cut off is still there.
        j.ring = recovered.ring;
        j.append(2, &[write(2, 100)]);
        let (found, recovered) = j.scan_from(0, 1).unwrap();
        assert_eq!((found, recovered.last), (vec![1, 2], Seq(2)));
    }

    #[test]
    fn damage_before_a_later_group_is_an_error_and_not_the_end() {
        let mut j = Journal::new();
        j.append(1, &[write(1, 100)]);
        let group = j.append(1, &[write(2, 100), write(3, 100)]);
        j.append(1, &[write(4, 100)]);
        j.append(1, &[write(5, 100)]);
        j.flip(group + 90);
        let error = j.scan_from(0, 1).unwrap_err();
        assert!(matches!(error, RecoverError::Damaged { at: Seq(2), until: Seq(4) }), "{error}");
    }

    #[test]
    fn a_log_that_ends_before_the_checkpoint_is_damaged() {
        let mut j = Journal::new();
        let group = j.append(1, &[write(1, 100)]);
        j.flip(group);
        let tail = JournalTail { offset: 0, seq: Seq(1), generation: 1 };
        let start = ScanStart {
            salt: SALT,
            capacity: CAPACITY,
            tail,
            durable_at_least: Seq(1),
            closed_in_good_order: true,
            end: Seq(u64::MAX),
        };
        assert!(matches!(scan(&j.file, start, &mut |_| Ok(())), Err(RecoverError::Damaged { .. })));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_in_the_ring_are_survived(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..9000), at in 0u64..64) {
            let mut j = Journal::new();
            j.append(1, &[write(1, 5000), write(2, 100)]);
            j.file.write_at(HEADER_BYTES + at * 100, &bytes).unwrap();
            let _ = j.scan_from(0, 1);
        }
    }
}
