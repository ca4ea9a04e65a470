//! How an engine comes to serve (DESIGN section 5.3, a rule).
//!
//! 1. *Gather*: greet every replica; refuse at once what is not this volume, wait while another engine is confirmed.
//! 2. *Promise*: ask for a promise of an epoch higher than any seen. Of the answers the highest position names the view;
//!    enough of its members must have answered. The highest of these is the source of the true history.
//! 3. *Replay*: members whose log is a prefix of the source's get what they lack from its journal, one after another.
//! 4. *Settle*: what a crash left unsettled on any of them is read at one, to be given out as records ([`super::settling`]).
//! 5. *Start*: the first record of the epoch goes to all; once enough members hold it durably, and no earlier engine can
//!    count on a lease any more, the volume serves. Members that took no part are then dropped by ordinary view changes.
//!
//! A start that is not possible for want of members is reported and tried on: they may come, or an operator may say to go
//! on without them, which makes a *forced* view the first record of the epoch.
//!
//! Losing a participant before step 5, or meeting a higher promise, starts over with a new epoch; nothing was served.

use std::time::Duration;

use protocol::message::{FetchKind, Promised, Welcome};
use protocol::quorum::AckPolicies;
use protocol::ranges::{ByteRange, outside, outside_blocks};
use protocol::record::ViewChange;
use protocol::{AckPolicy, Epoch, Position, Record, RecordKind, ReplicaName, Seq, ToAgent, View, VolumeUuid};

use super::log::Log;
use super::membership::Membership;
use super::peer::{Lacks, Link, Role};
use super::settling::Settling;
use super::{Event, Failure, MissingReplica, Notice, PeerId, Phase, StartRefusal, Time, Volume};

/// How long to wait for replicas that could be done without.
const GRACE: Duration = Duration::from_millis(1000);
/// A member with more than this unsettled is rather copied to than settled: it is held in memory until all of it is read.
const UNSETTLED_BYTES_MAX: u64 = 512 << 20;
/// Bits of an epoch that are drawn at random when members are given up.
const FORCED_EPOCH_BITS: u32 = 24;

#[derive(Debug)]
pub(super) struct Activation {
    started_at: Time,
    step: Step,
    step_since: Time,
    highest_promised: Epoch,
    serve_not_before: Time,
    other_engine: Option<OtherEngine>,
    /// Members that an operator gave up.
    without: Vec<ReplicaName>,
    /// Why it cannot go on, as far as people were told.
    blocked: Option<Box<StartRefusal>>,
}

#[derive(Clone, Debug)]
struct OtherEngine {
    replica: ReplicaName,
    heard_at: Time,
}

#[derive(Debug)]
enum Step {
    Gather,
    Promise,
    Replay(Box<Replay>),
    Settle(Box<Settle>),
    Start { seq: Seq },
}

#[derive(Debug)]
struct Settle {
    replay: Box<Replay>,
    settling: Settling,
}

#[derive(Debug)]
struct Replay {
    source: PeerId,
    /// Members that take part, those that are behind and those that are not.
    usable: Vec<PeerId>,
    /// The last record of the true history.
    goal: Seq,
    /// The member being brought up, and the last record sent on to it.
    current: Option<(PeerId, Seq)>,
    /// The first record of the part that the source was asked for.
    fetching_from: Option<Seq>,
    /// Ranges of the records sent on that are amended: the members that got them would report them as unsettled now.
    amended: Vec<ByteRange>,
}

impl Activation {
    pub(super) fn new(now: Time) -> Activation {
        Activation {
            started_at: now,
            step: Step::Gather,
            step_since: now,
            highest_promised: Epoch(0),
            serve_not_before: Time::ZERO,
            other_engine: None,
            without: Vec::new(),
            blocked: None,
        }
    }

    /// An activation that begins anew and does without these members.
    pub(super) fn without(now: Time, without: Vec<ReplicaName>, before: &Activation) -> Activation {
        let (highest_promised, serve_not_before) = (before.highest_promised, before.serve_not_before);
        Activation { without, highest_promised, serve_not_before, ..Activation::new(now) }
    }

    /// Whether people were told that it cannot go on.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked.is_some()
    }
}

impl<T> Volume<T> {
    fn activation(&mut self) -> Option<&mut Activation> {
        match &mut self.phase {
            Phase::Activating(activation) => Some(activation),
            Phase::Serving | Phase::Dead => None,
        }
    }

