//! Which part of the image each intent wrote last: what earlier records must not take back, and which intents are no longer
//! what the image shows. Pure bookkeeping.

use std::collections::{BTreeMap, BTreeSet};

use protocol::ranges::ByteRange;
use protocol::{BLOCK_BYTES, Seq};

use super::INTENTS_HELD_MAX;

/// Intents, by what they wrote.
#[derive(Clone, Debug, Default)]
pub struct Intents {
    /// By the first byte: the byte after the last, and the intent. No two overlap.
    parts: BTreeMap<u64, (u64, Seq)>,
    /// All of them.
    held: BTreeSet<Seq>,
    /// Those of which later records changed something.
    overwritten: BTreeSet<Seq>,
}

impl Intents {
    /// Notes an intent; they come in order.
    pub fn note(&mut self, range: ByteRange, seq: Seq) {
        self.note_change(range);
        self.parts.insert(range.offset, (range.end(), seq));
        self.held.insert(seq);
    }

    /// Notes that a later record changed the blocks of a range.
    pub fn note_change(&mut self, range: ByteRange) {
        if range.length == 0 || self.parts.is_empty() {
            return;
        }
        let range = range.aligned(BLOCK_BYTES);
        let overlapping: Vec<(u64, u64, Seq)> = self.overlapping(range).collect();
        for (start, end, earlier) in overlapping {
            self.parts.remove(&start);
            if start < range.offset {
                self.parts.insert(start, (range.offset, earlier));
            }
            if end > range.end() {
                self.parts.insert(range.end(), (end, earlier));
            }
            self.overwritten.insert(earlier);
        }
    }

    /// Parts that touch a range, in descending order.
    fn overlapping(&self, range: ByteRange) -> impl Iterator<Item = (u64, u64, Seq)> {
        let before_end = self.parts.range(..range.end()).rev();
        before_end.map(|(start, (end, seq))| (*start, *end, *seq)).take_while(move |(_, end, _)| *end > range.offset)
    }

    /// What of a range no intent after `seq` wrote, in ascending order.
    #[must_use]
    pub fn spared(&self, range: ByteRange, seq: Seq) -> Vec<ByteRange> {
        let mut taken: Vec<(u64, u64, Seq)> = self.overlapping(range).filter(|(_, _, later)| *later > seq).collect();
        taken.reverse();
        let mut spared = Vec::new();
        let mut from = range.offset;
        for (start, end, _) in taken {
            if from < start {
                spared.push(ByteRange { offset: from, length: start - from });
            }
            from = from.max(end);
        }
        if from < range.end() {
            spared.push(ByteRange { offset: from, length: range.end() - from });
        }
        spared
    }

    /// Which of the intents `from..=to` are no longer what the image shows.
    #[must_use]
    pub fn overwritten(&self, from: Seq, to: Seq) -> Vec<Seq> {
        if from > to { Vec::new() } else { self.overwritten.range(from..=to).copied().collect() }
    }

    /// Forgets intents before `first`.
    pub fn release_before(&mut self, first: Seq) {
        self.parts.retain(|_, (_, seq)| *seq >= first);
        self.held = self.held.split_off(&first);
        self.overwritten = self.overwritten.split_off(&first);
    }

    /// Whether there are any among the records `from..=to`.
    #[must_use]
    pub fn are_within(&self, from: Seq, to: Seq) -> bool {
        from <= to && self.held.range(from..=to).next().is_some()
    }

    /// Whether more than half of what may be held is, and half of that could be forgotten with the records up to `seq`.
    #[must_use]
    pub fn are_pressing(&self, seq: Seq) -> bool {
        self.held.len() > INTENTS_HELD_MAX / 2 && self.held.range(..=seq).count() > INTENTS_HELD_MAX / 4
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.held.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, length: u64) -> ByteRange {
        ByteRange { offset, length }
    }

    #[test]
    fn an_intent_spares_what_it_did_not_write_and_what_came_after_it() {
        let mut intents = Intents::default();
        intents.note(range(4096, 8192), Seq(5));
        assert_eq!(intents.spared(range(0, 16384), Seq(4)), [range(0, 4096), range(12288, 4096)]);
        assert_eq!(intents.spared(range(5000, 100), Seq(4)), []);
        assert_eq!(intents.spared(range(4000, 200), Seq(4)), [range(4000, 96)]);
        assert_eq!(intents.spared(range(4000, 200), Seq(6)), [range(4000, 200)], "it came after the intent");
    }

    #[test]
    fn of_intents_that_overlap_the_last_counts_block_by_block() {
        let mut intents = Intents::default();
        intents.note(range(0, 16384), Seq(3));
        intents.note(range(4096, 4096), Seq(7));
        intents.note(range(12288, 8192), Seq(9));
        let of = |seq| intents.spared(range(0, 24576), Seq(seq));
        assert_eq!(of(2), [range(20480, 4096)]);
        assert_eq!(of(5), [range(0, 4096), range(8192, 4096), range(20480, 4096)]);
        assert_eq!(of(8), [range(0, 12288), range(20480, 4096)]);
        assert_eq!(of(9), [range(0, 24576)]);
    }

    #[test]
    fn an_intent_is_overwritten_by_whatever_touches_one_of_its_blocks_until_it_is_forgotten() {
        let mut intents = Intents::default();
        intents.note(range(0, 8192), Seq(3));
        intents.note(range(8192, 8192), Seq(4));
        intents.note_change(range(16384, 4096));
        intents.note_change(range(0, 0));
        assert_eq!(intents.overwritten(Seq(1), Seq(9)), []);
        intents.note_change(range(9000, 1));
        assert_eq!(intents.overwritten(Seq(1), Seq(9)), [Seq(4)]);
        intents.note(range(0, 8192), Seq(5));
        assert_eq!(intents.overwritten(Seq(1), Seq(9)), [Seq(3), Seq(4)]);
        assert_eq!(intents.overwritten(Seq(4), Seq(3)), []);
        assert_eq!(
            (intents.count(), intents.are_within(Seq(5), Seq(9)), intents.are_within(Seq(6), Seq(9))),
            (3, true, false)
        );
        intents.release_before(Seq(4));
        assert_eq!(intents.overwritten(Seq(1), Seq(9)), [Seq(4)]);
        intents.release_before(Seq(6));
        assert_eq!(intents.count(), 0);
    }
}
