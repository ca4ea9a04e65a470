//! Which parts of the journal's ring are in use. Pure bookkeeping.
//!
//! **Invariant:** space is handed out again only after the caller said that a superblock whose tail lies behind it is
//! durable; otherwise a crash would leave a superblock that points at overwritten records.

use std::collections::VecDeque;

use protocol::Seq;
use protocol::ranges::ByteRange;

use super::intents::Intents;

/// One group in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts, bytes behind the journal's header.
    pub offset: u64,
    /// Bytes, a multiple of a block.
    pub bytes: u64,
    /// Its first record.
    pub first: Seq,
    /// Its last record.
    pub last: Seq,
}

/// The ring.
#[derive(Clone, Debug)]
pub struct Ring {
    capacity: u64,
    /// Where the next group goes if it fits.
    write_offset: u64,
    segments: VecDeque<Segment>,
    intents: Intents,
}

impl Ring {
    /// A ring of `capacity` bytes that holds these segments, with these intents, and goes on at `write_offset`.
    #[must_use]
    pub fn new(capacity: u64, segments: VecDeque<Segment>, intents: Intents, write_offset: u64) -> Ring {
        Ring { capacity, write_offset, segments, intents }
    }

    /// A ring of `capacity` bytes that holds nothing.
    #[must_use]
    pub fn empty(capacity: u64) -> Ring {
        Ring::new(capacity, VecDeque::new(), Intents::default(), 0)
    }

    fn start_of_used(&self) -> Option<u64> {
        self.segments.front().map(|s| s.offset)
    }

    fn place(&self, bytes: u64) -> Option<u64> {
        let room_to_end = self.capacity - self.write_offset;
        match self.start_of_used() {
            None if bytes <= room_to_end => Some(self.write_offset),
            None => (bytes <= self.capacity).then_some(0),
            Some(used) if self.write_offset > used => {
                if bytes <= room_to_end {
                    Some(self.write_offset)
                } else {
                    (bytes <= used).then_some(0)
                }
            }
            // The used part starts at or after the write offset: it wraps, or fills the ring.
            Some(used) => (bytes <= used - self.write_offset).then_some(self.write_offset),
        }
    }

    /// Takes room for a group; returns its offset, or `None` if there is none.
    pub fn take(&mut self, bytes: u64, first: Seq, last: Seq) -> Option<u64> {
        let offset = self.place(bytes)?;
        self.segments.push_back(Segment { offset, bytes, first, last });
        self.write_offset = offset + bytes;
        Some(offset)
    }

    /// Takes back the room that was given last: nothing was written there. The next group begins at the same place, which a
    /// superblock may call the tail by now.
    ///
    /// # Panics
    /// If that group does not begin with `first`.
    pub fn take_back(&mut self, first: Seq) {
        let last = self.segments.pop_back().filter(|segment| segment.first == first);
        self.write_offset = last.expect("the last group is the one that was given room last").offset;
    }

    /// A record that changed a range became durable, with its bytes in the image alone if it is an intent.
    pub fn note_durable(&mut self, seq: Seq, range: ByteRange, is_intent: bool) {
        if is_intent { self.intents.note(range, seq) } else { self.intents.note_change(range) }
    }

    /// The intents it holds.
    #[must_use]
    pub fn intents(&self) -> &Intents {
        &self.intents
    }

    /// The tail if everything up to `seq` is given up: offset and place of the oldest record kept.
    #[must_use]
    pub fn tail_after(&self, seq: Seq, next: Seq) -> (u64, Seq) {
        let kept = self.segments.iter().find(|s| s.last > seq);
        kept.map_or((self.write_offset, next), |s| (s.offset, s.first))
    }

    /// Gives back all groups before the one that starts with `first`.
    pub fn release_before(&mut self, first: Seq) {
        while self.segments.front().is_some_and(|s| s.last < first) {
            self.segments.pop_front();
        }
        self.intents.release_before(first);
    }