    /// Says why the volume does not start, and goes on trying.
    fn block_start(&mut self, now: Time, refusal: StartRefusal) {
        let Some(activation) = self.activation() else { return };
        activation.started_at = now;
        if activation.blocked.as_deref() != Some(&refusal) {
            activation.blocked = Some(Box::new(refusal.clone()));
            self.events.push_back(Event::StartBlocked(refusal));
        }
    }

    /// Why the volume cannot start, while it waits for replicas.
    #[must_use]
    pub fn start_blocked(&self) -> Option<&StartRefusal> {
        match &self.phase {
            Phase::Activating(activation) => activation.blocked.as_deref(),
            Phase::Serving | Phase::Dead => None,
        }
    }

    fn refuse_start(&mut self, refusal: StartRefusal) {
        self.die(Failure::Shutdown);
        self.events.push_back(Event::StartRefused(refusal));
    }

    // ---- what peers say ----------------------------------------------------------------------------------------

    pub(super) fn on_welcome(&mut self, now: Time, peer: PeerId, welcome: Welcome) {
        if let Some(what) = self.mismatch(&welcome) {
            let replica = self.peers[peer].name.clone();
            if self.activation().is_some() && self.log.is_none() {
                return self.refuse_start(StartRefusal::Mismatch { replica, what });
            }
            self.peers[peer].last_error = Some(what);
            return self.disconnect(now, peer);
        }
        let (take_over, serving) = (self.settings.take_over, self.log.is_some());
        let at = &mut self.peers[peer];
        if let Some(ms_ago) = welcome.other_engine_ms_ago
            && !take_over
            && !serving
        {
            let replica = at.name.clone();
            at.last_error = Some(format!("another engine was there {ms_ago} ms ago"));
            self.disconnect(now, peer);
            if let Some(activation) = self.activation() {
                activation.other_engine = Some(OtherEngine { replica, heard_at: now });
            }
            return;
        }
        self.record_payload_bytes_max = self.record_payload_bytes_max.min(welcome.record_payload_bytes_max);
        self.journal_bytes_min = self.journal_bytes_min.min(welcome.journal_bytes);
        let promised = welcome.promised;
        at.welcome = Some(welcome);
        at.link = Link::Welcomed;
        at.last_error = None;
        if let Some(activation) = self.activation() {
            activation.highest_promised = activation.highest_promised.max(promised);
        }
        let joins = match &self.phase {
            Phase::Activating(Activation { step: Step::Promise, .. }) => true,
            Phase::Activating(_) | Phase::Serving => {
                matches!(self.peers[peer].role, Role::Member | Role::Joining)
            }
            Phase::Dead => false,
        };
        if joins {
            self.ask_promise(now, peer);
        }
    }

    fn mismatch(&self, welcome: &Welcome) -> Option<String> {
        let (journal, lag) = (welcome.journal_bytes, self.settings.lag_bytes_max);
        if journal < lag.saturating_mul(2) {
            return Some(format!("has a journal of {journal} bytes, too small for a lag_bytes_max of {lag}"));
        }
        match self.uuid {
            Some(uuid) if uuid != welcome.uuid => {
                Some(format!("belongs to volume {}, the others to volume {uuid}", welcome.uuid))
            }
            Some(_) | None => None,
        }
    }

    pub(super) fn ask_promise(&mut self, now: Time, peer: PeerId) {
        let lease_ms = self.settings.lease.as_millis() as u32;
        let promise = ToAgent::Promise { epoch: self.epoch, engine: self.settings.engine, lease_ms };
        let at = &mut self.peers[peer];
        at.link = Link::Promising { sent_at: now };
        at.push_urgent(promise);
    }

    pub(super) fn on_promised(&mut self, now: Time, peer: PeerId, promised: Promised) {
        let at = &mut self.peers[peer];
        let Link::Promising { sent_at } = at.link else { return };
        if promised.epoch != self.epoch {
            return;
        }
        at.link = Link::Ready;
        at.confirmed_at = Some(sent_at);
        if self.log.is_some() {
            if self.has_changed_after(promised.position.seq) {
                return;
            }
            let at = &self.peers[peer];
            return match at.role {
                Role::Member | Role::Joining => self.on_return(now, peer, &promised),
                Role::Dropped => self.resync_promised(now, peer, &promised),
                Role::Unknown | Role::Leaving | Role::Syncing | Role::Gone => {}
            };
        }
        at.restart_from(promised.position.seq);
        let until = now + Duration::from_millis(promised.lease_remaining_ms.into());
        at.promised = Some(promised);
        if let Some(activation) = self.activation() {
            activation.serve_not_before = activation.serve_not_before.max(until);
        }
    }

