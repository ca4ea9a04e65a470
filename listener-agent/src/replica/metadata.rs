//! When a replica writes a superblock, what goes into it, and what follows from it.
//!
//! **Invariant:** what the machine keeps as its superblock differs from the one on disk in nothing that recovery starts
//! from (checkpoint, tail, sizes, dirty bitmaps): these change when they are durable.

use super::dirty::DirtyPage;
use super::jobs::{JobError, MetadataJob, Purpose};
use super::resync::TurnStep;
use super::{CHECKPOINT_INTERVAL, NO_SPACE_RETRY, Replica, SessionId, Time};
use crate::superblock::{JournalTail, Superblock};
use protocol::message::{Condition, RefusedReason};
use protocol::{Seq, ToEngine};

impl Replica {
    /// Ends the replica's work: no session is served from here on, and once everything durable is applied the last
    /// superblock says that the replica is clean.
    pub fn close(&mut self) {
        self.closing = true;
        let sessions: Vec<SessionId> = self.sessions.keys().copied().collect();
        for session in sessions {
            self.refuse(session, RefusedReason::Unusable, "the agent is stopping");
        }
        self.promise = self.promise.filter(|p| p.writing);
        self.drop_turn();
        self.drop_copies();
        // Nobody was told of these, and there may be no room for them.
        self.forget_unwritten();
    }

    fn releasable(&self) -> Seq {
        self.applied.seq.min(self.superblock.stable)
    }

    fn wants_checkpoint(&self, now: Time) -> bool {
        if now < self.checkpoint_retry_at {
            return false;
        }
        if self.closing {
            return self.received == self.applied && self.applying.is_none();
        }
        let freed = self.ring.releasable_bytes(self.releasable());
        let under_pressure = self.ring.used_bytes() > self.ring.capacity() / 2 && freed > self.ring.capacity() / 8;
        let changed = self.applied != self.superblock.checkpoint;
        let waited = now.saturating_sub(self.last_checkpoint_at) >= CHECKPOINT_INTERVAL;
        let copied = self.copies.checkpoint_due_at().is_some_and(|due| now >= due);
        under_pressure
            || self.ring.intents().are_pressing(self.releasable())
            || copied
            || self.no_space_for_metadata
            || (self.checkpoint_due && (changed || freed > 0))
            || (waited && changed)
    }

    /// When [`Replica::next_metadata`] may have a job although nothing happens until then.
    #[must_use]
    pub fn metadata_due_at(&self) -> Option<Time> {
        self.copies.checkpoint_due_at().map(|due| due.max(self.checkpoint_retry_at))
    }

    fn purpose(&self, now: Time) -> Option<Purpose> {
        if self.metadata_busy || self.closed || self.condition == Condition::Poisoned {
            return None;
        }
        if self.promise.is_some() && self.writing.is_none() {
            return Some(Purpose::Promise);
        }
        let turn = self.turn_due().filter(|_| now >= self.checkpoint_retry_at);
        turn.or_else(|| self.wants_checkpoint(now).then_some(Purpose::Checkpoint))
    }

    /// Whether [`Replica::next_metadata`] has a job.
    #[must_use]
    pub fn has_metadata(&self, now: Time) -> bool {
        self.purpose(now).is_some()
    }

    /// The next superblock to write; [`Replica::metadata_done`] must follow.
    pub fn next_metadata(&mut self, now: Time) -> Option<MetadataJob> {
        let purpose = self.purpose(now)?;
        self.metadata_busy = true;
        let mut superblock = self.superblock.clone();
        superblock.write_count += 1;
        if let (Purpose::Promise, Some(promise)) = (purpose, &mut self.promise) {
            promise.writing = true;
            let dirty_pages = Vec::new();
            return Some(MetadataJob { purpose, grow: None, sync_image: false, dirty_pages, superblock });
        }
        if let (Purpose::Begin | Purpose::Synced, Some(turn)) = (purpose, &mut self.turn) {
            turn.writing = true;
        }
        let step = self.turn.as_ref().map(|turn| &turn.step);
        Some(match (purpose, step) {
            (Purpose::Begin, Some(TurnStep::Begin(begin))) => self.begin_job(begin, superblock),
            (Purpose::Synced, _) => self.synced_job(superblock),
            (Purpose::Promise | Purpose::Begin | Purpose::Checkpoint, _) => self.checkpoint_job(superblock, now),
        })
    }

