//! What a replica applies to its image next, in which order, and what follows from it.
//!
//! **Invariant:** nothing is applied before it is durable, out of the order in which it was received, to a block that a
//! read at work touches, or to one that a scrub which came before it has not looked at.

use protocol::message::Condition;
use protocol::{Position, Record, Seq, ToEngine};

use super::jobs::{ApplyJob, Changes, Growth, JobError};
use super::reads::Place;
use super::{NO_SPACE_RETRY, Replica, Time, new_size};
use crate::image::Trust;

const APPLY_BATCH_RECORDS_MAX: usize = 128;
const APPLY_BATCH_BYTES_MAX: u64 = 4 << 20;
/// With so much payload durable but not applied, bytes, there is nothing to be gained from letting more come together.
const UNHURRIED_BYTES_MAX: u64 = 256 << 10;

/// What is being applied.
#[derive(Clone, Copy, Debug)]
pub(super) enum Applying {
    /// Records up to this one.
    Records(Position),
    Copies,
    /// The record of a resize.
    Growth(Position, Growth),
}

/// What is to be applied next.
enum Due {
    Records,
    Copies,
    Growth(Position, Growth),
}

impl Replica {
    /// Whether [`Replica::next_apply`] may have a job now.
    #[must_use]
    pub fn has_apply(&self, now: Time) -> bool {
        self.applying.is_none()
            && now >= self.apply_retry_at
            && self.condition != Condition::Poisoned
            && !self.turn.as_ref().is_some_and(|turn| turn.writing)
            && self.due().is_some()
    }

    /// Whether somebody waits for what [`Replica::next_apply`] has to do, or much has come together. If not, it is better
    /// done later and with more at once; but soon, as it bounds the work of whoever comes to wait for it.
    #[must_use]
    pub fn is_apply_urgent(&self) -> bool {
        self.unapplied_bytes >= UNHURRIED_BYTES_MAX
            || self.reads.has_waiting()
            || self.copies.has_waiting()
            || self.turn.is_some()
            || self.checkpoint_due
            || self.closing
    }

    /// The last record that may be applied: durable, and not behind a copy that was received before it.
    fn apply_until(&self) -> Seq {
        self.copies.records_until().map_or(self.durable.seq, |until| until.min(self.durable.seq))
    }

    fn due(&self) -> Option<Due> {
        if let Some((range, place)) = self.copies.due(self.applied.seq) {
            return (!self.reads.blocks(range, place)).then_some(Due::Copies);
        }
        let record = self.pending.front().filter(|r| r.seq() <= self.apply_until())?;
        match new_size(record) {
            Some(to) => Some(Due::Growth(record.header.position(), Growth { from: self.applied_size, to })),
            None => (!self.must_wait(record)).then_some(Due::Records),
        }
    }

    /// Whether a read stands in the way of a record.
    fn must_wait(&self, record: &Record) -> bool {
        self.reads.blocks(record.header.range(), Place { seq: record.seq(), copy: 0 })
    }

    /// The next changes to make to the image, in order; [`Replica::apply_done`] must follow.
    pub fn next_apply(&mut self, now: Time) -> Option<ApplyJob> {
        if !self.has_apply(now) {
            return None;
        }
        let changes = match self.due()? {
            Due::Records => {
                let mut records = self.records_due();
                self.applying = Some(Applying::Records(records.last()?.header.position()));
                records.retain(|record| !self.in_place.is_done(record.seq()));
                Changes::Records(records)
            }
            Due::Copies => {
                let may = |range, place| !self.reads.blocks(range, place);
                let copies = self.copies.start(self.applied.seq, APPLY_BATCH_BYTES_MAX, may);
                self.applying = Some(Applying::Copies);
                Changes::Copies(copies)
            }
            Due::Growth(position, growth) => {
                self.applying = Some(Applying::Growth(position, growth));
                Changes::Grow(growth)
            }
        };
        let trust = if self.apply_in_doubt { Trust::InDoubt } else { Trust::Verified };
        Some(ApplyJob { changes, trust })
    }

    fn records_due(&self) -> Vec<Record> {
        let until = self.apply_until();
        let mut bytes = 0;
        self.pending
            .iter()
            .take_while(|r| r.seq() <= until && new_size(r).is_none() && !self.must_wait(r))
            .take(APPLY_BATCH_RECORDS_MAX)
            .take_while(|r| {
                let fits = bytes <= APPLY_BATCH_BYTES_MAX;
                bytes += u64::from(r.header.payload_length);
                fits
            })
            .cloned()
            .collect()
    }

    /// The changes were made, or were not.
    pub fn apply_done(&mut self, now: Time, outcome: Result<(), JobError>) {
        let applying = self.applying.take().expect("changes were being made");
        match outcome {
            Ok(()) => {
                match applying {
                    Applying::Records(last) => self.on_records_applied(last),
                    Applying::Copies => self.copies.done(now),
                    Applying::Growth(last, growth) => {
                        self.on_records_applied(last);
                        self.applied_size = growth.to;
                    }
                }
                self.apply_in_doubt = false;
                self.no_space_to_apply = false;
                self.reads.on_applied(Place { seq: self.applied.seq, copy: self.copies.number_applied() });
                self.tell_condition();
            }
            Err(JobError::NoSpace) => {
                // The records are safe in the journal; space may be made for them.
                self.apply_retry_at = now + NO_SPACE_RETRY;
                self.apply_in_doubt = true;
                self.no_space_to_apply = true;
                if matches!(applying, Applying::Copies) {
                    self.copies.not_done();
                }
                self.forget_lack_of_space();
            }
            Err(JobError::Failed) => self.poison(),
        }
    }

    /// Gives up copies that nobody waits for any more.
    pub(super) fn drop_copies(&mut self) {
        self.copies.reset();
        self.forget_lack_of_space();
    }

    /// Where nothing is to be applied nothing will show that there is space again. A checkpoint is tried until it is taken.
    pub(super) fn forget_lack_of_space(&mut self) {
        self.no_space_to_apply &= self.copies.has_waiting() || self.applied != self.durable;
        self.tell_condition();
    }

    fn on_records_applied(&mut self, last: Position) {
        let mut bytes = 0;
        while self.pending.front().is_some_and(|r| r.seq() <= last.seq) {
            let record = self.pending.pop_front().expect("just seen");
            self.pending_bytes -= u64::from(record.header.payload_length);
            if !self.in_place.is_done(record.seq()) {
                bytes += u64::from(record.header.payload_length);
            }
        }
        self.unapplied_bytes -= bytes;
        self.in_place.applied(last.seq, bytes);
        self.applied = last;
    }

    pub(super) fn tell_condition(&mut self) {
        let full = self.no_space_to_apply || self.no_space_for_metadata;
        let condition = if full { Condition::NoSpace } else { Condition::Healthy };
        // Poisoned it stays, whatever still ends well.
        if self.condition != condition && self.condition != Condition::Poisoned {
            self.condition = condition;
            if let Some(session) = self.current {
                self.outbox.push_back((session, ToEngine::Condition(condition)));
            }
        }
    }
}
