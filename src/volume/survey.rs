//! Which ranges the records in a replica's journal change. They are asked for part by part. Two such surveys are made: of the
//! records that a returning replica alone has ([`super::resync`]), and of those that members which were absent at activation
//! may lack.

use protocol::Seq;
use protocol::message::FetchKind;
use protocol::ranges::{ByteRange, merge};

use super::{PeerId, SinceStable, Time, ToAgent, Volume};

/// Ranges kept before they are merged.
const RANGES_KEPT_MAX: usize = 64 * 1024;

/// A survey under way.
#[derive(Debug)]
pub(super) struct Survey {
    /// Whose journal it is.
    pub(super) peer: PeerId,
    next: Seq,
    end: Seq,
    ranges: Vec<ByteRange>,
    /// The first record of the part that was asked for.
    asked_from: Option<Seq>,
}

/// How an answer leaves a survey.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Surveyed {
    Whole,
    Partly,
    /// The journal does not give what was asked for.
    Failed,
}

impl Survey {
    /// Of the records after `base` up to `end`.
    pub(super) fn new(peer: PeerId, base: Seq, end: Seq) -> Survey {
        Survey { peer, next: base.next(), end, ranges: Vec::new(), asked_from: None }
    }

    /// What to ask for, if that was not done yet.
    pub(super) fn question(&mut self) -> Option<(Seq, Seq)> {
        if self.asked_from.is_some() || self.next > self.end {
            return None;
        }
        self.asked_from = Some(self.next);
        Some((self.next, self.end))
    }

    /// A record changed a range, or none if it is empty.
    pub(super) fn take(&mut self, seq: Seq, range: ByteRange) {
        if seq != self.next || self.next > self.end {
            return;
        }
        self.next = self.next.next();
        if range.length > 0 {
            self.ranges.push(range);
        }
        if self.ranges.len() > RANGES_KEPT_MAX {
            self.ranges = merge(std::mem::take(&mut self.ranges), RANGES_KEPT_MAX / 2);
        }
    }

    /// No more will come of the part that was asked for.
    pub(super) fn part_ended(&mut self, next: Seq) -> Surveyed {
        let from = self.asked_from.take();
        if self.next > self.end {
            return Surveyed::Whole;
        }
        let progressed = from.is_some_and(|from| next > from) && next == self.next;
        if progressed { Surveyed::Partly } else { Surveyed::Failed }
    }

    /// The last record of interest.
    pub(super) fn end(&self) -> Seq {
        self.end
    }

    pub(super) fn ranges(self) -> Vec<ByteRange> {
        self.ranges
    }
}

impl<T> Volume<T> {
    pub(super) fn survey_of(&mut self, peer: PeerId) -> Option<&mut Survey> {
        let of_stable = self.stable_survey.as_ref().is_some_and(|(_, survey)| survey.peer == peer);
        if of_stable { self.stable_survey.as_mut().map(|(_, survey)| survey) } else { self.resync_surveys(peer) }
    }

    pub(super) fn survey_part_ended(&mut self, now: Time, peer: PeerId, next: Seq) {
        let Some(survey) = self.survey_of(peer) else { return };
        let surveyed = survey.part_ended(next);
        if self.stable_survey.as_ref().is_none_or(|(_, survey)| survey.peer != peer) {
            return self.resync_surveyed(now, surveyed);
        }
        match surveyed {
            Surveyed::Partly => {}
            Surveyed::Whole => {
                if let Some((stable, survey)) = self.stable_survey.take() {
                    let until = survey.end();
                    self.since_stable = Some(SinceStable { stable, until, ranges: survey.ranges() });
                }
            }
            Surveyed::Failed => self.give_up_survey(),
        }
    }

    /// Nobody knows then what members that were absent lack.
    fn give_up_survey(&mut self) {
        let whole = self.whole();
        if let Some((_, survey)) = self.stable_survey.take() {
            self.since_stable = Some(SinceStable { stable: Seq(0), until: survey.end(), ranges: vec![whole] });
        }
    }

    pub(super) fn advance_survey(&mut self) {
        let Some((_, survey)) = &mut self.stable_survey else { return };
        let source = &mut self.peers[survey.peer];
        if !source.is_ready_member() {
            return self.give_up_survey();
        }
        if let Some((from, to)) = survey.question() {
            source.push_urgent(ToAgent::Fetch { from, to, what: FetchKind::Ranges });
        }
    }

    pub(super) fn survey_since(&mut self, stable: Seq, goal: Seq, source: PeerId, journal_first: Seq) {
        let survey = Survey::new(source, stable, goal);
        self.stable_survey = Some((stable, survey));
        self.since_stable = None;
        if stable >= goal {
            self.stable_survey = None;
            self.since_stable = Some(SinceStable { stable: goal, until: goal, ranges: Vec::new() });
        } else if journal_first > stable.next() {
            self.give_up_survey();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(survey: &mut Survey, seq: u64, offset: u64) {
        survey.take(Seq(seq), ByteRange { offset, length: 1 });
    }

    #[test]
    fn a_journal_is_asked_until_all_of_it_was_seen() {
        let mut survey = Survey::new(0, Seq(4), Seq(6));
        assert_eq!(survey.question(), Some((Seq(5), Seq(6))));
        assert_eq!(survey.question(), None, "one question at a time");
        take(&mut survey, 5, 100);
        take(&mut survey, 7, 300);
        assert_eq!(survey.part_ended(Seq(6)), Surveyed::Partly);
        assert_eq!(survey.question(), Some((Seq(6), Seq(6))));
        take(&mut survey, 6, 200);
        assert_eq!(survey.part_ended(Seq(7)), Surveyed::Whole);
        assert_eq!(survey.ranges().iter().map(|r| r.offset).collect::<Vec<_>>(), [100, 200]);
    }

    #[test]
    fn a_journal_that_gives_nothing_ends_it() {
        let mut survey = Survey::new(0, Seq(4), Seq(6));
        survey.question();
        assert_eq!(survey.part_ended(Seq(5)), Surveyed::Failed);
    }
}
