//! Places in a volume's order: [`Epoch`], [`Seq`], [`Position`], and the history of which epoch gave out which places.
//!
//! An epoch is one activation of an engine and serves fencing only; seq runs on over epochs, so that a position says
//! both how much a replica holds and which history it belongs to.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One activation of an engine. Zero: the volume was formatted and never served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// The place of a record in the volume's order, counted from 1. Zero: before the first record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seq(pub u64);

impl Seq {
    /// The place that follows this one.
    #[must_use]
    pub fn next(self) -> Seq {
        Seq(self.0 + 1)
    }

    /// How many places this one is ahead of `other`; zero if it is not.
    #[must_use]
    pub fn ahead_of(self, other: Seq) -> u64 {
        self.0.saturating_sub(other.0)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The last record that a replica holds: its place, and the epoch that gave the place out. Epochs order first: of two
/// replicas the one that was reached by the later epoch carries the true history (DESIGN: Activation).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// The epoch of the record at `seq`.
    pub epoch: Epoch,
    /// The place of the record.
    pub seq: Seq,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({}, {})", self.epoch, self.seq)
    }
}

/// The first place that an epoch gave out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochStart {
    /// The epoch.
    pub epoch: Epoch,
    /// Its first place.
    pub first_seq: Seq,
}

/// Which epoch gave out which places, oldest first. Two logs agree up to the last place at which their histories agree.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EpochHistory {
    starts: Vec<EpochStart>,
}

impl EpochHistory {
    /// Entries kept at most; the oldest are forgotten first, and a replica that ended before them is compared as one
    /// with no common history.
    pub const ENTRIES_MAX: usize = 1024;

    /// Builds a history from entries read from disk or network; `None` if they are not strictly rising or too many.
    #[must_use]
    pub fn from_entries(starts: Vec<EpochStart>) -> Option<EpochHistory> {
        let rising = starts.windows(2).all(|w| w[0].epoch < w[1].epoch && w[0].first_seq < w[1].first_seq);
        (rising && starts.len() <= Self::ENTRIES_MAX).then_some(EpochHistory { starts })
    }

    /// The entries, oldest first.
    #[must_use]
    pub fn entries(&self) -> &[EpochStart] {
        &self.starts
    }

    /// Notes that the record at `position` was taken into the log.
    ///
    /// # Panics
    /// If the epoch falls: the caller admits records in order, and going on would corrupt the history.
    pub fn note(&mut self, position: Position) {
        if let Some(last) = self.starts.last() {
            assert!(last.epoch <= position.epoch, "epoch fell from {} to {position}", last.epoch);
            if last.epoch == position.epoch {
                return;
            }
        }
        if self.starts.len() == Self::ENTRIES_MAX {
            self.starts.remove(0);
        }
        self.starts.push(EpochStart { epoch: position.epoch, first_seq: position.seq });
    }

    /// The epoch that gave out `seq`, `Epoch(0)` for `Seq(0)`, or `None` if that was forgotten.
    #[must_use]
    pub fn epoch_at(&self, seq: Seq) -> Option<Epoch> {
        if seq == Seq(0) {
            return Some(Epoch(0));
        }
        self.starts.iter().rev().find(|s| s.first_seq <= seq).map(|s| s.epoch)
    }

    /// The last place up to which the log that has this history and ends at `end` and the one that has `other` and ends at
    /// `other_end` are the same; `None` if that is not known any more. An epoch is one engine's, which went on from one
    /// log: where two logs share the start of an epoch, they share everything before it.
    #[must_use]
    pub fn common(&self, end: Position, other: &EpochHistory, other_end: Position) -> Option<Seq> {
        let last_of = |history: &EpochHistory, index: usize, end: Position| {
            history.starts.get(index + 1).map_or(end.seq, |next| Seq(next.first_seq.0 - 1))
        };
        for (i, start) in self.starts.iter().enumerate().rev() {
            if let Some(j) = other.starts.iter().position(|o| o == start) {
                return Some(last_of(self, i, end).min(last_of(other, j, other_end)));
            }
        }
        let is_whole = |history: &EpochHistory| history.starts.first().is_none_or(|s| s.first_seq == Seq(1));
        (is_whole(self) && is_whole(other)).then_some(Seq(0))
    }

