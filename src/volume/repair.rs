//! Bad blocks of members, made good again from other members.
//!
//! A repair is an ordinary record of a whole block that no client asked for: its bytes are read at a member in sync and go to
//! all members through the order, if no record changed the block meanwhile ([`super::fresh_read`]). To members whose block
//! is good it says what they hold already; journal, dirty ranges and replay know it as the write that it is. A client's
//! change of the whole block makes it good as well.
//!
//! Owns which blocks are known to be bad, at whom, and how far each repair is. Never answers a client: that is
//! [`super::dispatch`]'s, which reports here what it found.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use protocol::message::{ReadKind, ReadOutcome};
use protocol::ranges::ByteRange;
use protocol::{BLOCK_BYTES, Record, RecordKind, Seq};

use super::fresh_read::FreshRead;
use super::log::Log;
use super::peer::{Peer, READS_OUTSTANDING_MAX, Role};
use super::ties::Ties;
use super::{Notice, PeerId, Phase, Time, Volume};

/// Repairs under way, at most; what is found bad beyond that is found again by a later read, or by a scrub.
const UNDER_WAY_MAX: usize = 256;
/// Of these, blocks being read at a time.
const READING_MAX: usize = 8;
/// Blocks without a good copy that are remembered, at most.
const HOPELESS_MAX: usize = 1024;
/// Blocks that were made good of late and are remembered, at most.
const HEALED_MAX: usize = 256;

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

/// A block known to be bad somewhere.
#[derive(Debug)]
struct Repair {
    bad: Vec<(PeerId, Damage)>,
    /// The only members to copy from, if any were named. Who leaves the view is none of them any more: what it holds when it
    /// is back may have been copied from a member that was wrong.
    good: Option<Vec<PeerId>>,
    /// Members that could not read it for another reason.
    failed: Vec<PeerId>,
    read: FreshRead,
    step: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// A good copy is looked for, or being read.
    Seek,
    /// This record makes it good wherever it is durable.
    Given(Seq),
    /// No member has a good copy, or nobody knows which. A change of the whole block ends that, another member, or that it
    /// becomes known.
    Hopeless,
}

impl Repair {
    fn is_bad_at(&self, peer: PeerId) -> bool {
        self.bad.iter().any(|(bad, _)| *bad == peer)
    }

    /// Copies of these members were found good: one that was bad before may be copied from again. Returns these.
    fn believe(&mut self, sound: &[PeerId]) -> Vec<(PeerId, Damage)> {
        if matches!(self.step, Step::Given(_)) || sound.is_empty() {
            return Vec::new();
        }
        let good_again = self.bad.extract_if(.., |(peer, _)| sound.contains(peer)).collect();
        self.failed.retain(|peer| !sound.contains(peer));
        if let Some(good) = &mut self.good
            && (good.is_empty() || good.iter().any(|good| !sound.contains(good)))
        {
            // Of those that are right now, one that was named may be none.
            self.read.lose();
            *good = sound.to_vec();
        }
        self.step = Step::Seek;
        good_again
    }

    fn differs_at(&self, peer: PeerId) -> bool {
        self.bad.contains(&(peer, Damage::Differs))
    }

    fn may_read_at(&self, peer: PeerId) -> bool {
        self.good.as_ref().is_none_or(|good| good.contains(&peer))
            && !self.is_bad_at(peer)
            && !self.failed.contains(&peer)
    }
}

/// All blocks of a volume that are known to be bad, by their first byte.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    blocks: BTreeMap<u64, Repair>,
    /// Blocks made good of late, and by which record.
    healed: VecDeque<(u64, Seq)>,
    ties: Ties,
    /// Copies that were found good again without any record, until that is told.
    good_again: Vec<Healed>,
}

impl Repairs {
    fn count(&self, is_hopeless: bool) -> usize {
        self.blocks.values().filter(|r| (r.step == Step::Hopeless) == is_hopeless).count()
    }

    fn is_healed_since(&self, block: u64, seen: Seq) -> bool {
        self.healed.iter().any(|(healed, by)| *healed == block && *by > seen)
    }

