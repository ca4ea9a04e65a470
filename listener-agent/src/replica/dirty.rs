//! What a member keeps of the replicas out of the view: which parts of the volume they lack. A function of the durable
//! log alone, so that every member comes to the same account.
//!
//! One bit per [`DIRTY_UNIT_BYTES`] in three planes: what is *to be copied*, and what *recent* and *older* records
//! changed, which the replica gets as records but may lose again if it fails before they are durable there.
//!
//! On disk the account is as of one record, that of the last checkpoint; the journal holds all records after it. Pages
//! have two places each, and a checkpoint writes the one that the superblock in force does not count on.
//!
//! **Invariant:** a unit that a replica lacks is marked in some plane; one too many costs a copy, one too few loses data.

use std::collections::BTreeMap;
use std::ops::Range;

use protocol::cursor::Malformed;
use protocol::message::Dirty;
use protocol::ranges::{ByteRange, DIRTY_UNIT_BYTES};
use protocol::record::{DirtyChange, DirtyStep, Resize, ViewChange};
use protocol::{Record, RecordKind, ReplicaName, Seq};

use crate::journal::group::Salt;
use crate::superblock::{Superblock, TRACKED_MAX, TrackedHeader};
use entry::{Entry, outside, units_in};
use page::{Found, PAGE_BYTES, Page, PageKey, Plane, UNITS_PER_PAGE};

mod entry;
pub mod page;
#[cfg(test)]
mod tests;

/// Bytes of the volume that one page speaks of.
const PAGE_COVERS_BYTES: u64 = UNITS_PER_PAGE as u64 * DIRTY_UNIT_BYTES;
/// Places of a page.
pub const COPIES: u64 = 2;

/// Where a copy of a page lies in the file, bytes.
#[must_use]
pub fn page_offset(slot: u8, index: u64, copy: u64) -> u64 {
    ((index * TRACKED_MAX as u64 + u64::from(slot)) * COPIES + copy) * PAGE_BYTES as u64
}

/// A page to write to the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPage {
    /// Where.
    pub offset: u64,
    /// The page.
    pub bytes: Vec<u8>,
}

/// Figures of one replica out of the view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyCount {
    /// The replica.
    pub name: ReplicaName,
    /// It is known to hold everything up to here.
    pub acknowledged: Seq,
    /// What would have to be copied if it came back now, bytes.
    pub dirty_bytes: u64,
}

/// The account of all replicas out of the view.
#[derive(Clone, Debug)]
pub struct DirtyMaps {
    /// The replica whose disk this is. It keeps no account of itself.
    own: ReplicaName,
    salt: Salt,
    size_bytes: u64,
    entries: BTreeMap<ReplicaName, Entry>,
    /// Of each page, by slot and index, the copy that the superblock in force counts on.
    counted_on: BTreeMap<(u8, u64), u64>,
    /// The copies that are being written.
    writing: Vec<(u8, u64, u64)>,
}

/// What a superblock says of replicas of which nothing is known but what they acknowledged, as of the record `id`.
#[must_use]
pub fn unknown(tracked: &[(ReplicaName, Seq)], id: Seq, generation: u64, size_bytes: u64) -> Vec<TrackedHeader> {
    let solid = ByteRange { offset: 0, length: units_in(size_bytes) * DIRTY_UNIT_BYTES };
    let header = |(slot, (name, acknowledged)): (u8, &(ReplicaName, Seq))| TrackedHeader {
        name: name.clone(),
        slot,
        id,
        generation,
        acknowledged: *acknowledged,
        rotated_at: id,
        solid,
    };
    (0..).zip(tracked).map(header).collect()
}

impl DirtyMaps {
    /// The account as the superblock has it; its pages follow by [`DirtyMaps::restore`].
    #[must_use]
    pub fn of(superblock: &Superblock) -> DirtyMaps {
        let entry = |h: &TrackedHeader| {
            let mut entry = Entry::new(h.slot, h.id, h.generation, h.acknowledged);
            entry.rotated_at = h.rotated_at;
            entry.solid = h.solid.offset / DIRTY_UNIT_BYTES..h.solid.end() / DIRTY_UNIT_BYTES;
            (h.name.clone(), entry)
        };
        DirtyMaps {
            own: superblock.identity.replica.clone(),
            salt: Salt::of(superblock.identity.uuid),
            size_bytes: superblock.identity.size_bytes,
            entries: superblock.tracked.iter().map(entry).collect(),
            counted_on: BTreeMap::new(),
            writing: Vec::new(),
        }
    }

    /// The pages to be read back, by slot and index.
    #[must_use]
    pub fn pages(&self) -> Vec<(u8, u64)> {
        let count = self.size_bytes.div_ceil(PAGE_COVERS_BYTES);
        let mut slots: Vec<u8> = self.entries.values().map(|e| e.slot).collect();
        slots.sort_unstable();
        (0..count).flat_map(|index| slots.iter().map(move |slot| (*slot, index))).collect()
    }

