//! The records that some member does not hold durably yet, in order. One copy serves all members: each reads on from
//! its own place, and a record is dropped when the last one has it.

use std::collections::VecDeque;

use protocol::ranges::ByteRange;
use protocol::{Record, RecordKind, Seq};

use super::Time;

#[derive(Debug)]
struct Entry {
    record: Record,
    queued_at: Time,
    /// Journal bytes of all records ever put in, this one included.
    bytes_until: u64,
}

/// The log.
#[derive(Debug)]
pub(super) struct Log {
    /// The record before the first entry.
    base: Seq,
    base_bytes: u64,
    entries: VecDeque<Entry>,
}

impl Log {
    /// An empty log that goes on after `base`.
    pub(super) fn new(base: Seq) -> Log {
        Log { base, base_bytes: 0, entries: VecDeque::new() }
    }

    /// The last record given out.
    pub(super) fn last(&self) -> Seq {
        Seq(self.base.0 + self.entries.len() as u64)
    }

    pub(super) fn push(&mut self, record: Record, now: Time) {
        assert!(record.seq() == self.last().next(), "records are given out in order");
        let bytes_until = self.bytes_until(self.last()) + record.header.journal_bytes_max();
        self.entries.push_back(Entry { record, queued_at: now, bytes_until });
    }

    fn entry(&self, seq: Seq) -> Option<&Entry> {
        let index = seq.0.checked_sub(self.base.0 + 1)?;
        self.entries.get(index as usize)
    }

    pub(super) fn get(&self, seq: Seq) -> Option<&Record> {
        self.entry(seq).map(|e| &e.record)
    }

    /// The first record after `seq` whose payload is not that of its checksum, of as many as have `bytes_max` of payload.
    pub(super) fn first_changed_after(&self, seq: Seq, bytes_max: usize) -> Option<Seq> {
        let mut left = bytes_max;
        let after = self.entries.iter().skip(seq.ahead_of(self.base) as usize).map(|e| &e.record);
        let mut checked = after.take_while(|record| {
            let is_within = left > 0;
            left = left.saturating_sub(record.payload.len());
            is_within
        });
        checked.find(|record| record.check_payload().is_err()).map(Record::seq)
    }

    /// Whether every record after `seq` is still here.
    pub(super) fn holds_all_after(&self, seq: Seq) -> bool {
        self.base <= seq && seq <= self.last()
    }

    pub(super) fn queued_at(&self, seq: Seq) -> Option<Time> {
        self.entry(seq).map(|e| e.queued_at)
    }

    /// Journal bytes of all records ever put in, up to `seq`; those forgotten count as one.
    pub(super) fn bytes_until(&self, seq: Seq) -> u64 {
        if seq <= self.base { self.base_bytes } else { self.entry(seq).map_or(self.base_bytes, |e| e.bytes_until) }
    }

    /// Journal bytes of the records after `from`, up to `to`.
    pub(super) fn bytes_between(&self, from: Seq, to: Seq) -> u64 {
        self.bytes_until(to).saturating_sub(self.bytes_until(from))
    }

