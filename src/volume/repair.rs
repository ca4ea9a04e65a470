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
use super::peer::{READS_OUTSTANDING_MAX, Role};
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
    /// The only member to copy from, if one is named.
    good: Option<PeerId>,
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
    /// No member has a good copy. A change of the whole block ends that, or another member.
    Hopeless,
}

impl Repair {
    fn is_bad_at(&self, peer: PeerId) -> bool {
        self.bad.iter().any(|(bad, _)| *bad == peer)
    }

    /// Copies of these members were found good: one that was bad before may be copied from again.
    fn believe(&mut self, sound: &[PeerId]) {
        if matches!(self.step, Step::Given(_)) || sound.is_empty() {
            return;
        }
        self.bad.retain(|(peer, _)| !sound.contains(peer));
        self.failed.retain(|peer| !sound.contains(peer));
        if self.good.is_some_and(|good| !sound.contains(&good)) {
            // Of several that are right now, the one that was named may be none.
            self.read.lose();
            self.good = sound.first().copied();
        }
        self.step = Step::Seek;
    }

    fn may_read_at(&self, peer: PeerId) -> bool {
        self.good.is_none_or(|good| good == peer) && !self.is_bad_at(peer) && !self.failed.contains(&peer)
    }
}

/// All blocks of a volume that are known to be bad, by their first byte.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    blocks: BTreeMap<u64, Repair>,
    /// Blocks made good of late, and by which record.
    healed: VecDeque<(u64, Seq)>,
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
        if let Some(repair) = self.blocks.get_mut(&block) {
            // A record that made it good, and it is bad again.
            let again = matches!(repair.step, Step::Given(seq) if seq <= finding.seen);
            let is_news = again || !repair.is_bad_at(bad);
            if !repair.is_bad_at(bad) {
                repair.bad.push((bad, what));
            }
            if again {
                repair.step = Step::Seek;
                repair.failed.clear();
            }
            repair.believe(&finding.sound);
            if what == Damage::Differs {
                // What is being read may be what differs.
                repair.read.lose();
                repair.good = finding.good;
            }
            return is_news;
        }
        if self.count(false) >= UNDER_WAY_MAX {
            return false;
        }
        let read = FreshRead::new(block_at(block));
        let bad = vec![(bad, what)];
        self.blocks.insert(block, Repair { bad, good: finding.good, failed: vec![], read, step: Step::Seek });
        true
    }

    /// A record was given out that changes `range`.
    pub(super) fn overlap(&mut self, range: ByteRange, seq: Seq) {
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

    /// There is another member: it may have good copies of what no other has.
    pub(super) fn reconsider(&mut self) {
        for repair in self.blocks.values_mut().filter(|repair| repair.step == Step::Hopeless) {
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
        let mut healed = Vec::new();
        for (block, repair) in &mut self.blocks {
            let step = repair.step;
            repair.bad.retain(|(peer, what)| {
                let is_healed = matches!(step, Step::Given(seq) if durable(*peer) >= seq);
                if is_healed && is_member(*peer) {
                    healed.push(Healed { block: *block, peer: *peer, what: *what });
                }
                !is_healed && is_member(*peer)
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
        }
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
        let Some(repair) = self.repairs.blocks.get_mut(&block) else { return };
        let mut members = self.peers.iter().enumerate().filter(|(_, p)| p.role == Role::Member);
        if members.all(|(id, _)| !repair.may_read_at(id)) {
            repair.step = Step::Hopeless;
            if self.repairs.count(true) > HOPELESS_MAX {
                self.repairs.blocks.remove(&block);
            }
            return self.notice(Notice::NoGoodCopy { offset: block });
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
mod tests {
    use super::*;

    fn finding(bad: PeerId, seen: u64) -> Finding {
        Finding {
            blocks: block_at(4096),
            bad,
            what: Damage::ChecksumMismatch,
            good: None,
            sound: Vec::new(),
            seen: Seq(seen),
        }
    }

    fn step(repairs: &Repairs) -> Option<Step> {
        repairs.blocks.get(&4096).map(|repair| repair.step)
    }

    #[test]
    fn what_is_known_is_no_news_until_it_was_made_good() {
        let mut repairs = Repairs::default();
        assert!(repairs.note(4096, &finding(0, 10)) && !repairs.note(4096, &finding(0, 11)));
        assert!(repairs.note(4096, &finding(1, 11)), "at another member it is");
        repairs.overlap(block_at(4096), Seq(12));
        assert!(!repairs.note(4096, &finding(0, 11)), "it was found before");
        let durable = |peer| Seq(if peer == 0 { 12 } else { 11 });
        let healed = repairs.take_healed(|_| true, durable);
        assert_eq!(healed.iter().map(|h| (h.block, h.peer)).collect::<Vec<_>>(), [(4096, 0)]);
        assert_eq!(repairs.take_healed(|_| true, |_| Seq(12)).len(), 1);
        assert_eq!(step(&repairs), None);
        assert!(!repairs.note(4096, &finding(2, 11)), "the record made it good there too");
        assert!(repairs.note(4096, &finding(2, 12)), "this one was found behind the record");
    }

    #[test]
    fn a_block_that_is_bad_again_after_its_record_is_repaired_again() {
        let mut repairs = Repairs::default();
        repairs.note(4096, &finding(0, 1));
        repairs.overlap(block_at(4096), Seq(2));
        assert!(repairs.note(4096, &finding(0, 2)));
        assert_eq!(step(&repairs), Some(Step::Seek));
    }

    #[test]
    fn a_change_of_a_part_makes_nothing_good_and_what_was_read_before_useless() {
        let mut repairs = Repairs::default();
        repairs.note(4096, &finding(0, 1));
        let (_, repair) = repairs.blocks.first_key_value().map(|(b, r)| (*b, r)).unwrap();
        assert!(repair.may_read_at(1) && !repair.may_read_at(0));
        assert!(repairs.may_need(1) && !repairs.may_need(0));
        repairs.blocks.get_mut(&4096).unwrap().read.ask(7, Time::ZERO);
        repairs.overlap(ByteRange { offset: 4097, length: 8191 }, Seq(2));
        repairs.overlap(ByteRange { offset: 0, length: 4096 }, Seq(3));
        let (_, repair) = repairs.find_read(7).unwrap();
        assert!(!repair.read.finish(), "it is read again");
        assert_eq!(step(&repairs), Some(Step::Seek));
    }

    #[test]
    fn of_more_than_are_bounded_nothing_is_kept_and_members_that_left_are_forgotten() {
        let mut repairs = Repairs::default();
        let taken = (0..1000).filter(|block| repairs.note(block * BLOCK_BYTES, &finding(0, 1))).count();
        assert_eq!(taken, UNDER_WAY_MAX);
        assert_eq!(repairs.unasked().len(), READING_MAX);
        assert!(repairs.take_healed(|_| false, |_| Seq(9)).is_empty());
        assert!(repairs.blocks.is_empty());
    }

    #[test]
    fn a_block_that_differs_is_copied_from_the_member_that_is_named() {
        let mut repairs = Repairs::default();
        repairs.note(4096, &finding(0, 1));
        repairs.blocks.get_mut(&4096).unwrap().read.ask(7, Time::ZERO);
        repairs.note(4096, &Finding { what: Damage::Differs, good: Some(2), ..finding(1, 1) });
        assert!(repairs.find_read(7).is_none(), "what is read may be what differs");
        let repair = &repairs.blocks[&4096];
        assert_eq!([0, 1, 2, 3].map(|peer| repair.may_read_at(peer)), [false, false, true, false]);
    }

    #[test]
    fn a_copy_that_is_found_good_again_is_copied_from() {
        let mut repairs = Repairs::default();
        (0..3).for_each(|bad| _ = repairs.note(4096, &finding(bad, 1)));
        let repair = repairs.blocks.get_mut(&4096).unwrap();
        repair.failed.push(3);
        repair.step = Step::Hopeless;
        assert!(!repairs.note(4096, &Finding { sound: vec![0, 3], ..finding(1, 2) }), "that it is bad is known");
        assert_eq!(step(&repairs), Some(Step::Seek));
        assert_eq!([0, 1, 2, 3].map(|peer| repairs.blocks[&4096].may_read_at(peer)), [true, false, false, true]);
        repairs.overlap(block_at(4096), Seq(3));
        repairs.note(4096, &Finding { sound: vec![1], ..finding(2, 2) });
        assert_eq!(step(&repairs), Some(Step::Given(Seq(3))), "the record is what makes it good");
    }

    #[test]
    fn only_blocks_of_the_range_asked_for_are_believed_to_be_bad() {
        let range = ByteRange { offset: 5000, length: 4096 };
        let named = |offset| bad_block(&ReadOutcome::Unreadable { offset }, range).map(|(offset, _)| offset);
        assert_eq!([4096, 8192].map(named), [Some(4096), Some(8192)]);
        assert_eq!([0, 12_288, 5000, u64::MAX / 4096 * 4096].map(named), [None; 4]);
    }
}
