//! A replica on its way back into the view: beginning anew at a place of the order, taking copies, and the end of it.
//!
//! **Invariants**
//! * Until the superblock of a `Begin` is durable the replica is what it was before; from then on it is syncing and has
//!   nothing of what it dropped. Nothing of the engine is journaled in between.
//! * It stops being syncing only when every copy that it took is durable.

use protocol::message::{Begin, Copy};
use protocol::{BLOCK_BYTES, Epoch, ReplicaName, Seq, ToEngine};

use super::dirty::{self, DirtyMaps};
use super::jobs::{ExtendJob, Growth, JobError, MetadataJob, Purpose};
use super::{PENDING_BYTES_MAX, Replica, SessionId};
use crate::image::is_size_allowed;
use crate::superblock::{JournalTail, Superblock, TRACKED_MAX};

#[cfg(test)]
mod tests;

/// No volume gets so far in the life of a disk; counting on from here must not overflow.
const SEQ_MAX: u64 = u64::MAX / 2;
/// Requests for room that wait, at most.
const EXTENDS_MAX: usize = 16;

/// A step of a resync that takes a superblock.
#[derive(Debug)]
pub(super) struct Turn {
    pub(super) session: SessionId,
    pub(super) step: TurnStep,
    /// A job with it is being written.
    pub(super) writing: bool,
}

#[derive(Debug)]
pub(super) enum TurnStep {
    Begin(Box<Begin>),
    Synced,
}

fn check_begin(begin: &Begin, promised: Epoch) -> Result<(), &'static str> {
    let Begin { position, views, history, tracked, .. } = begin;
    if position.seq.0 > SEQ_MAX {
        return Err("no volume has come that far");
    }
    if position.epoch > promised {
        return Err("its position is of a higher epoch than was promised");
    }
    let last_epoch = history.entries().last().map_or(Seq(0), |start| start.first_seq);
    if views.seq > position.seq || last_epoch > position.seq || history.epoch_at(position.seq) != Some(position.epoch) {
        return Err("its position is not in its history");
    }
    if !is_size_allowed(begin.size_bytes) {
        return Err("no volume has its size");
    }
    let mut names: Vec<&ReplicaName> = tracked.iter().map(|(name, _)| name).collect();
    names.sort();
    names.dedup();
    if names.len() != tracked.len() || tracked.len() > TRACKED_MAX {
        return Err("it names too many replicas, or one twice");
    }
    Ok(())
}

impl Replica {
    pub(super) fn on_begin(&mut self, session: SessionId, begin: Begin) {
        if self.turn.is_some() {
            return self.refuse_protocol(session, "a step of the resync is under way");
        }
        if let Err(text) = check_begin(&begin, self.superblock.promised) {
            return self.refuse_protocol(session, &format!("the replica cannot begin anew: {text}"));
        }
        self.forget_unwritten();
        self.drop_copies();
        self.fetches.clear();
        self.turn = Some(Turn { session, step: TurnStep::Begin(Box::new(begin)), writing: false });
    }

    /// Whether a `Begin` is not durable yet.
    pub(super) fn begins_anew(&self) -> bool {
        self.turn.as_ref().is_some_and(|turn| matches!(turn.step, TurnStep::Begin(_)))
    }

    pub(super) fn on_copy(&mut self, session: SessionId, copy: Copy) {
        let fits = copy.range.length > 0
            && copy.range.offset.is_multiple_of(BLOCK_BYTES)
            && copy.range.length.is_multiple_of(BLOCK_BYTES)
            && (copy.data.is_empty() || copy.data.len() as u64 == copy.range.length)
            && copy.range.end() <= self.received_size;
        let text = if !self.superblock.syncing || self.turn.is_some() {
            "a copy came where none is taken"
        } else if !fits || !self.copies.is_next(copy.id) {
            "the copy makes no sense"
        } else if self.pending_bytes + self.copies.bytes() > PENDING_BYTES_MAX {
            "more copies are in flight than may be"
        } else {
            return self.copies.push(copy, self.received.seq);
        };
        self.refuse_protocol(session, text);
    }

    pub(super) fn on_synced(&mut self, session: SessionId) {
        if !self.superblock.syncing || self.turn.is_some() || !self.copies.is_settled() {
            return self.refuse_protocol(session, "the replica is not syncing, or a copy is not durable yet");
        }
        self.turn = Some(Turn { session, step: TurnStep::Synced, writing: false });
    }

    /// What the next step of the resync is, if it can be taken now.
    pub(super) fn turn_due(&self) -> Option<Purpose> {
        match self.turn.as_ref().filter(|turn| !turn.writing)?.step {
            TurnStep::Begin(_) => {
                let idle = self.writing.is_none() && self.applying.is_none() && self.applied == self.durable;
                idle.then_some(Purpose::Begin)
            }
            TurnStep::Synced => Some(Purpose::Synced),
        }
    }

