//! Large writes that go to the image without going through the journal: which may, and what follows.
//!
//! The journal gets an *intent*: the range, and the checksums of its blocks. When it is durable the bytes are written to the
//! image and made durable, and then the group counts. Each byte is written once instead of twice. What it costs: a crash in
//! between leaves blocks as they were or as they were to be, and nothing else tells which ([`crate::recovery`]); and nothing
//! in the journal brings such bytes again, so that no record that changes their blocks may still be under way.
//!
//! **Invariant:** while the bytes of an intent are written no other change of these blocks is being made or to be made, no
//! read that came before it looks at them, and none that comes after it does before it is applied.

use protocol::{BLOCK_BYTES, Record, RecordKind, Seq};

use super::Replica;
use super::reads::Place;
use crate::journal::{INTENTS_BYTES_MAX, INTENTS_HELD_MAX, INTENTS_MAX, intent_bytes_min};

/// What was written through the page cache since the image was last made durable, bytes, at most: it becomes durable together
/// with what an intent writes, and whoever waits for that would wait for all of it.
const UNSYNCED_BYTES_MAX: u64 = 1 << 20;
/// Unsettled bytes, at most: an engine settles them before it serves.
const UNSETTLED_BYTES_MAX: u64 = 16 << 20;

/// What a replica knows of writes in place.
#[derive(Debug, Default)]
pub(super) struct InPlace {
    /// Intents in the group being written.
    writing: Vec<Seq>,
    /// Intents that are durable and not counted as applied yet, ascending.
    done: Vec<Seq>,
    /// Bytes applied through the page cache since the image was last made durable.
    unsynced_bytes: u64,
    /// Of these, how many there were when the group being written began.
    unsynced_at_begin: u64,
    /// Likewise, when the checkpoint being taken began.
    unsynced_at_checkpoint: u64,
    /// The image has no room, or its filesystem does not say. Until the next checkpoint.
    no_room: bool,
    /// Records of the group being written are wanted by nobody, if it turns out that they were not being written.
    pub(super) forget_if_not_begun: bool,
}

impl InPlace {
    pub(super) fn begin(&mut self, intents: Vec<Seq>) {
        self.writing = intents;
        self.unsynced_at_begin = self.unsynced_bytes;
        self.forget_if_not_begun = false;
    }

    /// The group that was begun is durable.
    pub(super) fn written(&mut self) {
        if !self.writing.is_empty() {
            self.unsynced_bytes = self.unsynced_bytes.saturating_sub(self.unsynced_at_begin);
        }
        self.done.append(&mut self.writing);
    }

    /// Whether a durable record's bytes are in the image already.
    pub(super) fn is_done(&self, seq: Seq) -> bool {
        self.done.binary_search(&seq).is_ok()
    }

    /// Everything up to a record is applied; `bytes` of it through the page cache.
    pub(super) fn applied(&mut self, last: Seq, bytes: u64) {
        self.done.drain(..self.done.partition_point(|seq| *seq <= last));
        self.unsynced_bytes += bytes;
    }

    /// A checkpoint makes durable what is applied now.
    pub(super) fn checkpoint_begins(&mut self) {
        self.unsynced_at_checkpoint = self.unsynced_bytes;
    }

    /// The checkpoint that began last is durable.
    pub(super) fn checkpoint_taken(&mut self) {
        self.unsynced_bytes = self.unsynced_bytes.saturating_sub(self.unsynced_at_checkpoint);
        self.no_room = false;
    }
}

/// Whether one more intent may be in a group with these.
pub(super) fn has_room_for_another(intents: &[&Record], record: &Record) -> bool {
    let bytes: u64 = intents.iter().map(|intent| intent.header.length).sum();
    intents.is_empty() || (intents.len() < INTENTS_MAX && bytes + record.header.length <= INTENTS_BYTES_MAX)
}

impl Replica {
    /// Whether the record at `index` of those that are pending can be an intent now.
    pub(super) fn can_be_intent(&self, index: usize, record: &Record) -> bool {
        let (header, range) = (&record.header, record.header.range());
        let superblock = &self.superblock;
        let is_large = header.kind == RecordKind::Write
            && !header.amended
            && range.length >= intent_bytes_min(superblock.identity.journal_bytes)
            && range == range.aligned(BLOCK_BYTES);
        if !is_large {
            return false;
        }
        let is_in_order = !superblock.syncing && self.turn.is_none() && !self.copies.has_waiting();
        let is_held = self.ring.intents().count() < INTENTS_HELD_MAX;
        let has_room = !self.in_place.no_room && !self.no_space_to_apply && is_held;
        let unsynced = self.in_place.unsynced_bytes + self.unapplied_bytes;
        let unsettled: u64 = superblock.unsettled.iter().map(|range| range.length).sum();
        // Replaying the record that made the volume so large would zero what lies behind this.
        let is_within = range.end() <= superblock.image_bytes;
        let place = Place { seq: header.seq, copy: 0 };
        is_in_order
            && has_room
            && is_within
            && unsynced <= UNSYNCED_BYTES_MAX
            && unsettled <= UNSETTLED_BYTES_MAX
            && !self.pending.iter().take(index).any(|earlier| earlier.header.range().shares_block(range))
            && !self.reads.precede(range, place)
    }

    /// The image has no room for what was to be written in place: the records go through the journal instead, which can wait
    /// until there is room.
    pub(super) fn group_not_begun(&mut self) {
        self.in_place.writing.clear();
        self.in_place.no_room = true;
        self.ring.take_back(self.durable.seq.next());
        if std::mem::take(&mut self.in_place.forget_if_not_begun) {
            self.forget_unwritten();
        }
    }
}
