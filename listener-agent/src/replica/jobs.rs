//! Work that a replica hands out; whoever does it reports how it ended ([`crate::carry_out`] does it to real files).
//! Decides nothing.

use protocol::message::{Copy, FetchKind};
use protocol::ranges::ByteRange;
use protocol::{Record, Seq};

use super::SessionId;
use super::dirty::DirtyPage;
use crate::image::Trust;
use crate::journal::group::Salt;
use crate::journal::ring::Segment;
use crate::superblock::Superblock;

/// A group to write to the journal.
#[derive(Debug)]
pub struct GroupJob {
    /// Where, bytes behind the journal's header.
    pub offset: u64,
    /// What the checksums of the records start from.
    pub salt: Salt,
    /// Goes into each record.
    pub generation: u64,
    /// The records.
    pub records: Vec<Record>,
    /// Which of them are intents: their bytes go to the image instead, after the group and before it counts as durable.
    pub intents: Vec<Seq>,
}

impl GroupJob {
    /// The records that are intents.
    pub fn in_place(&self) -> impl Iterator<Item = &Record> {
        self.records.iter().filter(|record| self.intents.contains(&record.seq()))
    }
}

/// How the writing of a group ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupOutcome {
    /// All of it is durable.
    Durable,
    /// The image has no room for what was to be written in place; nothing was written.
    NotBegun,
    /// It failed, and nobody knows what is durable.
    Failed,
}

/// Changes to make to the image, in order.
#[derive(Debug)]
pub struct ApplyJob {
    /// The changes.
    pub changes: Changes,
    /// Whether blocks that they change in part must match their checksums: not after an attempt that got stuck halfway.
    pub trust: Trust,
}

/// Changes of one sort.
#[derive(Debug)]
pub enum Changes {
    /// Records that change bytes, or nothing.
    Records(Vec<Record>),
    /// Bytes that another replica holds.
    Copies(Vec<Copy>),
    /// The volume grows.
    Grow(Growth),
}

/// A volume that grows; what is new is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growth {
    /// The size before, bytes.
    pub from: u64,
    /// The size then, bytes.
    pub to: u64,
}

impl Changes {
    /// The ranges of the volume that are changed.
    #[must_use]
    pub fn ranges(&self) -> Vec<ByteRange> {
        match self {
            Changes::Records(records) => records.iter().map(|r| r.header.range()).collect(),
            Changes::Copies(copies) => copies.iter().map(|c| c.range).collect(),
            Changes::Grow(growth) => vec![ByteRange { offset: growth.from, length: growth.to - growth.from }],
        }
    }
}

/// A superblock to write. What is in here is done in this order, each part durable before the next begins.
#[derive(Debug)]
pub struct MetadataJob {
    pub(super) purpose: Purpose,
    /// Image and checksums are made larger.
    pub grow: Option<Growth>,
    /// Whether the image must be made durable.
    pub sync_image: bool,
    /// Pages of the dirty bitmaps.
    pub dirty_pages: Vec<DirtyPage>,
    /// What to write.
    pub superblock: Superblock,
}

/// What a superblock is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A promise.
    Promise,
    /// The replica follows from another place on.
    Begin,
    /// The replica lacks nothing any more.
    Synced,
    /// Journal space is given up, and recovery starts later.
    Checkpoint,
}

/// Records to read from the journal for another member.
#[derive(Clone, Debug)]
pub struct FetchJob {
    pub(super) session: SessionId,
    pub(super) from: Seq,
    pub(super) to: Seq,
    /// What is wanted.
    pub what: FetchKind,
    /// Intents of which later records changed something.
    pub overwritten: Vec<Seq>,
    /// Where the image may be ahead of the log.
    pub unsettled: Vec<ByteRange>,
    /// What the checksums of the records start from.
    pub salt: Salt,
    /// Where they are.
    pub segments: Vec<Segment>,
}

/// What was found of a record in the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// The record; amended if it is an intent of which later records changed something.
    Record(Record),
    /// Its place, and the range that it changed.
    Range(Seq, ByteRange),
}

impl Found {
    pub(super) fn seq(&self) -> Seq {
        match self {
            Found::Record(record) => record.seq(),
            Found::Range(seq, _) => *seq,
        }
    }
}

/// Room to make for a volume that is to grow.
#[derive(Clone, Copy, Debug)]
pub struct ExtendJob {
    pub(super) session: SessionId,
    /// The size that it is to have, bytes.
    pub size_bytes: u64,
}

/// Why a job was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobError {
    /// The disk is full: worth another try later.
    NoSpace,
    /// Anything else.
    Failed,
}