    /// A member is back after its connection was lost: it goes on from what it holds.
    fn on_return(&mut self, now: Time, peer: PeerId, promised: &Promised) {
        let Some(log) = &self.log else { return };
        let found = promised.position;
        let end = Position { epoch: self.epoch, seq: log.last() };
        let at = &mut self.peers[peer];
        // What it left unsettled is of records that it will get again, or was so before and could not be settled.
        let behind = ByteRange { offset: self.size_bytes, length: u64::MAX - self.size_bytes };
        let for_good = self.unsettled_for_good.iter().copied();
        let known = log.ranges_after(found.seq).chain(for_good).chain([behind]);
        let unsettled = known.fold(promised.unsettled.clone(), outside);
        let same_history =
            self.history.has_prefix(found, end) && log.holds_all_after(found.seq) && unsettled.is_empty();
        if found.seq < at.durable || !same_history {
            let notice = Notice::LostData { replica: at.name.clone(), acknowledged: at.durable, found };
            self.notice(notice);
            self.disconnect(now, peer);
            // It counts for nothing; its drop follows as soon as it can.
            let at = &mut self.peers[peer];
            at.restart_from(Seq(0));
            at.role = Role::Leaving;
            at.lacks = Lacks::Everything;
            return;
        }
        at.restart_from(found.seq);
        let back = Notice::Back { replica: at.name.clone(), records: end.seq.ahead_of(found.seq) };
        self.events.push_back(Event::Notice(back));
        let at = &mut self.peers[peer];
        // It may have missed this while it was away, and have no room in its journal until it knows.
        at.push_urgent(ToAgent::Stable { seq: self.stable_told });
    }

    /// The last record sent to a peer that is being brought up.
    pub(super) fn replay_sent(&self, peer: PeerId) -> Option<Seq> {
        let Phase::Activating(Activation { step: Step::Replay(replay), .. }) = &self.phase else { return None };
        replay.current.filter(|(target, _)| *target == peer).map(|(_, forwarded)| forwarded)
    }

    pub(super) fn on_fetched(&mut self, peer: PeerId, record: Record) {
        let Phase::Activating(Activation { step: Step::Replay(replay), .. }) = &mut self.phase else { return };
        let Some((target, forwarded)) = &mut replay.current else { return };
        if replay.source == peer && record.seq() == forwarded.next() && record.seq() <= replay.goal {
            *forwarded = record.seq();
            let range = record.header.range();
            if record.header.amended {
                replay.amended.push(range);
            } else if range.length > 0 && !replay.amended.is_empty() {
                replay.amended = outside_blocks(&replay.amended, range);
            }
            self.peers[*target].push_urgent(ToAgent::Append(record));
        }
    }

    pub(super) fn on_fetch_end(&mut self, now: Time, peer: PeerId, next: Seq) {
        let Phase::Activating(Activation { step: Step::Replay(replay), .. }) = &mut self.phase else {
            return self.survey_part_ended(now, peer, next);
        };
        if replay.source != peer {
            return;
        }
        let from = replay.fetching_from.take();
        let whole = replay.current.is_some_and(|(_, forwarded)| forwarded.next() == next);
        // The member may hold all of the part durably by now.
        let gave_something = whole && from.is_some_and(|from| next > from);
        if !gave_something {
            self.peers[peer].last_error = Some(format!("it does not give record {next}"));
            self.leave_behind(now);
        }
    }

    /// The member being brought up cannot be: the source lost what it lacks. It is done without if it can be, and copied to
    /// later.
    fn leave_behind(&mut self, now: Time) {
        let Phase::Activating(Activation { step: Step::Replay(replay), .. }) = &self.phase else { return };
        let (source, current) = (replay.source, replay.current);
        let usable: Vec<PeerId> =
            replay.usable.iter().copied().filter(|id| current.is_none_or(|(target, _)| *id != target)).collect();
        let is_enough = |truth: &Promised| {
            let given_up = self.given_up(&truth.views.view, &self.answered(&truth.views.view));
            !given_up.is_empty() || self.can_carry(truth, &usable)
        };
        let truth = self.peers[source].promised.clone().filter(is_enough);
        let Phase::Activating(Activation { step: Step::Replay(replay), .. }) = &mut self.phase else { return };
        if truth.is_none() || current.is_none() {
            return self.start_over(now);
        }
        (replay.usable, replay.current, replay.fetching_from) = (usable, None, None);
        self.advance_replay(now);
    }

