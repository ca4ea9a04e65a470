//! What is kept of one replica out of the view: its planes of units, and how each step of a resync changes them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use protocol::ranges::{ByteRange, DIRTY_UNIT_BYTES};
use protocol::{ReplicaName, Seq};

use super::page::{Page, Plane, UNITS_PER_PAGE};
use crate::superblock::TrackedHeader;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) slot: u8,
    pub(super) id: Seq,
    pub(super) generation: u64,
    pub(super) acknowledged: Seq,
    pub(super) rotated_at: Seq,
    /// Units that are all to be copied; the pages do not say so. Spares an unknown replica of a large volume its pages.
    pub(super) solid: Range<u64>,
    pub(super) pages: BTreeMap<u64, Box<Page>>,
    /// Pages that differ from what the superblock in force counts on.
    pub(super) changed: BTreeSet<u64>,
}

pub(super) fn units_in(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(DIRTY_UNIT_BYTES)
}

/// The bits of a page that stand for some units.
fn bits_in(index: u64, units: &Range<u64>) -> Range<usize> {
    let first = index * UNITS_PER_PAGE as u64;
    let within = |unit: u64| unit.clamp(first, first + UNITS_PER_PAGE as u64) - first;
    within(units.start) as usize..within(units.end) as usize
}

/// The pages that units lie in.
fn pages_of(units: &Range<u64>) -> Range<u64> {
    let pages = units.start / UNITS_PER_PAGE as u64..units.end.div_ceil(UNITS_PER_PAGE as u64);
    if units.is_empty() { 0..0 } else { pages }
}

/// What is left of a range on both sides of another.
pub(super) fn outside(units: &Range<u64>, of: &Range<u64>) -> [Range<u64>; 2] {
    if of.is_empty() {
        return [units.clone(), 0..0];
    }
    [units.start..units.end.min(of.start), units.start.max(of.end)..units.end]
}

impl Entry {
    pub(super) fn new(slot: u8, id: Seq, generation: u64, acknowledged: Seq) -> Entry {
        let (pages, changed) = (BTreeMap::new(), BTreeSet::new());
        Entry { slot, id, generation, acknowledged, rotated_at: id, solid: 0..0, pages, changed }
    }

    pub(super) fn set(&mut self, plane: Plane, units: &Range<u64>) {
        for index in pages_of(units) {
            let page = self.pages.entry(index).or_insert_with(Page::empty);
            if page.put(plane, &bits_in(index, units), true) {
                self.changed.insert(index);
            }
        }
    }

    pub(super) fn clear(&mut self, plane: Plane, units: &Range<u64>) {
        for (index, page) in self.pages.range_mut(pages_of(units)) {
            if page.put(plane, &bits_in(*index, units), false) {
                self.changed.insert(*index);
            }
        }
        self.forget_empty_pages();
    }

    fn forget_empty_pages(&mut self) {
        self.pages.retain(|_, page| !page.is_empty());
    }

    /// Takes ranges in as to be copied, of a volume of `total` units.
    pub(super) fn copy_too(&mut self, units: &Range<u64>, total: u64) {
        if units.start == 0 && units.end >= total && total > 0 {
            self.solid = 0..total;
            return self.clear(Plane::ToCopy, &(0..total));
        }
        for part in outside(units, &self.solid) {
            self.set(Plane::ToCopy, &part);
        }
    }

    fn change_pages(&mut self, change: impl Fn(&mut Page) -> bool) {
        for (index, page) in &mut self.pages {
            if change(page) {
                self.changed.insert(*index);
            }
        }
    }

    pub(super) fn follow(&mut self, seq: Seq) {
        self.change_pages(Page::gather);
        let solid = self.solid.clone();
        self.clear(Plane::ToCopy, &solid);
        self.rotated_at = seq;
    }

