//! Who is a member, from when on, and who must leave.
//!
//! A view change is a record like any other. Until it is durable on enough members of the view before it (`Qd`), it is
//! *pending*: acknowledgements count the view before it. A replica that leaves is sent nothing more, but what it lacks
//! stays in the journals of the others until the change is in force, as an engine that starts before that needs it.

use protocol::quorum::AckPolicies;
use protocol::ranges::merge;
use protocol::record::{ViewChange, ranges_max};
use protocol::{AckPolicy, RecordKind, Seq, View, ViewState};

use super::peer::{Lacks, Peer, Role};
use super::{DropReason, Event, Notice, PeerId, Phase, Time, Volume};
use protocol::message::Condition;
use protocol::ranges::ByteRange;

/// The view in force, and the one that may follow.
#[derive(Debug)]
pub(super) struct Membership {
    pub(super) in_force: View,
    pub(super) pending: Option<Pending>,
}

#[derive(Debug)]
pub(super) struct Pending {
    pub(super) view: View,
    pub(super) seq: Seq,
}

impl Membership {
    /// As found at activation: if the latest view has a predecessor, it may not have come into force.
    pub(super) fn found(views: &ViewState) -> Membership {
        if views.previous == views.view {
            return Membership { in_force: views.view.clone(), pending: None };
        }
        let pending = Some(Pending { view: views.view.clone(), seq: views.seq });
        Membership { in_force: views.previous.clone(), pending }
    }

    /// The view that is being aimed at.
    pub(super) fn target(&self) -> &View {
        self.pending.as_ref().map_or(&self.in_force, |p| &p.view)
    }
}

/// How long a change may be held back for a member that is half-way to its limit.
const PACE_MAX: Time = Time::from_millis(20);

/// A full disk makes a replica leave only after this time: disks shared by several replicas fill up together.
const FULL_GRACE: Time = Time::from_millis(1000);

impl<T> Volume<T> {
    /// The policy that quorums are computed from: the weaker of the two, whose acknowledgements fewer members hold.
    pub(super) fn quorum_policy(&self) -> AckPolicy {
        self.acks().quorum()
    }

    pub(super) fn acks(&self) -> AckPolicies {
        AckPolicies { write: self.settings.ack_write, flush: self.settings.ack_flush }
    }

    /// Members of a view of `members` on which a change of it must be durable. Until the volume serves, an engine that
    /// starts after this one may still go by the policies of the epoch before.
    pub(super) fn view_change_needed(&self, members: usize) -> usize {
        let now = self.quorum_policy().view_change(members);
        match (&self.phase, self.stored_acks) {
            (Phase::Activating(_), Some(before)) => now.max(before.quorum().view_change(members)),
            (Phase::Activating(_) | Phase::Serving | Phase::Dead, _) => now,
        }
    }

    pub(super) fn durable_on(&self, view: &View, seq: Seq) -> usize {
        self.peers.iter().filter(|p| view.contains(&p.name) && p.durable >= seq).count()
    }

    /// Up to here records are acknowledged by `policy`.
    pub(super) fn committed(&self, policy: AckPolicy) -> Seq {
        let Some(membership) = &self.membership else { return Seq(0) };
        let view = &membership.in_force;
        if view.len() < self.settings.min_replicas {
            return Seq(0);
        }
        let mut durable: Vec<Seq> = self.peers.iter().filter(|p| view.contains(&p.name)).map(|p| p.durable).collect();
        durable.sort_unstable_by(|a, b| b.cmp(a));
        durable.get(policy.needed(view.len()) - 1).copied().unwrap_or(Seq(0))
    }

    /// Up to here every member holds the order; members that leave count until they have left, and one that is about to
    /// join as well: what is stable must be so for all members there will be.
    pub(super) fn stable_seq(&self) -> Option<Seq> {
        let membership = self.membership.as_ref()?;
        let joining = self.resync.as_ref().filter(|r| r.is_finishing()).map(|r| &self.peers[r.peer].name);
        let counts = |p: &&Peer| {
            let is_member = membership.in_force.contains(&p.name) || membership.target().contains(&p.name);
            is_member || joining == Some(&p.name)
        };
        let known = membership.in_force.members().iter().all(|m| self.peers.iter().any(|p| p.name == *m));
        self.peers.iter().filter(counts).map(|p| p.durable).min().filter(|_| known)
    }

    /// Takes a pending view into force once enough members hold it.
    pub(super) fn advance_view(&mut self, now: Time) {
        let Some(membership) = &self.membership else { return };
        let Some(pending) = &membership.pending else { return };
        let old = &membership.in_force;
        if self.durable_on(old, pending.seq) < self.view_change_needed(old.len()) {
            return;
        }
        let (view, seq) = (pending.view.clone(), pending.seq);
        for peer in &mut self.peers {
            match (view.contains(&peer.name), peer.role) {
                (false, Role::Member | Role::Leaving | Role::Joining) => peer.role = Role::Dropped,
                (true, Role::Joining) => (peer.role, peer.member_since, peer.errors) = (Role::Member, now, 0),
                (true, Role::Unknown | Role::Dropped | Role::Syncing) => peer.role = Role::Member,
                (true, Role::Member | Role::Leaving | Role::Gone) => {}
                (false, Role::Unknown | Role::Dropped | Role::Syncing | Role::Gone) => {}
            }
        }
        self.membership = Some(Membership { in_force: view.clone(), pending: None });
        self.repairs.reconsider();
        self.notice(Notice::ViewInForce { view, seq });
    }

