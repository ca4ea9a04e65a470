//! Bringing back a replica that is out of the view (DESIGN section 5.5 and 5.6, a rule). One at a time.
//!
//! 1. *Promise*: the replica promises this epoch and says where it stands.
//! 2. *Survey*: the ranges of its records that are none of the volume's order are learned from its journal.
//! 3. *Follow*: a record tells the members that it follows from that place on; they add these ranges to what they keep of
//!    it. Nothing goes on before the record is on so many members that no later engine can overlook it: what is copied
//!    from here on was dirty at that record, so if a later engine takes back what was copied, it also takes back the
//!    record that called it clean.
//! 4. *Begin*: the replica drops its own tail and is durably *syncing* at that record; all later records go to it.
//! 5. *Copy*: what members list as dirty is copied. Records say now and then how far this is, so that the next engine need
//!    not begin anew.
//! 6. *Finish*: it has caught up; it is told that it is syncing no more, and then the view with it is proposed.
//!
//! Whatever goes wrong, the replica is out of the view as before, and is tried again later; members mark every change
//! for it all the while.

mod copy;

use std::time::Duration;

use protocol::message::{Begin, Condition, FetchKind, Promised};
use protocol::ranges::{ByteRange, merge};
use protocol::record::{DirtyChange, DirtyStep, ranges_max};
use protocol::{Position, REPLICAS_MAX, RecordKind, ReplicaName, Seq, ToAgent};

use super::copying::Copying;
use super::peer::{Link, Role};
use super::rate::Rate;
use super::survey::{Survey, Surveyed};
use super::{Notice, PeerId, Phase, Time, Volume};

/// A connection must have lasted so long: one that comes and goes is left alone.
const SETTLED_AFTER: Duration = Duration::from_millis(200);
/// An answer of the replica may take so long: it may have to make its image durable first.
const ANSWER_MAX: Duration = Duration::from_secs(60);
const LIST_PATIENCE: Duration = Duration::from_millis(500);
/// How often members are told how far the copying is.
const TELL_EVERY: Duration = Duration::from_secs(1);
const SPEED_OVER: Duration = Duration::from_secs(2);
/// Copies go out so many bytes at a time, at least: many small bursts would leave no pause.
const BURST_BYTES_MIN: u64 = 1 << 20;

/// A replica being brought back.
#[derive(Debug)]
pub(super) struct Resync {
    pub(super) peer: PeerId,
    /// Everything is to be copied, whatever members keep.
    full: bool,
    /// What the replica left unsettled: to be copied, whatever members keep.
    unsettled: Vec<ByteRange>,
    step: Step,
    step_since: Time,
    rate: Rate,
    told_at: Time,
    /// What they were told last: up to which byte, and in which record.
    told: (u64, Seq),
    /// Bytes copied at a time not long ago.
    speed_from: (u64, Time),
    bytes_per_second: u64,
}

#[derive(Debug)]
enum Step {
    Promise,
    Survey(Survey),
    Follow(Box<Begin>),
    Begin { from: Seq, size_bytes: u64 },
    Copy { from: Seq, copying: Box<Copying> },
    Finish { from: Seq, progress: (u64, u64), state: FinishState },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FinishState {
    /// It is to catch up.
    CatchUp,
    /// `Synced` was sent.
    Asked,
}

/// How far a resync is, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResyncSnapshot {
    /// Bytes copied.
    pub done_bytes: u64,
    /// Bytes to copy in all.
    pub total_bytes: u64,
    /// How fast.
    pub bytes_per_second: u64,
    /// How much longer, seconds; not known while nothing moves.
    pub eta_seconds: Option<u64>,
}

impl Resync {
    /// From this record on the replica's records must be kept.
    fn keeps_records(&self) -> bool {
        !matches!(self.step, Step::Promise | Step::Survey(_))
    }

    pub(super) fn is_finishing(&self) -> bool {
        matches!(self.step, Step::Finish { .. })
    }

    fn copying(&mut self) -> Option<&mut Copying> {
        match &mut self.step {
            Step::Copy { copying, .. } => Some(copying),
            Step::Promise | Step::Survey(_) | Step::Follow(_) | Step::Begin { .. } | Step::Finish { .. } => None,
        }
    }

