//! One replica as a state machine: what it admits, in which order it journals and applies, what it promises.
//!
//! A record goes through four stations, each a prefix of the one before: *received* (in memory), *durable* (in the
//! journal), *applied* (in the image), *checkpointed* (the image is durable up to there). The machine hands out one job
//! of each sort at a time - write a group, apply a batch, write a superblock - and any number of reads, and is told how
//! each ended. Threads around it ([`crate::host`]) or a simulation do the work.
//!
//! A large write may be journaled as an *intent* (`in_place`): its bytes go from memory to the image at once, as a part of
//! writing the group, and when it is durable there is nothing left to apply.
//!
//! Copies for a syncing replica (`copies`) have their places between records; they are not journaled, and durable by a
//! checkpoint alone. `resync` is how it comes to be syncing and how it ends; `metadata` writes superblocks.
//!
//! **Invariants**
//! * Nothing is applied before it is durable, nothing is acknowledged before it is durable. What an intent writes is written
//!   when the intent is durable, and acknowledged when what it wrote is.
//! * From a promise on (in memory, before it is durable), nothing of an older session is journaled that was not already
//!   being written; the promise is answered with the position that is durable then. So the position told to a new engine
//!   can no longer change behind its back.
//! * A read and a record that touch the same block are never at work together, and a read sees every record that was
//!   received before it. A scrub sees no other.
//! * Copies and records are applied in the order in which they were received.
//! * Journal space is reused only after the superblock that gives it up is durable.
//! * No clock, file, socket, thread or randomness in here: time is an argument.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod applying;
mod copies;
pub mod dirty;
mod in_place;
mod jobs;
mod lease;
mod metadata;
mod reads;
mod resync;
#[cfg(test)]
mod tests;
pub(crate) mod unsettled;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use protocol::cursor::Malformed;
use protocol::message::{
    Condition, EngineId, FetchKind, Promised, ReadKind, ReadOutcome, Refused, RefusedReason, Welcome,
};
use protocol::quorum::AckPolicies;
use protocol::ranges::ByteRange;
use protocol::record::{Amended, DirtyChange, Resize, ViewChange};
use protocol::{BLOCK_BYTES, Epoch, Position, Record, RecordKind, ReplicaName, Seq, ToAgent, ToEngine};

use crate::image::is_size_allowed;
use crate::journal::group::{Salt, entry_bytes, group_bytes};
use crate::journal::ring::Ring;
use crate::journal::{group_bytes_max, record_payload_bytes_max};
use crate::superblock::Superblock;
use applying::Applying;
use copies::CopyQueue;
use dirty::DirtyMaps;
use in_place::InPlace;
pub use jobs::{ApplyJob, Changes, ExtendJob, FetchJob, Found, GroupJob, GroupOutcome, Growth, JobError, MetadataJob};
use lease::Leases;
pub use reads::ReadJob;
use reads::{Place, ReadQueue};
use resync::Turn;
use unsettled::note_settled;

/// One connection of an engine.
pub type SessionId = u64;
/// Time since a fixed moment of the process.
pub type Time = Duration;

/// Payload and copies received but not applied, at most, bytes. An engine keeps far fewer in flight.
pub const PENDING_BYTES_MAX: u64 = 96 << 20;
/// With so much payload durable but not applied, bytes, nothing more is journaled until the image has caught up: an
/// image slower than its journal then slows its replica down, which its engine sees as lag.
const UNAPPLIED_BYTES_MAX: u64 = 32 << 20;
/// Reads asked for but not done, at most.
pub const READS_MAX: usize = 1024;
/// Changes are checkpointed after this time even if the journal has room: it bounds the replay after a crash.
pub const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(5);

const FETCH_BYTES_MAX: u64 = 4 << 20;
const NO_SPACE_RETRY: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug)]
struct PendingPromise {
    session: SessionId,
    /// A job with the promise in it is being written.
    writing: bool,
}

/// Figures for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Groups written.
    pub groups: u64,
    /// Records made durable.
    pub records: u64,
    /// Times that the journal started over at its beginning.
    pub wraps: u64,
    /// Checkpoints taken.
    pub checkpoints: u64,
}

