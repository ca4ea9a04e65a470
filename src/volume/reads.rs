//! Reads under way, and statuses and prefetches, which go the same way: cut into pieces that a frame can carry, each asked
//! of one member or several, the first valid answer taken.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use protocol::extents;
use protocol::message::{ReadKind, ReadOutcome};
use protocol::ranges::ByteRange;
use protocol::{BLOCK_BYTES, Seq};

use super::{Answer, PeerId, Time};

/// A hedge is sent no sooner than this after the first question: below it a second question costs more than it saves.
const HEDGE_MIN: Duration = Duration::from_millis(5);
const HEDGE_MAX: Duration = Duration::from_secs(1);

/// A part of a read.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) read: u64,
    pub(super) what: ReadKind,
    pub(super) range: ByteRange,
    /// Members asked, whether they answered or not.
    pub(super) asked: Vec<PeerId>,
    /// Of these, how many may still answer.
    pub(super) outstanding: usize,
    pub(super) asked_at: Time,
    /// Members that answered with an error or a bad block, and where that is, as far as they said.
    pub(super) failed: Vec<(PeerId, Option<u64>)>,
}

impl Piece {
    fn new(read: u64, what: ReadKind, range: ByteRange, now: Time) -> Piece {
        Piece { read, what, range, asked: vec![], outstanding: 0, asked_at: now, failed: vec![] }
    }

    pub(super) fn has_failed_at(&self, peer: PeerId) -> bool {
        self.failed.iter().any(|(failed, _)| *failed == peer)
    }

    /// What a member's answer says of the range, if it is one.
    pub(super) fn judge(&self, outcome: ReadOutcome) -> Option<Answer> {
        match (self.what, outcome) {
            (ReadKind::Data, ReadOutcome::Data { data, .. }) if data.len() as u64 == self.range.length => {
                Some(Answer::Data(data))
            }
            (ReadKind::Extents, ReadOutcome::Extents(found)) if extents::are_sound(&found, self.range.length) => {
                Some(Answer::Extents(found))
            }
            (ReadKind::Prefetch, ReadOutcome::Prefetched) => Some(Answer::Done),
            (
                ReadKind::Data | ReadKind::Extents | ReadKind::Prefetch,
                ReadOutcome::Data { .. }
                | ReadOutcome::Extents(_)
                | ReadOutcome::Prefetched
                | ReadOutcome::ChecksumMismatch { .. }
                | ReadOutcome::Unreadable { .. }
                | ReadOutcome::Failed,
            ) => None,
        }
    }
}

/// An answer that may not be given yet.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) piece: u64,
    pub(super) answer: Answer,
    /// Until records up to here are acknowledged: they show in the answer.
    pub(super) until: Seq,
}

#[derive(Debug)]
struct ReadOp<T> {
    token: T,
    /// The bytes of a read of several pieces, as far as they are there, by their first byte.
    parts: BTreeMap<u64, Bytes>,
    /// Pieces that are not there.
    missing: usize,
}

/// All reads of a volume. `T` names a request of the client.
#[derive(Debug)]
pub(super) struct Reads<T> {
    next_id: u64,
    ops: BTreeMap<u64, ReadOp<T>>,
    pub(super) pieces: BTreeMap<u64, Piece>,
    pub(super) held: Vec<Held>,
    /// Smoothed latency and its deviation, as TCP estimates them.
    latency: Option<(Duration, Duration)>,
}

impl<T> Reads<T> {
    pub(super) fn new() -> Reads<T> {
        Reads { next_id: 1, ops: BTreeMap::new(), pieces: BTreeMap::new(), held: Vec::new(), latency: None }
    }

