//! Which blocks are known to be bad, at whom, and how far the repair of each is; of which nobody knows who is right. Pure
//! bookkeeping: whom to ask and when is decided in [`super`].

use std::collections::{BTreeMap, VecDeque};

use protocol::ranges::ByteRange;
use protocol::{BLOCK_BYTES, Seq};

use super::super::fresh_read::FreshRead;
use super::super::ties::Ties;
use super::super::{PeerId, Time};
use super::{Damage, Finding, block_at};

/// Repairs under way, at most; what is found bad beyond that is found again by a later read, or by a scrub.
pub(super) const UNDER_WAY_MAX: usize = 256;
/// Of these, blocks being read at a time.
pub(super) const READING_MAX: usize = 8;
/// Blocks without a good copy that are remembered, at most.
pub(super) const HOPELESS_MAX: usize = 1024;
/// Blocks that were made good of late and are remembered, at most.
pub(super) const HEALED_MAX: usize = 256;

/// A block known to be bad somewhere.
#[derive(Debug)]
pub(super) struct Repair {
    pub(super) bad: Vec<(PeerId, Damage)>,
    /// The only members to copy from, if any were named. Who leaves the view and comes back is still one of them: nothing is
    /// copied to it from a member that is known to differ.
    good: Option<Vec<PeerId>>,
    /// Members that could not read it for another reason.
    pub(super) failed: Vec<PeerId>,
    /// Members that took too long to answer: they are asked when nobody else can be.
    pub(super) late: Vec<PeerId>,
    pub(super) read: FreshRead,
    pub(super) step: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A good copy is looked for, or being read.
    Seek,
    /// This record makes it good wherever it is durable.
    Given(Seq),
    /// No member has a good copy, or nobody knows which. A change of the whole block ends that, another member, or that it
    /// becomes known.
    Hopeless,
}

impl Repair {
    pub(super) fn is_bad_at(&self, peer: PeerId) -> bool {
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

    pub(super) fn may_read_at(&self, peer: PeerId) -> bool {
        self.good.as_ref().is_none_or(|good| good.contains(&peer))
            && !self.is_bad_at(peer)
            && !self.failed.contains(&peer)
    }
}

/// All blocks of a volume that are known to be bad, by their first byte.
#[derive(Debug, Default)]
pub(in crate::volume) struct Repairs {
    pub(super) blocks: BTreeMap<u64, Repair>,
    /// Blocks made good of late, and by which record.
    healed: VecDeque<(u64, Seq)>,
    pub(super) ties: Ties,
    /// Copies that were found good again without any record, until that is told.
    good_again: Vec<Healed>,
}

impl Repairs {
    pub(super) fn count(&self, is_hopeless: bool) -> usize {
        self.blocks.values().filter(|r| (r.step == Step::Hopeless) == is_hopeless).count()
    }

    fn is_healed_since(&self, block: u64, seen: Seq) -> bool {
        self.healed.iter().any(|(healed, by)| *healed == block && *by > seen)
    }

    /// Takes note of a bad block; whether that is news.
    pub(super) fn note(&mut self, block: u64, finding: &Finding) -> bool {
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
        self.blocks.insert(
            block,
            Repair { bad, good: finding.copied_from(), failed: vec![], late: vec![], read, step: Step::Seek },
        );
        true
    }

