//! What members' answers about one chunk come to: which copies of a block are not to be believed, and which member has a
//! good one. Remembers nothing.

use std::collections::BTreeMap;

use protocol::scrub::BlockFound;

use super::super::majority::elect;
use super::super::{Damage, PeerId};

/// A block that is not in order everywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// Which block of the chunk.
    pub(super) index: usize,
    /// Members whose copy is not to be believed.
    pub(super) bad: Vec<(PeerId, Damage)>,
    /// Members whose copy is, if any is: sound, and what all sound copies say, or a majority.
    pub(super) good: Vec<PeerId>,
    /// Sound copies differ, and none has a majority of the members in force.
    pub(super) is_tie: bool,
}

/// Compares what members found at one place of the order; `in_force` members there are, whether they answered or not. All
/// answers are of the same number of blocks. A copy that `differs` was not what most held when more of them could be asked:
/// it is believed if those are that can be believed, and never alone.
pub(super) fn compare(
    answers: &BTreeMap<PeerId, Vec<BlockFound>>,
    in_force: usize,
    differs: impl Fn(PeerId, usize) -> bool,
) -> Vec<Fault> {
    let blocks = answers.values().map(Vec::len).max().unwrap_or(0);
    (0..blocks).filter_map(|index| fault(index, answers, in_force, |peer| differs(peer, index))).collect()
}

