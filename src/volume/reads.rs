//! Reads under way, and statuses and prefetches, which go the same way: cut into pieces that a frame can carry, each asked
//! of one member or several, the first valid answer taken.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use protocol::extents;
use protocol::message::{ReadKind, ReadOutcome};
use protocol::ranges::ByteRange;
use protocol::{BLOCK_BYTES, Seq};

use super::fresh_read::FreshRead;
use super::read_latency::ReadLatency;
use super::{Answer, PeerId, ReadSpread, Time};

/// With `hedged` another member is asked no sooner than this after the first.
const HEDGE_MIN: Duration = Duration::from_millis(1);
const HEDGE_MAX: Duration = Duration::from_secs(1);
/// With the other policies only an answer that takes so many times what 95 of 100 do is unusually late, and none that takes
/// less than this: below it a second question costs more than it saves.
const LATE_TIMES: u32 = 4;
const LATE_MIN: Duration = Duration::from_millis(5);

/// What is a small read, bytes.
const SMALL_BYTES_MAX: u64 = 16 << 10;
/// Answers that take longer come from disks that are slow, or busy: better from all of them at the same time.
const FAST_MAX: Duration = Duration::from_millis(2);

/// A part of a read.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) read: u64,
    pub(super) what: ReadKind,
    pub(super) range: ByteRange,
    /// Members asked, whether they answered or not, and when.
    pub(super) asked: Vec<(PeerId, Time)>,
    /// Of these, how many may still answer.
    pub(super) outstanding: usize,
    /// Members that answered with an error or a bad block, or are known to hold something else than most, and where that is,
    /// as far as it is known.
    pub(super) failed: Vec<(PeerId, Option<u64>)>,
    /// If the answers of all members are compared.
    pub(super) round: Option<Round>,
}

/// Members asked for the same blocks behind the same record.
#[derive(Debug)]
pub(super) struct Round {
    /// Whether a record changed them meanwhile.
    pub(super) read: FreshRead,
    /// The record.
    pub(super) seen: Seq,
    /// The last record that an answer may show.
    pub(super) applied: Seq,
    pub(super) answers: Vec<(PeerId, Bytes)>,
    /// Members that are known to hold something else than most, and of which block.
    pub(super) disbelieved: Vec<(PeerId, u64)>,
    /// So many answers decided nothing.
    pub(super) undecided: usize,
    /// When members were asked for the first time.
    pub(super) since: Option<Time>,
}

impl Round {
    fn new(read: FreshRead) -> Round {
        let (answers, disbelieved) = (Vec::new(), Vec::new());
        Round { read, seen: Seq(0), applied: Seq(0), answers, disbelieved, undecided: 0, since: None }
    }

    fn again(self) -> Round {
        Round { since: self.since, ..Round::new(self.read) }
    }
}

impl Piece {
    fn new(read: u64, what: ReadKind, range: ByteRange, compares: bool) -> Piece {
        let round = compares.then(|| Round::new(FreshRead::new(range)));
        Piece { read, what, range, asked: vec![], outstanding: 0, failed: vec![], round }
    }

    pub(super) fn was_asked(&self, peer: PeerId) -> bool {
        self.asked.iter().any(|(asked, _)| *asked == peer)
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
                ReadKind::Data | ReadKind::Extents | ReadKind::Prefetch | ReadKind::Scrub,
                ReadOutcome::Data { .. }
                | ReadOutcome::Extents(_)
                | ReadOutcome::Prefetched
                | ReadOutcome::Scrubbed(_)
                | ReadOutcome::ChecksumMismatch { .. }
                | ReadOutcome::Unreadable { .. }
                | ReadOutcome::Cancelled
                | ReadOutcome::Failed
                | ReadOutcome::Damaged,
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
    /// What the client wants; the pieces may begin before and end after it.
    wanted: ByteRange,
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
    /// Names of pieces that nobody waits for any more, and members that may not have answered them.
    retired: Vec<(u64, Vec<PeerId>)>,
    latency: ReadLatency,
}

impl<T> Reads<T> {
    pub(super) fn new() -> Reads<T> {
        Reads {
            next_id: 1,
            ops: BTreeMap::new(),
            pieces: BTreeMap::new(),
            held: Vec::new(),
            retired: Vec::new(),
            latency: ReadLatency::new(),
        }
    }

