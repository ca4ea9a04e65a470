//! The copying of one resync: what is to be copied, what is under way, and up to where all of it is durable. Pure
//! bookkeeping; whom to ask and when is decided in [`super::resync`].
//!
//! A chunk is read at a member and sent to the syncing replica behind all records given out by then, if no record changed it
//! meanwhile ([`super::fresh_read`]).

use std::collections::{BTreeMap, VecDeque};

use protocol::message::Dirty;
use protocol::ranges::ByteRange;

use super::fresh_read::FreshRead;
use super::{PeerId, Time};

/// Bytes of one chunk, at most: small, so that few changes overlap it while it is read.
const CHUNK_BYTES_MAX: u64 = 256 * 1024;
/// Bytes of chunks under way, at most.
const WINDOW_BYTES: u64 = 16 << 20;
/// Chunks being read at a time.
const READING_MAX: usize = 4;

#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) read: FreshRead,
    /// Members that could not read it.
    pub(super) failed: Vec<PeerId>,
    /// It is on its way under this number, or there and not known to be durable.
    copy: Option<u64>,
}

/// Asking for what is dirty.
#[derive(Debug)]
struct Listing {
    asked: Vec<PeerId>,
    asked_at: Time,
    best: Option<(PeerId, Dirty)>,
}

/// The copying of one resync.
#[derive(Debug)]
pub(super) struct Copying {
    size_bytes: u64,
    /// The member whose list is gone by.
    source: Option<PeerId>,
    listing: Option<Listing>,
    listed_until: u64,
    queue: VecDeque<ByteRange>,
    /// Under way, by their first byte.
    chunks: BTreeMap<u64, Chunk>,
    chunks_bytes: u64,
    next_copy: u64,
    total_bytes: Option<u64>,
    done_bytes: u64,
}

/// What became of the bytes of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChunkRead {
    /// They may be sent, under this number.
    Send { copy: u64, range: ByteRange },
    /// They are of no use.
    Again,
    /// Nobody waits for them.
    Unknown,
}

impl Copying {
    pub(super) fn new(size_bytes: u64) -> Copying {
        Copying {
            size_bytes,
            source: None,
            listing: None,
            listed_until: 0,
            queue: VecDeque::new(),
            chunks: BTreeMap::new(),
            chunks_bytes: 0,
            next_copy: 1,
            total_bytes: None,
            done_bytes: 0,
        }
    }

    // ---- what is dirty -----------------------------------------------------------------------------------------

    /// The part to ask for next, and whom: the member whose list is gone by, or anybody.
    pub(super) fn to_list(&self) -> Option<(u64, Option<PeerId>)> {
        let wanted = self.listing.is_none() && self.queue.is_empty() && self.listed_until < self.size_bytes;
        wanted.then_some((self.listed_until, self.source))
    }

    pub(super) fn listing(&mut self, asked: Vec<PeerId>, now: Time) {
        self.listing = Some(Listing { asked, asked_at: now, best: None });
    }

    /// Takes a member's list. Lists differ where one knows less well; each holds all that is dirty.
    pub(super) fn listed(&mut self, peer: PeerId, dirty: Dirty) {
        let Some(listing) = &mut self.listing else { return };
        let sound = dirty.from == self.listed_until && dirty.next > dirty.from;
        let waited_for = listing.asked.iter().position(|asked| *asked == peer);
        let Some(at) = waited_for.filter(|_| sound) else { return };
        listing.asked.swap_remove(at);
        if listing.best.as_ref().is_none_or(|(_, best)| dirty.remaining_bytes < best.remaining_bytes) {
            listing.best = Some((peer, dirty));
        }
    }

    /// Goes by the shortest list once all have answered, or after `patience` by what is there.
    pub(super) fn take_list(&mut self, now: Time, patience: Time) {
        let Some(listing) = &mut self.listing else { return };
        let waits = !listing.asked.is_empty() && now.saturating_sub(listing.asked_at) < patience;
        if waits {
            return;
        }
        let best = listing.best.take();
        self.listing = None;
        let Some((peer, dirty)) = best else {
            self.source = None;
            return;
        };
        self.source = Some(peer);
        self.total_bytes.get_or_insert(dirty.remaining_bytes);
        // The volume may have grown; of what is new the replica gets every record.
        self.listed_until = dirty.next.min(self.size_bytes);
        for range in dirty.ranges {
            self.enqueue(range);
        }
    }

    fn enqueue(&mut self, range: ByteRange) {
        let end = range.end().min(self.size_bytes);
        let mut offset = range.offset;
        while offset < end {
            let next = (offset / CHUNK_BYTES_MAX + 1) * CHUNK_BYTES_MAX;
            let length = next.min(end) - offset;
            self.queue.push_back(ByteRange { offset, length });
            offset += length;
        }
    }

