//! Settling what replicas left unsettled, before a volume serves (DESIGN section 5.9: chosen once, and then for every replica).
//!
//! A replica that died while it wrote in place has blocks that are as before or as after a write which is not in its log. So
//! may others, and where two have different ones no record makes them the same: each would be right, but a client must not
//! read the one today and the other tomorrow. So the engine reads every such block at one member, the source of the history
//! if it can, and gives out what it read as records, the first ones after that of its epoch. What a client then reads is on
//! enough members to stay. If the engine dies before, nobody has read anything, and the next one may choose otherwise.
//!
//! A block that the crash tore in its midst matches no checksum at its replica and is read at another. If no member has a
//! sound copy it stays as it is, and fails alone, until it is written.

use std::collections::VecDeque;

use bytes::Bytes;
use protocol::message::{ReadKind, ReadOutcome};
use protocol::ranges::{ByteRange, merge_in_units};
use protocol::{BLOCK_BYTES, Record, RecordKind, Seq};

use super::{PeerId, Time, Volume};

/// Another member is asked for what one does not give within this time.
const PATIENCE: Time = Time::from_secs(5);

#[derive(Debug)]
struct Part {
    range: ByteRange,
    /// Members that have no sound copy of it.
    bad: Vec<PeerId>,
    /// Members that did not answer in time.
    late: Vec<PeerId>,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    read: u64,
    peer: PeerId,
    at: Time,
}

/// The reading of what is unsettled.
#[derive(Debug)]
pub(super) struct Settling {
    /// Whom to ask, the best first.
    members: Vec<PeerId>,
    /// What is to be read yet; the first one is being read.
    parts: VecDeque<Part>,
    asked: Option<Asked>,
    /// What nobody has a sound copy of.
    lost: Vec<ByteRange>,
    /// What was read, with its CRC-32.
    read: Vec<(ByteRange, Bytes, u32)>,
}

impl Settling {
    /// Of these ranges, read `bytes_max` at a time at the first of these members that can.
    pub(super) fn new(
        unsettled: impl IntoIterator<Item = ByteRange>,
        size_bytes: u64,
        bytes_max: u64,
        members: Vec<PeerId>,
    ) -> Settling {
        let step = (bytes_max / BLOCK_BYTES * BLOCK_BYTES).max(BLOCK_BYTES);
        let mut parts = VecDeque::new();
        for range in merge_in_units(unsettled, BLOCK_BYTES) {
            let end = range.end().min(size_bytes);
            let mut offset = range.offset;
            while offset < end {
                let length = step.min(end - offset);
                parts.push_back(Part { range: ByteRange { offset, length }, bad: Vec::new(), late: Vec::new() });
                offset += length;
            }
        }
        Settling { members, parts, asked: None, lost: Vec::new(), read: Vec::new() }
    }

    /// Bytes that are to be read.
    pub(super) fn bytes_left(&self) -> u64 {
        self.parts.iter().map(|part| part.range.length).sum()
    }

    pub(super) fn is_done(&self) -> bool {
        self.parts.is_empty()
    }

    /// What to ask whom, if nobody was asked.
    fn question(&mut self) -> Option<(PeerId, ByteRange)> {
        if self.asked.is_some() {
            return None;
        }
        loop {
            let part = self.parts.front_mut()?;
            let unasked = |peer: &&PeerId| !part.bad.contains(peer) && !part.late.contains(peer);
            if let Some(peer) = self.members.iter().find(unasked) {
                return Some((*peer, part.range));
            }
            if part.late.is_empty() {
                self.lost.extend(self.parts.pop_front().map(|part| part.range));
            } else {
                part.late.clear();
            }
        }
    }

    fn on_late(&mut self, now: Time) -> Option<Asked> {
        let asked = self.asked.take_if(|asked| now.saturating_sub(asked.at) >= PATIENCE)?;
        if let Some(part) = self.parts.front_mut() {
            part.late.push(asked.peer);
            // It is asked last from now on.
            self.members.retain(|peer| *peer != asked.peer);
            self.members.push(asked.peer);
        }
        Some(asked)
    }

    /// An answer; whether it is one to a question of ours.
    fn on_answer(&mut self, read: u64, outcome: &ReadOutcome) -> bool {
        let Some(asked) = self.asked.take_if(|asked| asked.read == read) else { return false };
        let Some(mut part) = self.parts.pop_front() else { return true };
        match outcome {
            ReadOutcome::Data { data, crc } if data.len() as u64 == part.range.length => {
                self.read.push((part.range, data.clone(), *crc));
            }
            _ if part.range.length > BLOCK_BYTES => {
                let blocks = (0..part.range.length / BLOCK_BYTES).rev();
                let offsets = blocks.map(|index| part.range.offset + index * BLOCK_BYTES);
                let ranges = offsets.map(|offset| ByteRange { offset, length: BLOCK_BYTES });
                ranges.for_each(|range| self.parts.push_front(Part { range, bad: Vec::new(), late: Vec::new() }));
            }
            _ => {
                part.bad.push(asked.peer);
                self.parts.push_front(part);
            }
        }
        true
    }
}