    pub(super) fn activation_lost(&mut self, now: Time, peer: PeerId) {
        let Phase::Activating(activation) = &self.phase else { return };
        let replay = match &activation.step {
            Step::Replay(replay) => replay,
            Step::Settle(settle) => &settle.replay,
            Step::Gather | Step::Promise | Step::Start { .. } => return,
        };
        if replay.usable.contains(&peer) {
            self.start_over(now);
        }
    }

    /// Another engine holds a higher promise. It came later: from here on this one waits for it, or two that both take over
    /// would go on outbidding each other.
    pub(super) fn outbid(&mut self, now: Time, promised: Epoch) {
        self.settings.take_over = false;
        if let Some(activation) = self.activation() {
            activation.highest_promised = activation.highest_promised.max(promised);
        }
        self.start_over(now);
    }

    pub(super) fn start_over(&mut self, now: Time) {
        for peer in 0..self.peers.len() {
            if !matches!(self.peers[peer].link, Link::Down { .. }) {
                self.disconnect(now, peer);
            }
        }
        self.enter(now, Step::Gather);
    }

    fn enter(&mut self, now: Time, step: Step) {
        if let Some(activation) = self.activation() {
            activation.step = step;
            activation.step_since = now;
        }
    }

    // ---- steps -------------------------------------------------------------------------------------------------

    pub(super) fn advance_activation(&mut self, now: Time) {
        let Phase::Activating(activation) = &self.phase else { return };
        let waited = now.saturating_sub(activation.step_since) >= GRACE;
        let too_late = now.saturating_sub(activation.started_at) >= self.settings.start_timeout;
        match &activation.step {
            Step::Gather => {
                let welcomed = self.peers.iter().filter(|p| matches!(p.link, Link::Welcomed)).count();
                if welcomed == self.peers.len() || (waited && welcomed > 0) {
                    self.begin_promise(now);
                } else if too_late {
                    self.refuse_late(now);
                }
            }
            Step::Promise => {
                if !self.try_choose(now, waited) && too_late {
                    self.refuse_late(now);
                }
            }
            Step::Replay(_) => {
                self.advance_replay(now);
                self.refuse_stalled(now);
            }
            Step::Settle(_) => {
                if self.advance_settling(now) {
                    self.begin_epoch(now);
                }
                self.refuse_stalled(now);
            }
            Step::Start { seq } => {
                let (seq, not_before) = (*seq, activation.serve_not_before);
                let waited_in_vain = now.saturating_sub(activation.step_since) >= self.settings.start_timeout;
                self.advance_view(now);
                if now >= not_before && self.committed_at_start(seq) {
                    self.phase = Phase::Serving;
                    self.events.push_back(Event::Serving);
                } else if waited_in_vain && now >= not_before {
                    self.block_unstarted(now, seq);
                }
            }
        }
    }

    fn committed_at_start(&self, seq: Seq) -> bool {
        let Some(membership) = &self.membership else { return false };
        let view = &membership.in_force;
        let holding = self.peers.iter().filter(|p| view.contains(&p.name) && p.durable >= seq).count();
        // An engine that starts later goes by the policies in this record; enough members must hold it that it cannot
        // be overlooked by one that would still go by the policies before it.
        let overlooked_by_none = self.stored_acks.map_or(0, |acks| acks.quorum().view_change(view.len()));
        holding >= self.settings.ack_write.needed(view.len()).max(overlooked_by_none)
    }

    /// The volume that most of the replicas belong to, and one that belongs to another.
    fn agree_on_volume(&self) -> Option<(VolumeUuid, Option<PeerId>)> {
        let uuids: Vec<(PeerId, VolumeUuid)> =
            self.peers.iter().enumerate().filter_map(|(id, p)| Some((id, p.welcome.as_ref()?.uuid))).collect();
        let count = |uuid| uuids.iter().filter(|(_, other)| *other == uuid).count();
        // Of equals the first in the configuration counts.
        let most = uuids.iter().map(|(_, uuid)| *uuid).rev().max_by_key(|uuid| count(*uuid))?;
        Some((most, uuids.iter().find(|(_, uuid)| *uuid != most).map(|(id, _)| *id)))
    }