    // ---- chunks ------------------------------------------------------------------------------------------------

    fn reading(&self) -> usize {
        self.chunks.values().filter(|c| c.copy.is_none()).count()
    }

    /// The next chunk that could begin now.
    pub(super) fn peek(&self) -> Option<ByteRange> {
        let room = self.reading() < READING_MAX && self.chunks_bytes < WINDOW_BYTES;
        self.queue.front().copied().filter(|_| room)
    }

    pub(super) fn begin(&mut self) {
        let Some(range) = self.queue.pop_front() else { return };
        self.chunks_bytes += range.length;
        let chunk = Chunk { read: FreshRead::new(range), failed: Vec::new(), copy: None };
        self.chunks.insert(range.offset, chunk);
    }

    /// Chunks that a member must be asked for.
    pub(super) fn unasked(&self) -> Vec<u64> {
        let waiting = self.chunks.iter().filter(|(_, c)| c.copy.is_none() && !c.read.is_asked());
        waiting.map(|(offset, _)| *offset).collect()
    }

    pub(super) fn chunk(&self, offset: u64) -> Option<&Chunk> {
        self.chunks.get(&offset)
    }

    pub(super) fn asked(&mut self, offset: u64, read: u64, now: Time) {
        if let Some(chunk) = self.chunks.get_mut(&offset) {
            chunk.read.ask(read, now);
        }
    }

    /// A record was given out that changes `range`.
    pub(super) fn overlap(&mut self, range: ByteRange) {
        self.chunks.values_mut().for_each(|chunk| chunk.read.overlap(range));
    }

    /// Whether changes of `range` must wait for a read.
    pub(super) fn holds(&self, range: ByteRange, now: Time) -> bool {
        self.chunks.values().any(|chunk| chunk.read.holds(range, now))
    }

    fn find_read(&mut self, id: u64) -> Option<&mut Chunk> {
        self.chunks.values_mut().find(|chunk| chunk.read.is_named(id))
    }

    /// The bytes of a read are there.
    pub(super) fn read_done(&mut self, id: u64) -> ChunkRead {
        let copy = self.next_copy;
        let Some(chunk) = self.find_read(id) else { return ChunkRead::Unknown };
        if !chunk.read.finish() {
            return ChunkRead::Again;
        }
        chunk.copy = Some(copy);
        let range = chunk.read.range;
        self.next_copy += 1;
        ChunkRead::Send { copy, range }
    }

    /// A member could not read it; which range that is, and how many could not by now.
    pub(super) fn read_failed(&mut self, id: u64, peer: PeerId) -> Option<(ByteRange, usize)> {
        let chunk = self.find_read(id)?;
        chunk.failed.push(peer);
        chunk.read.lose();
        Some((chunk.read.range, chunk.failed.len()))
    }

    /// A member will not answer.
    pub(super) fn read_lost(&mut self, id: u64) {
        if let Some(chunk) = self.find_read(id) {
            chunk.read.lose();
        }
    }

    /// What is being read of `range` is not to be used.
    pub(super) fn lose_reads(&mut self, range: ByteRange) {
        let is_in_it = |chunk: &&mut Chunk| chunk.copy.is_none() && chunk.read.range.overlaps(range);
        self.chunks.values_mut().filter(is_in_it).for_each(|chunk| chunk.read.lose());
    }

    /// Copies up to this one are durable.
    pub(super) fn copied(&mut self, id: u64) {
        let durable = |c: &Chunk| c.copy.is_some_and(|copy| copy <= id);
        let bytes: u64 = self.chunks.values().filter(|c| durable(c)).map(|c| c.read.range.length).sum();
        self.chunks.retain(|_, c| !durable(c));
        self.chunks_bytes -= bytes;
        self.done_bytes += bytes;
    }

    /// The last copy sent.
    pub(super) fn last_copy(&self) -> u64 {
        self.next_copy - 1
    }

    // ---- how far -----------------------------------------------------------------------------------------------

    /// Everything dirty below this byte is durable.
    pub(super) fn durable_until(&self) -> u64 {
        let under_way = self.chunks.keys().next().copied();
        let queued = self.queue.front().map(|r| r.offset);
        [under_way, queued].into_iter().flatten().fold(self.listed_until, u64::min)
    }

    pub(super) fn is_under_way(&self) -> bool {
        !self.chunks.is_empty()
    }

    pub(super) fn is_done(&self) -> bool {
        self.durable_until() >= self.size_bytes
    }