    /// Sound copies of these members were found to differ behind the record `seen`, and none is known to be right.
    pub(in crate::volume) fn tie(&mut self, block: u64, parties: Vec<PeerId>, seen: Seq) {
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
    pub(in crate::volume) fn agreed(&mut self, range: ByteRange, seen: Seq, is_open: impl Fn(u64) -> bool) {
        for block in self.ties.within(range).into_iter().filter(|block| !is_open(*block)) {
            if self.ties.end(block, seen) {
                self.seek_again(block);
            }
        }
    }

    /// All that a member held is given up: it is removed, or everything is copied to it anew.
    pub(in crate::volume) fn give_up(&mut self, peer: PeerId) {
        for repair in self.blocks.values_mut() {
            repair.bad.retain(|(bad, _)| *bad != peer);
            repair.good.iter_mut().for_each(|good| good.retain(|good| *good != peer));
        }
        self.ties.give_up(peer).into_iter().for_each(|block| self.seek_again(block));
    }

    fn seek_again(&mut self, block: u64) {
        if let Some(repair) = self.blocks.get_mut(&block).filter(|repair| repair.step == Step::Hopeless) {
            repair.step = Step::Seek;
            repair.failed.clear();
        }
    }

    /// A record was given out that changes `range`.
    pub(in crate::volume) fn overlap(&mut self, range: ByteRange, seq: Seq) {
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
    pub(in crate::volume) fn holds(&self, range: ByteRange, now: Time) -> bool {
        self.blocks.values().any(|repair| repair.read.holds(range, now))
    }

    pub(super) fn find_read(&mut self, id: u64) -> Option<(u64, &mut Repair)> {
        self.blocks.iter_mut().find(|(_, repair)| repair.read.is_named(id)).map(|(block, repair)| (*block, repair))
    }

    fn reading(&self) -> usize {
        self.blocks.values().filter(|repair| repair.read.is_asked()).count()
    }

    /// Blocks that a good copy is to be asked for now.
    pub(super) fn unasked(&self) -> Vec<u64> {
        let room = READING_MAX.saturating_sub(self.reading());
        let unasked = self.blocks.iter().filter(|(_, r)| r.step == Step::Seek && !r.read.is_asked());
        unasked.map(|(block, _)| *block).take(room).collect()
    }

    /// Blocks of which a good copy was asked for longer ago than that, by which reads.
    pub(super) fn late(&self, now: Time, patience: Time) -> Vec<(u64, u64)> {
        self.blocks.iter().filter_map(|(block, repair)| Some((*block, repair.read.late(now, patience)?))).collect()
    }

    pub(super) fn read_lost(&mut self, id: u64) {
        if let Some((_, repair)) = self.find_read(id) {
            repair.read.lose();
        }
    }

    /// Blocks of which a member is known to hold something else than most, and a read of `range` there would show it that is
    /// queued behind the record `seen`.
    pub(in crate::volume) fn differing(&self, peer: PeerId, range: ByteRange, seen: Seq) -> impl Iterator<Item = u64> {
        let whole = range.aligned(BLOCK_BYTES);
        let shows =
            move |repair: &Repair| repair.differs_at(peer) && !matches!(repair.step, Step::Given(seq) if seq <= seen);
        self.blocks.range(whole.offset..whole.end()).filter(move |(_, r)| shows(r)).map(|(block, _)| *block)
    }

    /// Whether a read of `range` would show that at this member.
    pub(in crate::volume) fn differs_at(&self, peer: PeerId, range: ByteRange, seen: Seq) -> bool {
        self.differing(peer, range, seen).next().is_some()
    }

    /// Whether a member holds something else than most did in a block of `range`, and nobody else has a good copy any more.
    pub(in crate::volume) fn is_lost_at(&self, peer: PeerId, range: ByteRange) -> bool {
        let whole = range.aligned(BLOCK_BYTES);
        let mut blocks = self.blocks.range(whole.offset..whole.end());
        blocks.any(|(_, repair)| repair.step == Step::Hopeless && repair.differs_at(peer))
    }

    /// The beginning of `range` in which nobody is known to differ; or in which somebody is, if it begins with that.
    pub(in crate::volume) fn up_to_difference(&self, range: ByteRange) -> ByteRange {
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
    pub(super) fn made_good_by(&self, block: u64) -> Option<Seq> {
        match self.blocks.get(&block).map(|repair| repair.step) {
            Some(Step::Given(seq)) => Some(seq),
            Some(Step::Seek | Step::Hopeless) => None,
            None => self.healed.iter().rev().find(|(healed, _)| *healed == block).map(|(_, seq)| *seq),
        }
    }

    /// There is another member: it may have good copies of what no other has.
    pub(in crate::volume) fn reconsider(&mut self) {
        let ties = &self.ties;
        let may_change =
            |(block, repair): &(&u64, &mut Repair)| repair.step == Step::Hopeless && !ties.contains(**block);
        for (_, repair) in self.blocks.iter_mut().filter(may_change) {
            repair.step = Step::Seek;
            repair.failed.clear();
        }
    }

    /// Whether a block that is bad elsewhere may have its good copy at this member.
    pub(in crate::volume) fn may_need(&self, peer: PeerId) -> bool {
        self.blocks.values().any(|repair| repair.step == Step::Seek && repair.may_read_at(peer))
    }

    /// Takes out whoever holds the record that makes a block good, or is no member any more; returns the former.
    pub(super) fn take_healed(
        &mut self,
        is_member: impl Fn(PeerId) -> bool,
        durable: impl Fn(PeerId) -> Seq,
    ) -> Vec<Healed> {
        let mut healed = std::mem::take(&mut self.good_again);
        healed.retain(|healed| is_member(healed.peer));
        for (block, repair) in &mut self.blocks {
            let step = repair.step;
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
pub(super) struct Healed {
    pub(super) block: u64,
    pub(super) peer: PeerId,
    pub(super) what: Damage,
}