    /// Journal bytes of everything in the log.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes_until(self.last()) - self.base_bytes
    }

    /// Forgets records up to `seq`.
    pub(super) fn trim(&mut self, seq: Seq) {
        while self.base < seq {
            let Some(entry) = self.entries.pop_front() else { break };
            self.base = self.base.next();
            self.base_bytes = entry.bytes_until;
        }
    }

    /// The ranges that records after `seq` change.
    pub(super) fn ranges_after(&self, seq: Seq) -> impl Iterator<Item = ByteRange> {
        let skip = seq.ahead_of(self.base) as usize;
        self.entries.iter().skip(skip).map(|e| e.record.header.range()).filter(|r| r.length > 0)
    }

    /// The last record after `seq` that a look at `range` has to come after: one that changes a byte of it, or that is of
    /// no range and may change what a replica is.
    pub(super) fn last_to_be_seen(&self, seq: Seq, range: ByteRange) -> Option<Seq> {
        let skip = (seq.ahead_of(self.base) as usize).min(self.entries.len());
        let is_seen = |e: &&Entry| match e.record.header.kind {
            RecordKind::Write | RecordKind::Trim | RecordKind::WriteZeroes => e.record.header.range().overlaps(range),
            RecordKind::EpochStart | RecordKind::ViewChange | RecordKind::DirtyChange | RecordKind::Resize => true,
        };
        self.entries.range(skip..).rev().find(is_seen).map(|e| e.record.seq())
    }

    /// The last record up to `until` that changes a byte of `range`.
    pub(super) fn last_change(&self, range: ByteRange, until: Seq) -> Option<Seq> {
        let take = until.ahead_of(self.base) as usize;
        let count = take.min(self.entries.len());
        let changed = self.entries.range(..count).rev().find(|e| e.record.header.range().overlaps(range));
        changed.map(|e| e.record.seq())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::{Epoch, Position};

    fn write(seq: u64, offset: u64) -> Record {
        let position = Position { epoch: Epoch(1), seq: Seq(seq) };
        Record::new(position, RecordKind::Write, ByteRange { offset, length: 4096 }, vec![0; 4096].into())
    }

    #[test]
    fn a_look_comes_after_what_changes_its_range_and_after_what_is_of_no_range() {
        let mut log = Log::new(Seq(10));
        let looked_at = ByteRange { offset: 4096, length: 4096 };
        log.push(write(11, 4096), Time::ZERO);
        log.push(write(12, 0), Time::ZERO);
        assert_eq!(log.last_to_be_seen(Seq(10), looked_at), Some(Seq(11)));
        assert_eq!(log.last_to_be_seen(Seq(11), looked_at), None, "it is behind that already");
        let position = Position { epoch: Epoch(1), seq: Seq(13) };
        let nowhere = ByteRange { offset: 0, length: 0 };
        log.push(Record::new(position, RecordKind::Resize, nowhere, vec![0; 8].into()), Time::ZERO);
        log.push(write(14, 8192), Time::ZERO);
        assert_eq!(log.last_to_be_seen(Seq(11), looked_at), Some(Seq(13)), "it may be of what the volume grew by");
        assert_eq!(log.last_to_be_seen(Seq(14), looked_at), None);
    }

    #[test]
    fn bytes_are_counted_between_any_two_places() {
        let mut log = Log::new(Seq(10));
        for seq in 11..=14 {
            log.push(write(seq, 0), Time::ZERO);
        }
        assert_eq!(log.bytes(), 4 * 8192);
        assert_eq!(log.bytes_between(Seq(12), Seq(14)), 2 * 8192);
        log.trim(Seq(12));
        assert_eq!((log.bytes(), log.last()), (2 * 8192, Seq(14)));
        assert!(log.holds_all_after(Seq(12)) && !log.holds_all_after(Seq(11)));
        log.trim(Seq(99));
        assert_eq!((log.bytes(), log.last()), (0, Seq(14)));
    }

    #[test]
    fn a_payload_that_changed_is_found_among_those_that_are_looked_at() {
        let mut log = Log::new(Seq(10));
        for seq in 11..=14 {
            let mut record = write(seq, 0);
            if seq == 13 {
                record.payload = vec![1; 4096].into();
            }
            log.push(record, Time::ZERO);
        }
        assert_eq!(log.first_changed_after(Seq(10), 1 << 20), Some(Seq(13)));
        assert_eq!(log.first_changed_after(Seq(12), 1), Some(Seq(13)));
        assert_eq!(log.first_changed_after(Seq(10), 8192), None);
        assert_eq!(log.first_changed_after(Seq(13), 1 << 20), None);
    }

    #[test]
    fn the_last_change_of_a_range_is_found_up_to_a_place() {
        let mut log = Log::new(Seq(0));
        log.push(write(1, 0), Time::ZERO);
        log.push(write(2, 8192), Time::ZERO);
        log.push(write(3, 0), Time::ZERO);
        let range = ByteRange { offset: 100, length: 10 };
        assert_eq!(log.last_change(range, Seq(3)), Some(Seq(3)));
        assert_eq!(log.last_change(range, Seq(2)), Some(Seq(1)));
        assert_eq!(log.last_change(ByteRange { offset: 4096, length: 4096 }, Seq(3)), None);
    }
}