    /// Bytes done, and all that were to be copied.
    pub(super) fn progress(&self) -> (u64, u64) {
        (self.done_bytes, self.total_bytes.unwrap_or(0).max(self.done_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::super::fresh_read::HOLD_FIRST;
    use super::*;

    const UNIT: u64 = 64 * 1024;

    fn dirty(from: u64, next: u64, ranges: &[(u64, u64)]) -> Dirty {
        let ranges: Vec<ByteRange> =
            ranges.iter().map(|(offset, length)| ByteRange { offset: *offset, length: *length }).collect();
        let remaining_bytes = ranges.iter().map(|r| r.length).sum();
        Dirty { subject: "c".parse().unwrap(), from, next, ranges, remaining_bytes }
    }

    /// Copying of a volume of 64 units, with the list taken.
    fn listed(ranges: &[(u64, u64)]) -> Copying {
        let mut copying = Copying::new(64 * UNIT);
        assert_eq!(copying.to_list(), Some((0, None)));
        copying.listing(vec![0], Time::ZERO);
        copying.listed(0, dirty(0, 64 * UNIT, ranges));
        copying.take_list(Time::ZERO, Time::from_secs(1));
        copying
    }

    fn begin(copying: &mut Copying, read: u64) -> u64 {
        let offset = copying.peek().expect("there is a chunk").offset;
        copying.begin();
        copying.asked(offset, read, Time::ZERO);
        offset
    }

    #[test]
    fn the_shortest_list_counts_and_late_ones_are_not_waited_for() {
        let mut copying = Copying::new(64 * UNIT);
        copying.listing(vec![0, 1, 2], Time::ZERO);
        copying.listed(0, dirty(0, 64 * UNIT, &[(0, 64 * UNIT)]));
        copying.listed(1, dirty(0, 64 * UNIT, &[(0, UNIT)]));
        copying.take_list(Time::ZERO, Time::from_secs(1));
        assert_eq!(copying.peek(), None, "one has not answered yet");
        copying.take_list(Time::from_secs(1), Time::from_secs(1));
        assert_eq!(copying.peek(), Some(ByteRange { offset: 0, length: UNIT }));
        assert_eq!(copying.progress(), (0, UNIT));
    }

    #[test]
    fn durable_until_waits_for_the_lowest_chunk() {
        let mut copying = listed(&[(0, UNIT), (10 * UNIT, UNIT), (20 * UNIT, UNIT)]);
        assert_eq!(copying.durable_until(), 0);
        for read in 1..=3 {
            begin(&mut copying, read);
        }
        assert!(matches!(copying.read_done(2), ChunkRead::Send { copy: 1, .. }));
        copying.copied(1);
        assert_eq!(copying.durable_until(), 0, "the first is still being read");
        assert!(matches!(copying.read_done(1), ChunkRead::Send { copy: 2, .. }));
        copying.copied(2);
        assert_eq!(copying.durable_until(), 20 * UNIT);
        copying.read_done(3);
        assert!(!copying.is_done());
        copying.copied(3);
        assert!(copying.is_done());
        assert_eq!(copying.progress(), (3 * UNIT, 3 * UNIT));
    }

    #[test]
    fn a_chunk_that_changed_while_it_was_read_is_read_again_and_then_held() {
        let mut copying = listed(&[(0, UNIT)]);
        let offset = begin(&mut copying, 1);
        let inside = ByteRange { offset: 4096, length: 4096 };
        for read in 2..5 {
            assert!(!copying.holds(inside, Time::ZERO));
            copying.overlap(inside);
            assert_eq!(copying.read_done(read - 1), ChunkRead::Again);
            copying.asked(offset, read, Time::ZERO);
        }
        let outside = ByteRange { offset: UNIT, length: 1 };
        assert!(copying.holds(inside, Time::ZERO) && !copying.holds(outside, Time::ZERO));
        assert!(!copying.holds(inside, HOLD_FIRST), "a member that hangs is not waited for");
        assert!(matches!(copying.read_done(4), ChunkRead::Send { .. }));
        assert!(!copying.holds(inside, Time::ZERO), "once it is on its way changes come after it");
    }

    #[test]
    fn ranges_are_cut_into_chunks_within_the_volume() {
        let mut copying = listed(&[(3 * UNIT, 6 * UNIT), (63 * UNIT, 9 * UNIT)]);
        let mut chunks = Vec::new();
        while let Some(range) = copying.queue.pop_front() {
            assert!(range.length <= CHUNK_BYTES_MAX && range.end() <= 64 * UNIT);
            chunks.push((range.offset / UNIT, range.length / UNIT));
        }
        assert_eq!(chunks, [(3, 1), (4, 4), (8, 1), (63, 1)]);
    }
}