    pub(super) fn synced_job(&self, mut superblock: Superblock) -> MetadataJob {
        superblock.syncing = false;
        // All of it was copied.
        superblock.unsettled.clear();
        MetadataJob { purpose: Purpose::Synced, grow: None, sync_image: false, dirty_pages: Vec::new(), superblock }
    }

    /// The replica as it would be had it come to the position record by record, but for what it lacks.
    pub(super) fn begin_job(&self, begin: &Begin, mut superblock: Superblock) -> MetadataJob {
        let position = begin.position;
        let (offset, seq) = self.ring.tail_after(Seq(u64::MAX), position.seq.next());
        // Records of what is dropped lie in the ring, sound and with the very places that are to come.
        let generation = superblock.generation + 1;
        let others: Vec<(ReplicaName, Seq)> =
            begin.tracked.iter().filter(|(name, _)| *name != superblock.identity.replica).cloned().collect();
        superblock.identity.size_bytes = begin.size_bytes;
        superblock.image_bytes = begin.size_bytes;
        superblock.generation = generation;
        superblock.clean = false;
        superblock.syncing = true;
        superblock.checkpoint = position;
        superblock.views = begin.views.clone();
        superblock.history = begin.history.clone();
        superblock.acks = Some(begin.acks);
        superblock.tail = JournalTail { offset, seq, generation };
        // What was said of the order that it leaves is not known of this one.
        superblock.stable = Seq(0);
        superblock.tracked = dirty::unknown(&others, position.seq, generation, begin.size_bytes);
        superblock.tracked_seq = position.seq;
        superblock.unsettled_seq = position.seq;
        let grows = begin.size_bytes > self.applied_size;
        let grow = grows.then_some(Growth { from: self.applied_size, to: begin.size_bytes });
        MetadataJob { purpose: Purpose::Begin, grow, sync_image: true, dirty_pages: Vec::new(), superblock }
    }

    /// The superblock of a `Begin` is durable.
    pub(super) fn on_begun(&mut self, written: &Superblock) {
        // What was promised while it was being written is in the next one.
        let (promised, engine, lease_ms) = (self.superblock.promised, self.superblock.engine, self.superblock.lease_ms);
        self.superblock = Superblock { promised, engine, lease_ms, ..written.clone() };
        self.dirty = DirtyMaps::of(&self.superblock);
        let position = written.checkpoint;
        (self.received, self.durable, self.applied) = (position, position, position);
        (self.received_size, self.applied_size) = (written.image_bytes, written.image_bytes);
        self.ring.release_before(Seq(u64::MAX));
        self.apply_in_doubt = false;
        self.forget_lack_of_space();
        self.reads.stop_waiting();
        self.end_turn(ToEngine::Begun);
    }

    /// A step is durable.
    pub(super) fn end_turn(&mut self, answer: ToEngine) {
        let turn = self.turn.take().expect("the step that was being written");
        if self.current == Some(turn.session) {
            self.outbox.push_back((turn.session, answer));
        }
    }

    /// Gives up a step that is not being written.
    pub(super) fn drop_turn(&mut self) {
        self.turn = self.turn.take().filter(|turn| turn.writing);
    }

    // ---- room ----------------------------------------------------------------------------------------------------

    pub(super) fn on_extend(&mut self, session: SessionId, size_bytes: u64) {
        if self.extends.len() >= EXTENDS_MAX {
            return self.refuse_protocol(session, "room was asked for too often");
        }
        if !is_size_allowed(size_bytes) {
            let refused = format!("no volume has {size_bytes} bytes");
            return self.outbox.push_back((session, ToEngine::Extended { size_bytes, refused }));
        }
        self.extends.push_back(ExtendJob { session, size_bytes });
    }

    /// Whether [`Replica::next_extend`] has a job.
    #[must_use]
    pub fn has_extend(&self) -> bool {
        !self.extends.is_empty()
    }

    /// The next request for room; [`Replica::extend_done`] must follow.
    pub fn next_extend(&mut self) -> Option<ExtendJob> {
        self.extends.pop_front()
    }

    /// Room was made durably, or why not. Where a sync failed, what was applied before may be lost with it.
    pub fn extend_done(&mut self, job: ExtendJob, outcome: Result<(), (JobError, String)>) {
        if matches!(outcome, Err((JobError::Failed, _))) {
            return self.poison();
        }
        if self.current == Some(job.session) {
            let refused = outcome.err().map(|(_, text)| text).unwrap_or_default();
            self.outbox.push_back((job.session, ToEngine::Extended { size_bytes: job.size_bytes, refused }));
        }
    }
}