    /// Bytes in use, as far as they cannot be taken.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        match self.start_of_used() {
            None => 0,
            Some(used) if self.write_offset > used => self.write_offset - used,
            Some(used) => self.capacity - used + self.write_offset,
        }
    }

    /// Bytes that would become free if everything up to `seq` were given up.
    #[must_use]
    pub fn releasable_bytes(&self, seq: Seq) -> u64 {
        self.segments.iter().take_while(|s| s.last <= seq).map(|s| s.bytes).sum()
    }

    /// All of the ring, bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// First record kept, if any.
    #[must_use]
    pub fn first(&self) -> Option<Seq> {
        self.segments.front().map(|s| s.first)
    }

    /// The groups that hold records `from..=to`, at most `bytes_max` but at least one.
    #[must_use]
    pub fn segments_of(&self, from: Seq, to: Seq, bytes_max: u64) -> Vec<Segment> {
        let mut bytes = 0;
        self.segments
            .iter()
            .filter(|s| s.last >= from && s.first <= to)
            .take_while(|s| {
                bytes += s.bytes;
                bytes == s.bytes || bytes <= bytes_max
            })
            .copied()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    fn ring() -> Ring {
        Ring::empty(64 * KIB)
    }

    #[test]
    fn a_group_that_does_not_fit_before_the_end_starts_over() {
        let mut r = ring();
        assert_eq!(r.take(40 * KIB, Seq(1), Seq(4)), Some(0));
        assert_eq!(r.take(20 * KIB, Seq(5), Seq(5)), Some(40 * KIB));
        assert_eq!(r.take(8 * KIB, Seq(6), Seq(6)), None, "the first group is still needed");
        r.release_before(Seq(5));
        assert_eq!(r.take(8 * KIB, Seq(6), Seq(6)), Some(0));
        assert_eq!(r.take(40 * KIB, Seq(7), Seq(7)), None, "it would run over the second group");
        assert_eq!(r.take(32 * KIB, Seq(7), Seq(7)), Some(8 * KIB));
        assert_eq!(r.take(4 * KIB, Seq(8), Seq(8)), None, "full to the last byte");
        assert_eq!(r.used_bytes(), 64 * KIB);
    }

    #[test]
    fn the_tail_is_the_first_group_with_a_record_that_is_kept() {
        let mut r = ring();
        r.take(8 * KIB, Seq(1), Seq(3));
        r.take(8 * KIB, Seq(4), Seq(6));
        assert_eq!(r.tail_after(Seq(2), Seq(7)), (0, Seq(1)));
        assert_eq!(r.tail_after(Seq(3), Seq(7)), (8 * KIB, Seq(4)));
        assert_eq!(r.tail_after(Seq(6), Seq(7)), (16 * KIB, Seq(7)));
        assert_eq!(r.releasable_bytes(Seq(5)), 8 * KIB);
    }

    proptest::proptest! {
        #[test]
        fn groups_in_use_never_overlap(steps in proptest::collection::vec((1u64..12, 0u64..3), 1..300)) {
            let mut r = ring();
            let mut live: VecDeque<Segment> = VecDeque::new();
            let mut seq = 0;
            for (blocks, releases) in steps {
                for _ in 0..releases {
                    live.pop_front();
                }
                r.release_before(live.front().map_or(Seq(seq + 1), |s| s.first));
                let bytes = blocks * 4 * KIB;
                if let Some(offset) = r.take(bytes, Seq(seq + 1), Seq(seq + 1)) {
                    seq += 1;
                    assert!(offset + bytes <= 64 * KIB);
                    assert!(live.iter().all(|s| offset >= s.offset + s.bytes || s.offset >= offset + bytes));
                    live.push_back(Segment { offset, bytes, first: Seq(seq), last: Seq(seq) });
                } else {
                    assert!(!live.is_empty(), "an empty ring has room");
                }
            }
        }
    }
}
