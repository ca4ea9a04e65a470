//! A volume as a state machine: the order of its changes, who holds how much of it, when a client is answered.
//!
//! Every change gets the next place in one order and goes to all members through one log, read by each member at its own
//! pace. A change is acknowledged when enough members of the view *in force* hold it durably ([`protocol::AckPolicy`]);
//! as each member takes records in order, one number per member (`durable`) says all about it. Members that fall too
//! far behind leave the view ([`membership`]); an engine that starts learns from the members' promises which history is
//! the true one ([`activation`]); reads go through the same queues ([`dispatch`]).
//!
//! **Invariants**
//! * Acknowledgements count members of the view in force only; a view change is in force when durable on enough members
//!   of the view before it; one view change at a time.
//! * Nothing is answered before activation is complete, and nothing after a higher epoch was seen anywhere.
//! * A read never shows a record that is not acknowledged by policy, and none is answered without a valid lease.
//! * Every queue is bounded: the log by `log_bytes_max`, reads by a number per peer, held requests by who submits them.
//! * No clock, file, socket, thread or randomness in here: time is an argument, and equal inputs give equal outputs.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod acks;
mod activation;
mod command;
mod compare;
mod copying;
mod dispatch;
mod fresh_read;
mod interface;
mod log;
mod majority;
mod membership;
mod notice;
mod peer;
mod precedence;
mod rate;
mod read_latency;
mod reads;
mod refusal;
mod repair;
mod resync;
mod scrub;
mod settling;
mod snapshot;
mod survey;
mod ties;
mod verify;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use protocol::message::{Condition, Hello, ReadKind, RefusedReason};
use protocol::quorum::AckPolicies;
use protocol::ranges::ByteRange;
use protocol::{
    Epoch, EpochHistory, Position, RECORD_PAYLOAD_BYTES_MAX, Record, RecordKind, ReplicaName, Seq, ToAgent, ToEngine,
    ViewState, VolumeUuid,
};

use acks::Acks;
use activation::Activation;
use command::Resizing;
pub use command::{Command, CommandRefusal};
pub use interface::{Answer, Event, Failure, ReadSpread, Request, VolumeSettings, Zeroing};
use log::Log;
use membership::Membership;
pub use notice::{DropReason, Notice, Severity};
use peer::{Link, Peer, Role};
use reads::Reads;
pub use refusal::{MissingReplica, StartRefusal};
pub use repair::Damage;
use repair::Repairs;
use resync::Resync;
pub use resync::ResyncSnapshot;
use scrub::Scrub;
pub use scrub::{ScrubFound, ScrubMark, ScrubSnapshot};
pub use snapshot::{PeerSnapshot, PeerState, VolumeSnapshot, VolumeState};
use survey::Survey;

/// Time since a fixed moment of the process.
pub type Time = Duration;
/// A replica of the volume, by its place in the configuration.
pub type PeerId = usize;

#[derive(Debug)]
enum Phase {
    Activating(Activation),
    Serving,
    Dead,
}

/// The state machine.
#[derive(Debug)]
pub struct Volume<T> {
    settings: VolumeSettings,
    phase: Phase,
    stopping: bool,
    uuid: Option<VolumeUuid>,
    size_bytes: u64,
    epoch: Epoch,
    history: EpochHistory,
    /// The first record of this epoch.
    epoch_start: Seq,
    /// What was unsettled at the start and stays so, as nobody had a sound copy of it.
    unsettled_for_good: Vec<ByteRange>,
    /// As of the last record given out.
    views: Option<ViewState>,
    /// Replicas out of the view, and up to where members know each to hold everything.
    tracked: BTreeMap<ReplicaName, Seq>,
    /// What changed after the last record that all members held when the engine before this one stopped; being learned
    /// from the journal of a member, or known. Only if a member was absent at activation.
    stable_survey: Option<(Seq, Survey)>,
    since_stable: Option<SinceStable>,
    resync: Option<Resync>,
    repairs: Repairs,
    scrub: Option<Scrub>,
    resizing: Option<Resizing>,
    /// The policies of the epoch before this one.
    stored_acks: Option<AckPolicies>,
    /// There once activation has found the true history.
    log: Option<Log>,
    membership: Option<Membership>,
    peers: Vec<Peer>,
    /// The members that get records at once.
    front: Vec<PeerId>,
    record_payload_bytes_max: u32,
    journal_bytes_min: u64,
    write_acks: Acks<T>,
    flush_acks: Acks<T>,
    /// Changes that wait for room in the log, in order; the first may be partly given out.
    held: VecDeque<HeldChange<T>>,
    reads: Reads<T>,
    /// Since when too few members can be reached.
    frozen_since: Option<Time>,
    stable_told: Seq,
    stable_told_at: Time,
    /// Journal bytes of all records up to `stable_told`.
    stable_told_bytes: u64,
    next_token: u64,
    events: VecDeque<Event<T>>,
    counts: Counts,
}

