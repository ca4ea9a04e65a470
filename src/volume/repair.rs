//! Bad blocks of members, made good again from other members.
//!
//! A repair is an ordinary record of a whole block that no client asked for: its bytes are read at a member in sync and go to
//! all members through the order, if no record changed the block meanwhile ([`super::fresh_read`]). To members whose block
//! is good it says what they hold already; journal, dirty ranges and replay know it as the write that it is. A client's
//! change of the whole block makes it good as well.
//!
//! Owns which blocks are known to be bad, at whom, and how far each repair is. Never answers a client: that is
//! [`super::dispatch`]'s, which reports here what it found.

mod known;

use std::fmt;

use protocol::message::{ReadKind, ReadOutcome};
use protocol::ranges::ByteRange;
use protocol::{BLOCK_BYTES, Record, RecordKind, Seq};

use super::log::Log;
use super::peer::{Peer, READS_OUTSTANDING_MAX, Role};
use super::{Notice, PeerId, Phase, Time, Volume};
pub(super) use known::Repairs;
use known::{HOPELESS_MAX, Healed, Step};

/// A member that has not answered for so long is not waited for, if another may have a good copy.
const SOURCE_PATIENCE: Time = Time::from_secs(5);

/// What is wrong with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// It does not match its checksum.
    ChecksumMismatch,
    /// The disk reports an error for it.
    Unreadable,
    /// It matches its checksum, and most members hold something else.
    Differs,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Damage::ChecksumMismatch => "does not match its checksum",
            Damage::Unreadable => "cannot be read from its disk",
            Damage::Differs => "is not what most members hold",
        })
    }
}

/// Blocks that were found bad at a member.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    /// Whole blocks.
    pub(super) blocks: ByteRange,
    pub(super) bad: PeerId,
    pub(super) what: Damage,
    /// The member to copy from; any whose block is good if none is named. One that is named must be right for all there
    /// may be to choose from, as for [`Damage::Differs`].
    pub(super) good: Option<PeerId>,
    /// Members whose copy was found good by the same question, as far as that is known.
    pub(super) sound: Vec<PeerId>,
    /// The question that found it was queued behind this record: what later ones made good is good.
    pub(super) seen: Seq,
}

impl Finding {
    /// The only members to copy from, if any is named: with it, those that were found to hold the same.
    fn copied_from(&self) -> Option<Vec<PeerId>> {
        let good = self.good?;
        Some(if self.sound.contains(&good) { self.sound.clone() } else { vec![good] })
    }
}

/// What an outcome says of a bad block in the range that was asked for.
pub(super) fn bad_block(outcome: &ReadOutcome, range: ByteRange) -> Option<(u64, Damage)> {
    let (offset, what) = match outcome {
        ReadOutcome::ChecksumMismatch { offset } => (*offset, Damage::ChecksumMismatch),
        ReadOutcome::Unreadable { offset } => (*offset, Damage::Unreadable),
        ReadOutcome::Data { .. }
        | ReadOutcome::Extents(_)
        | ReadOutcome::Prefetched
        | ReadOutcome::Scrubbed(_)
        | ReadOutcome::Cancelled
        | ReadOutcome::Failed
        | ReadOutcome::Damaged => return None,
    };
    let whole = range.aligned(BLOCK_BYTES);
    let is_in_it = offset.is_multiple_of(BLOCK_BYTES) && (whole.offset..whole.end()).contains(&offset);
    is_in_it.then_some((offset, what))
}

fn block_at(offset: u64) -> ByteRange {
    ByteRange { offset, length: BLOCK_BYTES }
}

impl<T> Volume<T> {
    /// Takes note of blocks that are bad at a member, and has them made good. What is known already is not counted again.
    pub(super) fn repair(&mut self, finding: Finding) {
        let whole = finding.blocks.aligned(BLOCK_BYTES);
        for block in (whole.offset..whole.end().min(self.size_given_out())).step_by(BLOCK_BYTES as usize) {
            if self.repairs.note(block, &finding) {
                let peer = &mut self.peers[finding.bad];
                peer.checksum_errors += 1;
                peer.errors += 1;
                let (replica, what) = (peer.name.clone(), finding.what);
                self.notice(Notice::BadBlock { replica, offset: block, what });
            }
            if finding.what == Damage::Differs {
                self.disbelieve(finding.bad, block);
            }
        }
    }

    /// What a member was asked for already and a block is part of that it holds wrong is used for nothing.
    fn disbelieve(&mut self, peer: PeerId, block: u64) {
        let good_since = self.repairs.made_good_by(block);
        let shows = |seen: Seq| good_since.is_none_or(|seq| seq > seen);
        let asked = &self.peers[peer].reads;
        self.reads.disbelieve(peer, block_at(block), |id| asked.get(&id).copied(), shows);
        self.lose_chunks(block_at(block));
    }

