//! Blocks of which sound copies were found to differ without a majority, remembered: nothing is repaired from such a copy, as
//! it could make most members hold what one of them made up. Pure bookkeeping.
//!
//! Owns when a tie ends: when a record is given out that makes the block the same everywhere, when a later look shows
//! who is right, or when all copies but one are given up. Who only goes away may come back with what it held.

use std::collections::BTreeMap;

use protocol::ranges::ByteRange;
use protocol::{BLOCK_BYTES, Seq};

use super::PeerId;

/// Ties that are remembered, at most; others are found again by the next scrub.
const TIES_MAX: usize = 1024;

#[derive(Debug)]
struct Tie {
    /// Members whose copy may be the right one.
    parties: Vec<PeerId>,
    /// They were asked behind this record.
    seen: Seq,
}

/// All ties of a volume, by the first byte of the block.
#[derive(Debug, Default)]
pub(super) struct Ties {
    blocks: BTreeMap<u64, Tie>,
}

impl Ties {
    pub(super) fn contains(&self, block: u64) -> bool {
        self.blocks.contains_key(&block)
    }

    /// Takes note of a tie; whether it is remembered.
    pub(super) fn note(&mut self, block: u64, parties: Vec<PeerId>, seen: Seq) -> bool {
        if self.blocks.len() >= TIES_MAX && !self.contains(block) {
            return false;
        }
        let tie = self.blocks.entry(block).or_insert(Tie { parties: Vec::new(), seen });
        *tie = Tie { parties, seen: seen.max(tie.seen) };
        true
    }

    /// A record was given out that makes `range` the same everywhere.
    pub(super) fn overlap(&mut self, range: ByteRange) {
        let inside = self.blocks.range(range.offset..range.end()).map(|(block, _)| *block);
        let whole: Vec<u64> = inside.filter(|block| block + BLOCK_BYTES <= range.end()).collect();
        whole.into_iter().for_each(|block| drop(self.blocks.remove(&block)));
    }

    /// Members that were asked behind `seen` show which copy is right; whether there was a tie until then.
    pub(super) fn end(&mut self, block: u64, seen: Seq) -> bool {
        let is_older = self.blocks.get(&block).is_some_and(|tie| tie.seen <= seen);
        is_older && self.blocks.remove(&block).is_some()
    }

    /// Those within `range`.
    pub(super) fn within(&self, range: ByteRange) -> Vec<u64> {
        self.blocks.range(range.offset..range.end()).map(|(block, _)| *block).collect()
    }

    /// What a member held is given up; returns the ties that end thereby.
    pub(super) fn give_up(&mut self, peer: PeerId) -> Vec<u64> {
        self.blocks.values_mut().for_each(|tie| tie.parties.retain(|party| *party != peer));
        let ended: Vec<u64> =
            self.blocks.iter().filter(|(_, t)| t.parties.len() < 2).map(|(block, _)| *block).collect();
        ended.iter().for_each(|block| drop(self.blocks.remove(block)));
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 2 * BLOCK_BYTES;

    fn tied(parties: &[PeerId]) -> Ties {
        let mut ties = Ties::default();
        assert!(ties.note(BLOCK, parties.to_vec(), Seq(5)));
        ties
    }

    #[test]
    fn a_tie_ends_with_a_record_of_the_whole_block_and_of_no_less() {
        let mut ties = tied(&[0, 1]);
        ties.overlap(ByteRange { offset: BLOCK + 1, length: 2 * BLOCK_BYTES });
        ties.overlap(ByteRange { offset: 0, length: 3 * BLOCK_BYTES - 1 });
        assert!(ties.contains(BLOCK));
        ties.overlap(ByteRange { offset: BLOCK - 1, length: BLOCK_BYTES + 1 });
        assert!(!ties.contains(BLOCK));
    }

    #[test]
    fn a_tie_ends_with_what_a_later_look_shows() {
        let mut ties = tied(&[0, 1]);
        assert!(!ties.end(BLOCK, Seq(4)) && ties.contains(BLOCK), "that was before");
        assert!(ties.end(BLOCK, Seq(5)) && !ties.contains(BLOCK) && !ties.end(BLOCK, Seq(6)));
    }

    #[test]
    fn a_tie_ends_when_all_copies_but_one_are_given_up() {
        let mut ties = tied(&[0, 1, 3]);
        assert_eq!((ties.give_up(2), ties.give_up(0)), (vec![], vec![]));
        assert_eq!(ties.give_up(3), [BLOCK]);
        assert!(!ties.contains(BLOCK));
    }

    #[test]
    fn no_more_ties_are_remembered_than_are_bounded() {
        let mut ties = Ties::default();
        let kept = (0..2000).filter(|block| ties.note(block * BLOCK_BYTES, vec![0, 1], Seq(1))).count();
        assert_eq!((kept, ties.within(ByteRange { offset: 0, length: 1 << 40 }).len()), (TIES_MAX, TIES_MAX));
        assert!(ties.note(0, vec![0, 1], Seq(2)), "what is remembered is brought up to date");
    }
}
