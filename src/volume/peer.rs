//! The engine's record of one replica: how far it is, what is on its way to it, and whether it can be asked.

use std::collections::{BTreeMap, VecDeque};

use protocol::message::{Condition, Promised, ReadKind, Welcome};
use protocol::ranges::ByteRange;
use protocol::{Record, ReplicaName, Seq, ToAgent};

use super::Time;
use super::log::Log;

/// Journal bytes sent to a peer and not yet durable there, at most. It is what a replica must hold in memory.
pub(super) const WINDOW_BYTES: u64 = 16 << 20;
/// A member that is silent for eight times what it takes usually, within these bounds, is taken to hang.
const SILENCE_MIN: Time = Time::from_millis(100);
const SILENCE_MAX: Time = Time::from_millis(2000);
/// Reads on their way to or at a peer, at most.
pub(super) const READS_OUTSTANDING_MAX: usize = 64;

/// How far the connection to a replica is.
#[derive(Clone, Debug)]
pub(super) enum Link {
    Down {
        since: Time,
    },
    /// `Hello` is on its way, since then.
    Greeting {
        since: Time,
    },
    Welcomed,
    /// `Promise` is on its way, sent then.
    Promising {
        sent_at: Time,
    },
    /// The promise is given: records and reads flow.
    Ready,
}

/// What the replica is to the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Not known before activation.
    Unknown,
    Member,
    /// Its drop is on its way to the others, or will be.
    Leaving,
    Dropped,
    /// Out of the view, but it gets all records, and copies of what it lacks.
    Syncing,
    /// It holds everything; the view with it is not in force yet.
    Joining,
    /// It was removed: nobody.
    Gone,
}

/// What a replica that leaves may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lacks {
    /// Records after the last that it acknowledged.
    Unacknowledged,
    /// Records after the last that all members held when the engine before this one stopped.
    SinceStable,
    /// Nobody knows.
    Everything,
}

/// When a replica that was dropped is brought back: the sooner it is dropped again, the later.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Backoff {
    attempts: u32,
    pub(super) not_before: Time,
}

const BACKOFF_FIRST: Time = Time::from_millis(500);
const BACKOFF_MAX: Time = Time::from_secs(60);

impl Backoff {
    /// It was lost, after `stayed` in good order.
    pub(super) fn lost(&mut self, now: Time, stayed: Time) {
        if stayed >= BACKOFF_MAX {
            self.attempts = 0;
        }
        self.not_before = now + (BACKOFF_FIRST * 2_u32.pow(self.attempts.min(8))).min(BACKOFF_MAX);
        self.attempts += 1;
    }
}

/// One message to a peer; it must not overtake the records given out before it.
#[derive(Debug)]
struct Queued {
    after: Seq,
    message: ToAgent,
}

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) name: ReplicaName,
    pub(super) link: Link,
    pub(super) role: Role,
    pub(super) lacks: Lacks,
    pub(super) backoff: Backoff,
    /// Since when it has been a member.
    pub(super) member_since: Time,
    /// Since when there has been a connection.
    pub(super) linked_at: Time,
    /// An operator wants it out of the view.
    pub(super) must_leave: bool,
    /// It is to be forgotten once it is out of the view.
    pub(super) is_removed: bool,
    /// Somebody asked that all of it be copied anew.
    pub(super) wants_full_resync: bool,
    pub(super) welcome: Option<Welcome>,
    pub(super) promised: Option<Promised>,
    pub(super) condition: Condition,
    pub(super) full_since: Option<Time>,
    /// Every record up to here is durable there.
    pub(super) durable: Seq,
    /// When it last acknowledged something new.
    progress_at: Time,
    /// How long it takes to do so when there is something to acknowledge, smoothed.
    progress_takes: Option<Time>,
    /// The last record handed to the link.
    sent: Seq,
    queued: VecDeque<Queued>,
    urgent: VecDeque<ToAgent>,
    /// Reads it was asked for and has not answered, and behind which record each was queued.
    pub(super) reads: BTreeMap<u64, Seq>,
    /// When the ping was sent that was last answered: the lease counts from then.
    pub(super) confirmed_at: Option<Time>,
    pub(super) ping: Option<(u64, Time)>,
    pub(super) last_ping_at: Time,
    /// Blocks that were found bad there, and those of them that are good again.
    pub(super) checksum_errors: u64,
    pub(super) repaired_blocks: u64,
    /// Blocks that were found bad, and reads that failed, since it became a member.
    pub(super) errors: u64,
    /// It left for these: only a copy of everything brings it back.
    pub(super) is_kept_out: bool,
    /// Whether the volume itself ended the connection, for the reason in `last_error`.
    pub(super) ended: bool,
    /// Why it was last refused or lost, for people.
    pub(super) last_error: Option<String>,
}

