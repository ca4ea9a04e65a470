//! Reads: whom to ask, when to ask another, when an answer may be given.
//!
//! A member answers a read as of its place in the order of messages, so any member's answer is fresh. An answer may show
//! records that were applied meanwhile; if more than one member must hold a record before it is acknowledged, the answer
//! waits until all that it may show is (otherwise a later engine could take back what a client has read).
//!
//! A status goes the same way, as a client that is told of zeroes does not read them. A prefetch does too, but shows
//! nothing.

use protocol::message::{ReadKind, ReadOutcome};
use protocol::ranges::ByteRange;
use protocol::{BLOCK_BYTES, Seq, View};

use super::membership::Membership;
use super::peer::READS_OUTSTANDING_MAX;
use super::reads::Held;
use super::repair::{self, Damage, Finding};
use super::{Answer, Failure, Notice, PeerId, Phase, ReadSpread, Time, Volume};

impl<T> Volume<T> {
    pub(super) fn begin_read(&mut self, now: Time, token: T, what: ReadKind, range: ByteRange) {
        let compares = what == ReadKind::Data && self.settings.read == ReadSpread::Verify;
        // A status of what nobody is sure of must not fail with that of its neighbours.
        let range = if what == ReadKind::Extents { self.repairs.up_to_difference(range) } else { range };
        for piece in self.reads.begin(token, what, range, compares) {
            self.ask(now, piece);
        }
    }

    /// Members that may be asked for a piece, the best first: few reads under way, little lag.
    fn candidates(&self, piece: u64) -> Vec<PeerId> {
        let Some(membership) = &self.membership else { return Vec::new() };
        let piece = self.reads.pieces.get(&piece);
        let may = |id: &PeerId| {
            let peer = &self.peers[*id];
            peer.is_ready_member()
                && membership.in_force.contains(&peer.name)
                && peer.reads.len() < READS_OUTSTANDING_MAX
                && !piece.is_some_and(|p| p.was_asked(*id) || p.has_failed_at(*id))
        };
        let mut candidates: Vec<PeerId> = (0..self.peers.len()).filter(may).collect();
        let last = self.last_given_out();
        // So many reads under way make a member no worse than one with none.
        let is_quick = piece.is_some_and(|piece| self.reads.is_quick(piece));
        let together = if is_quick { self.settings.reads_together.max(1) } else { 1 };
        candidates.sort_by_key(|id| {
            let peer = &self.peers[*id];
            // A backlog is read behind; a few records in flight are not.
            (last.ahead_of(peer.durable) / 64, peer.reads.len() / together, *id)
        });
        candidates
    }

    pub(super) fn last_given_out(&self) -> Seq {
        self.log.as_ref().map_or(Seq(0), super::Log::last)
    }

    /// Asks one member for a piece, or all that can be asked.
    fn ask(&mut self, now: Time, piece: u64) {
        if self.reads.pieces.get(&piece).is_some_and(|p| p.round.is_some()) {
            return self.ask_all(now, piece);
        }
        self.pass_over_differing(piece);
        let mut candidates = self.candidates(piece);
        match self.settings.read {
            ReadSpread::Adaptive | ReadSpread::Hedged | ReadSpread::Verify => candidates.truncate(1),
            ReadSpread::Multicast => {}
        }
        let last = self.last_given_out();
        for id in candidates {
            let Some(range) = self.reads.pieces.get(&piece).map(|at| at.range) else { return };
            let after = self.read_after(id, range);
            let Some(at) = self.reads.pieces.get_mut(&piece) else { return };
            at.asked.push((id, now));
            at.outstanding += 1;
            self.peers[id].ask(after, last, piece, at.what, at.range);
        }
    }

    /// Members that are known to hold something else than most are as good as such that have failed.
    fn pass_over_differing(&mut self, id: u64) {
        let last = self.last_given_out();
        let Some(piece) = self.reads.pieces.get_mut(&id).filter(|p| p.what != ReadKind::Prefetch) else { return };
        for peer in (0..self.peers.len()).filter(|peer| self.peers[*peer].role == super::Role::Member) {
            if !piece.was_asked(peer)
                && !piece.has_failed_at(peer)
                && let Some(block) = self.repairs.differing(peer, piece.range, last).next()
            {
                piece.failed.push((peer, Some(block)));
            }
        }
    }