    fn begin_promise(&mut self, now: Time) {
        let Some((uuid, stranger)) = self.agree_on_volume() else { return };
        if let Some(stranger) = stranger {
            let found = self.peers[stranger].welcome.as_ref().map(|w| w.uuid).unwrap_or_default();
            let what = format!("belongs to volume {found}, the others to volume {uuid}");
            let replica = self.peers[stranger].name.clone();
            return self.refuse_start(StartRefusal::Mismatch { replica, what });
        }
        self.uuid = Some(uuid);
        let engine = self.settings.engine;
        let Some(activation) = self.activation() else { return };
        let mut epoch = Epoch(activation.highest_promised.0.saturating_add(1));
        if !activation.without.is_empty() {
            // Another engine may do the same with the other half of the members, and both must not take one number: the
            // replicas could not be told apart when they meet again.
            let own = u64::from(u32::from_le_bytes([engine[0], engine[1], engine[2], 0]));
            epoch = Epoch((((epoch.0 >> FORCED_EPOCH_BITS) + 1) << FORCED_EPOCH_BITS) | own);
        }
        activation.highest_promised = epoch;
        self.epoch = epoch;
        self.enter(now, Step::Promise);
        for peer in 0..self.peers.len() {
            if matches!(self.peers[peer].link, Link::Welcomed) {
                self.ask_promise(now, peer);
            }
        }
    }

    /// The policy that the number of members that must answer is computed from: that of the epoch whose
    /// acknowledgements are to be kept.
    fn activation_policy(&self, top: &Promised) -> AckPolicy {
        top.acks.map_or(self.quorum_policy(), AckPolicies::quorum)
    }

    /// The most advanced of the replicas that promised and can stand for the volume.
    fn top(&self) -> Option<&Promised> {
        let promises = self.peers.iter().filter_map(|p| p.promised.as_ref());
        promises.filter(|p| !p.syncing).max_by_key(|p| p.position)
    }

    /// Members of the view that answered and hold what every member held once: one with less has lost data, and may have
    /// lost what it alone acknowledged.
    fn answered(&self, view: &View) -> Vec<PeerId> {
        let answers = |id: &PeerId| {
            let peer = &self.peers[*id];
            let promised = peer.promised.as_ref().filter(|p| !p.syncing);
            promised.filter(|_| view.contains(&peer.name) && peer.is_ready())
        };
        let ids = || (0..self.peers.len()).filter_map(|id| Some((id, answers(&id)?)));
        let stable = ids().map(|(_, p)| p.stable).max().unwrap_or(Seq(0));
        ids().filter(|(_, p)| p.position.seq >= stable).map(|(id, _)| id).collect()
    }

    /// Whether a replica answered, and its answer counts in its own view.
    pub(super) fn answers(&self, id: PeerId) -> bool {
        let promised = self.peers[id].promised.as_ref();
        promised.is_some_and(|p| self.answered(&p.views.view).contains(&id))
    }

    /// Members of the view that an operator gave up and that did not answer.
    fn given_up(&self, view: &View, answered: &[PeerId]) -> Vec<ReplicaName> {
        let Phase::Activating(Activation { without, .. }) = &self.phase else { return Vec::new() };
        let is_there = |name: &ReplicaName| answered.iter().any(|id| self.peers[*id].name == *name);
        view.members().iter().filter(|m| without.contains(m) && !is_there(m)).cloned().collect()
    }

    fn is_to_answer(&self, name: &ReplicaName) -> bool {
        let peer = self.peers.iter().find(|p| p.name == *name);
        peer.is_some_and(|p| match p.link {
            Link::Greeting { .. } | Link::Welcomed | Link::Promising { .. } => true,
            Link::Down { .. } | Link::Ready => false,
        })
    }