impl<T> Volume<T> {
    /// Goes on reading; whether all is read.
    pub(super) fn advance_settling(&mut self, now: Time) -> bool {
        let Some(settling) = self.settling() else { return true };
        if let Some(late) = settling.on_late(now) {
            self.peers[late.peer].cancel(late.read);
        }
        let question = self.settling().and_then(Settling::question);
        if let Some((peer, range)) = question {
            let read = self.reads.id();
            if let Some(settling) = self.settling() {
                settling.asked = Some(Asked { read, peer, at: now });
            }
            self.peers[peer].ask(Seq(0), Seq(0), read, ReadKind::Data, range);
        }
        self.settling().is_none_or(|settling| settling.is_done())
    }

    pub(super) fn on_settling_read(&mut self, now: Time, read: u64, outcome: &ReadOutcome) -> bool {
        let is_ours = self.settling().is_some_and(|settling| settling.on_answer(read, outcome));
        if is_ours {
            self.progressed(now);
        }
        is_ours
    }

    /// Gives out what was read, as records; returns the last.
    pub(super) fn give_out_settled(&mut self, now: Time, settling: Settling) -> Option<Seq> {
        self.unsettled_for_good = settling.lost;
        let records = settling.read.into_iter().map(|(range, data, crc)| {
            let record = Record::carrying(self.next_position(), RecordKind::Write, range, data, crc);
            self.append_record(now, record)
        });
        records.last()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = BLOCK_BYTES;

    fn range(offset: u64, length: u64) -> ByteRange {
        ByteRange { offset, length }
    }

    fn ask(settling: &mut Settling, read: u64) -> Option<(PeerId, ByteRange)> {
        let question = settling.question();
        settling.asked = question.map(|(peer, _)| Asked { read, peer, at: Time::ZERO });
        question
    }

    fn data(length: u64) -> ReadOutcome {
        ReadOutcome::Data { data: vec![7; length as usize].into(), crc: 9 }
    }

    #[test]
    fn what_several_left_unsettled_is_read_once_in_parts_and_within_the_volume() {
        let unsettled = [range(4 * BLOCK, 4 * BLOCK), range(0, BLOCK), range(6 * BLOCK, 8 * BLOCK)];
        let mut settling = Settling::new(unsettled, 9 * BLOCK, 3 * BLOCK, vec![1, 0]);
        assert_eq!(settling.bytes_left(), 6 * BLOCK);
        for (read, part) in (1..).zip([range(0, BLOCK), range(4 * BLOCK, 3 * BLOCK), range(7 * BLOCK, 2 * BLOCK)]) {
            assert_eq!(ask(&mut settling, read), Some((1, part)));
            assert!(!settling.on_answer(99, &data(part.length)), "an answer to somebody else");
            assert!(settling.on_answer(read, &data(part.length)));
        }
        assert!(settling.is_done());
        assert_eq!(settling.read.len(), 3);
    }

    #[test]
    fn a_bad_block_is_read_at_another_member_and_left_out_if_no_member_has_it() {
        let mut settling = Settling::new([range(0, 2 * BLOCK)], 2 * BLOCK, 2 * BLOCK, vec![0, 1]);
        let bad = ReadOutcome::ChecksumMismatch { offset: 0 };
        assert_eq!(ask(&mut settling, 1), Some((0, range(0, 2 * BLOCK))));
        settling.on_answer(1, &bad);
        assert_eq!(ask(&mut settling, 2), Some((0, range(0, BLOCK))));
        settling.on_answer(2, &bad);
        assert_eq!(ask(&mut settling, 3), Some((1, range(0, BLOCK))));
        settling.on_answer(3, &bad);
        assert_eq!(ask(&mut settling, 4), Some((0, range(BLOCK, BLOCK))), "the first is on nobody");
        settling.on_answer(4, &bad);
        assert_eq!(ask(&mut settling, 5), Some((1, range(BLOCK, BLOCK))));
        settling.on_answer(5, &data(BLOCK));
        assert!(settling.is_done());
        assert_eq!(settling.read.iter().map(|(range, ..)| *range).collect::<Vec<_>>(), [range(BLOCK, BLOCK)]);
        assert_eq!(settling.lost, [range(0, BLOCK)]);
    }

    #[test]
    fn one_that_does_not_answer_is_asked_again_when_the_others_have_nothing() {
        let mut settling = Settling::new([range(0, BLOCK)], BLOCK, BLOCK, vec![0, 1]);
        assert_eq!(ask(&mut settling, 1), Some((0, range(0, BLOCK))));
        assert!(settling.on_late(PATIENCE - Time::from_millis(1)).is_none());
        assert_eq!(settling.on_late(PATIENCE).map(|asked| asked.peer), Some(0));
        assert_eq!(ask(&mut settling, 2), Some((1, range(0, BLOCK))));
        settling.on_answer(2, &ReadOutcome::Failed);
        assert_eq!(ask(&mut settling, 3), Some((0, range(0, BLOCK))));
        assert!(!settling.on_answer(1, &data(BLOCK)), "the first question is not waited for any more");
        assert!(settling.on_answer(3, &data(BLOCK)) && settling.is_done());
    }
}