    fn checkpoint_job(&mut self, mut superblock: Superblock, now: Time) -> MetadataJob {
        self.checkpoint_due = false;
        self.last_checkpoint_at = now;
        self.copies.checkpoint_begins();
        self.in_place.checkpoint_begins();
        superblock.checkpoint = self.applied;
        superblock.image_bytes = self.applied_size;
        let (offset, seq) = self.ring.tail_after(self.releasable(), self.durable.seq.next());
        // Where nothing is kept, nothing of an earlier opening may be taken for what comes next.
        let generation = if seq > self.durable.seq { superblock.generation } else { superblock.tail.generation };
        superblock.tail = JournalTail { offset, seq, generation };
        superblock.clean = self.closing;
        let dirty_pages: Vec<DirtyPage> = self.dirty.begin_writing(self.durable.seq);
        superblock.identity.size_bytes = self.dirty.size_bytes();
        superblock.tracked = self.dirty.headers();
        superblock.tracked_seq = self.durable.seq;
        MetadataJob { purpose: Purpose::Checkpoint, grow: None, sync_image: true, dirty_pages, superblock }
    }

    /// The superblock is durable, or is not. Without space for it the state on disk is as before.
    pub fn metadata_done(&mut self, now: Time, job: &MetadataJob, outcome: Result<(), JobError>) {
        self.metadata_busy = false;
        match outcome {
            Ok(()) => {}
            Err(JobError::NoSpace) => return self.on_no_space_for_metadata(now),
            Err(JobError::Failed) => return self.poison(),
        }
        let written = &job.superblock;
        self.superblock.write_count = written.write_count;
        self.closed = written.clean;
        match job.purpose {
            Purpose::Promise => {
                if let Some(promise) = self.promise.filter(|promise| promise.writing) {
                    self.on_promise_durable(now, promise);
                }
            }
            Purpose::Begin => {
                self.on_space_for_metadata();
                self.on_begun(written);
            }
            Purpose::Synced => {
                self.superblock.syncing = false;
                self.superblock.unsettled.clear();
                self.end_turn(ToEngine::InSync);
            }
            Purpose::Checkpoint => {
                self.on_checkpoint(written);
                self.on_space_for_metadata();
            }
        }
    }

    fn on_checkpoint(&mut self, written: &Superblock) {
        self.superblock.checkpoint = written.checkpoint;
        self.superblock.image_bytes = written.image_bytes;
        self.superblock.tail = written.tail;
        self.superblock.identity.size_bytes = written.identity.size_bytes;
        self.superblock.tracked.clone_from(&written.tracked);
        self.superblock.tracked_seq = written.tracked_seq;
        self.dirty.written();
        self.ring.release_before(written.tail.seq);
        self.counters.checkpoints += 1;
        self.in_place.checkpoint_taken();
        if let (Some(id), Some(session)) = (self.copies.checkpoint_taken(), self.current) {
            self.outbox.push_back((session, ToEngine::Copied { id }));
        }
    }

    fn on_no_space_for_metadata(&mut self, now: Time) {
        self.dirty.not_written();
        self.copies.checkpoint_not_taken(now);
        self.checkpoint_due = true;
        self.checkpoint_retry_at = now + NO_SPACE_RETRY;
        if let Some(turn) = &mut self.turn {
            turn.writing = false;
            if self.current != Some(turn.session) {
                self.turn = None;
            }
        }
        self.no_space_for_metadata = true;
        self.tell_condition();
    }

    fn on_space_for_metadata(&mut self) {
        self.no_space_for_metadata = false;
        self.tell_condition();
    }
}
