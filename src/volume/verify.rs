//! Reads that are compared: all members are asked for the same whole blocks, behind the same record. Nobody is believed
//! alone where several can be asked.
//!
//! Answers can differ because records were applied meanwhile that one of them shows and another does not; they are then
//! asked for again, and after a few tries such changes wait ([`super::fresh_read`]). Differing otherwise, a block is what
//! most members in force hold, and is repaired where it is not; without a majority the read fails.

use bytes::Bytes;
use protocol::message::ReadKind;
use protocol::ranges::ByteRange;
use protocol::{BLOCK_BYTES, Seq};

use super::compare::{self, Compared, Electorate};
use super::peer::READS_OUTSTANDING_MAX;
use super::reads::{Held, Piece};
use super::repair::{Damage, Finding};
use super::{Answer, Failure, Notice, PeerId, Time, Volume};

/// A member that has not answered for so long is not waited for, if two others have and need it for no majority.
const PATIENCE: Time = Time::from_millis(1000);

impl<T> Volume<T> {
    /// Asks all members for a piece that is compared; none of them as long as one cannot be asked just now.
    pub(super) fn ask_all(&mut self, now: Time, id: u64) {
        let Some(piece) = self.reads.pieces.get(&id).filter(|p| p.outstanding == 0) else { return };
        let Some(membership) = &self.membership else { return };
        let can = |(peer, p): &(PeerId, &super::Peer)| {
            p.is_ready_member() && membership.in_force.contains(&p.name) && !piece.has_failed_at(*peer)
        };
        let members: Vec<PeerId> = self.peers.iter().enumerate().filter(can).map(|(peer, _)| peer).collect();
        if members.iter().any(|peer| self.peers[*peer].reads.len() >= READS_OUTSTANDING_MAX) {
            return;
        }
        let last = self.last_given_out();
        let range = piece.range;
        let differing = |peer: PeerId| self.repairs.differing(peer, range, last).map(move |block| (peer, block));
        let disbelieved: Vec<(PeerId, u64)> = members.iter().copied().flat_map(differing).collect();
        let Some(piece) = self.reads.pieces.get_mut(&id) else { return };
        let (range, Some(round)) = (piece.range, &mut piece.round) else { return };
        round.read.ask(id, now);
        round.seen = last;
        round.disbelieved = disbelieved;
        round.since.get_or_insert(now);
        for peer in members {
            piece.asked.push((peer, now));
            piece.outstanding += 1;
            self.peers[peer].ask(last, last, id, ReadKind::Data, range);
        }
    }

    /// One of the members asked has answered, or will not.
    pub(super) fn advance_comparison(&mut self, now: Time, id: u64) {
        let is_held = self.reads.held.iter().any(|h| h.piece == id);
        let Some(piece) = self.reads.pieces.get_mut(&id).filter(|p| p.outstanding == 0 && !is_held) else { return };
        let has_answers = piece.round.as_ref().is_some_and(|round| !round.answers.is_empty());
        if has_answers {
            self.conclude(now, id);
        } else {
            self.ask_all(now, id);
            self.fail_if_hopeless(now, id);
        }
    }

    fn electorate(&self, piece: &Piece) -> Electorate {
        let in_force = self.membership.as_ref().map_or(0, |m| m.in_force.len());
        let failed = piece.failed.iter().filter_map(|(peer, block)| block.map(|block| (*peer, block)));
        let disbelieved = piece.round.iter().flat_map(|round| round.disbelieved.iter().copied());
        Electorate { in_force, bad: failed.chain(disbelieved).collect() }
    }

    /// Compares what is there.
    fn conclude(&mut self, now: Time, id: u64) {
        let Some(electorate) = self.reads.pieces.get(&id).map(|piece| self.electorate(piece)) else { return };
        let Some(piece) = self.reads.pieces.get_mut(&id) else { return };
        let (range, Some(round)) = (piece.range, &mut piece.round) else { return };
        let is_fresh = round.read.finish();
        if !is_fresh && !compare::are_equal(&round.answers) {
            if let Some(again) = self.reads.renew(id) {
                self.ask_all(now, again);
            }
            return;
        }
        let Compared { data, differences, ties } = compare::compare(range.offset, &round.answers, &electorate);
        let (seen, applied) = (round.seen, round.applied);
        if is_fresh && round.answers.len() >= electorate.in_force {
            self.repairs.agreed(range, seen, |block| ties.contains(&block));
        }
        for difference in differences {
            let blocks = ByteRange { offset: difference.block, length: BLOCK_BYTES };
            let good = difference.good.first().copied();
            let sound = difference.good;
            self.repair(Finding { blocks, bad: difference.bad, what: Damage::Differs, good, sound, seen });
        }
        for offset in ties {
            self.note_tie(offset, |peer| electorate.is_bad(peer, offset), seen);
            self.notice(Notice::NoMajority { offset });
        }
        match data {
            Some(data) => {
                let until = self.must_be_committed(range, applied);
                self.answer_or_hold(now, Held { piece: id, answer: Answer::Data(data), until });
            }
            None => {
                if let Some(token) = self.reads.fail_piece(id) {
                    self.complete(token, Err(Failure::Io));
                }
            }
        }
    }

    /// Takes a member's answer.
    pub(super) fn compare_with(&mut self, now: Time, id: u64, peer: PeerId, applied: Seq, data: Bytes) {
        let round = self.reads.pieces.get_mut(&id).and_then(|piece| piece.round.as_mut());
        if let Some(round) = round {
            round.answers.push((peer, data));
            round.applied = round.applied.max(applied);
        }
        self.advance_comparison(now, id);
    }

    /// Goes on without members that do not answer, if the others decide, or if it takes as long as requests wait for members.
    pub(super) fn conclude_late(&mut self, now: Time) {
        let held = &self.reads.held;
        let late = |(id, p): &(&u64, &Piece)| {
            let asked_at = p.asked.last().map_or(now, |(_, at)| *at);
            p.outstanding > 0
                && p.round.as_ref().is_some_and(|round| round.answers.len() >= 2)
                && now.saturating_sub(asked_at) > PATIENCE
                && !held.iter().any(|h| h.piece == **id)
        };
        let late: Vec<u64> = self.reads.pieces.iter().filter(late).map(|(id, _)| *id).collect();
        for id in late {
            if !self.is_open(now, id) {
                self.conclude(now, id);
            }
        }
    }

    /// Whether answers that are there decide nothing, and those that are missing may.
    fn is_open(&mut self, now: Time, id: u64) -> bool {
        let Some(electorate) = self.reads.pieces.get(&id).map(|piece| self.electorate(piece)) else { return false };
        let Some(piece) = self.reads.pieces.get_mut(&id) else { return false };
        let (range, Some(round)) = (piece.range, &mut piece.round) else { return false };
        let waited = round.since.map_or(Time::ZERO, |since| now.saturating_sub(since));
        if waited >= self.settings.freeze || !round.read.is_fresh() {
            return false;
        }
        // They are megabytes: compared once, and not whenever time passes.
        let is_known = round.undecided == round.answers.len();
        if is_known || compare::compare(range.offset, &round.answers, &electorate).data.is_none() {
            round.undecided = round.answers.len();
            return true;
        }
        false
    }
}
