//! Copies that a syncing replica got: waiting for their turn among the records, applied, or durable.
//!
//! **Invariant:** a copy is applied after every record that was received before it and before every later one.

use std::collections::VecDeque;
use std::time::Duration;

use protocol::Seq;
use protocol::message::Copy;
use protocol::ranges::ByteRange;

use super::Time;
use super::reads::Place;

/// With so many bytes applied and not durable a checkpoint is due.
const APPLIED_BYTES_MAX: u64 = 4 << 20;
/// So long after the first copy was applied a checkpoint is due.
const APPLIED_TIME_MAX: Duration = Duration::from_millis(100);
/// What a copy takes beside its data, bytes.
const COPY_OVERHEAD_BYTES: u64 = 256;

#[derive(Debug)]
struct Waiting {
    place: Place,
    copy: Copy,
}

/// Copies that are applied.
#[derive(Clone, Copy, Debug)]
struct Applied {
    id: u64,
    bytes: u64,
    since: Time,
}

/// All copies of a replica.
#[derive(Debug, Default)]
pub(super) struct CopyQueue {
    /// Those at work come first.
    waiting: VecDeque<Waiting>,
    bytes: u64,
    at_work: usize,
    /// Nobody is to hear of those at work.
    orphaned: bool,
    last_id: Option<u64>,
    /// Counts copies, over all sessions.
    number: u64,
    number_applied: u64,
    applied: Option<Applied>,
    /// The copies up to this id are being made durable.
    in_checkpoint: Option<u64>,
}

impl CopyQueue {
    /// Bytes of memory.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether `id` is higher than all before.
    pub(super) fn is_next(&self, id: u64) -> bool {
        self.last_id.is_none_or(|last| id > last)
    }

    pub(super) fn push(&mut self, copy: Copy, received: Seq) {
        self.last_id = Some(copy.id);
        self.number += 1;
        self.bytes += cost(&copy);
        self.waiting.push_back(Waiting { place: Place { seq: received, copy: self.number }, copy });
    }

    /// Forgets everything that is not at work; of what is, nobody is told.
    pub(super) fn reset(&mut self) {
        self.bytes -= self.waiting.drain(self.at_work..).map(|w| cost(&w.copy)).sum::<u64>();
        self.orphaned = self.at_work > 0;
        self.last_id = None;
        self.applied = None;
        self.in_checkpoint = None;
    }

    /// Records after this one must wait for a copy.
    pub(super) fn records_until(&self) -> Option<Seq> {
        self.waiting.front().map(|w| w.place.seq)
    }

    /// The range and the place of the next copy, if all records before it are applied.
    pub(super) fn due(&self, applied: Seq) -> Option<(ByteRange, Place)> {
        self.waiting.front().filter(|w| w.place.seq <= applied).map(|w| (w.copy.range, w.place))
    }

    /// The last copy that shares a block with a range.
    pub(super) fn last_on(&self, range: ByteRange) -> Option<Place> {
        self.waiting.iter().rev().find(|w| w.copy.range.shares_block(range)).map(|w| w.place)
    }

    /// The last copy applied, counted over all sessions.
    pub(super) fn number_applied(&self) -> u64 {
        self.number_applied
    }

    /// Takes the copies that are due and that `may` be made.
    pub(super) fn start(&mut self, applied: Seq, bytes_max: u64, may: impl Fn(ByteRange, Place) -> bool) -> Vec<Copy> {
        let mut bytes = 0;
        let copies: Vec<Copy> = self
            .waiting
            .iter()
            .take_while(|w| w.place.seq <= applied && may(w.copy.range, w.place))
            .take_while(|w| {
                let fits = bytes <= bytes_max;
                bytes += cost(&w.copy);
                fits
            })
            .map(|w| w.copy.clone())
            .collect();
        self.at_work = copies.len();
        copies
    }

    /// The copies at work are applied.
    pub(super) fn done(&mut self, now: Time) {
        for waiting in self.waiting.drain(..std::mem::take(&mut self.at_work)) {
            let bytes = cost(&waiting.copy);
            self.bytes -= bytes;
            self.number_applied = waiting.place.copy;
            if !self.orphaned {
                let before = self.applied.map_or((0, now), |a| (a.bytes, a.since));
                self.applied = Some(Applied { id: waiting.copy.id, bytes: before.0 + bytes, since: before.1 });
            }
        }
        self.orphaned = false;
    }

    /// The copies at work have to be tried again, or given up if nobody wants them any more.
    pub(super) fn not_done(&mut self) {
        let at_work = std::mem::take(&mut self.at_work);
        if std::mem::take(&mut self.orphaned) {
            self.bytes -= self.waiting.drain(..at_work).map(|w| cost(&w.copy)).sum::<u64>();
        }
    }

    /// When a checkpoint is due on account of copies.
    pub(super) fn checkpoint_due_at(&self) -> Option<Time> {
        let applied = self.applied?;
        Some(if applied.bytes >= APPLIED_BYTES_MAX { Time::ZERO } else { applied.since + APPLIED_TIME_MAX })
    }

    /// A checkpoint begins: it makes durable what is applied now.
    pub(super) fn checkpoint_begins(&mut self) {
        self.in_checkpoint = self.applied.take().map(|a| a.id);
    }

    /// The checkpoint is taken; the last copy that it made durable.
    pub(super) fn checkpoint_taken(&mut self) -> Option<u64> {
        self.in_checkpoint.take()
    }

    /// The checkpoint has to be tried again.
    pub(super) fn checkpoint_not_taken(&mut self, now: Time) {
        if let Some(id) = self.in_checkpoint.take() {
            let bytes = self.applied.map_or(0, |a| a.bytes);
            self.applied = Some(Applied { id: self.applied.map_or(id, |a| a.id), bytes, since: now });
        }
    }

    /// Whether a copy is not applied yet.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether every copy is durable.
    pub(super) fn is_settled(&self) -> bool {
        self.waiting.is_empty() && self.applied.is_none() && self.in_checkpoint.is_none()
    }
}

fn cost(copy: &Copy) -> u64 {
    COPY_OVERHEAD_BYTES + copy.data.len() as u64
}