    /// A new name for a read.
    pub(super) fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Begins a read; returns the ids of its pieces. What is not asked for its bytes is one piece: the beginning of a range
    /// that is too long answers for the range.
    pub(super) fn begin(&mut self, token: T, what: ReadKind, range: ByteRange, now: Time) -> Vec<u64> {
        let piece_bytes = what.bytes_max();
        let length = match what {
            ReadKind::Data => range.length,
            ReadKind::Extents | ReadKind::Prefetch => range.length.min(piece_bytes),
        };
        let range = ByteRange { length, ..range };
        let read = self.id();
        let mut pieces = Vec::new();
        let mut offset = range.offset;
        while offset < range.end() {
            let length = piece_bytes.min(range.end() - offset);
            let id = self.id();
            self.pieces.insert(id, Piece::new(read, what, ByteRange { offset, length }, now));
            pieces.push(id);
            offset += length;
        }
        self.ops.insert(read, ReadOp { token, missing: pieces.len(), parts: BTreeMap::new() });
        pieces
    }

    /// Makes two of a piece that no member has all of; returns their ids. `None` if that is of no use: it is one block, or
    /// nothing that has bytes, or all members failed at the same block.
    pub(super) fn split(&mut self, id: u64, now: Time) -> Option<[u64; 2]> {
        let piece = self.pieces.get(&id)?;
        let whole = piece.range.aligned(BLOCK_BYTES);
        let blocks = whole.length / BLOCK_BYTES;
        let first = piece.failed.first()?.1;
        let is_same = first.is_some() && piece.failed.iter().all(|(_, offset)| *offset == first);
        if piece.what != ReadKind::Data || blocks < 2 || is_same {
            return None;
        }
        let piece = self.pieces.remove(&id)?;
        let middle = whole.offset + blocks / 2 * BLOCK_BYTES;
        let ends = [(piece.range.offset, middle), (middle, piece.range.end())];
        self.ops.get_mut(&piece.read)?.missing += 1;
        Some(ends.map(|(offset, end)| {
            let half = self.id();
            let range = ByteRange { offset, length: end - offset };
            self.pieces.insert(half, Piece::new(piece.read, piece.what, range, now));
            half
        }))
    }

    /// Ends a piece with its answer; returns the request if that was its last.
    pub(super) fn finish_piece(&mut self, piece: u64, answer: Answer) -> Option<(T, Answer)> {
        let piece = self.pieces.remove(&piece)?;
        let op = self.ops.get_mut(&piece.read)?;
        op.missing -= 1;
        match answer {
            Answer::Data(data) if op.missing > 0 || !op.parts.is_empty() => {
                op.parts.insert(piece.range.offset, data);
            }
            Answer::Data(_) | Answer::Extents(_) | Answer::Done => {
                return self.ops.remove(&piece.read).map(|op| (op.token, answer));
            }
        }
        if op.missing > 0 {
            return None;
        }
        let op = self.ops.remove(&piece.read)?;
        let mut whole = BytesMut::with_capacity(op.parts.values().map(Bytes::len).sum());
        for part in op.parts.into_values() {
            whole.extend_from_slice(&part);
        }
        Some((op.token, Answer::Data(whole.freeze())))
    }

    /// Ends the whole read of a piece without data.
    pub(super) fn fail_piece(&mut self, piece: u64) -> Option<T> {
        let read = self.pieces.get(&piece)?.read;
        self.drop_read(read)
    }

    fn drop_read(&mut self, read: u64) -> Option<T> {
        self.pieces.retain(|_, p| p.read != read);
        let pieces = &self.pieces;
        self.held.retain(|h| pieces.contains_key(&h.piece));
        self.ops.remove(&read).map(|op| op.token)
    }

    /// Takes all requests.
    pub(super) fn take_all(&mut self) -> Vec<T> {
        self.pieces.clear();
        self.held.clear();
        std::mem::take(&mut self.ops).into_values().map(|op| op.token).collect()
    }

    pub(super) fn note_latency(&mut self, sample: Duration) {
        self.latency = Some(match self.latency {
            None => (sample, sample / 2),
            Some((mean, deviation)) => {
                let error = mean.abs_diff(sample);
                (mean * 7 / 8 + sample / 8, deviation * 3 / 4 + error / 4)
            }
        });
    }

    /// How long to wait for an answer before another member is asked.
    pub(super) fn hedge_after(&self) -> Duration {
        self.latency.map_or(HEDGE_MIN * 4, |(mean, deviation)| (mean + deviation * 4).clamp(HEDGE_MIN, HEDGE_MAX))
    }
}
