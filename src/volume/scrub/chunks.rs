//! The chunks of one scrub: which are asked about, what came of each, how far all of it is. Pure bookkeeping; whom to ask,
//! and what is to be done about a fault, is decided in [`super`].

use std::collections::{BTreeMap, BTreeSet};

use protocol::ranges::ByteRange;
use protocol::scrub::BlockFound;
use protocol::{BLOCK_BYTES, Seq};

use super::super::{Damage, PeerId, Time};
use super::ScrubFound;
use super::verdict::{Fault, compare};

/// Looks at a chunk of which a copy is bad, at most: each but the first waits until the repair should be done.
const LOOKS_MAX: u32 = 8;
/// The second look comes so long after the first, each further one after twice as long.
const LOOK_AGAIN_FIRST: Time = Time::from_millis(50);
/// Looks that a member did not answer, before the answers of the others have to do.
const LOST_MAX: u32 = 3;
const LOST_PAUSE: Time = Time::from_millis(500);

#[derive(Debug)]
enum Look {
    /// Members are to be asked, from this time on.
    Due { at: Time },
    /// Under this number members were asked, behind this record.
    Asked {
        read: u64,
        asked_at: Time,
        missing: BTreeSet<PeerId>,
        answers: BTreeMap<PeerId, Vec<BlockFound>>,
        seen: Seq,
        /// Blocks that records made the same everywhere since.
        rewritten: BTreeSet<usize>,
        /// Members in force, whether they were asked or not.
        in_force: usize,
        /// Somebody who was asked does not answer.
        is_lost: bool,
        /// A member joined after the others were asked.
        is_joined: bool,
    },
}

/// What members said of a chunk.
#[derive(Debug)]
struct Answers {
    of: BTreeMap<PeerId, Vec<BlockFound>>,
    seen: Seq,
    rewritten: BTreeSet<usize>,
    in_force: usize,
    is_lost: bool,
    is_joined: bool,
}

impl Answers {
    /// Whether all members in force have answered.
    fn is_whole(&self) -> bool {
        !self.is_lost && !self.is_joined && self.of.len() >= self.in_force
    }
}

#[derive(Debug)]
struct Chunk {
    range: ByteRange,
    look: Look,
    looks: u32,
    lost: u32,
    /// Copies that were found bad, by block of the chunk and member.
    bad: BTreeMap<(usize, PeerId), Damage>,
    /// Blocks of which no copy can be believed, and whether sound ones differ.
    hopeless: BTreeMap<usize, bool>,
    is_incomplete: bool,
    /// What was found in chunks that are done with, between this one and the next that is not.
    above: ScrubFound,
}

/// What members are asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question<'a> {
    /// The number of the read.
    pub(super) read: u64,
    /// Who is asked.
    pub(super) members: &'a [PeerId],
    /// Behind this record.
    pub(super) seen: Seq,
    /// How many members there are, whether they are asked or not.
    pub(super) in_force: usize,
}

/// What a look at a chunk came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Looked {
    /// The chunk.
    pub(super) range: ByteRange,
    /// What is not in order, as of this look.
    pub(super) faults: Vec<Fault>,
    /// The record behind which all were asked.
    pub(super) seen: Seq,
    /// Whether all members in force have answered.
    pub(super) is_whole: bool,
    /// Blocks of the chunk that records made the same everywhere since.
    pub(super) rewritten: BTreeSet<usize>,
    /// Blocks, by their first byte, of which sound copies were found to differ for the first time.
    pub(super) ties: Vec<u64>,
}

/// The chunks of one scrub.
#[derive(Debug)]
pub(super) struct Chunks {
    size_bytes: u64,
    next: u64,
    under_way: BTreeMap<u64, Chunk>,
    /// Below [`Chunks::position`]: what lies above is looked at again by whoever goes on from there, and must not count twice.
    found: ScrubFound,
}

impl Chunks {
    /// Goes on at `position` with what was found before.
    pub(super) fn new(size_bytes: u64, position: u64, found: ScrubFound) -> Chunks {
        let next = (position / BLOCK_BYTES * BLOCK_BYTES).min(size_bytes);
        Chunks { size_bytes, next, under_way: BTreeMap::new(), found }
    }

    /// Bytes of the volume.
    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The volume may have grown.
    pub(super) fn grow(&mut self, size_bytes: u64) {
        self.size_bytes = self.size_bytes.max(size_bytes);
    }

    /// There is another member, now one of so many in force: it has looked at nothing so far.
    pub(super) fn joined(&mut self, in_force: usize) {
        self.found.incomplete_bytes = self.found.incomplete_bytes.max(self.position());
        let mut end = self.next;
        for chunk in self.under_way.values_mut().rev() {
            chunk.above.incomplete_bytes = end - chunk.range.end();
            end = chunk.range.offset;
            if let Look::Asked { in_force: before, is_joined, .. } = &mut chunk.look {
                (*before, *is_joined) = (in_force.max(*before), true);
            }
        }
    }