    /// A new name for a read.
    pub(super) fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Begins a read; returns the ids of its pieces. What is not asked for its bytes is one piece: the beginning of a range
    /// that is too long answers for the range. Bytes that are compared are those of whole blocks.
    pub(super) fn begin(&mut self, token: T, what: ReadKind, range: ByteRange, compares: bool) -> Vec<u64> {
        let piece_bytes = what.bytes_max();
        let length = match what {
            ReadKind::Data | ReadKind::Scrub => range.length,
            ReadKind::Extents | ReadKind::Prefetch => range.length.min(piece_bytes),
        };
        let wanted = ByteRange { length, ..range };
        let range = if compares { wanted.aligned(BLOCK_BYTES) } else { wanted };
        let read = self.id();
        let mut pieces = Vec::new();
        let mut offset = range.offset;
        while offset < range.end() {
            let length = piece_bytes.min(range.end() - offset);
            let id = self.id();
            self.pieces.insert(id, Piece::new(read, what, ByteRange { offset, length }, compares));
            pieces.push(id);
            offset += length;
        }
        self.ops.insert(read, ReadOp { token, wanted, missing: pieces.len(), parts: BTreeMap::new() });
        pieces
    }

    /// Makes two of a piece that no member has all of; returns their ids. `None` if that is of no use: it is one block, or
    /// nothing that has bytes, or all members failed at the same block.
    pub(super) fn split(&mut self, id: u64) -> Option<[u64; 2]> {
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
            self.pieces.insert(half, Piece::new(piece.read, piece.what, range, piece.round.is_some()));
            half
        }))
    }

    fn take_piece(&mut self, id: u64) -> Option<Piece> {
        let piece = self.pieces.remove(&id)?;
        if piece.outstanding > 0 {
            self.retired.push((id, piece.asked.iter().map(|(peer, _)| *peer).collect()));
        }
        Some(piece)
    }

    /// What nobody waits for any more since this was last asked.
    pub(super) fn take_retired(&mut self) -> Vec<(u64, Vec<PeerId>)> {
        std::mem::take(&mut self.retired)
    }

    /// Gives a piece another name, under which all members that did not fail are to be asked anew: answers to the old one
    /// are of no use.
    pub(super) fn renew(&mut self, id: u64) -> Option<u64> {
        let mut piece = self.take_piece(id)?;
        let again = self.id();
        piece.outstanding = 0;
        piece.asked.clear();
        piece.round = piece.round.map(Round::again);
        self.pieces.insert(again, piece);
        Some(again)
    }

    /// A member turns out to hold something wrong of a block: answers that show it are not taken. `asked` says behind which
    /// record the member was asked for a piece that it has not answered, `shows` whether an answer behind a record does.
    pub(super) fn disbelieve(
        &mut self,
        peer: PeerId,
        block: ByteRange,
        asked: impl Fn(u64) -> Option<Seq>,
        shows: impl Fn(Seq) -> bool,
    ) {
        let is_concerned = |p: &Piece| p.what != ReadKind::Prefetch && p.was_asked(peer) && p.range.overlaps(block);
        for (id, piece) in self.pieces.iter_mut().filter(|(_, p)| is_concerned(p)) {
            let has_failed = piece.has_failed_at(peer);
            match &mut piece.round {
                Some(round) if shows(round.seen) => round.disbelieved.push((peer, block.offset)),
                None if !has_failed && asked(*id).is_some_and(&shows) => piece.failed.push((peer, Some(block.offset))),
                Some(_) | None => {}
            }
        }
    }

    /// A record was given out that changes `range`.
    pub(super) fn overlap(&mut self, range: ByteRange) {
        self.pieces.values_mut().filter_map(|p| p.round.as_mut()).for_each(|round| round.read.overlap(range));
    }

    /// Whether changes of `range` must wait for a comparison that changes have made useless too often.
    pub(super) fn holds(&self, range: ByteRange, now: Time) -> bool {
        self.pieces.values().filter_map(|p| p.round.as_ref()).any(|round| round.read.holds(range, now))
    }

    /// Ends a piece with its answer; returns the request if that was its last.
    pub(super) fn finish_piece(&mut self, piece: u64, answer: Answer) -> Option<(T, Answer)> {
        let piece = self.take_piece(piece)?;
        let op = self.ops.get_mut(&piece.read)?;
        op.missing -= 1;
        match answer {
            Answer::Data(data) if op.missing > 0 || !op.parts.is_empty() => {
                op.parts.insert(piece.range.offset, data);
            }
            Answer::Data(data) => {
                let op = self.ops.remove(&piece.read)?;
                return Some((op.token, Answer::Data(cut(data, piece.range.offset, op.wanted))));
            }
            Answer::Extents(_) | Answer::Done => {
                return self.ops.remove(&piece.read).map(|op| (op.token, answer));
            }
        }
        if op.missing > 0 {
            return None;
        }
        let op = self.ops.remove(&piece.read)?;
        let begin = *op.parts.first_key_value()?.0;
        let mut whole = BytesMut::with_capacity(op.parts.values().map(Bytes::len).sum());
        for part in op.parts.into_values() {
            whole.extend_from_slice(&part);
        }
        Some((op.token, Answer::Data(cut(whole.freeze(), begin, op.wanted))))
    }

    /// Ends the whole read of a piece without data.
    pub(super) fn fail_piece(&mut self, piece: u64) -> Option<T> {
        let read = self.pieces.get(&piece)?.read;
        self.drop_read(read)
    }

    fn drop_read(&mut self, read: u64) -> Option<T> {
        let ended: Vec<u64> = self.pieces.iter().filter(|(_, p)| p.read == read).map(|(id, _)| *id).collect();
        ended.into_iter().for_each(|id| drop(self.take_piece(id)));
        let pieces = &self.pieces;
        self.held.retain(|h| pieces.contains_key(&h.piece));
        self.ops.remove(&read).map(|op| op.token)
    }

    /// Whether no request waits for an answer.
    pub(super) fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Takes all requests.
    pub(super) fn take_all(&mut self) -> Vec<T> {
        let ended: Vec<u64> = self.pieces.keys().copied().collect();
        ended.into_iter().for_each(|id| drop(self.take_piece(id)));
        self.held.clear();
        std::mem::take(&mut self.ops).into_values().map(|op| op.token).collect()
    }

    /// A member answered a piece. Of those that were asked before it and are still to answer it is known by now that they
    /// take longer.
    pub(super) fn note_latency(&mut self, piece: u64, peer: PeerId, now: Time) {
        let Some(piece) = self.pieces.get(&piece) else { return };
        let Some(index) = piece.asked.iter().position(|(asked, _)| *asked == peer) else { return };
        let counts = |(asked, _): &&(PeerId, Time)| *asked == peer || !piece.has_failed_at(*asked);
        for (_, asked_at) in piece.asked[..=index].iter().filter(counts) {
            self.latency.note(now.saturating_sub(*asked_at));
        }
    }

    /// Whether a piece is small, and answers come fast.
    pub(super) fn is_quick(&self, piece: &Piece) -> bool {
        let is_small = piece.range.length <= SMALL_BYTES_MAX && piece.what == ReadKind::Data;
        is_small && self.latency.p95().is_some_and(|p95| p95 <= FAST_MAX)
    }

    /// How long to wait for an answer before another member is asked.
    pub(super) fn hedge_after(&self, spread: ReadSpread) -> Duration {
        let p95 = self.latency.p95();
        match spread {
            ReadSpread::Hedged => p95.unwrap_or(LATE_MIN).clamp(HEDGE_MIN, HEDGE_MAX),
            ReadSpread::Adaptive | ReadSpread::Multicast | ReadSpread::Verify => {
                p95.map_or(LATE_MIN * LATE_TIMES, |p95| (p95 * LATE_TIMES).clamp(LATE_MIN, HEDGE_MAX))
            }
        }
    }
}