    /// Takes note of a bad block; whether that is news.
    fn note(&mut self, block: u64, finding: &Finding) -> bool {
        let (bad, what) = (finding.bad, finding.what);
        if self.is_healed_since(block, finding.seen) {
            return false;
        }
        if what == Damage::Differs && self.ties.end(block, finding.seen) {
            self.seek_again(block);
        }
        let is_tied = self.ties.contains(block);
        if let Some(repair) = self.blocks.get_mut(&block) {
            // A record that made it good, and it is bad again.
            let again = matches!(repair.step, Step::Given(seq) if seq <= finding.seen);
            let is_news = again || !repair.is_bad_at(bad);
            match repair.bad.iter_mut().find(|(peer, _)| *peer == bad) {
                Some((_, before)) if what == Damage::Differs => *before = what,
                Some(_) => {}
                None => repair.bad.push((bad, what)),
            }
            if again {
                repair.step = Step::Seek;
                repair.failed.clear();
                repair.good = None;
            }
            if !is_tied {
                let good_again = repair.believe(&finding.sound).into_iter();
                self.good_again.extend(good_again.map(|(peer, what)| Healed { block, peer, what }));
            }
            if what == Damage::Differs {
                // What is being read may be what differs.
                repair.read.lose();
                repair.good = finding.copied_from();
                if repair.step == Step::Hopeless {
                    repair.step = Step::Seek;
                }
            }
            return is_news;
        }
        if self.count(false) >= UNDER_WAY_MAX {
            return false;
        }
        let read = FreshRead::new(block_at(block));
        let bad = vec![(bad, what)];
        self.blocks.insert(block, Repair { bad, good: finding.copied_from(), failed: vec![], read, step: Step::Seek });
        true
    }

    /// Sound copies of these members were found to differ behind the record `seen`, and none is known to be right.
    pub(super) fn tie(&mut self, block: u64, parties: Vec<PeerId>, seen: Seq) {
        let made_good = self.blocks.get(&block).is_some_and(|r| matches!(r.step, Step::Given(seq) if seq > seen));
        if made_good || self.is_healed_since(block, seen) || !self.ties.note(block, parties, seen) {
            return;
        }
        if let Some(repair) = self.blocks.get_mut(&block) {
            // What is being read may be the wrong one.
            repair.read.lose();
        }
    }

    /// All members were asked about `range` behind the record `seen`, and which copies are right is known but for some blocks.
    pub(super) fn agreed(&mut self, range: ByteRange, seen: Seq, is_open: impl Fn(u64) -> bool) {
        for block in self.ties.within(range).into_iter().filter(|block| !is_open(*block)) {
            if self.ties.end(block, seen) {
                self.seek_again(block);
            }
        }
    }

    /// All that a member held is given up: it is removed, or everything is copied to it anew.
    pub(super) fn give_up(&mut self, peer: PeerId) {
        self.blocks.values_mut().for_each(|repair| repair.bad.retain(|(bad, _)| *bad != peer));
        self.ties.give_up(peer).into_iter().for_each(|block| self.seek_again(block));
    }

    fn seek_again(&mut self, block: u64) {
        if let Some(repair) = self.blocks.get_mut(&block).filter(|repair| repair.step == Step::Hopeless) {
            repair.step = Step::Seek;
            repair.failed.clear();
        }
    }

    /// A record was given out that changes `range`.
    pub(super) fn overlap(&mut self, range: ByteRange, seq: Seq) {
        self.ties.overlap(range);
        for (_, repair) in self.blocks.range_mut((range.offset / BLOCK_BYTES * BLOCK_BYTES)..range.end()) {
            let block = repair.read.range;
            repair.read.overlap(range);
            if range.offset <= block.offset && block.end() <= range.end() {
                repair.read.lose();
                repair.step = Step::Given(seq);
            }
        }
    }

    /// Whether changes of `range` must wait for the read of a block that changes have made useless too often.
    pub(super) fn holds(&self, range: ByteRange, now: Time) -> bool {
        self.blocks.values().any(|repair| repair.read.holds(range, now))
    }

    fn find_read(&mut self, id: u64) -> Option<(u64, &mut Repair)> {
        self.blocks.iter_mut().find(|(_, repair)| repair.read.is_named(id)).map(|(block, repair)| (*block, repair))
    }

    fn reading(&self) -> usize {
        self.blocks.values().filter(|repair| repair.read.is_asked()).count()
    }

    /// Blocks that a good copy is to be asked for now.
    fn unasked(&self) -> Vec<u64> {
        let room = READING_MAX.saturating_sub(self.reading());
        let unasked = self.blocks.iter().filter(|(_, r)| r.step == Step::Seek && !r.read.is_asked());
        unasked.map(|(block, _)| *block).take(room).collect()
    }

    fn read_lost(&mut self, id: u64) {
        if let Some((_, repair)) = self.find_read(id) {
            repair.read.lose();
        }
    }