/// What the records of earlier engines changed that some member may lack.
#[derive(Debug)]
struct SinceStable {
    /// Every member held the records up to here.
    stable: Seq,
    /// The records after that, up to here, changed these ranges.
    until: Seq,
    ranges: Vec<ByteRange>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    reads: u64,
    writes: u64,
    statuses: u64,
    prefetches: u64,
}

#[derive(Debug)]
struct HeldChange<T> {
    token: T,
    request: Request,
    /// Bytes of its range that already have places.
    given_out: u64,
    queued_at: Time,
}

/// Payload that is compared with its checksums when a peer comes back, at most, bytes.
const LOOKED_AT_BYTES_MAX: usize = 1 << 20;
const STABLE_INTERVAL: Duration = Duration::from_millis(50);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Longer than pings may take: a promise waits for a checkpoint that is being taken.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

impl<T> Volume<T> {
    /// A volume that begins its activation at `now`.
    #[must_use]
    pub fn new(settings: VolumeSettings, now: Time) -> Volume<T> {
        let peers = settings.replicas.iter().map(|name| Peer::new(name.clone(), now)).collect();
        Volume {
            phase: Phase::Activating(Activation::new(now)),
            stopping: false,
            uuid: None,
            size_bytes: settings.size_bytes,
            epoch: Epoch(0),
            history: EpochHistory::default(),
            epoch_start: Seq(0),
            unsettled_for_good: Vec::new(),
            views: None,
            tracked: BTreeMap::new(),
            stable_survey: None,
            since_stable: None,
            resync: None,
            repairs: Repairs::default(),
            scrub: None,
            resizing: None,
            stored_acks: None,
            log: None,
            membership: None,
            peers,
            front: Vec::new(),
            record_payload_bytes_max: RECORD_PAYLOAD_BYTES_MAX,
            journal_bytes_min: u64::MAX,
            write_acks: Acks::new(),
            flush_acks: Acks::new(),
            held: VecDeque::new(),
            reads: Reads::new(),
            frozen_since: None,
            stable_told: Seq(0),
            stable_told_at: Time::ZERO,
            stable_told_bytes: 0,
            next_token: 0,
            events: VecDeque::new(),
            counts: Counts::default(),
            settings,
        }
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event<T>> {
        self.events.pop_front()
    }

    fn is_dead(&self) -> bool {
        matches!(self.phase, Phase::Dead)
    }

    fn notice(&mut self, notice: Notice) {
        self.events.push_back(Event::Notice(notice));
    }

    fn complete(&mut self, token: T, outcome: Result<Answer, Failure>) {
        self.events.push_back(Event::Completed(token, outcome));
    }

    // ---- connections -------------------------------------------------------------------------------------------

    /// A connection to a peer was made.
    pub fn peer_connected(&mut self, now: Time, peer: PeerId) {
        if self.is_dead() || self.peers[peer].role == Role::Gone {
            return;
        }
        let hello = Hello {
            volume: self.settings.name.clone(),
            replica: self.peers[peer].name.clone(),
            engine: self.settings.engine,
        };
        self.peers[peer].link = Link::Greeting { since: now };
        self.peers[peer].linked_at = now;
        self.peers[peer].push_urgent(ToAgent::Hello(hello));
    }

    /// The connection to a peer is gone, or could not be made.
    pub fn peer_disconnected(&mut self, now: Time, peer: PeerId, reason: String) {
        let at = &mut self.peers[peer];
        // Why the volume ended the connection tells more than that it ended.
        if !std::mem::take(&mut at.ended) {
            self.note_trouble(peer, reason);
        }
        self.note_lost(peer);
        self.peers[peer].reset(now);
        self.reads_lost(now, peer);
        if self.is_dead() {
            return;
        }
        self.activation_lost(now, peer);
        self.settle(now);
    }

    /// Keeps why a peer cannot be had, and says so while the volume starts.
    fn note_trouble(&mut self, peer: PeerId, reason: String) {
        let at = &mut self.peers[peer];
        if matches!(self.phase, Phase::Activating(_)) && at.last_error.as_ref() != Some(&reason) {
            let notice = Notice::Waiting { replica: at.name.clone(), reason: reason.clone() };
            self.events.push_back(Event::Notice(notice));
        }
        at.last_error = Some(reason);
    }

    /// Keeps why a replica refuses to serve, and says so once.
    fn note_refusal(&mut self, peer: PeerId, reason: String) {
        let at = &self.peers[peer];
        if matches!(self.phase, Phase::Serving) && at.last_error.as_ref() != Some(&reason) {
            let notice = Notice::Refuses { replica: at.name.clone(), reason: reason.clone() };
            self.notice(notice);
        }
        self.note_trouble(peer, reason);
    }

    /// Says that a member goes out of reach, and why.
    fn note_lost(&mut self, peer: PeerId) {
        let at = &self.peers[peer];
        if at.is_ready_member() && !self.is_dead() {
            let reason = at.last_error.clone().unwrap_or_default();
            self.notice(Notice::Lost { replica: at.name.clone(), reason });
        }
    }

    fn disconnect(&mut self, now: Time, peer: PeerId) {
        let at = &mut self.peers[peer];
        at.ended = !matches!(at.link, Link::Down { .. });
        self.note_lost(peer);
        self.peers[peer].reset(now);
        self.events.push_back(Event::Disconnect(peer));
        self.reads_lost(now, peer);
    }

    /// A message of a peer.
    pub fn peer_message(&mut self, now: Time, peer: PeerId, message: ToEngine) {
        if self.is_dead() || matches!(self.peers[peer].link, Link::Down { .. }) {
            return;
        }
        match message {
            ToEngine::Welcome(welcome) => self.on_welcome(now, peer, welcome),
            ToEngine::Promised(promised) => self.on_promised(now, peer, promised),
            ToEngine::Durable { seq } => self.on_durable(now, peer, seq),
            ToEngine::Pong { token } => {
                let at = &mut self.peers[peer];
                if let Some((_, sent_at)) = at.ping.take_if(|(sent, _)| *sent == token) {
                    at.confirmed_at = Some(sent_at);
                }
            }
            ToEngine::ReadDone { id, applied, outcome } => self.on_read_done(now, peer, id, applied, outcome),
            ToEngine::Fetched(record) => self.on_fetched(peer, record),
            ToEngine::Changed { seq, range } => {
                if let Some(survey) = self.survey_of(peer) {
                    survey.take(seq, range);
                }
            }
            ToEngine::Begun => self.on_begun(now, peer),
            ToEngine::Copied { id } => self.on_copied(now, peer, id),
            ToEngine::InSync => self.on_in_sync(now, peer),
            ToEngine::Dirty(dirty) => self.on_dirty(now, peer, dirty),
            ToEngine::Extended { size_bytes, refused } => self.on_extended(peer, size_bytes, refused),
            ToEngine::FetchEnd { next } => self.on_fetch_end(now, peer, next),
            ToEngine::Condition(condition) => self.on_condition(now, peer, condition),
            ToEngine::Refused(refused) => match refused.reason {
                RefusedReason::Fenced { promised } => self.on_fenced(now, peer, promised),
                RefusedReason::NoReplica
                | RefusedReason::HasData
                | RefusedReason::Unusable
                | RefusedReason::Protocol => {
                    self.note_refusal(peer, refused.text);
                    self.disconnect(now, peer);
                    self.activation_lost(now, peer);
                }
            },
            ToEngine::Formatted => {}
        }
        self.settle(now);
    }

    fn on_fenced(&mut self, now: Time, peer: PeerId, promised: Epoch) {
        let counts = matches!(self.peers[peer].role, Role::Member | Role::Leaving | Role::Joining | Role::Unknown);
        if !counts && self.log.is_some() {
            // It is out of the view: what it promised elsewhere overtakes nobody, but it cannot come back to this engine.
            let text = format!("it promised epoch {promised} to another engine; restart this one to take it back");
            self.note_trouble(peer, text);
            return self.disconnect(now, peer);
        }
        match self.phase {
            Phase::Activating(_) if self.log.is_none() => self.outbid(now, promised),
            Phase::Activating(_) | Phase::Serving => {
                let replica = self.peers[peer].name.clone();
                self.die(Failure::Shutdown);
                self.events.push_back(Event::Fenced { promised, replica });
            }
            Phase::Dead => {}
        }
    }

    /// Whether a record that a peer lacks who comes back after `seq` has changed in memory: refusing it may be why it left, and
    /// every other peer would refuse it too. That is the end of the volume here.
    fn has_changed_after(&mut self, seq: Seq) -> bool {
        let changed = self.log.as_ref().and_then(|log| log.first_changed_after(seq, LOOKED_AT_BYTES_MAX));
        if let Some(seq) = changed {
            self.die(Failure::Shutdown);
            self.events.push_back(Event::Corrupt { seq });
        }
        changed.is_some()
    }

    /// Ends the volume: every request fails.
    fn die(&mut self, failure: Failure) {
        self.phase = Phase::Dead;
        self.resync = None;
        self.repairs = Repairs::default();
        self.scrub = None;
        self.fail_waiting(failure);
    }

    fn on_condition(&mut self, now: Time, peer: PeerId, condition: Condition) {
        let at = &mut self.peers[peer];
        let was_full = at.full_since.is_some();
        let is_full = condition == Condition::NoSpace;
        at.condition = condition;
        at.full_since = is_full.then(|| at.full_since.unwrap_or(now));
        if was_full != is_full {
            let replica = at.name.clone();
            self.notice(Notice::Space { replica, full: is_full });
        }
    }

    // ---- requests ----------------------------------------------------------------------------------------------

    /// Takes a request; a [`Event::Completed`] follows. Changes get their places in the order of these calls.
    pub fn submit(&mut self, now: Time, token: T, request: Request) {
        if self.is_dead() || self.stopping {
            return self.complete(token, Err(Failure::Shutdown));
        }
        match request {
            Request::Read(range) => {
                self.counts.reads += 1;
                self.begin_read(now, token, ReadKind::Data, range);
            }
            Request::Status(range) => {
                self.counts.statuses += 1;
                self.begin_read(now, token, ReadKind::Extents, range);
            }
            Request::Prefetch(range) => {
                self.counts.prefetches += 1;
                self.begin_read(now, token, ReadKind::Prefetch, range);
            }
            Request::Flush => match &self.log {
                Some(log) => {
                    let last = log.last();
                    self.flush_acks.push(last, token, now);
                    self.release_committed(now);
                }
                None => self.complete(token, Err(Failure::Io)),
            },
            Request::Write { .. } | Request::Zero { .. } => {
                self.counts.writes += 1;
                self.held.push_back(HeldChange { token, request, given_out: 0, queued_at: now });
                self.give_out(now);
                self.enforce_limits(now);
            }
        }
    }

    fn log_bytes_max(&self) -> u64 {
        let lag = self.settings.lag_bytes_max;
        if self.settings.throttle { lag } else { lag + lag / 4 }
    }

    /// Gives places to held changes as long as there is room.
    fn give_out(&mut self, now: Time) {
        while let Some(mut change) = self.held.pop_front() {
            if !self.give_out_change(now, &mut change) {
                self.held.push_front(change);
                return;
            }
            let HeldChange { token, request, queued_at, .. } = change;
            let Some(log) = &self.log else { return self.complete(token, Err(Failure::Io)) };
            let last = log.last();
            match request {
                Request::Write { fua: false, .. } | Request::Zero { fua: false, .. } => {
                    self.write_acks.push(last, token, queued_at);
                }
                Request::Write { .. }
                | Request::Zero { .. }
                | Request::Flush
                | Request::Read(_)
                | Request::Status(_)
                | Request::Prefetch(_) => {
                    self.flush_acks.push(last, token, queued_at);
                }
            }
        }
    }

    /// Whether all of the change has its places now. Without room, or when all disks are full, it does not.
    fn give_out_change(&mut self, now: Time, change: &mut HeldChange<T>) -> bool {
        let (range, kind) = match &change.request {
            Request::Write { offset, data, .. } => {
                (ByteRange { offset: *offset, length: data.len() as u64 }, RecordKind::Write)
            }
            Request::Zero { range, how: Zeroing::Trim, .. } => (*range, RecordKind::Trim),
            Request::Zero { range, how: Zeroing::Zero | Zeroing::ZeroKeepAllocated, .. } => {
                (*range, RecordKind::WriteZeroes)
            }
            Request::Read(_) | Request::Status(_) | Request::Prefetch(_) | Request::Flush => return true,
        };
        let no_hole = matches!(change.request, Request::Zero { how: Zeroing::ZeroKeepAllocated, .. });
        while change.given_out < range.length {
            let bytes_max = self.log_bytes_max();
            if self.log.as_ref().is_none_or(|log| log.bytes() >= bytes_max) || self.is_full() {
                return false;
            }
            if self.is_paced(now, now.saturating_sub(change.queued_at)) {
                return false;
            }
            let step = match kind {
                RecordKind::Write => u64::from(self.record_payload_bytes_max).min(range.length - change.given_out),
                RecordKind::Trim
                | RecordKind::WriteZeroes
                | RecordKind::EpochStart
                | RecordKind::ViewChange
                | RecordKind::DirtyChange
                | RecordKind::Resize => range.length,
            };
            let piece = ByteRange { offset: range.offset + change.given_out, length: step };
            if self.is_held_for_copy(piece, now) || self.is_held_for_reads(piece, now) {
                return false;
            }
            let payload = match &change.request {
                Request::Write { data, .. } => {
                    data.slice(change.given_out as usize..(change.given_out + step) as usize)
                }
                Request::Zero { .. }
                | Request::Read(_)
                | Request::Status(_)
                | Request::Prefetch(_)
                | Request::Flush => Bytes::new(),
            };
            self.append(now, kind, piece, no_hole, payload);
            change.given_out += step;
        }
        true
    }

    /// Whether a change must wait for a read that changes have made useless too often.
    fn is_held_for_reads(&self, range: ByteRange, now: Time) -> bool {
        let compares = self.settings.read == ReadSpread::Verify;
        self.repairs.holds(range, now) || (compares && self.reads.holds(range, now))
    }

    /// Gives the next place to a record.
    fn append(&mut self, now: Time, kind: RecordKind, range: ByteRange, no_hole: bool, payload: Bytes) -> Seq {
        let mut record = Record::new(self.next_position(), kind, range, payload);
        record.header.no_hole = no_hole;
        self.append_record(now, record)
    }

    fn next_position(&self) -> Position {
        let log = self.log.as_ref().expect("places are given out after activation found the history");
        Position { epoch: self.epoch, seq: log.last().next() }
    }

    /// Gives the next place to a record that was made for it.
    fn append_record(&mut self, now: Time, record: Record) -> Seq {
        let (seq, range) = (record.seq(), record.header.range());
        if let Some(log) = &mut self.log {
            log.push(record, now);
        }
        if range.length > 0 {
            self.overlap_chunks(range);
            self.repairs.overlap(range, seq);
            self.overlap_scrub(range);
            if self.settings.read == ReadSpread::Verify {
                self.reads.overlap(range);
            }
        }
        seq
    }

    // ---- progress ----------------------------------------------------------------------------------------------

    fn on_durable(&mut self, now: Time, peer: PeerId, seq: Seq) {
        let sent = self.replay_sent(peer).unwrap_or(self.peers[peer].sent());
        let queued_at = self.log.as_ref().and_then(|log| log.queued_at(self.peers[peer].durable.next()));
        let at = &mut self.peers[peer];
        if !at.is_ready() || seq <= at.durable {
            return;
        }
        if seq > sent {
            // Believing it would acknowledge what no disk holds.
            at.last_error = Some(format!("it acknowledged record {seq}, but was sent no more than {sent}"));
            self.disconnect(now, peer);
            return self.activation_lost(now, peer);
        }
        at.acknowledge(seq, queued_at, now);
    }

    /// Draws the consequences of whatever happened.
    fn settle(&mut self, now: Time) {
        if self.is_dead() {
            return;
        }
        self.advance_activation(now);
        if self.log.is_some() {
            self.advance_view(now);
            self.release_committed(now);
            self.release_reads(now);
            self.advance_survey();
            self.enforce_limits(now);
            self.finish_removals(now);
            self.advance_resync(now);
            self.advance_scrub(now);
            self.advance_resizing(now);
            self.advance_repairs(now);
            self.cancel_losers();
            self.trim(now);
            self.choose_front();
            self.give_out(now);
        }
    }

    fn release_committed(&mut self, now: Time) {
        if !matches!(self.phase, Phase::Serving) {
            return;
        }
        let committed = self.committed(self.settings.ack_write);
        while let Some((token, asked_at)) = self.write_acks.pop_committed(committed) {
            self.note_client(asked_at, now);
            self.complete(token, Ok(Answer::Done));
        }
        let committed = self.committed(self.settings.ack_flush);
        while let Some((token, asked_at)) = self.flush_acks.pop_committed(committed) {
            self.note_client(asked_at, now);
            self.complete(token, Ok(Answer::Done));
        }
    }

    /// Tells members up to where all hold the order, and forgets it here.
    fn trim(&mut self, now: Time) {
        let Some(stable) = self.stable_seq() else { return };
        let followed = self.followed();
        let Some(log) = &mut self.log else { return };
        let bytes_until = log.bytes_until(stable);
        let news = bytes_until.saturating_sub(self.stable_told_bytes);
        log.trim(followed.map_or(stable, |followed| followed.min(stable)));
        let due = now.saturating_sub(self.stable_told_at) >= STABLE_INTERVAL || news > self.journal_bytes_min / 16;
        if stable > self.stable_told && due {
            self.stable_told = stable;
            self.stable_told_bytes = bytes_until;
            self.stable_told_at = now;
            for peer in self.peers.iter_mut().filter(|p| p.takes_records()) {
                peer.push_urgent(ToAgent::Stable { seq: stable });
            }
        }
    }

    /// Time passes. Call this every few milliseconds.
    pub fn tick(&mut self, now: Time) {
        if self.is_dead() {
            return;
        }
        self.ping(now);
        self.hedge(now);
        self.fail_hopeless(now);
        self.expire(now);
        self.settle(now);
    }

    fn ping(&mut self, now: Time) {
        let mut silent = Vec::new();
        for (id, peer) in self.peers.iter_mut().enumerate().filter(|(_, p)| p.takes_records()) {
            match peer.ping {
                Some((_, sent_at)) if now.saturating_sub(sent_at) > PING_TIMEOUT => silent.push(id),
                Some(_) => {}
                None if now.saturating_sub(peer.last_ping_at) >= self.settings.lease / 4 => {
                    self.next_token += 1;
                    peer.ping = Some((self.next_token, now));
                    peer.last_ping_at = now;
                    peer.push_urgent(ToAgent::Ping { token: self.next_token });
                }
                None => {}
            }
        }
        silent.extend((0..self.peers.len()).filter(|id| self.peers[*id].answer_overdue(now, HANDSHAKE_TIMEOUT)));
        for peer in silent {
            self.peers[peer].last_error = Some("no answer for too long".to_owned());
            self.disconnect(now, peer);
        }
    }

    /// Fails what waits for members that have been out of reach too long, or for room that no member has. What has its
    /// place in the order keeps it and may still come to pass.
    fn expire(&mut self, now: Time) {
        let frozen = self.is_frozen();
        if frozen != self.frozen_since.is_some() && matches!(self.phase, Phase::Serving) {
            self.notice(Notice::Frozen(frozen));
        }
        self.frozen_since = frozen.then(|| self.frozen_since.unwrap_or(now));
        if self.frozen_since.is_some_and(|since| now.saturating_sub(since) >= self.settings.freeze) {
            self.fail_waiting(Failure::Io);
        }
        if self.is_full() {
            while let Some(change) = self.held.pop_front() {
                self.complete(change.token, Err(Failure::NoSpace));
            }
        }
    }

    fn fail_waiting(&mut self, failure: Failure) {
        let mut tokens = Vec::new();
        while let Some(token) = self.write_acks.pop().or_else(|| self.flush_acks.pop()) {
            tokens.push(token);
        }
        tokens.extend(self.reads.take_all());
        tokens.extend(self.held.drain(..).map(|h| h.token));
        for token in tokens {
            self.complete(token, Err(failure));
        }
    }

    // ---- stopping ----------------------------------------------------------------------------------------------

    /// Takes no more requests. Members go on catching up until [`Volume::goodbye`].
    pub fn stop(&mut self, now: Time) {
        self.stopping = true;
        if self.resync.is_some() {
            self.end_resync(now, "the engine stops".to_owned());
        }
    }

    /// Whether nothing is waiting: every member that can be reached holds everything.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        let Some(log) = &self.log else { return true };
        let caught_up = self.peers.iter().filter(|p| p.is_ready_member()).all(|p| p.durable == log.last());
        self.is_dead()
            || (caught_up && self.write_acks.is_empty() && self.flush_acks.is_empty() && self.held.is_empty())
    }

    /// Fails what is left and takes leave of the members, so that the next engine need not wait for the lease.
    pub fn goodbye(&mut self) {
        if self.is_dead() {
            return;
        }
        let stable = self.stable_seq();
        for peer in self.peers.iter_mut().filter(|p| p.is_ready_member()) {
            if let Some(seq) = stable {
                peer.push_urgent(ToAgent::Stable { seq });
            }
            // An engine that never served may have found an earlier one whose lease still runs.
            if matches!(self.phase, Phase::Serving) {
                peer.push_urgent(ToAgent::Goodbye);
            }
        }
        self.die(Failure::Shutdown);
    }
}