    /// Whether a member other than `peer` could carry on: connected, healthy, and holding everything up to `seq`.
    pub(super) fn another_holds(&self, peer: PeerId, seq: Seq) -> bool {
        self.peers
            .iter()
            .enumerate()
            .any(|(id, p)| id != peer && p.is_ready_member() && p.condition == Condition::Healthy && p.durable >= seq)
    }

    fn reason_to_drop(&self, now: Time, id: PeerId) -> Option<DropReason> {
        let peer = &self.peers[id];
        let log = self.log.as_ref()?;
        let missing = peer.durable.next();
        if !self.another_holds(id, peer.durable) {
            return None;
        }
        if peer.must_leave {
            return Some(DropReason::Operator);
        }
        if peer.condition == Condition::Poisoned {
            return Some(DropReason::Poisoned);
        }
        if peer.full_since.is_some_and(|since| now.saturating_sub(since) >= FULL_GRACE) {
            return Some(DropReason::NoSpace);
        }
        if peer.errors > self.settings.checksum_errors_max && !self.repairs.may_need(id) {
            return Some(DropReason::BadBlocks);
        }
        let front = self.peers.iter().filter(|p| p.is_ready_member()).map(|p| p.durable).max()?;
        let too_far = log.bytes_between(peer.durable, front) >= self.settings.lag_bytes_max;
        let hangs = !peer.is_ready() || self.is_stalled(peer, now);
        if too_far && hangs && !self.settings.throttle {
            return Some(DropReason::LagBytes);
        }
        let waits = log.queued_at(missing).map(|at| now.saturating_sub(at)).filter(|_| front >= missing);
        let down = peer.down_for(now);
        (waits.max(down)? > self.settings.lag_max).then_some(DropReason::LagTime)
    }

    /// Whether the drop of a replica can come into force: enough members but it are there. A drop that only some hold and
    /// that the others cannot take would stand in the way of every later engine.
    pub(super) fn can_drop(&self, id: PeerId) -> bool {
        let Some(Membership { in_force, .. }) = &self.membership else { return false };
        let others = self
            .peers
            .iter()
            .enumerate()
            .filter(|(other, p)| *other != id && p.is_ready_member() && in_force.contains(&p.name));
        others.count() >= self.view_change_needed(in_force.len())
    }

    /// On so many members the first record of the epoch must be before this engine changes the view, so that no later engine
    /// goes by a log without it. A view that was changed before that could be overlooked in favour of one that an earlier
    /// engine left behind, as both would look like the latest.
    pub(super) fn record_of_epoch_needed(&self, members: usize, before: Option<AckPolicies>) -> usize {
        let needed = |policy: AckPolicy| policy.weaker(AckPolicy::Majority).needed(members);
        needed(self.quorum_policy()).max(before.map_or(0, |acks| needed(acks.quorum())))
    }

    /// Whether this engine may change the view: none is pending, and its epoch is on record.
    pub(super) fn may_change_view(&self) -> bool {
        let Some(Membership { in_force, pending: None }) = &self.membership else { return false };
        let needed = self.record_of_epoch_needed(in_force.len(), self.stored_acks);
        self.durable_on(in_force, self.epoch_start) >= needed
    }

    /// Lets members go that are too far behind for too long, one at a time.
    pub(super) fn enforce_limits(&mut self, now: Time) {
        if !self.may_change_view() {
            return;
        }
        for id in 0..self.peers.len() {
            if self.peers[id].role == Role::Member
                && let Some(reason) = self.reason_to_drop(now, id)
                && self.can_drop(id)
            {
                return self.propose_drop(now, id, reason);
            }
        }
        // Members of the view that activation could not use, or that came back with less than they had.
        let leaving = |id: &PeerId| {
            let peer = &self.peers[*id];
            let is_known = peer.lacks != Lacks::SinceStable || self.since_stable.is_some();
            peer.role == Role::Leaving && is_known && self.can_drop(*id)
        };
        if let Some(id) = (0..self.peers.len()).find(leaving) {
            let reason = match self.peers[id].lacks {
                Lacks::Unacknowledged | Lacks::SinceStable => DropReason::Absent,
                Lacks::Everything => DropReason::LostData,
            };
            self.propose_drop(now, id, reason);
        }
    }