    pub(super) fn snapshot(&self) -> ResyncSnapshot {
        let (done_bytes, total_bytes) = match &self.step {
            Step::Copy { copying, .. } => copying.progress(),
            Step::Finish { progress, .. } => *progress,
            Step::Promise | Step::Survey(_) | Step::Follow(_) | Step::Begin { .. } => (0, 0),
        };
        let bytes_per_second = self.bytes_per_second;
        let left = total_bytes - done_bytes;
        ResyncSnapshot { done_bytes, total_bytes, bytes_per_second, eta_seconds: left.checked_div(bytes_per_second) }
    }
}

impl<T> Volume<T> {
    /// Up to here the replica being brought back holds records; those behind must be kept for it.
    pub(super) fn followed(&self) -> Option<Seq> {
        let resync = self.resync.as_ref().filter(|r| r.keeps_records())?;
        Some(self.peers[resync.peer].durable)
    }

    fn enter_resync(&mut self, now: Time, step: Step) {
        if let Some(resync) = &mut self.resync {
            resync.step = step;
            resync.step_since = now;
        }
    }

    /// Goes on with the replica being brought back, or begins with one.
    pub(super) fn advance_resync(&mut self, now: Time) {
        if !matches!(self.phase, Phase::Serving) || self.stopping {
            return;
        }
        let Some(resync) = &self.resync else { return self.begin_resync(now) };
        let peer = &self.peers[resync.peer];
        let waited = now.saturating_sub(resync.step_since) >= ANSWER_MAX;
        let asked = match &resync.step {
            Step::Promise | Step::Survey(_) | Step::Begin { .. } => true,
            Step::Finish { state, .. } => *state == FinishState::Asked,
            Step::Follow(_) | Step::Copy { .. } => false,
        };
        if matches!(peer.link, Link::Down { .. }) {
            let reason = peer.last_error.clone().unwrap_or_else(|| "the connection is gone".to_owned());
            return self.end_resync(now, reason);
        }
        if peer.condition == Condition::NoSpace {
            return self.end_resync(now, "its disk is full".to_owned());
        }
        if asked && waited {
            return self.end_resync(now, format!("no answer within {} s", ANSWER_MAX.as_secs()));
        }
        if self.follower_is_too_slow(now) {
            return self.end_resync(now, "it takes records more slowly than clients write".to_owned());
        }
        match &self.resync.as_ref().expect("just seen").step {
            Step::Promise | Step::Begin { .. } => {}
            Step::Survey(_) => self.ask_survey(),
            Step::Follow(_) => self.send_begin(now),
            Step::Copy { .. } => self.advance_copying(now),
            Step::Finish { state: FinishState::CatchUp, .. } => self.send_synced(now),
            Step::Finish { state: FinishState::Asked, .. } => {}
        }
    }

    fn follower_is_too_slow(&self, now: Time) -> bool {
        let (Some(followed), Some(log)) = (self.followed(), &self.log) else { return false };
        let behind = log.bytes_between(followed, log.last());
        let waits = log.queued_at(followed.next()).is_some_and(|at| now.saturating_sub(at) > self.settings.lag_max);
        behind > self.settings.lag_bytes_max / 4 * 3 || waits
    }

    fn begin_resync(&mut self, now: Time) {
        let may = |id: &PeerId| {
            let peer = &self.peers[*id];
            peer.role == Role::Dropped
                && (!peer.is_kept_out || peer.wants_full_resync)
                && matches!(peer.link, Link::Welcomed)
                && now >= peer.backoff.not_before
                && peer.linked_for(now) >= SETTLED_AFTER
        };
        let Some(peer) = (0..self.peers.len()).filter(may).min_by_key(|id| self.peers[*id].backoff.not_before) else {
            return;
        };
        let full = std::mem::take(&mut self.peers[peer].wants_full_resync);
        self.peers[peer].is_kept_out = false;
        self.resync = Some(Resync {
            peer,
            full,
            unsettled: Vec::new(),
            step: Step::Promise,
            step_since: now,
            rate: Rate::new(self.settings.resync_rate_min, BURST_BYTES_MIN, now),
            told_at: now,
            told: (0, Seq(0)),
            speed_from: (0, now),
            bytes_per_second: 0,
        });
        self.ask_promise(now, peer);
    }