    pub(super) fn on_read_done(&mut self, now: Time, peer: PeerId, id: u64, applied: Seq, outcome: ReadOutcome) {
        let Some(seen) = self.peers[peer].reads.remove(&id) else { return };
        if outcome == ReadOutcome::Damaged {
            let replica = self.peers[peer].name.clone();
            self.notice(Notice::DamagedAnswer { replica });
        }
        if self.on_settling_read(now, id, &outcome) {
            return;
        }
        let is_of_ours = self.on_chunk_read(now, peer, id, seen, &outcome);
        if is_of_ours || self.on_repair_read(now, peer, id, seen, &outcome) {
            return;
        }
        if self.on_scrub_read(now, peer, id, seen, &outcome) {
            return;
        }
        let Some(piece) = self.reads.pieces.get_mut(&id) else {
            // Nobody waits for it; what is bad is bad all the same.
            if let Some(bad) = repair::bad_block(&outcome, self.whole()) {
                self.note_read_failed(peer, seen, Some(bad));
            }
            return;
        };
        piece.outstanding -= 1;
        let (what, range, compares) = (piece.what, piece.range, piece.round.is_some());
        let asked_at = piece.asked.iter().find(|(asked, _)| *asked == peer).map_or(now, |(_, at)| *at);
        let bad = repair::bad_block(&outcome, range);
        let is_disbelieved = !compares && piece.has_failed_at(peer);
        match piece.judge(outcome) {
            Some(_) if is_disbelieved => self.ask_another_or_fail(now, id),
            Some(Answer::Data(data)) if compares => {
                self.note_client(asked_at, now);
                self.compare_with(now, id, peer, applied, data);
            }
            Some(answer) => {
                let until = match what {
                    ReadKind::Data => {
                        self.reads.note_latency(id, peer, now);
                        self.note_client(asked_at, now);
                        self.must_be_committed(range, applied)
                    }
                    ReadKind::Extents => self.must_be_committed(range, applied),
                    ReadKind::Prefetch | ReadKind::Scrub => Seq(0),
                };
                self.answer_or_hold(now, Held { piece: id, answer, until });
            }
            None => self.read_failed(now, peer, id, seen, bad),
        }
    }

    /// A member could not do a read that was queued behind the record `seen`; because of a bad block, if that is known.
    pub(super) fn note_read_failed(&mut self, peer: PeerId, seen: Seq, bad: Option<(u64, Damage)>) {
        match bad {
            Some((offset, what)) => {
                let blocks = ByteRange { offset, length: BLOCK_BYTES };
                self.repair(Finding { blocks, bad: peer, what, good: None, sound: Vec::new(), seen });
            }
            None => {
                let peer = &mut self.peers[peer];
                peer.errors += 1;
                let replica = peer.name.clone();
                self.notice(Notice::ReadFailed { replica });
            }
        }
    }

    fn read_failed(&mut self, now: Time, peer: PeerId, id: u64, seen: Seq, bad: Option<(u64, Damage)>) {
        self.note_read_failed(peer, seen, bad);
        if let Some(piece) = self.reads.pieces.get_mut(&id) {
            piece.failed.push((peer, bad.map(|(offset, _)| offset)));
        }
        self.ask_another_or_fail(now, id);
    }

    /// What a read showed must be acknowledged up to here before it is answered.
    pub(super) fn must_be_committed(&self, range: ByteRange, applied: Seq) -> Seq {
        let view_size = self.membership.as_ref().map_or(1, |m| m.in_force.len());
        if self.quorum_policy().needed(view_size) == 1 {
            // The member that answered holds what it showed, and one is enough.
            return Seq(0);
        }
        self.log.as_ref().and_then(|log| log.last_change(range, applied)).unwrap_or(Seq(0))
    }

    pub(super) fn answer_or_hold(&mut self, now: Time, held: Held) {
        if self.may_answer(now, held.until) {
            self.answer(held.piece, held.answer);
        } else {
            self.reads.held.push(held);
        }
    }

    fn may_answer(&self, now: Time, until: Seq) -> bool {
        let serving = matches!(self.phase, Phase::Serving);
        serving && until <= self.committed(self.quorum_policy()) && self.has_lease(now)
    }

    /// Whether enough members confirmed this epoch lately that no other engine can have activated: by the view in force, or by
    /// one that is pending, which another engine may have found.
    pub(super) fn has_lease(&self, now: Time) -> bool {
        let Some(Membership { in_force, pending }) = &self.membership else { return false };
        let is_confirmed = |p: &&super::Peer| {
            p.confirmed_at.is_some_and(|at| now.saturating_sub(at) < self.settings.lease)
                && p.role != super::Role::Leaving
        };
        let holds = |view: &View| {
            let confirmed = self.peers.iter().filter(is_confirmed).filter(|p| view.contains(&p.name)).count();
            confirmed >= self.quorum_policy().view_change(view.len())
        };
        holds(in_force) && pending.as_ref().is_none_or(|pending| holds(&pending.view))
    }