    /// Everything below this byte is done with.
    pub(super) fn position(&self) -> u64 {
        self.under_way.keys().next().copied().unwrap_or(self.next)
    }

    /// What was found below [`Chunks::position`].
    pub(super) fn found(&self) -> ScrubFound {
        self.found
    }

    /// Chunks that are not done with.
    pub(super) fn len(&self) -> usize {
        self.under_way.len()
    }

    /// Whether all is done.
    pub(super) fn is_done(&self) -> bool {
        self.next >= self.size_bytes && self.under_way.is_empty()
    }

    /// Chunks that nobody has answered for the first time, or that members are being asked about.
    pub(super) fn asking(&self) -> usize {
        self.under_way.values().filter(|c| c.looks == 0 || matches!(c.look, Look::Asked { .. })).count()
    }

    /// The next chunk that nothing was done about yet, of so many bytes at most.
    pub(super) fn peek(&self, bytes_max: u64) -> Option<ByteRange> {
        let length = bytes_max.min(self.size_bytes - self.next);
        (length > 0).then_some(ByteRange { offset: self.next, length })
    }

    /// A chunk that was peeked is begun.
    pub(super) fn begin(&mut self, range: ByteRange, now: Time) {
        self.next = range.end();
        let chunk = Chunk {
            range,
            look: Look::Due { at: now },
            looks: 0,
            lost: 0,
            bad: BTreeMap::new(),
            hopeless: BTreeMap::new(),
            is_incomplete: false,
            above: ScrubFound::default(),
        };
        self.under_way.insert(range.offset, chunk);
    }

    /// Chunks that members are to be asked about now.
    pub(super) fn due(&self, now: Time) -> Vec<ByteRange> {
        let is_due = |c: &&Chunk| matches!(c.look, Look::Due { at } if at <= now);
        self.under_way.values().filter(is_due).map(|c| c.range).collect()
    }

    /// Members were asked about the chunk at `offset`.
    pub(super) fn asked(&mut self, now: Time, offset: u64, question: Question<'_>) {
        let Question { read, members, seen, in_force } = question;
        if let Some(chunk) = self.under_way.get_mut(&offset) {
            chunk.look = Look::Asked {
                read,
                asked_at: now,
                missing: members.iter().copied().collect(),
                answers: BTreeMap::new(),
                seen,
                rewritten: BTreeSet::new(),
                in_force,
                is_lost: false,
                is_joined: false,
            };
        }
    }

    /// A record was given out that changes `range`.
    pub(super) fn overlap(&mut self, range: ByteRange) {
        for (offset, chunk) in self.under_way.range_mut(..range.end()) {
            if let Look::Asked { rewritten, .. } = &mut chunk.look {
                let first = range.offset.max(*offset).div_ceil(BLOCK_BYTES);
                let end = range.end().min(chunk.range.end()) / BLOCK_BYTES;
                rewritten.extend((first..end).map(|block| (block - offset / BLOCK_BYTES) as usize));
            }
        }
    }

    /// Reads that members have not answered for longer than `limit`, with these members.
    pub(super) fn late(&self, now: Time, limit: Time) -> Vec<(u64, PeerId)> {
        let mut late = Vec::new();
        for chunk in self.under_way.values() {
            if let Look::Asked { read, asked_at, missing, .. } = &chunk.look
                && now.saturating_sub(*asked_at) >= limit
            {
                late.extend(missing.iter().map(|peer| (*read, *peer)));
            }
        }
        late
    }

    /// All reads that members have not answered, with these members.
    pub(super) fn unanswered(&self) -> Vec<(u64, PeerId)> {
        self.late(Time::MAX, Time::ZERO)
    }

    /// Whether somebody was asked under this number and has not answered.
    pub(super) fn waits_for(&self, read: u64, peer: PeerId) -> bool {
        self.under_way.values().any(
            |c| matches!(&c.look, Look::Asked { read: asked, missing, .. } if *asked == read && missing.contains(&peer)),
        )
    }