fn fault(
    index: usize,
    answers: &BTreeMap<PeerId, Vec<BlockFound>>,
    in_force: usize,
    differs: impl Fn(PeerId) -> bool,
) -> Option<Fault> {
    let mut bad = Vec::new();
    let mut sound: Vec<(PeerId, u32)> = Vec::new();
    for (peer, blocks) in answers {
        match blocks.get(index) {
            Some(BlockFound::Sound { checksum }) => sound.push((*peer, *checksum)),
            Some(BlockFound::Mismatch) => bad.push((*peer, Damage::ChecksumMismatch)),
            Some(BlockFound::Unreadable) => bad.push((*peer, Damage::Unreadable)),
            None => {}
        }
    }
    let (differing, voting): (Vec<_>, Vec<_>) = sound.iter().copied().partition(|(peer, _)| differs(*peer));
    let Some(elected) = elect(&voting, in_force, bad.len() + differing.len()) else {
        // No sound copy at all, or no majority among them.
        let is_tie = !voting.is_empty();
        bad.extend(differing.iter().map(|(peer, _)| (*peer, Damage::Differs)));
        return (is_tie || !bad.is_empty()).then_some(Fault { index, bad, good: Vec::new(), is_tie });
    };
    bad.extend(sound.iter().filter(|(_, checksum)| *checksum != elected).map(|(peer, _)| (*peer, Damage::Differs)));
    let good = sound.iter().filter(|(_, checksum)| *checksum == elected).map(|(peer, _)| *peer).collect();
    (!bad.is_empty()).then_some(Fault { index, bad, good, is_tie: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAD: BlockFound = BlockFound::Mismatch;

    fn sound(checksum: u32) -> BlockFound {
        BlockFound::Sound { checksum }
    }

    /// What comes of one block, as members 0, 1, ... found it, and none else is in force.
    fn of(found: &[BlockFound]) -> Option<Fault> {
        among(found.len(), found)
    }

    /// The same, when so many members are in force.
    fn among(in_force: usize, found: &[BlockFound]) -> Option<Fault> {
        let answers = found.iter().enumerate().map(|(peer, block)| (peer, vec![*block])).collect();
        compare(&answers, in_force, |_, _| false).pop()
    }

    fn fault(bad: &[(PeerId, Damage)], good: &[PeerId], is_tie: bool) -> Option<Fault> {
        Some(Fault { index: 0, bad: bad.to_vec(), good: good.to_vec(), is_tie })
    }

    #[test]
    fn equal_copies_are_in_order_however_few() {
        assert_eq!(of(&[sound(7)]), None);
        assert_eq!(of(&[sound(7), sound(7), sound(7)]), None);
    }

    #[test]
    fn a_copy_that_is_bad_by_itself_is_repaired_from_a_sound_one() {
        assert_eq!(of(&[BAD, sound(7)]), fault(&[(0, Damage::ChecksumMismatch)], &[1], false));
        let both = [(0, Damage::ChecksumMismatch), (1, Damage::Unreadable)];
        assert_eq!(of(&[BAD, BlockFound::Unreadable, sound(7)]), fault(&both, &[2], false));
    }

    #[test]
    fn of_sound_copies_that_differ_the_majority_is_right() {
        assert_eq!(of(&[sound(8), sound(7), sound(7)]), fault(&[(0, Damage::Differs)], &[1, 2], false));
        let two = [(3, Damage::ChecksumMismatch), (0, Damage::Differs)];
        assert_eq!(of(&[sound(8), sound(7), sound(7), BAD]), fault(&two, &[1, 2], false));
    }

    #[test]
    fn nobody_guesses_which_of_two_is_right() {
        assert_eq!(of(&[sound(8), sound(7)]), fault(&[], &[], true));
        assert_eq!(of(&[sound(8), sound(7), BAD]), fault(&[(2, Damage::ChecksumMismatch)], &[], true));
        assert_eq!(of(&[sound(8), sound(7), sound(7), sound(9)]), fault(&[], &[], true), "two of four are no majority");
    }

    #[test]
    fn a_majority_of_those_in_reach_is_none_if_it_is_none_of_those_in_force() {
        let two_to_one = [sound(8), sound(7), sound(7)];
        assert_eq!(among(4, &two_to_one), fault(&[], &[], true), "the fourth may say what the first says");
        assert_eq!(among(3, &two_to_one[..2]), fault(&[], &[], true));
        let four = [sound(7), sound(7), sound(7), sound(8)];
        assert_eq!(among(5, &four), fault(&[(3, Damage::Differs)], &[0, 1, 2], false), "whatever the fifth says");
        let bad = [(0, Damage::ChecksumMismatch), (1, Damage::Differs)];
        assert_eq!(among(5, &[BAD, sound(8), sound(7), sound(7), sound(7)]), fault(&bad, &[2, 3, 4], false));
        let one_is_bad = fault(&[(0, Damage::ChecksumMismatch)], &[], true);
        assert_eq!(among(5, &[BAD, sound(8), sound(7), sound(7)]), one_is_bad, "two of four are no majority");
    }

    #[test]
    fn a_copy_that_is_bad_by_itself_is_repaired_though_not_all_were_asked() {
        assert_eq!(among(4, &[BAD, sound(7)]), fault(&[(0, Damage::ChecksumMismatch)], &[1], false));
        assert_eq!(among(4, &[sound(7), sound(7)]), None);
    }

    #[test]
    fn a_copy_that_was_outvoted_is_not_believed_because_the_others_are_gone() {
        let of = |found: &[BlockFound]| {
            let answers = found.iter().enumerate().map(|(peer, block)| (peer, vec![*block])).collect();
            compare(&answers, found.len(), |peer, _| peer == 0).pop()
        };
        let outvoted = (0, Damage::Differs);
        assert_eq!(of(&[sound(8)]), fault(&[outvoted], &[], false));
        assert_eq!(of(&[sound(8), BAD]), fault(&[(1, Damage::ChecksumMismatch), outvoted], &[], false));
        assert_eq!(of(&[sound(8), sound(7)]), fault(&[outvoted], &[1], false));
        assert_eq!(of(&[sound(8), sound(7), sound(9)]), fault(&[outvoted], &[], true));
        assert_eq!(of(&[sound(7), sound(7)]), None, "it is what the others hold by now");
        assert_eq!(of(&[sound(7), BAD, sound(7)]), fault(&[(1, Damage::ChecksumMismatch)], &[0, 2], false));
    }

    #[test]
    fn without_a_sound_copy_there_is_nothing_to_repair_with() {
        let all = [(0, Damage::ChecksumMismatch), (1, Damage::ChecksumMismatch)];
        assert_eq!(of(&[BAD, BAD]), fault(&all, &[], false));
    }
}