/// The part of `data`, which begins at `begin`, that is wanted.
fn cut(data: Bytes, begin: u64, wanted: ByteRange) -> Bytes {
    let at = (wanted.offset - begin) as usize;
    data.slice(at..at + wanted.length as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_member_was_asked_for_is_not_taken_if_it_shows_a_block_that_it_holds_wrong() {
        let mut reads: Reads<u8> = Reads::new();
        let block = ByteRange { offset: 4096, length: 4096 };
        let mut piece = |what, offset, compares| {
            let range = ByteRange { offset, length: 8192 };
            let id = reads.begin(0, what, range, compares)[0];
            let piece = reads.pieces.get_mut(&id).unwrap();
            piece.asked = vec![(0, Time::ZERO), (1, Time::ZERO)];
            id
        };
        let [before, behind, answered] = [0; 3].map(|_| piece(ReadKind::Data, 0, false));
        let elsewhere = piece(ReadKind::Data, 8192, false);
        let prefetch = piece(ReadKind::Prefetch, 0, false);
        let compared = piece(ReadKind::Data, 0, true);
        let asked = |id| (id != answered).then_some(Seq(if id == behind { 5 } else { 4 }));
        reads.disbelieve(0, block, asked, |seen| seen < Seq(5));
        reads.disbelieve(2, block, asked, |seen| seen < Seq(5));
        let failed: Vec<u64> = reads.pieces.iter().filter(|(_, p)| !p.failed.is_empty()).map(|(id, _)| *id).collect();
        assert_eq!(failed, [before], "not {elsewhere} or {prefetch}");
        assert_eq!(reads.pieces[&before].failed, [(0, Some(4096))]);
        assert_eq!(reads.pieces[&compared].round.as_ref().unwrap().disbelieved, [(0, 4096)]);
    }
}
