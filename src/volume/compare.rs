//! What several members say of the same blocks, compared block by block. The majority is believed; where there is none,
//! nobody is. Pure: knows no volume and asks nobody.

use bytes::{Bytes, BytesMut};
use protocol::BLOCK_BYTES;

use super::PeerId;

/// A block that is not what most members hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Difference {
    /// First byte of the block.
    pub(super) block: u64,
    pub(super) bad: PeerId,
    /// One of the majority.
    pub(super) good: PeerId,
}

/// What comes of a comparison.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Compared {
    /// What most members hold; none if some block has no majority.
    pub(super) data: Option<Bytes>,
    pub(super) differences: Vec<Difference>,
    /// First bytes of the blocks without a majority.
    pub(super) ties: Vec<u64>,
}

/// Whether all answers are the same.
pub(super) fn are_equal(answers: &[(PeerId, Bytes)]) -> bool {
    answers.windows(2).all(|two| two[0].1 == two[1].1)
}

/// Compares answers of whole blocks, all of them of one range that begins at `offset`.
pub(super) fn compare(offset: u64, answers: &[(PeerId, Bytes)]) -> Compared {
    let Some((_, first)) = answers.first() else { return Compared::default() };
    if are_equal(answers) {
        return Compared { data: Some(first.clone()), ..Compared::default() };
    }
    let mut compared = Compared::default();
    let mut data = BytesMut::with_capacity(first.len());
    for start in (0..first.len()).step_by(BLOCK_BYTES as usize) {
        let of = |answer: &Bytes| answer.slice(start..start + BLOCK_BYTES as usize);
        let alike = |block: &Bytes| answers.iter().filter(|(_, other)| of(other) == *block).count();
        let block = offset + start as u64;
        let Some((good, most)) = answers.iter().find(|(_, answer)| alike(&of(answer)) * 2 > answers.len()) else {
            compared.ties.push(block);
            continue;
        };
        data.extend_from_slice(&of(most));
        let others = answers.iter().filter(|(_, answer)| of(answer) != of(most));
        compared.differences.extend(others.map(|(bad, _)| Difference { block, bad: *bad, good: *good }));
    }
    compared.data = compared.ties.is_empty().then(|| data.freeze());
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

    #[test]
    fn each_block_is_what_most_say() {
        let compared = compare(8192, &answers(&["xbcd", "abyd", "abcd"]));
        assert_eq!(compared.data.as_ref().map(text), Some("abcd".to_owned()));
        let first = Difference { block: 8192, bad: 0, good: 1 };
        assert_eq!(compared.differences, [first, Difference { block: 16_384, bad: 1, good: 0 }]);
        assert!(compared.ties.is_empty());
    }

    #[test]
    fn without_a_majority_nobody_is_believed() {
        for said in [&["a", "b"][..], &["a", "b", "c"], &["a", "a", "b", "b"], &["a", "a", "b", "c"]] {
            let compared = compare(0, &answers(said));
            assert_eq!(compared, Compared { data: None, differences: vec![], ties: vec![0] }, "{said:?}");
        }
        let compared = compare(0, &answers(&["ab", "ac"]));
        assert_eq!((compared.data, compared.ties), (None, vec![4096]));
    }

    #[test]
    fn one_answer_or_equal_ones_are_taken_as_they_are() {
        for said in [&["ab"][..], &["ab", "ab", "ab"]] {
            let compared = compare(0, &answers(said));
            assert_eq!(compared.data.as_ref().map(text), Some("ab".to_owned()));
        }
        assert_eq!(compare(0, &[]), Compared::default());
    }
}