    /// Goes on to the replay if enough members have promised. Whether more may still come decides `waited`.
    fn try_choose(&mut self, now: Time, waited: bool) -> bool {
        let Some(top) = self.top().cloned() else { return false };
        let view = &top.views.view;
        let unconfigured = view.members().iter().find(|m| self.peers.iter().all(|p| p.name != **m));
        if let Some(replica) = unconfigured.cloned() {
            let view = view.clone();
            self.refuse_start(StartRefusal::NotConfigured { replica, view });
            return true;
        }
        let answered = self.answered(view);
        let given_up = self.given_up(view, &answered);
        // One that was given up and is in reach may bring what it alone holds.
        let away = given_up.iter().filter(|name| !self.is_to_answer(name)).count();
        let given_up = given_up.len();
        let enough = answered.len() + given_up >= self.activation_policy(&top).activation(view.len());
        let may_come = answered.len() + away < view.len() && !waited;
        if !enough || may_come {
            return false;
        }
        // Of equals rather one that has nothing unsettled: its blocks are read at it.
        let position = |id: &PeerId| self.peers[*id].promised.as_ref().map(|p| (p.position, p.unsettled.is_empty()));
        let Some(source) = answered.iter().copied().max_by_key(position) else { return false };
        let Some(truth) = self.peers[source].promised.clone() else { return false };
        if truth.size_bytes < self.settings.size_bytes {
            let (found, size) = (truth.size_bytes, self.settings.size_bytes);
            let what = format!("has {found} bytes, the configuration says {size}");
            let replica = self.peers[source].name.clone();
            self.refuse_start(StartRefusal::Mismatch { replica, what });
            return true;
        }
        let usable: Vec<PeerId> = answered.into_iter().filter(|id| !self.is_stranger(*id, &truth)).collect();
        if given_up == 0 && !self.can_carry(&truth, &usable) {
            return false;
        }
        let goal = truth.position.seq;
        // What the source gave up all members hold; with all of them here, so do they what the last of them has. A
        // journal that is full of such records could not take what is to be replayed.
        let all_here = usable.len() == view.len();
        let last_of_all = usable.iter().map(|id| self.peers[*id].durable).min().filter(|_| all_here);
        let stable = last_of_all.unwrap_or(Seq(truth.journal_first.0.saturating_sub(1)));
        for id in &usable {
            self.peers[*id].push_urgent(ToAgent::Stable { seq: stable });
        }
        self.enter(
            now,
            Step::Replay(Box::new(Replay {
                source,
                usable,
                goal,
                current: None,
                fetching_from: None,
                amended: Vec::new(),
            })),
        );
        self.advance_replay(now);
        true
    }

    /// Whether these members are enough to bring the view that was found into force and to change it. With fewer nothing
    /// could ever be acknowledged nor the others be dropped: rather wait for one from which those here can get what they
    /// lack.
    fn can_carry(&self, truth: &Promised, usable: &[PeerId]) -> bool {
        let carrying = |view: &View| usable.iter().filter(|id| view.contains(&self.peers[**id].name)).count();
        let found = Membership::found(&truth.views);
        let pending = found.pending.is_some();
        let comes_into_force = carrying(&found.in_force) >= self.view_change_needed(found.in_force.len());
        let target = found.target();
        let change = self.view_change_needed(target.len());
        let needed = change.max(self.record_of_epoch_needed(target.len(), truth.acks));
        (comes_into_force || !pending) && carrying(target) >= needed
    }

    fn advance_replay(&mut self, now: Time) {
        let Phase::Activating(Activation { step: Step::Replay(replay), .. }) = &mut self.phase else { return };
        let done = replay.current.is_some_and(|(target, _)| self.peers[target].durable >= replay.goal);
        if done || replay.current.is_none() {
            let behind = replay.usable.iter().copied().find(|id| self.peers[*id].durable < replay.goal);
            replay.current = behind.map(|id| (id, self.peers[id].durable));
            let Some((target, durable)) = replay.current else { return self.begin_settling(now) };
            let notice = Notice::Replaying {
                replica: self.peers[target].name.clone(),
                source: self.peers[replay.source].name.clone(),
                records: replay.goal.ahead_of(durable),
            };
            self.events.push_back(Event::Notice(notice));
        }
        // The next part is fetched when the one before is durable: that bounds what is in memory.
        if let Some((target, forwarded)) = replay.current
            && replay.fetching_from.is_none()
            && self.peers[target].durable == forwarded
        {
            replay.fetching_from = Some(forwarded.next());
            let (from, to, what) = (forwarded.next(), replay.goal, FetchKind::Records);
            self.peers[replay.source].push_urgent(ToAgent::Fetch { from, to, what });
            self.progressed(now);
        }
    }

    /// All members that take part hold the same records. They may differ where a crash left something unsettled.
    fn begin_settling(&mut self, now: Time) {
        let bytes_max = u64::from(self.record_payload_bytes_max);
        let Some(activation) = self.activation() else { return };
        let Step::Replay(replay) = std::mem::replace(&mut activation.step, Step::Gather) else { return };
        let source = replay.source;
        let promised = |id: &PeerId| self.peers[*id].promised.as_ref();
        let unsettled = replay.usable.iter().filter_map(promised).flat_map(|p| p.unsettled.iter().copied());
        let unsettled = unsettled.chain(replay.amended.iter().copied());
        let size_bytes = promised(&source).map_or(0, |truth| truth.size_bytes);
        let others = replay.usable.iter().copied().filter(|id| *id != source);
        let members = std::iter::once(source).chain(others).collect();
        let settling = Settling::new(unsettled, size_bytes, bytes_max, members);
        let bytes = settling.bytes_left();
        self.enter(now, Step::Settle(Box::new(Settle { replay, settling })));
        if bytes > 0 {
            let source = self.peers[source].name.clone();
            self.events.push_back(Event::Notice(Notice::Settling { source, bytes }));
        }
        if self.advance_settling(now) {
            self.begin_epoch(now);
        }
    }