    /// Takes back what lies in the two places of a page, as of `seq`.
    pub fn restore(&mut self, slot: u8, index: u64, copies: [&[u8]; 2], seq: Seq) {
        let Some(entry) = self.entries.values_mut().find(|e| e.slot == slot) else { return };
        let mut broken = None;
        let mut best: Option<(Seq, u64, Box<Page>)> = None;
        for (copy, bytes) in (0..).zip(copies) {
            match Page::decode(self.salt, slot, index, bytes) {
                Found::Blank => {}
                Found::Broken => broken = Some(copy),
                Found::Whole(key, page) => {
                    let counts = key.id == entry.id && key.generation == entry.generation && key.seq <= seq;
                    if counts && best.as_ref().is_none_or(|(best, ..)| *best < key.seq) {
                        best = Some((key.seq, copy, page));
                    }
                }
            }
        }
        if let Some((_, copy, page)) = best {
            self.counted_on.insert((slot, index), copy);
            if !page.is_empty() {
                entry.pages.insert(index, page);
            }
        }
        if let Some(copy) = broken {
            // It may be the later one, and what it said is not known.
            self.counted_on.insert((slot, index), 1 - copy);
            let first = index * UNITS_PER_PAGE as u64;
            let total = units_in(self.size_bytes);
            let units = first..(first + UNITS_PER_PAGE as u64).min(total);
            for part in outside(&units, &entry.solid) {
                entry.set(Plane::ToCopy, &part);
            }
            // It may have marked records that are on their way to the replica; such marks outlast the copying.
            entry.set(Plane::Recent, &units);
            entry.changed.insert(index);
        }
    }

    /// Size of the volume, bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The replicas, and up to where each holds everything.
    #[must_use]
    pub fn acknowledged(&self) -> Vec<(ReplicaName, Seq)> {
        self.entries.iter().map(|(name, entry)| (name.clone(), entry.acknowledged)).collect()
    }

    /// What a superblock says of the replicas now.
    #[must_use]
    pub fn headers(&self) -> Vec<TrackedHeader> {
        self.entries.iter().map(|(name, entry)| entry.header(name)).collect()
    }

    /// The units of a range, as far as it lies in the volume.
    fn units_of(&self, range: ByteRange) -> Range<u64> {
        let start = range.offset.min(self.size_bytes) / DIRTY_UNIT_BYTES;
        let end = units_in(range.end().min(self.size_bytes));
        if range.length == 0 || range.offset >= self.size_bytes { 0..0 } else { start..end }
    }

    /// Brings the account up to the next durable record. `generation` is that of the replica.
    pub fn note(&mut self, record: &Record, generation: u64) -> Result<(), Malformed> {
        let seq = record.seq();
        match record.header.kind {
            RecordKind::Write | RecordKind::Trim | RecordKind::WriteZeroes if !self.entries.is_empty() => {
                let units = self.units_of(record.header.range());
                for entry in self.entries.values_mut() {
                    entry.set(Plane::Recent, &units);
                }
            }
            RecordKind::Write | RecordKind::Trim | RecordKind::WriteZeroes | RecordKind::EpochStart => {}
            RecordKind::ViewChange => self.note_view(&ViewChange::decode(&record.payload)?, seq, generation),
            RecordKind::DirtyChange => self.note_step(DirtyChange::decode(&record.payload)?, seq, generation),
            RecordKind::Resize => self.size_bytes = self.size_bytes.max(Resize::decode(&record.payload)?.size_bytes),
        }
        Ok(())
    }

    fn note_view(&mut self, change: &ViewChange, seq: Seq, generation: u64) {
        if change.view.contains(&change.subject) {
            self.entries.remove(&change.subject);
        } else if change.subject != self.own {
            self.make(change.subject.clone(), seq, generation, change.acknowledged);
            self.copy_ranges(&change.subject, &change.unacknowledged);
        }
    }

    fn note_step(&mut self, change: DirtyChange, seq: Seq, generation: u64) {
        if change.subject == self.own {
            return;
        }
        match change.step {
            DirtyStep::Follow { ranges } => {
                if let Some(entry) = self.entries.get_mut(&change.subject) {
                    entry.follow(seq);
                    self.copy_ranges(&change.subject, &ranges);
                } else {
                    self.make(change.subject.clone(), seq, generation, Seq(0));
                    self.copy_ranges(&change.subject, &[ByteRange { offset: 0, length: u64::MAX }]);
                }
            }
            DirtyStep::Copied { until, followed } => {
                let total = units_in(self.size_bytes);
                let below = if until >= self.size_bytes { total } else { until / DIRTY_UNIT_BYTES };
                if let Some(entry) = self.entries.get_mut(&change.subject) {
                    entry.copied(below, followed, seq);
                }
            }
            DirtyStep::Forget => _ = self.entries.remove(&change.subject),
        }
    }