/// The state machine.
#[derive(Debug)]
pub struct Replica {
    /// What the next superblock says. Its views and history are as of `durable`; what recovery starts from is as the
    /// superblock on disk has it.
    superblock: Superblock,
    ring: Ring,
    /// What replicas out of the view lack, and the size of the volume, as of `durable`.
    dirty: DirtyMaps,
    received: Position,
    durable: Position,
    applied: Position,
    /// Size of the volume as of `received`, bytes.
    received_size: u64,
    /// Size of the volume as of `applied`, bytes.
    applied_size: u64,
    copies: CopyQueue,
    turn: Option<Turn>,
    extends: VecDeque<ExtendJob>,
    /// Records after `applied`, up to `received`.
    pending: VecDeque<Record>,
    pending_bytes: u64,
    /// Of these, payload of records that are durable and wait to be applied.
    unapplied_bytes: u64,
    /// The last record of the group being written.
    writing: Option<Position>,
    in_place: InPlace,
    applying: Option<Applying>,
    /// An attempt to apply got stuck: blocks of the first records may not match their checksums.
    apply_in_doubt: bool,
    no_space_to_apply: bool,
    no_space_for_metadata: bool,
    metadata_busy: bool,
    reads: ReadQueue,
    fetches: VecDeque<FetchJob>,
    sessions: BTreeMap<SessionId, EngineId>,
    /// The session whose records are admitted.
    current: Option<SessionId>,
    promise: Option<PendingPromise>,
    leases: Leases,
    condition: Condition,
    apply_retry_at: Time,
    checkpoint_due: bool,
    checkpoint_retry_at: Time,
    last_checkpoint_at: Time,
    closing: bool,
    closed: bool,
    last_group_offset: u64,
    counters: Counters,
    outbox: VecDeque<(SessionId, ToEngine)>,
}

impl Replica {
    /// A replica whose journal was recovered and replayed up to `durable`. `superblock` is the one that was just written
    /// for this opening, with views and history brought up to `durable`, and so is `dirty`. With `old_engines_gone` no
    /// earlier engine can still be alive (it would have run in a process that held this replica's lock).
    #[must_use]
    pub fn new(
        superblock: Superblock,
        ring: Ring,
        durable: Position,
        dirty: DirtyMaps,
        now: Time,
        old_engines_gone: bool,
    ) -> Replica {
        let lease_ms = if old_engines_gone { 0 } else { superblock.lease_ms };
        let leases = Leases::at_open(superblock.engine, Duration::from_millis(lease_ms.into()), now);
        Replica {
            superblock,
            ring,
            received_size: dirty.size_bytes(),
            applied_size: dirty.size_bytes(),
            dirty,
            received: durable,
            durable,
            applied: durable,
            copies: CopyQueue::default(),
            turn: None,
            extends: VecDeque::new(),
            pending: VecDeque::new(),
            pending_bytes: 0,
            unapplied_bytes: 0,
            writing: None,
            in_place: InPlace::default(),
            applying: None,
            apply_in_doubt: false,
            no_space_to_apply: false,
            no_space_for_metadata: false,
            metadata_busy: false,
            reads: ReadQueue::default(),
            fetches: VecDeque::new(),
            sessions: BTreeMap::new(),
            current: None,
            promise: None,
            leases,
            condition: Condition::Healthy,
            apply_retry_at: Time::ZERO,
            checkpoint_due: false,
            checkpoint_retry_at: Time::ZERO,
            last_checkpoint_at: now,
            closing: false,
            closed: false,
            last_group_offset: 0,
            counters: Counters::default(),
            outbox: VecDeque::new(),
        }
    }

    /// The last durable record.
    #[must_use]
    pub fn durable(&self) -> Position {
        self.durable
    }

    /// The last applied record.
    #[must_use]
    pub fn applied(&self) -> Position {
        self.applied
    }

    /// The superblock as it would be written now.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The replicas out of the view, and up to where each holds everything, as of the last durable record.
    #[must_use]
    pub fn tracked(&self) -> Vec<(ReplicaName, Seq)> {
        self.dirty.acknowledged()
    }