    /// Takes note of a block of which sound copies differ, behind the record `seen`; nothing is made good from any of them.
    pub(super) fn note_tie(&mut self, block: u64, bad: impl Fn(PeerId) -> bool, seen: Seq) {
        let Some(membership) = &self.membership else { return };
        let is_party = |(id, p): &(PeerId, &Peer)| {
            let is_member = matches!(p.role, Role::Member | Role::Leaving);
            is_member && membership.in_force.contains(&p.name) && !bad(*id)
        };
        let parties = self.peers.iter().enumerate().filter(is_party).map(|(id, _)| id).collect();
        self.repairs.tie(block, parties, seen);
    }

    /// Goes on with repairs: takes note of those that are durable, asks for good copies.
    pub(super) fn advance_repairs(&mut self, now: Time) {
        if self.repairs.blocks.is_empty() || !matches!(self.phase, Phase::Serving) || self.stopping {
            return;
        }
        let peers = &self.peers;
        let is_member = |id: PeerId| peers[id].role == Role::Member;
        for Healed { block, peer, what } in self.repairs.take_healed(is_member, |id| peers[id].durable) {
            let peer = &mut self.peers[peer];
            peer.repaired_blocks += 1;
            let replica = peer.name.clone();
            self.notice(Notice::Repaired { replica, offset: block, what });
        }
        self.give_up_late_sources(now);
        if self.repairs_wait_for().is_none() {
            for block in self.repairs.unasked() {
                self.ask_for_good_copy(now, block);
            }
        }
    }

    /// Why no repair is given out just now.
    pub(super) fn repairs_wait_for(&self) -> Option<&'static str> {
        let has_room = self.log.as_ref().is_some_and(|log| log.bytes() < self.log_bytes_max());
        if self.is_frozen() {
            Some("the volume is frozen")
        } else if self.is_full() {
            Some("the disks are full")
        } else if !has_room {
            Some("room in the log")
        } else {
            None
        }
    }

    fn ask_for_good_copy(&mut self, now: Time, block: u64) {
        let Some(membership) = &self.membership else { return };
        let is_tied = self.repairs.ties.contains(block);
        let Some(repair) = self.repairs.blocks.get_mut(&block) else { return };
        let mut members = self.peers.iter().enumerate().filter(|(_, p)| p.role == Role::Member);
        // A copy of one that may be wrong would make it look like the right one.
        if is_tied || members.all(|(id, _)| !repair.may_read_at(id)) {
            repair.step = Step::Hopeless;
            if self.repairs.count(true) > HOPELESS_MAX {
                self.repairs.blocks.remove(&block);
            }
            let why = if is_tied { Notice::NoMajority { offset: block } } else { Notice::NoGoodCopy { offset: block } };
            return self.notice(why);
        }
        let last = self.log.as_ref().map_or(Seq(0), Log::last);
        let can = |id: &PeerId| {
            let peer = &self.peers[*id];
            let is_ready = peer.is_ready_member() && membership.in_force.contains(&peer.name);
            is_ready && peer.reads.len() < READS_OUTSTANDING_MAX && repair.may_read_at(*id)
        };
        let cost = |id: &PeerId| {
            let peer = &self.peers[*id];
            (repair.late.contains(id), last.ahead_of(peer.durable) / 64, peer.reads.len())
        };
        let Some(source) = (0..self.peers.len()).filter(can).min_by_key(cost) else { return };
        let id = self.reads.id();
        repair.read.ask(id, now);
        self.peers[source].ask(last, last, id, ReadKind::Data, block_at(block));
    }

    /// A member whose disk hangs must not keep others from being asked for a good copy.
    fn give_up_late_sources(&mut self, now: Time) {
        for (block, id) in self.repairs.late(now, SOURCE_PATIENCE) {
            let Some(source) = self.peers.iter().position(|peer| peer.reads.contains_key(&id)) else { continue };
            let Some(repair) = self.repairs.blocks.get_mut(&block) else { continue };
            let is_other = |(peer, p): (PeerId, &Peer)| {
                peer != source && p.is_ready_member() && repair.may_read_at(peer) && !repair.late.contains(&peer)
            };
            if self.peers.iter().enumerate().any(is_other) {
                repair.late.push(source);
                repair.read.lose();
                self.peers[source].cancel(id);
            }
        }
    }

    /// A member answered a read; whether it was one of a repair.
    pub(super) fn on_repair_read(
        &mut self,
        now: Time,
        peer: PeerId,
        id: u64,
        seen: Seq,
        outcome: &ReadOutcome,
    ) -> bool {
        let Some((block, repair)) = self.repairs.find_read(id) else { return false };
        if let ReadOutcome::Data { data, crc } = outcome
            && data.len() as u64 == BLOCK_BYTES
        {
            if repair.read.finish() {
                // This makes it a repair that is given out, by the same rule as a change of a client.
                let position = self.next_position();
                let record = Record::carrying(position, RecordKind::Write, block_at(block), data.clone(), *crc);
                self.append_record(now, record);
            }
            return true;
        }
        repair.read.lose();
        match bad_block(outcome, block_at(block)) {
            Some((_, what)) => {
                self.repair(Finding { blocks: block_at(block), bad: peer, what, good: None, sound: Vec::new(), seen });
            }
            None => repair.failed.push(peer),
        }
        true
    }

    pub(super) fn repair_read_lost(&mut self, id: u64) {
        self.repairs.read_lost(id);
    }
}

#[cfg(test)]
mod tests;