    /// Blocks of which a member is known to hold something else than most, and a read of `range` there would show it that is
    /// queued behind the record `seen`.
    pub(super) fn differing(&self, peer: PeerId, range: ByteRange, seen: Seq) -> impl Iterator<Item = u64> {
        let whole = range.aligned(BLOCK_BYTES);
        let shows =
            move |repair: &Repair| repair.differs_at(peer) && !matches!(repair.step, Step::Given(seq) if seq <= seen);
        self.blocks.range(whole.offset..whole.end()).filter(move |(_, r)| shows(r)).map(|(block, _)| *block)
    }

    /// Whether a read of `range` would show that at this member.
    pub(super) fn differs_at(&self, peer: PeerId, range: ByteRange, seen: Seq) -> bool {
        self.differing(peer, range, seen).next().is_some()
    }

    /// Whether a member holds something else than most did in a block of `range`, and nobody else has a good copy any more.
    pub(super) fn is_lost_at(&self, peer: PeerId, range: ByteRange) -> bool {
        let whole = range.aligned(BLOCK_BYTES);
        let mut blocks = self.blocks.range(whole.offset..whole.end());
        blocks.any(|(_, repair)| repair.step == Step::Hopeless && repair.differs_at(peer))
    }

    /// The beginning of `range` in which nobody is known to differ; or in which somebody is, if it begins with that.
    pub(super) fn up_to_difference(&self, range: ByteRange) -> ByteRange {
        let is_open = |repair: &Repair| {
            !matches!(repair.step, Step::Given(_)) && repair.bad.iter().any(|(_, what)| *what == Damage::Differs)
        };
        let whole = range.aligned(BLOCK_BYTES);
        let Some((block, _)) = self.blocks.range(whole.offset..whole.end()).find(|(_, r)| is_open(r)) else {
            return range;
        };
        let end = if *block > range.offset { *block } else { block + BLOCK_BYTES };
        ByteRange { length: end.min(range.end()) - range.offset, ..range }
    }

    /// The record that makes a block good, or made it so of late.
    fn made_good_by(&self, block: u64) -> Option<Seq> {
        match self.blocks.get(&block).map(|repair| repair.step) {
            Some(Step::Given(seq)) => Some(seq),
            Some(Step::Seek | Step::Hopeless) => None,
            None => self.healed.iter().rev().find(|(healed, _)| *healed == block).map(|(_, seq)| *seq),
        }
    }

    /// There is another member: it may have good copies of what no other has.
    pub(super) fn reconsider(&mut self) {
        let ties = &self.ties;
        let may_change =
            |(block, repair): &(&u64, &mut Repair)| repair.step == Step::Hopeless && !ties.contains(**block);
        for (_, repair) in self.blocks.iter_mut().filter(may_change) {
            repair.step = Step::Seek;
            repair.failed.clear();
        }
    }

    /// Whether a block that is bad elsewhere may have its good copy at this member.
    pub(super) fn may_need(&self, peer: PeerId) -> bool {
        self.blocks.values().any(|repair| repair.step == Step::Seek && repair.may_read_at(peer))
    }

    /// Takes out whoever holds the record that makes a block good, or is no member any more; returns the former.
    fn take_healed(&mut self, is_member: impl Fn(PeerId) -> bool, durable: impl Fn(PeerId) -> Seq) -> Vec<Healed> {
        let mut healed = std::mem::take(&mut self.good_again);
        healed.retain(|healed| is_member(healed.peer));
        for (block, repair) in &mut self.blocks {
            let step = repair.step;
            if let Some(good) = &mut repair.good {
                good.retain(|peer| is_member(*peer));
            }
            repair.bad.retain(|(peer, what)| {
                let is_healed = matches!(step, Step::Given(seq) if durable(*peer) >= seq);
                if is_healed && is_member(*peer) {
                    healed.push(Healed { block: *block, peer: *peer, what: *what });
                }
                // One that leaves may come back with what differs; it gets whatever records change meanwhile.
                let stays = *what == Damage::Differs && !matches!(step, Step::Given(_));
                !is_healed && (is_member(*peer) || stays)
            });
            if let (Step::Given(seq), true) = (step, repair.bad.is_empty()) {
                self.healed.push_back((*block, seq));
            }
        }
        self.blocks.retain(|_, repair| !repair.bad.is_empty());
        while self.healed.len() > HEALED_MAX {
            self.healed.pop_front();
        }
        healed
    }
}

#[derive(Debug)]
struct Healed {
    block: u64,
    peer: PeerId,
    what: Damage,
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
        let cost = |id: &PeerId| (last.ahead_of(self.peers[*id].durable) / 64, self.peers[*id].reads.len());
        let Some(source) = (0..self.peers.len()).filter(can).min_by_key(cost) else { return };
        let id = self.reads.id();
        repair.read.ask(id, now);
        self.peers[source].ask(last, last, id, ReadKind::Data, block_at(block));
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