    pub(super) fn settling(&mut self) -> Option<&mut Settling> {
        match &mut self.phase {
            Phase::Activating(Activation { step: Step::Settle(settle), .. }) => Some(&mut settle.settling),
            Phase::Activating(_) | Phase::Serving | Phase::Dead => None,
        }
    }

    pub(super) fn progressed(&mut self, now: Time) {
        if let Some(activation) = self.activation() {
            activation.step_since = now;
        }
    }

    fn refuse_stalled(&mut self, now: Time) {
        let Phase::Activating(Activation { step, step_since, .. }) = &self.phase else { return };
        let waited_for = match step {
            Step::Replay(replay) => replay.current.map(|(target, _)| target),
            Step::Settle(settle) => Some(settle.replay.source),
            Step::Gather | Step::Promise | Step::Start { .. } => None,
        };
        if let Some(target) = waited_for
            && now.saturating_sub(*step_since) >= self.settings.start_timeout
        {
            let peer = &self.peers[target];
            let (replica, at) = (peer.name.clone(), peer.durable);
            self.block_start(now, StartRefusal::Stalled { replica, at });
            self.start_over(now);
        }
    }

    fn begin_epoch(&mut self, now: Time) {
        let Some(activation) = self.activation() else { return };
        let Step::Settle(settle) = std::mem::replace(&mut activation.step, Step::Gather) else { return };
        let Settle { replay, settling } = *settle;
        let Replay { goal, usable, source, .. } = *replay;
        let Some(truth) = self.peers[source].promised.clone() else { return };
        let size_bytes = truth.size_bytes;
        let given_up = self.given_up(&truth.views.view, &self.answered(&truth.views.view));
        let membership = match given_up.iter().try_fold(truth.views.view.clone(), |view, gone| view.without(gone)) {
            Some(view) if !given_up.is_empty() => Membership { in_force: view, pending: None },
            Some(_) | None => Membership::found(&truth.views),
        };
        let target = membership.target().clone();
        let stable = truth.stable;
        for id in 0..self.peers.len() {
            let lacks = self.lacks_at_start(id, stable);
            let peer = &mut self.peers[id];
            peer.member_since = now;
            (peer.role, peer.lacks) = match (target.contains(&peer.name), usable.contains(&id)) {
                (true, true) => (Role::Member, Lacks::Unacknowledged),
                (true, false) => (Role::Leaving, lacks),
                (false, _) => (Role::Dropped, Lacks::Unacknowledged),
            };
            // What the others hold is none of this history, or nobody knows: it counts for nothing.
            peer.restart_from(if peer.role == Role::Member { goal } else { Seq(0) });
        }
        if self.peers.iter().any(|p| p.role == Role::Leaving && p.lacks == Lacks::SinceStable) {
            self.survey_since(stable, goal, source, truth.journal_first);
        }
        self.membership = Some(membership);
        self.history = truth.history;
        self.stored_acks = truth.acks;
        self.views = Some(truth.views);
        self.tracked = truth.tracked.into_iter().collect();
        self.size_bytes = size_bytes;
        self.log = Some(Log::new(goal));
        self.stable_told = Seq(0);
        let first = Position { epoch: self.epoch, seq: goal.next() };
        self.history.note(first);
        self.epoch_start = first.seq;
        self.force_view(now, given_up);
        let nowhere = ByteRange { offset: 0, length: 0 };
        let first = self.append(now, RecordKind::EpochStart, nowhere, false, self.acks().encode());
        let seq = self.give_out_settled(now, settling).unwrap_or(first);
        for id in 0..self.peers.len() {
            let peer = &self.peers[id];
            if peer.role != Role::Member && matches!(peer.link, Link::Ready | Link::Promising { .. }) {
                self.disconnect(now, id);
            }
        }
        if size_bytes != self.settings.size_bytes {
            self.notice(Notice::SizeDiffers { size_bytes });
        }
        self.enter(now, Step::Start { seq });
    }