impl Peer {
    pub(super) fn new(name: ReplicaName, now: Time) -> Peer {
        Peer {
            name,
            link: Link::Down { since: now },
            role: Role::Unknown,
            lacks: Lacks::Unacknowledged,
            backoff: Backoff::default(),
            member_since: now,
            linked_at: now,
            must_leave: false,
            is_removed: false,
            wants_full_resync: false,
            welcome: None,
            promised: None,
            condition: Condition::Healthy,
            full_since: None,
            durable: Seq(0),
            progress_at: Time::ZERO,
            progress_takes: None,
            sent: Seq(0),
            queued: VecDeque::new(),
            urgent: VecDeque::new(),
            reads: BTreeMap::new(),
            confirmed_at: None,
            ping: None,
            last_ping_at: Time::ZERO,
            checksum_errors: 0,
            repaired_blocks: 0,
            errors: 0,
            is_kept_out: false,
            ended: false,
            last_error: None,
        }
    }

    pub(super) fn in_role(name: ReplicaName, role: Role, now: Time) -> Peer {
        Peer { role, ..Peer::new(name, now) }
    }

    pub(super) fn is_ready(&self) -> bool {
        matches!(self.link, Link::Ready)
    }

    pub(super) fn is_ready_member(&self) -> bool {
        self.is_ready() && self.role == Role::Member
    }

    /// Whether records are sent to it.
    pub(super) fn takes_records(&self) -> bool {
        self.is_ready() && matches!(self.role, Role::Member | Role::Syncing | Role::Joining)
    }

    /// How long the connection has been down.
    pub(super) fn down_for(&self, now: Time) -> Option<Time> {
        match self.link {
            Link::Down { since } => Some(now.saturating_sub(since)),
            Link::Greeting { .. } | Link::Welcomed | Link::Promising { .. } | Link::Ready => None,
        }
    }

    /// How long the connection has lasted.
    pub(super) fn linked_for(&self, now: Time) -> Time {
        now.saturating_sub(self.linked_at)
    }

    /// Whether the answer to `Hello` or `Promise` has not come for longer than `limit`.
    pub(super) fn answer_overdue(&self, now: Time, limit: Time) -> bool {
        match self.link {
            Link::Greeting { since } | Link::Promising { sent_at: since } => now.saturating_sub(since) > limit,
            Link::Down { .. } | Link::Welcomed | Link::Ready => false,
        }
    }

    /// Notes that records up to `durable` are durable there; the first of them was given out at `queued_at`.
    pub(super) fn acknowledge(&mut self, durable: Seq, queued_at: Option<Time>, now: Time) {
        if let Some(queued_at) = queued_at {
            let took = now.saturating_sub(self.progress_at.max(queued_at));
            self.progress_takes = Some(self.progress_takes.map_or(took, |usual| usual * 7 / 8 + took / 8));
        }
        self.durable = durable;
        self.progress_at = now;
    }

    /// Whether it acknowledged nothing for much longer than usual, although a record waits since `queued_at`.
    pub(super) fn is_silent_since(&self, queued_at: Time, now: Time) -> bool {
        let usual = self.progress_takes.unwrap_or(SILENCE_MIN);
        now.saturating_sub(self.progress_at.max(queued_at)) > (usual * 8).clamp(SILENCE_MIN, SILENCE_MAX)
    }