    /// Makes an entry, in place of the one that may be there.
    fn make(&mut self, name: ReplicaName, id: Seq, generation: u64, acknowledged: Seq) {
        let before = self.entries.remove(&name).map(|entry| entry.slot);
        if self.entries.len() == TRACKED_MAX {
            // All of the volume is copied to one that nothing is kept of.
            let oldest = self.entries.iter().min_by_key(|(name, entry)| (entry.id, (*name).clone()));
            let oldest = oldest.map(|(name, _)| name.clone()).expect("the table is full");
            self.entries.remove(&oldest);
        }
        let is_free = |slot: &u8| self.entries.values().all(|entry| entry.slot != *slot);
        let slot = before.unwrap_or_else(|| (0..).find(is_free).expect("an entry was made room for"));
        self.entries.insert(name, Entry::new(slot, id, generation, acknowledged));
    }

    fn copy_ranges(&mut self, name: &ReplicaName, ranges: &[ByteRange]) {
        let total = units_in(self.size_bytes);
        let units: Vec<Range<u64>> = ranges.iter().map(|range| self.units_of(*range)).collect();
        if let Some(entry) = self.entries.get_mut(name) {
            units.iter().for_each(|units| entry.copy_too(units, total));
        }
    }

    /// What a replica lacks from a byte on, as much as one message takes. All of it if nothing is kept of the replica.
    #[must_use]
    pub fn list(&self, subject: &ReplicaName, from: u64) -> Dirty {
        let size = self.size_bytes;
        let from = from.min(size);
        let clip = |start: u64, end: u64| {
            let (offset, end) =
                (start.saturating_mul(DIRTY_UNIT_BYTES).max(from), end.saturating_mul(DIRTY_UNIT_BYTES));
            ByteRange { offset, length: end.min(size).saturating_sub(offset) }
        };
        let mut ranges = Vec::new();
        let mut next = size;
        let remaining_bytes;
        if let Some(entry) = self.entries.get(subject) {
            let total = units_in(size);
            let mut at = entry.find(from / DIRTY_UNIT_BYTES, total, true);
            remaining_bytes = entry.bytes(from, size, |page, bits| page.count(Plane::ToCopy, bits));
            while at < total {
                if ranges.len() == Dirty::RANGES_MAX {
                    next = at * DIRTY_UNIT_BYTES;
                    break;
                }
                let end = entry.find(at, total, false);
                ranges.push(clip(at, end));
                at = entry.find(end, total, true);
            }
        } else {
            ranges.extend((from < size).then_some(ByteRange { offset: from, length: size - from }));
            remaining_bytes = size - from;
        }
        Dirty { subject: subject.clone(), from, next, ranges, remaining_bytes }
    }

    /// Figures of all replicas out of the view.
    #[must_use]
    pub fn counts(&self) -> Vec<DirtyCount> {
        let count = |(name, entry): (&ReplicaName, &Entry)| DirtyCount {
            name: name.clone(),
            acknowledged: entry.acknowledged,
            dirty_bytes: entry.bytes(0, self.size_bytes, Page::count_any),
        };
        self.entries.iter().map(count).collect()
    }

    /// The pages that a checkpoint as of `seq` has to write; [`DirtyMaps::written`] or [`DirtyMaps::not_written`] must
    /// follow.
    #[must_use]
    pub fn begin_writing(&mut self, seq: Seq) -> Vec<DirtyPage> {
        debug_assert!(self.writing.is_empty(), "one checkpoint at a time");
        let blank = Page::empty();
        let mut pages = Vec::new();
        for entry in self.entries.values_mut() {
            for index in std::mem::take(&mut entry.changed) {
                let copy = self.counted_on.get(&(entry.slot, index)).map_or(0, |counted_on| 1 - counted_on);
                let key = PageKey { slot: entry.slot, index, id: entry.id, generation: entry.generation, seq };
                let page = entry.pages.get(&index).unwrap_or(&blank);
                pages.push(DirtyPage {
                    offset: page_offset(entry.slot, index, copy),
                    bytes: page.encode(self.salt, key),
                });
                self.writing.push((entry.slot, index, copy));
            }
        }
        pages
    }

    /// The superblock that counts on the pages is durable.
    pub fn written(&mut self) {
        for (slot, index, copy) in std::mem::take(&mut self.writing) {
            self.counted_on.insert((slot, index), copy);
        }
    }

    /// The pages were written in part at most, and the superblock not at all.
    pub fn not_written(&mut self) {
        for (slot, index, _) in std::mem::take(&mut self.writing) {
            if let Some(entry) = self.entries.values_mut().find(|e| e.slot == slot) {
                entry.changed.insert(index);
            }
        }
    }
}