    /// Gives up for now. What was copied stays counted.
    pub(super) fn end_resync(&mut self, now: Time, reason: String) {
        self.tell_copied(now);
        let Some(resync) = self.resync.take() else { return };
        let peer = resync.peer;
        let at = &mut self.peers[peer];
        at.role = Role::Dropped;
        at.wants_full_resync |= resync.full && !resync.keeps_records();
        at.backoff.lost(now, Duration::ZERO);
        at.last_error = Some(reason.clone());
        let (replica, began) = (at.name.clone(), resync.keeps_records());
        if !matches!(at.link, Link::Down { .. }) {
            self.disconnect(now, peer);
        }
        if began {
            self.notice(Notice::ResyncEnded { replica, reason });
        }
    }

    // ---- promise and survey ------------------------------------------------------------------------------------

    pub(super) fn resync_promised(&mut self, now: Time, peer: PeerId, promised: &Promised) {
        let Some(resync) = self.resync.as_mut().filter(|r| r.peer == peer) else { return };
        resync.unsettled.clone_from(&promised.unsettled);
        let Some(log) = &self.log else { return };
        let end = Position { epoch: self.epoch, seq: log.last() };
        let replica = self.peers[peer].name.clone();
        let tracked = self.tracked.get(&replica).copied();
        let found = promised.position;
        let base = self.history.common(end, &promised.history, found);
        let full = resync.full;
        let known = base.filter(|base| tracked.is_some_and(|acknowledged| *base >= acknowledged));
        if let (None, Some(acknowledged)) = (known, tracked)
            && acknowledged > Seq(0)
            && !full
        {
            self.notice(Notice::LostData { replica, acknowledged, found });
        }
        match known.filter(|_| !full) {
            Some(base) if base == found.seq => self.give_out_follow(now, Vec::new()),
            Some(base) if promised.journal_first <= base.next() => {
                self.enter_resync(now, Step::Survey(Survey::new(peer, base, found.seq)));
                self.ask_survey();
            }
            Some(_) | None => self.give_out_follow(now, vec![self.whole()]),
        }
    }

    fn ask_survey(&mut self) {
        if let Some(Resync { peer, step: Step::Survey(survey), .. }) = &mut self.resync
            && let Some((from, to)) = survey.question()
        {
            self.peers[*peer].push_urgent(ToAgent::Fetch { from, to, what: FetchKind::Ranges });
        }
    }

    pub(super) fn resync_surveys(&mut self, peer: PeerId) -> Option<&mut Survey> {
        match &mut self.resync {
            Some(Resync { peer: at, step: Step::Survey(survey), .. }) if *at == peer => Some(survey),
            Some(_) | None => None,
        }
    }

    pub(super) fn resync_surveyed(&mut self, now: Time, surveyed: Surveyed) {
        match surveyed {
            Surveyed::Partly => self.progressed_resync(now),
            Surveyed::Failed => self.give_out_follow(now, vec![self.whole()]),
            Surveyed::Whole => {
                if let Some(Resync { step: Step::Survey(survey), .. }) = &mut self.resync {
                    let survey = std::mem::replace(survey, Survey::new(0, Seq(0), Seq(0)));
                    self.give_out_follow(now, survey.ranges());
                }
            }
        }
    }

    fn progressed_resync(&mut self, now: Time) {
        if let Some(resync) = &mut self.resync {
            resync.step_since = now;
        }
    }

    // ---- follow and begin --------------------------------------------------------------------------------------

    pub(super) fn whole(&self) -> ByteRange {
        ByteRange { offset: 0, length: self.size_given_out() }
    }

    /// Members take note that the replica follows from here on; `ranges` are dirty besides what they keep.
    fn give_out_follow(&mut self, now: Time, mut ranges: Vec<ByteRange>) {
        let Some((peer, unsettled)) = self.resync.as_ref().map(|r| (r.peer, r.unsettled.clone())) else { return };
        let subject = self.peers[peer].name.clone();
        if ranges == [self.whole()] {
            self.repairs.give_up(peer);
        }
        ranges.extend(unsettled);
        let count_max = ranges_max(self.record_payload_bytes_max).max(1);
        let step = DirtyStep::Follow { ranges: merge(ranges, count_max) };
        let seq = self.append_dirty(now, subject.clone(), step);
        self.tracked.entry(subject.clone()).or_insert(Seq(0));
        let others = self.tracked.iter().filter(|(n, _)| **n != subject);
        let begin = Begin {
            position: Position { epoch: self.epoch, seq },
            size_bytes: self.size_given_out(),
            views: self.views.clone().expect("views are known once the volume serves"),
            history: self.history.clone(),
            acks: self.acks(),
            // Of one that is left out the replica will think that it lacks everything.
            tracked: others.take(REPLICAS_MAX).map(|(n, s)| (n.clone(), *s)).collect(),
        };
        self.peers[peer].restart_from(seq);
        self.enter_resync(now, Step::Follow(Box::new(begin)));
    }