    /// Up to where a replica that leaves holds everything for certain, and what changed after that.
    fn account_of(&self, id: PeerId) -> (Seq, Vec<ByteRange>) {
        let peer = &self.peers[id];
        let Some(log) = &self.log else { return (Seq(0), vec![self.whole()]) };
        match (peer.lacks, &self.since_stable) {
            (Lacks::Unacknowledged, _) if log.holds_all_after(peer.durable) => {
                (peer.durable, log.ranges_after(peer.durable).collect())
            }
            (Lacks::SinceStable, Some(since)) if log.holds_all_after(since.until) => {
                (since.stable, since.ranges.iter().copied().chain(log.ranges_after(since.until)).collect())
            }
            (Lacks::Unacknowledged | Lacks::SinceStable | Lacks::Everything, _) => (Seq(0), vec![self.whole()]),
        }
    }

    /// Gives out the record that drops a replica. No other view change may be pending.
    pub(super) fn propose_drop(&mut self, now: Time, id: PeerId, reason: DropReason) {
        let name = self.peers[id].name.clone();
        let Some(membership) = &self.membership else { return };
        let Some(view) = membership.in_force.without(&name) else { return };
        self.keep_from_synced(now);
        let count_max = ranges_max(self.record_payload_bytes_max).max(1);
        let (acknowledged, ranges) = self.account_of(id);
        let unacknowledged = merge(ranges, count_max);
        let change = ViewChange { view, subject: name.clone(), acknowledged, unacknowledged, forced: false };
        self.give_out_view(now, change);
        self.tracked.insert(name.clone(), acknowledged);
        let peer = &mut self.peers[id];
        peer.role = Role::Leaving;
        peer.must_leave = false;
        peer.is_kept_out = reason == DropReason::BadBlocks;
        peer.backoff.lost(now, now.saturating_sub(peer.member_since));
        self.disconnect(now, id);
        self.events.push_back(Event::Notice(Notice::Dropping { replica: name, reason }));
    }

    /// Gives out the record that takes a replica into the view.
    pub(super) fn propose_join(&mut self, now: Time, id: PeerId) {
        assert!(self.may_change_view(), "one view change at a time");
        let name = self.peers[id].name.clone();
        let Some(view) = self.membership.as_ref().and_then(|m| m.in_force.with(&name)) else { return };
        self.peers[id].role = Role::Joining;
        self.peers[id].lacks = Lacks::Unacknowledged;
        self.tracked.remove(&name);
        let (acknowledged, unacknowledged) = (Seq(0), Vec::new());
        self.give_out_view(now, ViewChange { view, subject: name, acknowledged, unacknowledged, forced: false });
    }

    fn give_out_view(&mut self, now: Time, change: ViewChange) {
        let view = change.view.clone();
        let seq = self.append_view(now, change);
        if let Some(membership) = &mut self.membership {
            membership.pending = Some(Pending { view, seq });
        }
    }

    pub(super) fn append_view(&mut self, now: Time, change: ViewChange) -> Seq {
        let nowhere = ByteRange { offset: 0, length: 0 };
        let seq = self.append(now, RecordKind::ViewChange, nowhere, false, change.encode());
        if let Some(views) = &mut self.views {
            views.change(change.view, change.forced, seq);
        }
        seq
    }

    /// Whether a change that was held back for `held` is to wait on, for a member that falls behind but makes progress:
    /// a little when it is half-way to its limit, and until it has caught up when it is nearly there. A replica that is
    /// merely slower than the client writes is so not lost; one that hangs is not waited for.
    pub(super) fn is_paced(&self, now: Time, held: Time) -> bool {
        let lag_bytes_max = self.settings.lag_bytes_max;
        let Some(log) = self.log.as_ref().filter(|log| log.bytes() > lag_bytes_max / 2) else { return false };
        let ready = || self.peers.iter().filter(|p| p.is_ready_member());
        let Some(front) = ready().map(|p| p.durable).max() else { return false };
        ready().any(|p| {
            let lag_bytes = log.bytes_between(p.durable, front);
            let holds = lag_bytes > lag_bytes_max / 8 * 7 || (lag_bytes > lag_bytes_max / 2 && held < PACE_MAX);
            holds && !self.is_stalled(p, now)
        })
    }

    /// Whether a member that lacks records has been silent for much longer than it takes usually.
    fn is_stalled(&self, peer: &Peer, now: Time) -> bool {
        let queued_at = self.log.as_ref().and_then(|log| log.queued_at(peer.durable.next()));
        queued_at.is_some_and(|queued_at| peer.is_silent_since(queued_at, now))
    }

    /// Whether too few members are in the view or in reach to acknowledge anything.
    pub(super) fn is_frozen(&self) -> bool {
        let Some(Membership { in_force: view, .. }) = &self.membership else { return false };
        let reachable = self.peers.iter().filter(|p| p.is_ready_member() && view.contains(&p.name)).count();
        reachable < self.settings.ack_write.needed(view.len()) || view.len() < self.settings.min_replicas
    }

    /// Whether no member has room on its disk.
    pub(super) fn is_full(&self) -> bool {
        let mut members = self.peers.iter().filter(|p| p.role == Role::Member).peekable();
        members.peek().is_some() && members.all(|p| p.full_since.is_some())
    }
}