    /// Gives out the record that takes the members that were given up out of the view: one for all of them, and before any
    /// other of the epoch. A log with a record of this epoch counts more than what the given up ones hold, so that it must
    /// not be found with the view that they belong to.
    fn force_view(&mut self, now: Time, given_up: Vec<ReplicaName>) {
        let Some(subject) = given_up.first().cloned() else { return };
        let before = self.views.as_ref().map(|views| views.view.clone());
        let view = given_up.iter().try_fold(before, |view, gone| view.map(|view| view.without(gone)));
        let Some(view) = view.flatten() else { return };
        let (unacknowledged, acknowledged, forced) = (vec![self.whole()], Seq(0), true);
        // Of the others nothing is kept, which means the same: all of them is copied when they return.
        self.tracked.insert(subject.clone(), acknowledged);
        self.append_view(now, ViewChange { view, subject, acknowledged, unacknowledged, forced });
        self.notice(Notice::GivenUp { replicas: given_up });
    }

    /// The first record of the epoch does not become durable on enough members.
    fn block_unstarted(&mut self, now: Time, seq: Seq) {
        let Some(membership) = &self.membership else { return };
        let lacks = |p: &&super::Peer| membership.in_force.contains(&p.name) && p.durable < seq;
        if let Some(peer) = self.peers.iter().find(lacks) {
            let (replica, at) = (peer.name.clone(), peer.durable);
            self.block_start(now, StartRefusal::Stalled { replica, at });
            self.progressed(now);
        }
    }

    /// Whether the log of a replica that answered cannot be brought up to that of another.
    fn is_stranger(&self, id: PeerId, truth: &Promised) -> bool {
        self.peers[id].promised.as_ref().is_some_and(|p| {
            let own = p.position;
            let is_behind = own.seq != truth.position.seq && truth.journal_first > own.seq.next();
            let unsettled: u64 = p.unsettled.iter().map(|range| range.length).fold(0, u64::saturating_add);
            !truth.history.has_prefix(own, truth.position) || is_behind || unsettled > UNSETTLED_BYTES_MAX
        })
    }

    fn refuse_late(&mut self, now: Time) {
        let missing = |name: &ReplicaName| -> MissingReplica {
            let peer = self.peers.iter().find(|p| p.name == *name);
            let position = peer.and_then(|p| p.promised.as_ref()).map(|p| (p.position, p.syncing));
            let reason = match (position, peer.and_then(|p| p.last_error.clone())) {
                (Some((_, true)), _) => "it is being copied to and does not hold everything".to_owned(),
                (Some((found, false)), _) => format!("it stands at {found}, but held more: its disk lost data"),
                (None, Some(error)) => error,
                (None, None) => "no answer".to_owned(),
            };
            MissingReplica { replica: name.clone(), reason }
        };
        if let Phase::Activating(Activation { other_engine: Some(other), .. }) = &self.phase
            && now.saturating_sub(other.heard_at) < self.settings.lease
        {
            let replica = other.replica.clone();
            return self.refuse_start(StartRefusal::OtherEngine { replica });
        }
        let Some(top) = self.top() else {
            let missing = self.peers.iter().filter(|p| p.promised.is_none()).map(|p| missing(&p.name)).collect();
            let refusal = StartRefusal::Unknown { missing };
            // Where some answered once, it is worth waiting for them.
            let had_answers = matches!(&self.phase, Phase::Activating(activation) if activation.is_blocked());
            return if had_answers { self.block_start(now, refusal) } else { self.refuse_start(refusal) };
        };
        let view = top.views.view.clone();
        let answered = self.answered(&view);
        let strangers = answered.iter().filter(|id| self.is_stranger(**id, top)).map(|id| &self.peers[*id].name);
        let strangers = strangers.map(|name| MissingReplica {
            replica: name.clone(),
            reason: "the others have not got what would bring it up to their history".to_owned(),
        });
        let absent = view.members().iter().filter(|m| answered.iter().all(|id| self.peers[*id].name != **m));
        let best = answered
            .iter()
            .filter_map(|id| Some((self.peers[*id].name.clone(), self.peers[*id].promised.as_ref()?.position)))
            .max_by_key(|(_, position)| *position);
        let refusal = StartRefusal::Missing {
            needed: self.activation_policy(top).activation(view.len()),
            missing: absent.map(missing).chain(strangers).collect(),
            best,
            held_at_least: top.stable,
            view,
        };
        self.block_start(now, refusal);
    }
}