    pub(super) fn append_dirty(&mut self, now: Time, subject: ReplicaName, step: DirtyStep) -> Seq {
        let nowhere = ByteRange { offset: 0, length: 0 };
        let payload = DirtyChange { subject, step }.encode();
        self.append(now, RecordKind::DirtyChange, nowhere, false, payload)
    }

    fn send_begin(&mut self, now: Time) {
        let Some(Resync { peer, step: Step::Follow(begin), .. }) = &self.resync else { return };
        let (from, size_bytes) = (begin.position.seq, begin.size_bytes);
        if !self.is_beyond_doubt(from) {
            return;
        }
        let message = ToAgent::Begin(Begin::clone(begin));
        let peer = *peer;
        self.peers[peer].push_urgent(message);
        self.enter_resync(now, Step::Begin { from, size_bytes });
    }

    /// Whether no later engine can overlook the record: it is on as many members as a view change needs.
    fn is_beyond_doubt(&self, seq: Seq) -> bool {
        self.membership.as_ref().is_some_and(|m| {
            m.pending.is_none() && self.durable_on(&m.in_force, seq) >= self.view_change_needed(m.in_force.len())
        })
    }

    pub(super) fn on_begun(&mut self, now: Time, peer: PeerId) {
        let Some(Resync { peer: at, step: Step::Begin { from, size_bytes }, .. }) = &self.resync else { return };
        if *at != peer {
            return;
        }
        let (from, size_bytes) = (*from, *size_bytes);
        self.peers[peer].role = Role::Syncing;
        self.peers[peer].restart_from(from);
        self.peers[peer].push_urgent(ToAgent::Stable { seq: self.stable_told.min(from) });
        self.enter_resync(now, Step::Copy { from, copying: Box::new(Copying::new(size_bytes)) });
        let replica = self.peers[peer].name.clone();
        self.notice(Notice::Resyncing { replica });
    }

    // ---- finish ------------------------------------------------------------------------------------------------

    /// Says that it is in sync, once it has nearly all records and what all members are known to hold, and no view change
    /// stands in the way. Its journal begins where it began to follow: all members must hold everything before that, or one
    /// that lags could not be brought up from this journal by an engine that finds no better one.
    fn send_synced(&mut self, now: Time) {
        let Step::Finish { from, .. } = &self.resync.as_ref().expect("the step is this one").step else { return };
        if self.stable_seq().is_none_or(|stable| stable < *from) {
            return;
        }
        let may_join = self.may_change_view();
        let Some(log) = &self.log else { return };
        let Some(resync) = &mut self.resync else { return };
        let peer = &mut self.peers[resync.peer];
        let behind = log.bytes_between(peer.durable, log.last());
        let near = behind <= (self.settings.lag_bytes_max / 16).max(1 << 15) && peer.durable >= self.stable_told;
        if near && may_join {
            peer.push_urgent(ToAgent::Synced);
            self.enter_finish(now, FinishState::Asked);
        }
    }

    fn enter_finish(&mut self, now: Time, to: FinishState) {
        if let Some(resync) = &mut self.resync
            && let Step::Finish { state, .. } = &mut resync.step
        {
            *state = to;
            resync.step_since = now;
        }
    }

    pub(super) fn on_in_sync(&mut self, now: Time, peer: PeerId) {
        let asked = |r: &&Resync| r.peer == peer && matches!(r.step, Step::Finish { state: FinishState::Asked, .. });
        if !self.resync.as_ref().is_some_and(|r| asked(&r)) {
            return;
        }
        if !self.may_change_view() {
            return self.end_resync(now, "the view cannot be changed just now".to_owned());
        }
        self.resync = None;
        self.propose_join(now, peer);
    }

    /// A view change of others is about to be given out. A replica that was told that it is in sync, and is not a member
    /// yet, must not get it: it could be the only one to do so, and would name a view that nobody else knows of.
    pub(super) fn keep_from_synced(&mut self, now: Time) {
        let told = |r: &Resync| matches!(r.step, Step::Finish { state: FinishState::Asked, .. });
        if self.resync.as_ref().is_some_and(told) {
            self.end_resync(now, "a member leaves the view first".to_owned());
        }
    }
}