    fn answer(&mut self, piece: u64, answer: Answer) {
        if let Some((token, answer)) = self.reads.finish_piece(piece, answer) {
            self.complete(token, Ok(answer));
        }
    }

    /// Gives the answers that may be given now, and asks for pieces that nobody was asked for.
    pub(super) fn release_reads(&mut self, now: Time) {
        if !self.reads.held.is_empty() {
            for held in std::mem::take(&mut self.reads.held) {
                self.answer_or_hold(now, held);
            }
        }
        // Only as many are looked for as can be asked now: thousands may wait.
        let members = self.peers.iter().filter(|p| p.is_ready_member());
        let room: usize = members.map(|p| READS_OUTSTANDING_MAX.saturating_sub(p.reads.len())).sum();
        if room == 0 || self.reads.pieces.is_empty() {
            return;
        }
        let held = &self.reads.held;
        let waits = |id: &u64, p: &super::reads::Piece| {
            p.outstanding == 0 && !held.iter().any(|h| h.piece == *id) && !self.candidates(*id).is_empty()
        };
        let pieces = self.reads.pieces.iter();
        let unasked: Vec<u64> = pieces.filter(|(id, p)| waits(id, p)).map(|(id, _)| *id).take(room).collect();
        for piece in unasked {
            self.ask(now, piece);
        }
    }

    /// A peer will not answer what it was asked.
    pub(super) fn reads_lost(&mut self, now: Time, peer: PeerId) {
        for id in std::mem::take(&mut self.peers[peer].reads).into_keys() {
            self.chunk_read_lost(id);
            self.repair_read_lost(id);
            self.scrub_read_lost(now, peer, id);
            if let Some(piece) = self.reads.pieces.get_mut(&id) {
                piece.outstanding -= 1;
                // It may be asked again when it is back.
                piece.asked.retain(|(asked, _)| *asked != peer);
                self.ask_another_or_fail(now, id);
            }
        }
    }

    fn ask_another_or_fail(&mut self, now: Time, id: u64) {
        if self.reads.held.iter().any(|h| h.piece == id) {
            return;
        }
        if self.reads.pieces.get(&id).is_some_and(|p| p.round.is_some()) {
            return self.advance_comparison(now, id);
        }
        self.ask(now, id);
        self.fail_if_hopeless(now, id);
    }

    /// Fails a read that every member was asked for and none has a good copy of: better no answer than a wrong one. If
    /// they may have good copies of its parts, these are asked for.
    pub(super) fn fail_if_hopeless(&mut self, now: Time, id: u64) {
        let Some(piece) = self.reads.pieces.get(&id) else { return };
        let mut members = (0..self.peers.len()).filter(|id| self.peers[*id].role == super::Role::Member);
        let is_hopeless = piece.outstanding == 0 && !piece.failed.is_empty() && members.all(|m| piece.has_failed_at(m));
        if !is_hopeless {
            return;
        }
        if let Some(halves) = self.reads.split(id) {
            halves.into_iter().for_each(|half| self.ask(now, half));
        } else if let Some(token) = self.reads.fail_piece(id) {
            self.complete(token, Err(Failure::Io));
        }
    }

    /// Looks again at reads that some members could not do: the one that might have done better may have left.
    pub(super) fn fail_hopeless(&mut self, now: Time) {
        let failed: Vec<u64> =
            self.reads.pieces.iter().filter(|(_, p)| !p.failed.is_empty()).map(|(id, _)| *id).collect();
        failed.into_iter().for_each(|id| self.fail_if_hopeless(now, id));
    }

    /// Asks another member where an answer takes unusually long.
    pub(super) fn hedge(&mut self, now: Time) {
        let after = self.reads.hedge_after(self.settings.read);
        let held = &self.reads.held;
        let late = |(id, p): &(&u64, &super::reads::Piece)| {
            let asked_at = p.asked.last().map_or(now, |(_, at)| *at);
            let is_late = p.outstanding > 0 && now.saturating_sub(asked_at) > after;
            is_late && p.round.is_none() && !held.iter().any(|h| h.piece == **id)
        };
        let late: Vec<u64> = self.reads.pieces.iter().filter(late).map(|(id, _)| *id).collect();
        for piece in late {
            self.ask(now, piece);
        }
        self.conclude_late(now);
    }

    /// Takes back what nobody waits for any more.
    pub(super) fn cancel_losers(&mut self) {
        for (id, asked) in self.reads.take_retired() {
            for peer in asked {
                self.peers[peer].cancel(id);
            }
        }
    }
}