    /// Everything that was to be copied below a unit is there, and so is every record up to `followed`.
    pub(super) fn copied(&mut self, below: u64, followed: Seq, seq: Seq) {
        self.acknowledged = self.acknowledged.max(followed);
        // What an entry says of the time before it was made is in its first plane, until the replica holds all of that.
        if followed < self.id {
            return;
        }
        self.clear(Plane::ToCopy, &(0..below));
        self.solid = self.solid.start.max(below)..self.solid.end;
        if self.solid.is_empty() {
            self.solid = 0..0;
        }
        if followed >= self.rotated_at {
            self.change_pages(Page::rotate);
            self.forget_empty_pages();
            self.rotated_at = seq;
        }
    }

    /// The first unit from `from` on that is to be copied, or is not; `total` if there is none.
    pub(super) fn find(&self, from: u64, total: u64, to_copy: bool) -> u64 {
        let per_page = UNITS_PER_PAGE as u64;
        let mut at = from;
        while at < total {
            if self.solid.contains(&at) {
                if to_copy {
                    return at;
                }
                at = self.solid.end;
                continue;
            }
            let (index, bit) = (at / per_page, (at % per_page) as usize);
            let end_of_page = (index + 1) * per_page;
            // The solid part may begin within the page.
            let end = if self.solid.start > at { end_of_page.min(self.solid.start) } else { end_of_page };
            let found = match self.pages.get(&index) {
                Some(page) => index * per_page + page.find(Plane::ToCopy, bit, to_copy) as u64,
                None if to_copy => end,
                None => at,
            };
            if found < end {
                return found.min(total);
            }
            at = end;
            if to_copy && !self.solid.contains(&at) && !self.pages.contains_key(&(at / per_page)) {
                at = self.next_page_or_solid(at, total);
            }
        }
        total
    }

    /// Where the next page begins that is kept, or the solid part.
    fn next_page_or_solid(&self, at: u64, total: u64) -> u64 {
        let per_page = UNITS_PER_PAGE as u64;
        let page = self.pages.range(at / per_page..).next().map_or(total, |(index, _)| index * per_page);
        let solid = if self.solid.start >= at && !self.solid.is_empty() { self.solid.start } else { total };
        page.min(solid).max(at)
    }

    /// Bytes of the units from `from` on that `count` counts in the pages, and of the solid part.
    pub(super) fn bytes(&self, from: u64, size_bytes: u64, count: impl Fn(&Page, &Range<usize>) -> u64) -> u64 {
        let of = |units: &Range<u64>| {
            let solid = self.solid.end.min(units.end).saturating_sub(self.solid.start.max(units.start));
            let parts = outside(units, &self.solid);
            let bits = |index: u64| parts.iter().map(move |part| bits_in(index, part)).filter(|bits| !bits.is_empty());
            let pages = self.pages.range(pages_of(units));
            solid + pages.flat_map(|(index, page)| bits(*index).map(|bits| count(page, &bits))).sum::<u64>()
        };
        let total = units_in(size_bytes);
        let first = from / DIRTY_UNIT_BYTES;
        if first >= total {
            return 0;
        }
        // The first unit may begin before `from`, the last may end after the volume.
        let before = of(&(first..first + 1)) * (from - first * DIRTY_UNIT_BYTES);
        let behind = of(&(total - 1..total)) * (total * DIRTY_UNIT_BYTES - size_bytes);
        of(&(first..total)) * DIRTY_UNIT_BYTES - before - behind
    }

    pub(super) fn header(&self, name: &ReplicaName) -> TrackedHeader {
        let solid = ByteRange {
            offset: self.solid.start * DIRTY_UNIT_BYTES,
            length: (self.solid.end - self.solid.start) * DIRTY_UNIT_BYTES,
        };
        TrackedHeader {
            name: name.clone(),
            slot: self.slot,
            id: self.id,
            generation: self.generation,
            acknowledged: self.acknowledged,
            rotated_at: self.rotated_at,
            solid,
        }
    }
}
