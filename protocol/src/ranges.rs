//! Byte ranges of a volume: overlap, and merging many into few.

use crate::BLOCK_BYTES;

/// The unit in which changes that a dropped replica lacks are tracked, bytes.
pub const DIRTY_UNIT_BYTES: u64 = 64 * 1024;

/// A range of bytes of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Bytes in the range.
    pub length: u64,
}

impl ByteRange {
    /// The byte after the last; saturates for ranges that could not exist anyway.
    #[must_use]
    pub fn end(self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// Whether the two share a byte.
    #[must_use]
    pub fn overlaps(self, other: ByteRange) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    /// Whether the two share a checksummed block. Work on two ranges that do must not run side by side.
    #[must_use]
    pub fn shares_block(self, other: ByteRange) -> bool {
        self.aligned(BLOCK_BYTES).overlaps(other.aligned(BLOCK_BYTES))
    }

    /// The smallest range of whole `unit`s that holds this one.
    #[must_use]
    pub fn aligned(self, unit: u64) -> ByteRange {
        let start = self.offset / unit * unit;
        let end = self.end().div_ceil(unit).saturating_mul(unit);
        ByteRange { offset: start, length: end - start }
    }
}

/// Merges ranges, widened to whole [`DIRTY_UNIT_BYTES`], into at most `count_max` (at least one); where there are too
/// many, neighbours are joined, so the result covers more but never less.
#[must_use]
pub fn merge(ranges: impl IntoIterator<Item = ByteRange>, count_max: usize) -> Vec<ByteRange> {
    let mut unit = DIRTY_UNIT_BYTES;
    let mut merged = merge_in_units(ranges, unit);
    while merged.len() > count_max.max(1) {
        unit = unit.saturating_mul(2);
        merged = merge_in_units(merged, unit);
    }
    merged
}

/// Merges ranges, widened to whole units, where they touch each other: in ascending order.
#[must_use]
pub fn merge_in_units(ranges: impl IntoIterator<Item = ByteRange>, unit: u64) -> Vec<ByteRange> {
    let mut sorted: Vec<ByteRange> = ranges.into_iter().filter(|r| r.length > 0).map(|r| r.aligned(unit)).collect();
    sorted.sort_unstable();
    let mut merged: Vec<ByteRange> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.offset <= last.end() => last.length = last.end().max(range.end()) - last.offset,
            Some(_) | None => merged.push(range),
        }
    }
    merged
}

/// What of `ranges` lies outside of `taken`.
#[must_use]
pub fn outside(ranges: impl IntoIterator<Item = ByteRange>, taken: ByteRange) -> Vec<ByteRange> {
    let between = |start: u64, end: u64| ByteRange { offset: start, length: end.saturating_sub(start) };
    let parts = ranges.into_iter().flat_map(|range| {
        let before = between(range.offset, range.end().min(taken.offset));
        let behind = between(range.offset.max(taken.end()), range.end());
        if taken.length == 0 { [range, between(0, 0)] } else { [before, behind] }
    });
    parts.filter(|part| part.length > 0).collect()
}

/// What of `ranges` lies outside of the whole blocks of `changed`.
#[must_use]
pub fn outside_blocks(ranges: &[ByteRange], changed: ByteRange) -> Vec<ByteRange> {
    let start = changed.offset.div_ceil(BLOCK_BYTES).saturating_mul(BLOCK_BYTES);
    let end = changed.end() / BLOCK_BYTES * BLOCK_BYTES;
    outside(ranges.iter().copied(), ByteRange { offset: start, length: end.saturating_sub(start) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, length: u64) -> ByteRange {
        ByteRange { offset, length }
    }

    #[test]
    fn neighbours_become_one() {
        let unit = DIRTY_UNIT_BYTES;
        let merged = merge([range(5 * unit, 1), range(1, 1), range(unit, unit), range(0, 0)], 10);
        assert_eq!(merged, [range(0, 2 * unit), range(5 * unit, unit)]);
    }

    #[test]
    fn too_many_are_joined_and_still_cover_all() {
        let ranges: Vec<_> = (0..1000).map(|i| range(i * 10 * DIRTY_UNIT_BYTES, 1)).collect();
        let merged = merge(ranges.clone(), 7);
        assert!(merged.len() <= 7);
        assert!(ranges.iter().all(|r| merged.iter().any(|m| m.offset <= r.offset && r.end() <= m.end())));
    }

    #[test]
    fn what_is_taken_leaves_what_lies_before_and_behind_it() {
        assert_eq!(outside([range(10, 20), range(40, 5)], range(15, 5)), [range(10, 5), range(20, 10), range(40, 5)]);
        assert_eq!(outside([range(10, 20)], range(0, 11)), [range(11, 19)]);
        assert_eq!(outside([range(10, 20)], range(10, 20)), []);
        assert_eq!(outside([range(10, 20)], range(15, 0)), [range(10, 20)]);
        assert_eq!(outside([range(10, 20)], range(30, 5)), [range(10, 20)]);
        assert_eq!(outside_blocks(&[range(0, 12288)], range(4095, 4098)), [range(0, 4096), range(8192, 4096)]);
        assert_eq!(outside_blocks(&[range(0, 12288)], range(4096, 4095)), [range(0, 12288)]);
    }

    #[test]
    fn ranges_in_one_block_share_it_without_overlapping() {
        assert!(range(0, 512).shares_block(range(512, 512)));
        assert!(!range(0, 512).overlaps(range(512, 512)));
        assert!(!range(0, 4096).shares_block(range(4096, 1)));
    }
}