    /// Whether a log that ends at `end` is a prefix of the log that has this history and ends at `own_end`.
    #[must_use]
    pub fn has_prefix(&self, end: Position, own_end: Position) -> bool {
        end.seq <= own_end.seq && self.epoch_at(end.seq) == Some(end.epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(epoch: u64, seq: u64) -> Position {
        Position { epoch: Epoch(epoch), seq: Seq(seq) }
    }

    fn history() -> EpochHistory {
        let mut h = EpochHistory::default();
        for p in [at(1, 1), at(1, 2), at(3, 3), at(3, 9), at(4, 10)] {
            h.note(p);
        }
        h
    }

    #[test]
    fn an_epoch_owns_the_places_from_its_first_to_the_next_ones() {
        let h = history();
        assert_eq!(h.epoch_at(Seq(2)), Some(Epoch(1)));
        assert_eq!(h.epoch_at(Seq(3)), Some(Epoch(3)));
        assert_eq!(h.epoch_at(Seq(9)), Some(Epoch(3)));
        assert_eq!(h.epoch_at(Seq(99)), Some(Epoch(4)));
        assert_eq!(h.epoch_at(Seq(0)), Some(Epoch(0)));
    }

    #[test]
    fn a_log_of_another_epoch_at_the_same_place_is_no_prefix() {
        let h = history();
        assert!(h.has_prefix(at(3, 9), at(4, 10)));
        assert!(h.has_prefix(at(0, 0), at(4, 10)));
        assert!(!h.has_prefix(at(1, 9), at(4, 10)), "place 9 was given out by epoch 3");
        assert!(!h.has_prefix(at(4, 11), at(4, 10)), "longer than the log");
    }

    #[test]
    fn two_logs_are_the_same_up_to_the_last_epoch_that_they_share() {
        let h = history();
        let of = |positions: &[Position]| {
            let mut h = EpochHistory::default();
            positions.iter().for_each(|p| h.note(*p));
            h
        };
        assert_eq!(h.common(at(4, 20), &h, at(4, 15)), Some(Seq(15)));
        // It held more of epoch 3 than the others went on from.
        assert_eq!(h.common(at(4, 20), &of(&[at(1, 1), at(3, 3)]), at(3, 12)), Some(Seq(9)));
        // An engine of its own wrote to it since.
        assert_eq!(h.common(at(4, 20), &of(&[at(1, 1), at(3, 3), at(5, 8)]), at(5, 9)), Some(Seq(7)));
        assert_eq!(h.common(at(4, 20), &of(&[at(2, 1)]), at(2, 9)), Some(Seq(0)));
        assert_eq!(h.common(at(4, 20), &of(&[at(2, 7)]), at(2, 9)), None, "what came before is forgotten");
    }

    #[test]
    fn entries_that_do_not_rise_are_refused() {
        let e = |epoch, seq| EpochStart { epoch: Epoch(epoch), first_seq: Seq(seq) };
        assert!(EpochHistory::from_entries(vec![e(1, 1), e(2, 5)]).is_some());
        assert!(EpochHistory::from_entries(vec![e(2, 1), e(1, 5)]).is_none());
        assert!(EpochHistory::from_entries(vec![e(1, 5), e(2, 5)]).is_none());
    }

    #[test]
    fn the_oldest_entries_are_forgotten_first() {
        let mut h = EpochHistory::default();
        for i in 1..=(EpochHistory::ENTRIES_MAX as u64 + 1) {
            h.note(at(i, i));
        }
        assert_eq!(h.entries().len(), EpochHistory::ENTRIES_MAX);
        assert_eq!(h.epoch_at(Seq(1)), None);
    }
}
