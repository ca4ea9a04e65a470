//! Which of several copies of a block is believed, if any: the one rule of scrubs and of reads that are compared. Pure: what
//! a copy is told by, its bytes or a checksum of them, is up to who asks.

use super::PeerId;

/// What all copies say, or more than half of the members in force. Of these as many as `bad` say nothing, as their copy is
/// bad by itself; those that did not answer may all say the opposite. None if there is no such copy.
pub(super) fn elect<C: Copy + PartialEq>(copies: &[(PeerId, C)], in_force: usize, bad: usize) -> Option<C> {
    let votes = |of: C| copies.iter().filter(|(_, copy)| *copy == of).count();
    let voters = in_force.saturating_sub(bad).max(copies.len());
    let wins = |of: C| votes(of) == copies.len() || votes(of) * 2 > voters;
    copies.iter().map(|(_, copy)| *copy).find(|copy| wins(*copy))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn among(in_force: usize, bad: usize, copies: &str) -> Option<char> {
        let copies: Vec<(PeerId, char)> = copies.chars().enumerate().collect();
        elect(&copies, in_force, bad)
    }

    #[test]
    fn what_all_say_is_believed_however_few_they_are() {
        assert_eq!(
            [among(3, 0, "a"), among(3, 0, "aa"), among(1, 0, "a"), among(3, 0, "")],
            [Some('a'), Some('a'), Some('a'), None]
        );
    }

    #[test]
    fn of_copies_that_differ_more_than_half_of_all_members_are_believed() {
        assert_eq!([among(3, 0, "baa"), among(5, 0, "aaab")], [Some('a'); 2]);
        assert_eq!([among(2, 0, "ab"), among(3, 0, "ab"), among(4, 0, "baa"), among(4, 0, "aabb")], [None; 4]);
    }

    #[test]
    fn who_is_bad_by_itself_says_nothing() {
        assert_eq!([among(4, 1, "baa"), among(5, 1, "baa"), among(3, 1, "ab")], [Some('a'), None, None]);
    }
}