    /// Size of the volume as of the last durable record, bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.dirty.size_bytes()
    }

    /// Figures for people.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// How well the replica is.
    #[must_use]
    pub fn condition(&self) -> Condition {
        self.condition
    }

    /// Whether the last superblock of [`Replica::close`] is written.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    fn salt(&self) -> Salt {
        Salt::of(self.superblock.identity.uuid)
    }

    /// Takes the next message for a session. After a [`ToEngine::Refused`] the session is over.
    pub fn poll_outbox(&mut self) -> Option<(SessionId, ToEngine)> {
        self.outbox.pop_front()
    }

    // ---- sessions and promises ---------------------------------------------------------------------------------

    /// An engine said hello.
    pub fn open_session(&mut self, session: SessionId, engine: EngineId, now: Time) {
        self.sessions.insert(session, engine);
        if self.condition == Condition::Poisoned || self.closing {
            let text = if self.closing { "the agent is stopping" } else { "a durable write failed; restart the agent" };
            return self.refuse(session, RefusedReason::Unusable, text);
        }
        let identity = &self.superblock.identity;
        let welcome = Welcome {
            uuid: identity.uuid,
            size_bytes: self.size_bytes(),
            journal_bytes: identity.journal_bytes,
            record_payload_bytes_max: record_payload_bytes_max(identity.journal_bytes),
            promised: self.superblock.promised,
            other_engine_ms_ago: self.leases.other_ms_ago(engine, now),
        };
        self.outbox.push_back((session, ToEngine::Welcome(welcome)));
    }

    /// The connection is gone.
    pub fn close_session(&mut self, session: SessionId) {
        self.sessions.remove(&session);
        if self.current == Some(session) {
            self.current = None;
            self.drop_copies();
            self.drop_turn();
        }
        if self.promise.is_some_and(|p| p.session == session && !p.writing) {
            self.promise = None;
        }
        self.reads.drop_session(session);
        self.fetches.retain(|f| f.session != session);
        self.extends.retain(|e| e.session != session);
    }

    fn refuse(&mut self, session: SessionId, reason: RefusedReason, text: &str) {
        if self.sessions.contains_key(&session) {
            self.outbox.push_back((session, ToEngine::Refused(Refused { reason, text: text.to_owned() })));
            self.close_session(session);
        }
    }

    fn refuse_protocol(&mut self, session: SessionId, text: &str) {
        self.refuse(session, RefusedReason::Protocol, text);
    }

    fn refuse_fenced(&mut self, session: SessionId) {
        let promised = self.superblock.promised;
        self.refuse(session, RefusedReason::Fenced { promised }, &format!("epoch {promised} was promised since"));
    }

    /// A message of a session that said hello.
    pub fn handle(&mut self, now: Time, session: SessionId, message: ToAgent) {
        let Some(engine) = self.sessions.get(&session).copied() else { return };
        match message {
            ToAgent::Promise { epoch, engine: asking, lease_ms } if asking == engine => {
                self.on_promise(now, session, epoch, engine, lease_ms);
            }
            ToAgent::Promise { .. } | ToAgent::Hello(_) | ToAgent::Format(_) => {
                self.refuse_protocol(session, "the replica is there and the session has begun");
            }
            ToAgent::Append(_)
            | ToAgent::Stable { .. }
            | ToAgent::Ping { .. }
            | ToAgent::Read { .. }
            | ToAgent::Fetch { .. }
            | ToAgent::Goodbye
            | ToAgent::Begin(_)
            | ToAgent::Copy(_)
            | ToAgent::Synced
            | ToAgent::ListDirty { .. }
            | ToAgent::Extend { .. }
            | ToAgent::CancelRead { .. }
                if self.current != Some(session) =>
            {
                self.refuse_fenced(session);
            }
            ToAgent::Append(record) => self.on_append(session, record),
            ToAgent::Stable { seq } => {
                self.superblock.stable = self.superblock.stable.max(seq.min(self.durable.seq));
            }
            ToAgent::Ping { token } => {
                self.leases.confirm(now);
                self.outbox.push_back((session, ToEngine::Pong { token }));
            }
            ToAgent::Read { id, what, offset, length } => {
                self.on_read(session, id, what, ByteRange { offset, length });
            }
            ToAgent::Fetch { from, to, what } => {
                let segments = self.ring.segments_of(from, to.min(self.durable.seq), FETCH_BYTES_MAX);
                self.fetches.push_back(FetchJob {
                    session,
                    from,
                    to: to.min(self.durable.seq),
                    what,
                    overwritten: Vec::new(),
                    unsettled: Vec::new(),
                    salt: self.salt(),
                    segments,
                });
            }
            ToAgent::Goodbye => {
                self.leases.release();
                self.superblock.lease_ms = 0;
                self.checkpoint_due = true;
            }
            ToAgent::Begin(begin) => self.on_begin(session, begin),
            ToAgent::Copy(copy) => self.on_copy(session, copy),
            ToAgent::Synced => self.on_synced(session),
            ToAgent::ListDirty { subject, from } => {
                self.outbox.push_back((session, ToEngine::Dirty(self.dirty.list(&subject, from))));
            }
            ToAgent::Extend { size_bytes } => self.on_extend(session, size_bytes),
            ToAgent::CancelRead { id } => self.on_cancel_read(session, id),
        }
    }

    fn on_promise(&mut self, now: Time, session: SessionId, epoch: Epoch, engine: EngineId, lease_ms: u32) {
        let promised = self.superblock.promised;
        let same_engine = epoch == promised && engine == self.superblock.engine;
        if epoch < promised || (epoch == promised && !same_engine) || epoch == Epoch(0) {
            return self.refuse_fenced(session);
        }
        self.leases.promise(engine, Duration::from_millis(lease_ms.into()), now);
        self.superblock.promised = epoch;
        self.superblock.engine = engine;
        self.superblock.lease_ms = lease_ms;
        let others: Vec<SessionId> = self.sessions.keys().copied().filter(|s| *s != session).collect();
        for other in others {
            let was_serving = self.current == Some(other) || self.promise.is_some_and(|p| p.session == other);
            if was_serving {
                self.refuse_fenced(other);
            }
        }
        self.current = None;
        self.drop_copies();
        self.drop_turn();
        self.forget_unwritten();
        self.promise = Some(PendingPromise { session, writing: false });
    }

    /// Drops what was received but is not yet being made durable.
    fn forget_unwritten(&mut self) {
        let kept = self.writing.unwrap_or(self.durable);
        self.in_place.forget_if_not_begun = self.writing.is_some();
        while self.pending.back().is_some_and(|r| r.seq() > kept.seq) {
            let dropped = self.pending.pop_back().expect("just seen");
            self.pending_bytes -= u64::from(dropped.header.payload_length);
        }
        self.received = kept;
        self.received_size = self.pending.iter().rev().find_map(new_size).unwrap_or(self.applied_size);
    }

    fn on_promise_durable(&mut self, now: Time, promise: PendingPromise) {
        self.promise = None;
        if !self.sessions.contains_key(&promise.session) {
            return;
        }
        self.current = Some(promise.session);
        let promised = Promised {
            epoch: self.superblock.promised,
            position: self.durable,
            size_bytes: self.size_bytes(),
            views: self.superblock.views.clone(),
            history: self.superblock.history.clone(),
            acks: self.superblock.acks,
            syncing: self.superblock.syncing,
            journal_first: self.ring.first().unwrap_or(self.durable.seq.next()),
            stable: self.superblock.stable,
            tracked: self.tracked(),
            lease_remaining_ms: self.leases.remaining_ms(now),
            unsettled: self.superblock.unsettled.clone(),
        };
        self.outbox.push_back((promise.session, ToEngine::Promised(promised)));
        if self.condition != Condition::Healthy {
            self.outbox.push_back((promise.session, ToEngine::Condition(self.condition)));
        }
    }

    // ---- records -----------------------------------------------------------------------------------------------

    fn on_append(&mut self, session: SessionId, record: Record) {
        if let Err(text) = self.check_append(&record) {
            return self.refuse_protocol(session, &text);
        }
        self.received = record.header.position();
        self.received_size = new_size(&record).unwrap_or(self.received_size);
        self.pending_bytes += u64::from(record.header.payload_length);
        self.pending.push_back(record);
    }

    fn check_append(&self, record: &Record) -> Result<(), String> {
        let header = &record.header;
        if self.begins_anew() {
            return Err(format!("record {} came before the replica has begun anew", header.seq));
        }
        let expected = self.received.seq.next();
        if header.seq != expected {
            return Err(format!("record {} came where {expected} was due", header.seq));
        }
        if header.epoch > self.superblock.promised || header.epoch < self.received.epoch {
            return Err(format!("record {} is of epoch {}", header.seq, header.epoch));
        }
        if header.payload_length > record_payload_bytes_max(self.superblock.identity.journal_bytes) {
            return Err(format!("record {} is longer than the journal allows", header.seq));
        }
        if self.pending_bytes + self.copies.bytes() > PENDING_BYTES_MAX {
            return Err("more records are in flight than may be".to_owned());
        }
        header.check_range(self.received_size).map_err(|e| e.to_string())?;
        // The payload was compared with its checksum when it came off the network.
        check_payload_shape(record).map_err(|e| e.to_string())?;
        match new_size(record) {
            Some(size) if size < self.received_size || !is_size_allowed(size) => {
                Err(format!("record {} makes {size} bytes of {}", header.seq, self.received_size))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Whether [`Replica::next_group`] may have a job.
    #[must_use]
    pub fn has_group(&self) -> bool {
        self.writing.is_none()
            && self.received > self.durable
            && self.unapplied_bytes < UNAPPLIED_BYTES_MAX
            && self.condition != Condition::Poisoned
    }

    /// The next group to write durably; [`Replica::group_done`] must follow.
    pub fn next_group(&mut self) -> Option<GroupJob> {
        if !self.has_group() {
            return None;
        }
        let (mut records, mut intents) = self.compose_group();
        let first = records.first()?.seq();
        let Some((offset, last)) = self.take_room(&mut records, &intents, first) else {
            self.checkpoint_due = true;
            return None;
        };
        intents.retain(|seq| *seq <= last.seq);
        self.in_place.begin(intents.clone());
        if offset < self.last_group_offset {
            self.counters.wraps += 1;
        }
        self.last_group_offset = offset;
        self.writing = Some(last);
        Some(GroupJob { offset, salt: self.salt(), generation: self.superblock.generation, records, intents })
    }

    /// The records of the next group, and which of them are intents.
    fn compose_group(&self) -> (Vec<Record>, Vec<Seq>) {
        let bytes_max = group_bytes_max(self.superblock.identity.journal_bytes);
        let skip = self.durable.seq.ahead_of(self.applied.seq) as usize;
        let mut bytes = 0;
        let mut intents: Vec<&Record> = Vec::new();
        let mut records = Vec::new();
        for (index, record) in self.pending.iter().enumerate().skip(skip) {
            // What comes after an intent and touches it must not be in its group: only the blocks of an intent tell whether
            // its group counts.
            let range = record.header.range();
            let touches = range.length > 0 && intents.iter().any(|intent| intent.header.range().shares_block(range));
            let is_intent = self.can_be_intent(index, record);
            bytes += entry_bytes(record, is_intent);
            if touches || bytes > bytes_max || (is_intent && !in_place::has_room_for_another(&intents, record)) {
                break;
            }
            intents.extend(is_intent.then_some(record));
            records.push(record.clone());
        }
        (records, intents.into_iter().map(Record::seq).collect())
    }

    /// Takes room for as many of the records as there is room for.
    fn take_room(&mut self, records: &mut Vec<Record>, intents: &[Seq], first: Seq) -> Option<(u64, Position)> {
        loop {
            let last = records.last()?.header.position();
            if let Some(offset) = self.ring.take(group_bytes(records.iter(), intents), first, last.seq) {
                return Some((offset, last));
            }
            records.pop();
        }
    }

    /// The group was written, or was not.
    pub fn group_done(&mut self, outcome: GroupOutcome) {
        let last = self.writing.take().expect("a group was being written");
        match outcome {
            GroupOutcome::Durable => self.in_place.written(),
            GroupOutcome::NotBegun => return self.group_not_begun(),
            GroupOutcome::Failed => return self.poison(),
        }
        let first = self.durable.seq.ahead_of(self.applied.seq) as usize;
        let count = last.seq.ahead_of(self.durable.seq) as usize;
        for record in self.pending.iter().skip(first).take(count) {
            let is_done = self.in_place.is_done(record.seq());
            self.ring.note_durable(record.seq(), record.header.range(), is_done);
            if !is_done {
                self.unapplied_bytes += u64::from(record.header.payload_length);
            }
            note_durable(&mut self.superblock, &mut self.dirty, record)
                .expect("records are checked before they are journaled");
        }
        self.counters.groups += 1;
        self.counters.records += count as u64;
        self.durable = last;
        if let Some(session) = self.current {
            self.outbox.push_back((session, ToEngine::Durable { seq: last.seq }));
        }
    }

    fn poison(&mut self) {
        self.condition = Condition::Poisoned;
        if let Some(session) = self.current {
            self.outbox.push_back((session, ToEngine::Condition(Condition::Poisoned)));
        }
        let sessions: Vec<SessionId> = self.sessions.keys().copied().collect();
        for session in sessions {
            self.refuse(session, RefusedReason::Unusable, "a durable write failed; restart the agent");
        }
    }

    // ---- reads -------------------------------------------------------------------------------------------------

    fn on_read(&mut self, session: SessionId, id: u64, what: ReadKind, range: ByteRange) {
        let ByteRange { offset, length } = range;
        let sound = (1..=what.bytes_max()).contains(&length)
            && offset.checked_add(length).is_some_and(|end| end <= self.received_size)
            && (what != ReadKind::Scrub || range == range.aligned(BLOCK_BYTES));
        if !sound || self.reads.len() >= READS_MAX {
            return self.refuse_protocol(session, &format!("read of {offset}+{length} cannot be taken"));
        }
        let job = ReadJob { session, id, what, range };
        if !job.looks() {
            return self.reads.make_ready(job);
        }
        let grows = range.end() > self.applied_size;
        let concerns = |r: &&Record| r.header.range().shares_block(range) || (grows && new_size(r).is_some());
        let record = self.pending.iter().rev().find(concerns).map(|r| Place { seq: r.seq(), copy: 0 });
        match record.max(self.copies.last_on(range)) {
            Some(place) => self.reads.wait_for(place, job),
            None => self.reads.make_ready(job),
        }
    }

    /// What is not at work is not begun, and answered at once: the engine counts on one answer for each read.
    fn on_cancel_read(&mut self, session: SessionId, id: u64) {
        if self.reads.cancel(session, id) {
            let (applied, outcome) = (self.applied.seq, ReadOutcome::Cancelled);
            self.outbox.push_back((session, ToEngine::ReadDone { id, applied, outcome }));
        }
    }

    /// Whether [`Replica::next_read`] has a job.
    #[must_use]
    pub fn has_read(&self) -> bool {
        self.reads.has_ready()
    }

    /// The next read, if it is one for at most `bytes_max` bytes of data, to be done as far as memory has what it wants;
    /// [`Replica::read_done`] must follow, or [`Replica::not_cached`]. None while a device is waited for.
    pub fn next_read_at_once(&mut self, bytes_max: u64) -> Option<ReadJob> {
        self.reads.start_at_once(bytes_max)
    }

    /// Memory has not all that a read wants: [`Replica::next_read`] will give it.
    pub fn not_cached(&mut self, job: ReadJob) {
        self.reads.not_cached(job, self.current == Some(job.session));
    }

    /// The next read; [`Replica::read_done`] must follow. Several may be at work at once.
    pub fn next_read(&mut self) -> Option<ReadJob> {
        self.reads.start()
    }

    /// A read ended.
    pub fn read_done(&mut self, job: ReadJob, outcome: ReadOutcome) {
        self.reads.finish(job);
        if self.current == Some(job.session) {
            // Records being applied side by side do not touch the read's blocks; naming them is only cautious.
            let applied = match self.applying {
                Some(Applying::Records(last) | Applying::Growth(last, _)) => last.seq,
                Some(Applying::Copies) | None => self.applied.seq,
            };
            self.outbox.push_back((job.session, ToEngine::ReadDone { id: job.id, applied, outcome }));
        }
    }

    /// The next journal read for another member; [`Replica::fetch_done`] must follow.
    pub fn next_fetch(&mut self) -> Option<FetchJob> {
        if !self.has_fetch() {
            return None;
        }
        let mut job = self.fetches.pop_front()?;
        job.overwritten = self.ring.intents().overwritten(job.from, job.to);
        job.unsettled.clone_from(&self.superblock.unsettled);
        Some(job)
    }

    /// Whether [`Replica::next_fetch`] has a job. What intents wrote is read from the image, with everything applied.
    #[must_use]
    pub fn has_fetch(&self) -> bool {
        let is_at_rest = self.applied == self.durable && self.writing.is_none();
        self.fetches.front().is_some_and(|job| {
            let needs_image = job.what == FetchKind::Records && self.ring.intents().are_within(job.from, job.to);
            is_at_rest || !needs_image
        })
    }

    /// What was found in the job's segments, as far as they could be read.
    pub fn fetch_done(&mut self, job: &FetchJob, found: Vec<Found>) {
        if self.current != Some(job.session) {
            return;
        }
        let mut next = job.from;
        for found in found {
            if found.seq() == next && next <= job.to {
                next = next.next();
                let message = match found {
                    Found::Record(record) => ToEngine::Fetched(record),
                    Found::Range(seq, range) => ToEngine::Changed { seq, range },
                };
                self.outbox.push_back((job.session, message));
            }
        }
        self.outbox.push_back((job.session, ToEngine::FetchEnd { next }));
    }
}

/// Checks what a record says beside its effect on the image.
fn check_payload_shape(record: &Record) -> Result<(), Malformed> {
    match record.header.kind {
        RecordKind::EpochStart => AckPolicies::decode(&record.payload).map(drop),
        RecordKind::ViewChange => ViewChange::decode(&record.payload).map(drop),
        RecordKind::DirtyChange => DirtyChange::decode(&record.payload).map(drop),
        RecordKind::Resize => Resize::decode(&record.payload).map(drop),
        RecordKind::Write if record.header.amended => Amended::of(record).map(drop),
        RecordKind::Write | RecordKind::Trim | RecordKind::WriteZeroes => Ok(()),
    }
}

/// The size that a record gives the volume, bytes.
fn new_size(record: &Record) -> Option<u64> {
    let is_resize = record.header.kind == RecordKind::Resize;
    is_resize.then(|| Resize::decode(&record.payload).ok()).flatten().map(|resize| resize.size_bytes)
}

/// Brings views, history, ack policies and dirty bitmaps up to a record that is durable.
pub fn note_durable(superblock: &mut Superblock, dirty: &mut DirtyMaps, record: &Record) -> Result<(), Malformed> {
    let position = record.header.position();
    if superblock.history.entries().last().is_none_or(|last| last.epoch < position.epoch) {
        superblock.history.note(position);
    }
    // Not a record twice: the bitmaps would forget marks.
    if position.seq > superblock.tracked_seq {
        dirty.note(record, superblock.generation)?;
    }
    note_settled(superblock, &record.header);
    match record.header.kind {
        RecordKind::EpochStart => superblock.acks = Some(AckPolicies::decode(&record.payload)?),
        RecordKind::ViewChange if position.seq > superblock.views.seq => {
            let change = ViewChange::decode(&record.payload)?;
            superblock.views.change(change.view, change.forced, position.seq);
        }
        RecordKind::ViewChange
        | RecordKind::DirtyChange
        | RecordKind::Resize
        | RecordKind::Write
        | RecordKind::Trim
        | RecordKind::WriteZeroes => {}
    }
    Ok(())
}
