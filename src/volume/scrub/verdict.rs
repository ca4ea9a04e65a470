//! What members' answers about one chunk come to: which copies of a block are not to be believed, and which member has a
//! good one. Remembers nothing.

use std::collections::BTreeMap;

use protocol::scrub::BlockFound;

use super::super::{Damage, PeerId};

/// A block that is not in order everywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// Which block of the chunk.
    pub(super) index: usize,
    /// Members whose copy is not to be believed.
    pub(super) bad: Vec<(PeerId, Damage)>,
    /// A member whose copy is, if any is: sound, and what most sound copies say.
    pub(super) good: Option<PeerId>,
    /// Sound copies differ, and none has a majority.
    pub(super) is_tie: bool,
}

/// Compares what members found at one place of the order. All answers are of the same number of blocks.
pub(super) fn compare(answers: &BTreeMap<PeerId, Vec<BlockFound>>) -> Vec<Fault> {
    let blocks = answers.values().map(Vec::len).max().unwrap_or(0);
    (0..blocks).filter_map(|index| fault(index, answers)).collect()
}

fn fault(index: usize, answers: &BTreeMap<PeerId, Vec<BlockFound>>) -> Option<Fault> {
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
    let votes = |of: u32| sound.iter().filter(|(_, checksum)| *checksum == of).count();
    let elected = sound.iter().map(|(_, checksum)| *checksum).find(|checksum| votes(*checksum) * 2 > sound.len());
    let Some(elected) = elected else {
        // No sound copy at all, or no majority among them.
        let is_tie = !sound.is_empty();
        return (is_tie || !bad.is_empty()).then_some(Fault { index, bad, good: None, is_tie });
    };
    bad.extend(sound.iter().filter(|(_, checksum)| *checksum != elected).map(|(peer, _)| (*peer, Damage::Differs)));
    let good = sound.iter().find(|(_, checksum)| *checksum == elected).map(|(peer, _)| *peer);
    (!bad.is_empty()).then_some(Fault { index, bad, good, is_tie: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAD: BlockFound = BlockFound::Mismatch;

    fn sound(checksum: u32) -> BlockFound {
        BlockFound::Sound { checksum }
    }

    /// What comes of one block, as members 0, 1, ... found it.
    fn of(found: &[BlockFound]) -> Option<Fault> {
        let answers = found.iter().enumerate().map(|(peer, block)| (peer, vec![*block])).collect();
        compare(&answers).pop()
    }

    fn fault(bad: &[(PeerId, Damage)], good: Option<PeerId>, is_tie: bool) -> Option<Fault> {
        Some(Fault { index: 0, bad: bad.to_vec(), good, is_tie })
    }

    #[test]
    fn equal_copies_are_in_order_however_few() {
        assert_eq!(of(&[sound(7)]), None);
        assert_eq!(of(&[sound(7), sound(7), sound(7)]), None);
    }

    #[test]
    fn a_copy_that_is_bad_by_itself_is_repaired_from_a_sound_one() {
        assert_eq!(of(&[BAD, sound(7)]), fault(&[(0, Damage::ChecksumMismatch)], Some(1), false));
        let both = [(0, Damage::ChecksumMismatch), (1, Damage::Unreadable)];
        assert_eq!(of(&[BAD, BlockFound::Unreadable, sound(7)]), fault(&both, Some(2), false));
    }

    #[test]
    fn of_sound_copies_that_differ_the_majority_is_right() {
        assert_eq!(of(&[sound(8), sound(7), sound(7)]), fault(&[(0, Damage::Differs)], Some(1), false));
        let two = [(3, Damage::ChecksumMismatch), (0, Damage::Differs)];
        assert_eq!(of(&[sound(8), sound(7), sound(7), BAD]), fault(&two, Some(1), false));
    }

    #[test]
    fn nobody_guesses_which_of_two_is_right() {
        assert_eq!(of(&[sound(8), sound(7)]), fault(&[], None, true));
        assert_eq!(of(&[sound(8), sound(7), BAD]), fault(&[(2, Damage::ChecksumMismatch)], None, true));
        assert_eq!(
            of(&[sound(8), sound(7), sound(7), sound(9)]),
            fault(&[], None, true),
            "two of four are no majority"
        );
    }

    #[test]
    fn without_a_sound_copy_there_is_nothing_to_repair_with() {
        let all = [(0, Damage::ChecksumMismatch), (1, Damage::ChecksumMismatch)];
        assert_eq!(of(&[BAD, BAD]), fault(&all, None, false));
    }
}