    /// A member answered, or will not; returns what the look came to if that was the last answer.
    pub(super) fn answered(
        &mut self,
        now: Time,
        read: u64,
        peer: PeerId,
        found: Option<Vec<BlockFound>>,
        differs: impl Fn(PeerId, ByteRange, Seq) -> bool,
    ) -> Option<Looked> {
        let asked = |c: &&mut Chunk| matches!(c.look, Look::Asked { read: asked, .. } if asked == read);
        let chunk = self.under_way.values_mut().find(asked)?;
        let blocks = (chunk.range.length / BLOCK_BYTES) as usize;
        let Look::Asked { missing, answers, seen, rewritten, in_force, is_lost, is_joined, .. } = &mut chunk.look
        else {
            return None;
        };
        missing.remove(&peer);
        match found.filter(|found| found.len() == blocks) {
            Some(found) => _ = answers.insert(peer, found),
            None => *is_lost = true,
        }
        if !missing.is_empty() {
            return None;
        }
        let answers = Answers {
            of: std::mem::take(answers),
            seen: *seen,
            rewritten: std::mem::take(rewritten),
            in_force: *in_force,
            is_lost: *is_lost,
            is_joined: *is_joined,
        };
        let offset = chunk.range.offset;
        let looked = chunk.looked(now, &answers, differs);
        let is_done = !matches!(chunk.look, Look::Due { .. });
        if is_done && let Some(chunk) = self.under_way.remove(&offset) {
            let still: BTreeSet<(usize, PeerId)> =
                looked.faults.iter().flat_map(|f| f.bad.iter().map(|(peer, _)| (f.index, *peer))).collect();
            let below = self.under_way.range_mut(..offset).next_back();
            let found = below.map_or(&mut self.found, |(_, below)| &mut below.above);
            found.add(&chunk, &answers.of, &still);
            found.join(chunk.above);
        }
        Some(looked)
    }
}

impl Chunk {
    fn looked(&mut self, now: Time, answers: &Answers, differs: impl Fn(PeerId, ByteRange, Seq) -> bool) -> Looked {
        let start = self.range.offset;
        let block = |index| ByteRange { offset: start + index as u64 * BLOCK_BYTES, length: BLOCK_BYTES };
        let faults = compare(&answers.of, answers.in_force, |peer, index| differs(peer, block(index), answers.seen));
        self.looks += 1;
        self.lost += u32::from(answers.is_lost);
        self.is_incomplete = !answers.is_whole();
        let can_be_repaired = faults.iter().any(|f| !f.good.is_empty());
        if can_be_repaired && self.looks < LOOKS_MAX {
            self.look = Look::Due { at: now + LOOK_AGAIN_FIRST * 2_u32.pow(self.looks - 1) };
        } else if (answers.is_lost && self.lost < LOST_MAX) || answers.is_joined {
            self.look = Look::Due { at: now + LOST_PAUSE };
        }
        // Whoever did not answer may yet make a majority of what is a tie without it.
        let is_open = self.is_incomplete && matches!(self.look, Look::Due { .. });
        let mut ties = Vec::new();
        for fault in &faults {
            self.bad.extend(fault.bad.iter().map(|(peer, what)| ((fault.index, *peer), *what)));
            if fault.good.is_empty() && !(fault.is_tie && is_open) {
                let before = self.hopeless.insert(fault.index, fault.is_tie);
                if fault.is_tie && before != Some(true) {
                    ties.push(self.range.offset + fault.index as u64 * BLOCK_BYTES);
                }
            }
        }
        // What somebody overwrote since is in order now.
        self.hopeless.retain(|index, _| faults.iter().any(|f| f.index == *index && f.good.is_empty()));
        let (seen, is_whole, rewritten) = (answers.seen, answers.is_whole(), answers.rewritten.clone());
        Looked { range: self.range, faults, seen, is_whole, rewritten, ties }
    }
}

impl ScrubFound {
    fn join(&mut self, other: ScrubFound) {
        let ScrubFound { bad_blocks, differing_blocks, repaired_blocks, unrepaired_blocks, incomplete_bytes } = other;
        for (count, more) in [
            (&mut self.bad_blocks, bad_blocks),
            (&mut self.differing_blocks, differing_blocks),
            (&mut self.repaired_blocks, repaired_blocks),
            (&mut self.unrepaired_blocks, unrepaired_blocks),
            (&mut self.incomplete_bytes, incomplete_bytes),
        ] {
            *count = count.saturating_add(more);
        }
    }

    /// Counts a chunk that is done with; `still` is bad, as the last look at it showed. What was counted before may have come
    /// from a file and be anything.
    fn add(&mut self, chunk: &Chunk, answers: &BTreeMap<PeerId, Vec<BlockFound>>, still: &BTreeSet<(usize, PeerId)>) {
        let add = |count: &mut u64, more: u64| *count = count.saturating_add(more);
        for (copy, what) in &chunk.bad {
            match what {
                Damage::ChecksumMismatch | Damage::Unreadable => add(&mut self.bad_blocks, 1),
                Damage::Differs => add(&mut self.differing_blocks, 1),
            }
            let (is_bad, is_member) = (still.contains(copy), answers.contains_key(&copy.1));
            add(&mut self.repaired_blocks, u64::from(!is_bad && is_member));
            add(&mut self.unrepaired_blocks, u64::from(is_bad && !chunk.hopeless.contains_key(&copy.0)));
        }
        for is_tie in chunk.hopeless.values() {
            // Where nothing tells good copies from bad ones, the block counts, not its copies.
            add(&mut self.differing_blocks, u64::from(*is_tie));
            add(&mut self.unrepaired_blocks, 1);
        }
        add(&mut self.incomplete_bytes, if chunk.is_incomplete { chunk.range.length } else { 0 });
    }
}

#[cfg(test)]
mod tests;
