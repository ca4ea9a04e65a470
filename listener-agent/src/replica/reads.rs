//! Reads that a replica was asked for: waiting for records they must see, ready, or at work.
//!
//! A small one is tried *at once*, by whoever brought it, in the hope that memory has what it wants. If it has not, the read
//! is ready again, as *uncached*, for the threads that wait for devices, and can be cancelled like any other.

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
    /// Likewise, and tried before. They go first.
    uncached: VecDeque<ReadJob>,
    active: Vec<ReadJob>,
    /// At work too, but only as far as memory goes.
    at_once: Vec<ReadJob>,
}

impl ReadQueue {
    pub(super) fn len(&self) -> usize {
        let waiting = self.waiting.values().map(Vec::len).sum::<usize>();
        waiting + self.ready.len() + self.uncached.len() + self.active.len() + self.at_once.len()
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
        !self.ready.is_empty() || !self.uncached.is_empty()
    }

    /// The next read, if it is for at most so many bytes of data, to be tried at once. None while a device is waited for: it
    /// may be slow, and trying may have to wait for it too.
    pub(super) fn start_at_once(&mut self, bytes_max: u64) -> Option<ReadJob> {
        let is_small = |job: &ReadJob| job.what == ReadKind::Data && job.range.length <= bytes_max;
        if !self.active.is_empty() || !self.uncached.is_empty() || !self.ready.front().is_some_and(is_small) {
            return None;
        }
        let job = self.ready.pop_front()?;
        self.at_once.push(job);
        Some(job)
    }

    /// What was tried at once needs a device.
    pub(super) fn not_cached(&mut self, job: ReadJob, is_wanted: bool) {
        self.finish(job);
        if is_wanted {
            self.uncached.push_back(job);
        }
    }

    pub(super) fn start(&mut self) -> Option<ReadJob> {
        let job = self.uncached.pop_front().or_else(|| self.ready.pop_front())?;
        self.active.push(job);
        Some(job)
    }

    pub(super) fn finish(&mut self, job: ReadJob) {
        let at_work = [&mut self.at_once, &mut self.active];
        let found = at_work.into_iter().find_map(|jobs| Some((jobs.iter().position(|a| *a == job)?, jobs)));
        let (at, jobs) = found.expect("a read ends once, after it started");
        jobs.swap_remove(at);
    }

    /// Whether a change of `range` at `place` must wait: a read at work touches a block of it, or one that may begin at any
    /// moment, or a barrier that waits for an earlier change.
    pub(super) fn blocks(&self, range: ByteRange, place: Place) -> bool {
        let begun = self.active.iter().chain(&self.at_once);
        let mut may_be_at_work = begun.chain(&self.ready).chain(&self.uncached);
        may_be_at_work.any(|a| a.looks() && a.range.shares_block(range))
            || (self.barriers_waiting > 0 && self.barrier_before(range, place))
    }

    /// Whether any read that was asked for before a change of `range` at `place` looks at a block of it, at work or not.
    pub(super) fn precede(&self, range: ByteRange, place: Place) -> bool {
        let begun = self.active.iter().chain(&self.at_once).chain(&self.ready).chain(&self.uncached);
        let waiting = self.waiting.range(..place).flat_map(|(_, jobs)| jobs);
        begun.chain(waiting).any(|job| job.looks() && job.range.shares_block(range))
    }

    fn barrier_before(&self, range: ByteRange, place: Place) -> bool {
        let mut before = self.waiting.range(..place).flat_map(|(_, jobs)| jobs);
        before.any(|j| j.is_barrier() && j.range.shares_block(range))
    }

    /// Forgets a read that is not at work; whether there was one.
    pub(super) fn cancel(&mut self, session: SessionId, id: u64) -> bool {
        let before = self.len();
        let is_other = |job: &ReadJob| job.session != session || job.id != id;
        self.forget_idle(is_other);
        self.len() < before
    }

    /// Forgets what a session asked for, as far as it is not at work.
    pub(super) fn drop_session(&mut self, session: SessionId) {
        let is_other = |job: &ReadJob| job.session != session;
        self.forget_idle(is_other);
    }

    /// Forgets what is not at work, but for the reads that are to be kept.
    fn forget_idle(&mut self, is_kept: impl Fn(&ReadJob) -> bool) {
        self.ready.retain(&is_kept);
        self.uncached.retain(&is_kept);
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

    fn data(id: u64, blocks: std::ops::Range<u64>) -> ReadJob {
        let range = ByteRange { offset: blocks.start * 4096, length: (blocks.end - blocks.start) * 4096 };
        ReadJob { session: 1, id, what: ReadKind::Data, range }
    }

    #[test]
    fn what_memory_does_not_have_is_read_next_and_holds_up_changes_all_the_while() {
        let mut reads = ReadQueue::default();
        let later = Place { seq: Seq(9), copy: 0 };
        [data(1, 0..1), data(2, 1..2), data(3, 2..3)].into_iter().for_each(|job| reads.make_ready(job));
        let tried = reads.start_at_once(4096).unwrap();
        assert!((tried.id, reads.blocks(tried.range, later)) == (1, true));
        assert_eq!(reads.start_at_once(4096).unwrap().id, 2, "one that is tried keeps no other from being");
        reads.not_cached(tried, true);
        assert!(reads.blocks(tried.range, later) && reads.has_ready());
        assert_eq!(reads.start_at_once(4096), None, "a device is to be waited for");
        assert_eq!(reads.start(), Some(tried));
        assert!(reads.blocks(tried.range, later));
        assert_eq!(reads.start_at_once(4096), None, "a device is waited for");
        reads.finish(tried);
        assert!(!reads.blocks(tried.range, later));
        reads.finish(data(2, 1..2));
        assert_eq!(reads.start_at_once(4095), None, "too large");
        assert_eq!(reads.start_at_once(4096).unwrap().id, 3);
        reads.not_cached(data(3, 2..3), false);
        assert_eq!((reads.len(), reads.has_ready()), (0, false), "whoever asked is gone");
    }

    #[test]
    fn reads_that_wait_for_earlier_records_precede_a_change_and_those_behind_it_do_not() {
        let mut reads = ReadQueue::default();
        let place = |seq| Place { seq: Seq(seq), copy: 0 };
        let job = data(1, 0..2);
        reads.wait_for(place(3), job);
        assert!(reads.precede(job.range, place(4)) && !reads.blocks(job.range, place(4)));
        assert!(!reads.precede(job.range, place(3)), "it waits for this very change");
        assert!(!reads.precede(data(2, 2..3).range, place(4)));
        reads.on_applied(place(3));
        assert!(reads.precede(job.range, place(3)), "it may begin at any moment");
    }

    #[test]
    fn what_memory_does_not_have_can_be_cancelled_and_ends_with_its_session() {
        let mut reads = ReadQueue::default();
        for id in 1..=2 {
            reads.make_ready(data(id, id..id + 1));
        }
        for _ in 1..=2 {
            assert!(reads.start_at_once(4096).is_some());
        }
        assert!(!reads.cancel(1, 1), "it is at work");
        reads.not_cached(data(1, 1..2), true);
        reads.not_cached(data(2, 2..3), true);
        assert!(reads.cancel(1, 1) && !reads.cancel(1, 1));
        reads.drop_session(1);
        assert_eq!(reads.len(), 0);
    }
}
