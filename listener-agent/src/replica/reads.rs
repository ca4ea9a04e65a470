//! Reads that a replica was asked for: waiting for records they must see, ready, or at work.

use std::collections::{BTreeMap, VecDeque};

use protocol::Seq;
use protocol::message::ReadKind;
use protocol::ranges::ByteRange;

use super::SessionId;

/// One read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadJob {
    /// Who asked.
    pub session: SessionId,
    /// The engine's name for it.
    pub id: u64,
    /// What is wanted of the range.
    pub what: ReadKind,
    /// Which part of the volume.
    pub range: ByteRange,
}

impl ReadJob {
    /// Whether its answer shows anything of the image: then no record that shares a block with it may be applied
    /// meanwhile, and records before it must be.
    #[must_use]
    pub fn looks(&self) -> bool {
        match self.what {
            ReadKind::Data | ReadKind::Extents | ReadKind::Scrub => true,
            ReadKind::Prefetch => false,
        }
    }

    /// Whether its answer may show no record that came after it: records that share a block with it wait from the moment
    /// it came. Other reads may show more than they must.
    fn is_barrier(&self) -> bool {
        match self.what {
            ReadKind::Scrub => true,
            ReadKind::Data | ReadKind::Extents | ReadKind::Prefetch => false,
        }
    }
}

/// A place among all changes of the image: after a record, and after so many copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) seq: Seq,
    /// Which copy, counted from 1; zero if the place is before the copies that follow the record.
    pub(super) copy: u64,
}

/// All reads of a replica.
#[derive(Debug, Default)]
pub(super) struct ReadQueue {
    /// By what must be applied first.
    waiting: BTreeMap<Place, Vec<ReadJob>>,
    /// How many of these are barriers.
    barriers_waiting: usize,
    ready: VecDeque<ReadJob>,
    active: Vec<ReadJob>,
}

impl ReadQueue {
    pub(super) fn len(&self) -> usize {
        self.waiting.values().map(Vec::len).sum::<usize>() + self.ready.len() + self.active.len()
    }

    pub(super) fn wait_for(&mut self, place: Place, job: ReadJob) {
        self.barriers_waiting += usize::from(job.is_barrier());
        self.waiting.entry(place).or_default().push(job);
    }

    pub(super) fn make_ready(&mut self, job: ReadJob) {
        self.ready.push_back(job);
    }

    pub(super) fn on_applied(&mut self, place: Place) {
        while let Some(entry) = self.waiting.first_entry() {
            if *entry.key() > place {
                break;
            }
            let jobs = entry.remove();
            self.barriers_waiting -= jobs.iter().filter(|j| j.is_barrier()).count();
            self.ready.extend(jobs);
        }
    }

    /// What was waited for will not come.
    pub(super) fn stop_waiting(&mut self) {
        self.barriers_waiting = 0;
        self.ready.extend(std::mem::take(&mut self.waiting).into_values().flatten());
    }

    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The read that [`ReadQueue::start`] would give.
    pub(super) fn next_ready(&self) -> Option<&ReadJob> {
        self.ready.front()
    }

    pub(super) fn start(&mut self) -> Option<ReadJob> {
        let job = self.ready.pop_front()?;
        self.active.push(job);
        Some(job)
    }

    pub(super) fn finish(&mut self, job: ReadJob) {
        let at = self.active.iter().position(|a| *a == job).expect("a read ends once, after it started");
        self.active.swap_remove(at);
    }

    /// Whether a change of `range` at `place` must wait: a read at work touches a block of it, or one that may begin at any
    /// moment, or a barrier that waits for an earlier change.
    pub(super) fn blocks(&self, range: ByteRange, place: Place) -> bool {
        let may_be_at_work = self.active.iter().chain(&self.ready).any(|a| a.looks() && a.range.shares_block(range));
        may_be_at_work || (self.barriers_waiting > 0 && self.barrier_before(range, place))
    }

    fn barrier_before(&self, range: ByteRange, place: Place) -> bool {
        let mut before = self.waiting.range(..place).flat_map(|(_, jobs)| jobs);
        before.any(|j| j.is_barrier() && j.range.shares_block(range))
    }

    /// Forgets a read that is not at work; whether there was one.
    pub(super) fn cancel(&mut self, session: SessionId, id: u64) -> bool {
        let before = self.len();
        let is_other = |job: &ReadJob| job.session != session || job.id != id;
        self.forget_waiting(is_other);
        self.ready.retain(is_other);
        self.len() < before
    }

    /// Forgets what other sessions asked for and what is not at work yet.
    pub(super) fn drop_session(&mut self, session: SessionId) {
        let is_other = |job: &ReadJob| job.session != session;
        self.forget_waiting(is_other);
        self.ready.retain(is_other);
    }

    /// Forgets what waits, but for the reads that are to be kept.
    fn forget_waiting(&mut self, is_kept: impl Fn(&ReadJob) -> bool) {
        for jobs in self.waiting.values_mut() {
            jobs.retain(&is_kept);
        }
        self.waiting.retain(|_, jobs| !jobs.is_empty());
        self.barriers_waiting = self.waiting.values().flatten().filter(|j| j.is_barrier()).count();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_barrier_that_is_cancelled_counts_no_more() {
        let place = |seq| Place { seq: Seq(seq), copy: 0 };
        let range = ByteRange { offset: 0, length: 4096 };
        let scrub = |session, id| ReadJob { session, id, what: ReadKind::Scrub, range };
        let mut reads = ReadQueue::default();
        reads.wait_for(place(1), scrub(1, 7));
        reads.wait_for(place(1), scrub(1, 8));
        reads.wait_for(place(2), scrub(2, 7));
        assert!(reads.cancel(1, 7) && reads.blocks(range, place(2)));
        assert!(reads.cancel(1, 8) && !reads.blocks(range, place(2)));
        assert_eq!(reads.barriers_waiting, 1, "the one of the other session");
        assert!(reads.cancel(2, 7) && !reads.cancel(2, 7));
        assert_eq!(reads.barriers_waiting, 0, "no record is compared with barriers that are not there");
    }
}
