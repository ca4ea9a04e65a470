//! What several members say of the same blocks, compared block by block. What all say or a majority of the members in force is
//! believed ([`super::majority`]); where there is neither, nobody is. Pure: knows no volume and asks nobody.

use bytes::{Bytes, BytesMut};
use protocol::BLOCK_BYTES;

use super::PeerId;
use super::majority::elect;

/// A block that is not what most members hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Difference {
    /// First byte of the block.
    pub(super) block: u64,
    pub(super) bad: PeerId,
    /// The majority, as far as it answered: at least one.
    pub(super) good: Vec<PeerId>,
}

/// What comes of a comparison.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Compared {
    /// What is right; none if of some block nobody can be believed.
    pub(super) data: Option<Bytes>,
    pub(super) differences: Vec<Difference>,
    /// First bytes of the blocks of which members say different things without a majority.
    pub(super) ties: Vec<u64>,
}

/// Who else there is besides those that answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Electorate {
    /// Members in force, whether they answered or not.
    pub(super) in_force: usize,
    /// Copies that are known to be bad, whether their members answered or not, with the first bytes of their blocks.
    pub(super) bad: Vec<(PeerId, u64)>,
}

impl Electorate {
    pub(super) fn is_bad(&self, peer: PeerId, block: u64) -> bool {
        self.bad.contains(&(peer, block))
    }

    fn bad_of(&self, block: u64) -> usize {
        let mut bad: Vec<PeerId> = self.bad.iter().filter(|(_, at)| *at == block).map(|(peer, _)| *peer).collect();
        bad.sort_unstable();
        bad.dedup();
        bad.len()
    }
}

/// Whether all answers are the same.
pub(super) fn are_equal(answers: &[(PeerId, Bytes)]) -> bool {
    answers.windows(2).all(|two| two[0].1 == two[1].1)
}

/// Compares answers of whole blocks, all of them of one range that begins at `offset`.
pub(super) fn compare(offset: u64, answers: &[(PeerId, Bytes)], electorate: &Electorate) -> Compared {
    let Some((_, first)) = answers.first() else { return Compared::default() };
    if electorate.bad.is_empty() && are_equal(answers) {
        return Compared { data: Some(first.clone()), ..Compared::default() };
    }
    let mut compared = Compared::default();
    let mut data = BytesMut::with_capacity(first.len());
    for start in (0..first.len()).step_by(BLOCK_BYTES as usize) {
        let block = offset + start as u64;
        let believed = answers.iter().filter(|(peer, _)| !electorate.is_bad(*peer, block));
        let copies: Vec<(PeerId, &[u8])> =
            believed.map(|(peer, answer)| (*peer, &answer[start..start + BLOCK_BYTES as usize])).collect();
        let Some(right) = elect(&copies, electorate.in_force, electorate.bad_of(block)) else {
            if !copies.is_empty() {
                compared.ties.push(block);
            }
            continue;
        };
        data.extend_from_slice(right);
        let (good, others): (Vec<_>, Vec<_>) = copies.iter().partition(|(_, copy)| *copy == right);
        let good: Vec<PeerId> = good.iter().map(|(peer, _)| *peer).collect();
        let difference = |(bad, _): &(PeerId, &[u8])| Difference { block, bad: *bad, good: good.clone() };
        compared.differences.extend(others.iter().map(difference));
    }
    compared.data = (data.len() == first.len()).then(|| data.freeze());
    compared
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One block for each letter.
    fn answers(said: &[&str]) -> Vec<(PeerId, Bytes)> {
        let blocks = |text: &str| text.bytes().flat_map(|byte| vec![byte; BLOCK_BYTES as usize]).collect::<Vec<u8>>();
        said.iter().enumerate().map(|(peer, text)| (peer, blocks(text).into())).collect()
    }

    fn text(data: &Bytes) -> String {
        data.iter().step_by(BLOCK_BYTES as usize).map(|byte| char::from(*byte)).collect()
    }

    /// What comes of it if none but who answered is in force.
    fn compare_all(offset: u64, said: &[&str]) -> Compared {
        among(said.len(), &[], offset, said)
    }

    /// The same, when so many members are in force, and these copies are known to be bad.
    fn among(in_force: usize, bad: &[(PeerId, u64)], offset: u64, said: &[&str]) -> Compared {
        compare(offset, &answers(said), &Electorate { in_force, bad: bad.to_vec() })
    }

    #[test]
    fn each_block_is_what_most_say() {
        let compared = compare_all(8192, &["xbcd", "abyd", "abcd"]);
        assert_eq!(compared.data.as_ref().map(text), Some("abcd".to_owned()));
        let first = Difference { block: 8192, bad: 0, good: vec![1, 2] };
        assert_eq!(compared.differences, [first, Difference { block: 16_384, bad: 1, good: vec![0, 2] }]);
        assert!(compared.ties.is_empty());
    }

    #[test]
    fn without_a_majority_nobody_is_believed() {
        for said in [&["a", "b"][..], &["a", "b", "c"], &["a", "a", "b", "b"], &["a", "a", "b", "c"]] {
            let compared = compare_all(0, said);
            assert_eq!(compared, Compared { data: None, differences: vec![], ties: vec![0] }, "{said:?}");
        }
        let compared = compare_all(0, &["ab", "ac"]);
        assert_eq!((compared.data, compared.ties), (None, vec![4096]));
    }

    #[test]
    fn one_answer_or_equal_ones_are_taken_as_they_are() {
        for said in [&["ab"][..], &["ab", "ab", "ab"]] {
            let compared = among(3, &[], 0, said);
            assert_eq!(compared.data.as_ref().map(text), Some("ab".to_owned()));
        }
        assert_eq!(compare_all(0, &[]), Compared::default());
    }

    #[test]
    fn a_majority_of_those_that_answered_is_none_if_it_is_none_of_those_in_force() {
        let compared = among(4, &[], 0, &["a", "a", "b"]);
        assert_eq!(compared, Compared { data: None, differences: vec![], ties: vec![0] }, "the fourth may say b");
        let compared = among(5, &[], 0, &["a", "a", "a", "b"]);
        assert_eq!((compared.data.as_ref().map(text), compared.differences.len()), (Some("a".to_owned()), 1));
        let compared = among(4, &[(3, 0)], 0, &["a", "a", "b"]);
        assert_eq!(compared.data.as_ref().map(text), Some("a".to_owned()), "the fourth has nothing to say");
    }

    #[test]
    fn a_copy_that_is_known_to_be_bad_is_not_believed_even_alone() {
        assert_eq!(among(3, &[(0, 0)], 0, &["a"]), Compared::default());
        assert_eq!(among(3, &[(0, 4096)], 0, &["ab", "ac"]).data.as_ref().map(text), Some("ac".to_owned()));
        let compared = among(5, &[(0, 0), (1, 0)], 0, &["a", "a", "b"]);
        assert_eq!((compared.data.as_ref().map(text), compared.differences), (Some("b".to_owned()), vec![]));
    }
}