    /// The connection is gone, or will be: nothing queued will arrive.
    pub(super) fn reset(&mut self, now: Time) {
        if !matches!(self.link, Link::Down { .. }) {
            self.link = Link::Down { since: now };
        }
        self.welcome = None;
        self.promised = None;
        self.queued.clear();
        self.urgent.clear();
        self.ping = None;
        self.confirmed_at = None;
        self.condition = Condition::Healthy;
        self.full_since = None;
    }

    /// Goes on from `durable`: records after it are sent again.
    pub(super) fn restart_from(&mut self, durable: Seq) {
        self.durable = durable;
        self.sent = durable;
    }

    /// The last record that was sent and can have been acknowledged.
    pub(super) fn sent(&self) -> Seq {
        self.sent
    }

    /// Queues a message that may overtake records.
    pub(super) fn push_urgent(&mut self, message: ToAgent) {
        self.urgent.push_back(message);
    }

    /// Queues a message behind all records up to `after`.
    pub(super) fn push_after(&mut self, after: Seq, message: ToAgent) {
        self.queued.push_back(Queued { after, message });
    }

    /// Queues a read behind all records up to `after`; those after that, up to `seen`, change nothing that it looks at.
    pub(super) fn ask(&mut self, after: Seq, seen: Seq, id: u64, what: ReadKind, range: ByteRange) {
        self.reads.insert(id, seen);
        self.push_after(after, ToAgent::Read { id, what, offset: range.offset, length: range.length });
    }

    /// Takes back a read that is still here, or lets the member know that nobody waits for it.
    pub(super) fn cancel(&mut self, id: u64) {
        if !self.reads.contains_key(&id) {
            return;
        }
        let before = self.queued.len();
        self.queued.retain(|q| !matches!(q.message, ToAgent::Read { id: queued, .. } if queued == id));
        if self.queued.len() < before {
            self.reads.remove(&id);
        } else {
            self.push_urgent(ToAgent::CancelRead { id });
        }
    }

    fn next_message(&mut self, log: Option<&Log>) -> Option<ToAgent> {
        if let Some(message) = self.urgent.pop_front() {
            return Some(message);
        }
        if self.queued.front().is_some_and(|q| q.after <= self.sent) {
            return self.queued.pop_front().map(|q| q.message);
        }
        let record = self.next_record(log?)?.clone();
        self.sent = record.seq();
        Some(ToAgent::Append(record))
    }

    /// The next record to send, if the peer takes records and its window has room.
    fn next_record<'a>(&self, log: &'a Log) -> Option<&'a Record> {
        let record = log.get(self.sent.next()).filter(|_| self.takes_records())?;
        let in_flight = log.bytes_between(self.durable, self.sent);
        let fits = in_flight == 0 || in_flight + record.header.journal_bytes_max() <= WINDOW_BYTES;
        fits.then_some(record)
    }

    /// Takes messages for the link, in order, until `bytes_max` of payload are taken; no records without a log.
    pub(super) fn take(&mut self, log: Option<&Log>, bytes_max: u64) -> Vec<ToAgent> {
        let mut taken = Vec::new();
        let mut bytes = 0;
        while bytes < bytes_max {
            let Some(message) = self.next_message(log) else { break };
            if let ToAgent::Append(record) = &message {
                bytes += record.header.journal_bytes_max();
            } else if let ToAgent::Copy(copy) = &message {
                bytes += copy.data.len() as u64;
            }
            taken.push(message);
        }
        taken
    }

    /// Whether [`Peer::take`] would give something that waits for no record.
    pub(super) fn has_message(&self) -> bool {
        !self.urgent.is_empty() || self.queued.front().is_some_and(|q| q.after <= self.sent)
    }

    /// Whether a message waits for records that were not sent.
    pub(super) fn needs_records(&self) -> bool {
        self.queued.iter().any(|q| q.after > self.sent)
    }

    /// Whether [`Peer::take`] would give anything.
    pub(super) fn has_output(&self, log: Option<&Log>) -> bool {
        self.has_message() || log.is_some_and(|log| self.next_record(log).is_some())
    }
}
