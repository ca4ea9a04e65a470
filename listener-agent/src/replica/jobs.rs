//! Work that a replica hands out; whoever does it reports how it ended. No behaviour.

use protocol::{Record, Seq};

use super::SessionId;
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
}

/// Records to apply to the image, in order.
#[derive(Debug)]
pub struct ApplyJob {
    /// The records.
    pub records: Vec<Record>,
    /// Whether blocks that they change in part must match their checksums: not after an attempt that got stuck halfway.
    pub trust: Trust,
}

/// A superblock to write.
#[derive(Debug)]
pub struct MetadataJob {
    /// Whether the image must be made durable first.
    pub sync_image: bool,
    /// What to write.
    pub superblock: Superblock,
}

/// Records to read from the journal for another member.
#[derive(Clone, Debug)]
pub struct FetchJob {
    pub(super) session: SessionId,
    pub(super) from: Seq,
    pub(super) to: Seq,
    /// What the checksums of the records start from.
    pub salt: Salt,
    /// Where they are.
    pub segments: Vec<Segment>,
}

/// Why a batch was not applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApplyError {
    /// The disk is full: worth another try later.
    NoSpace,
    /// Anything else.
    Failed,
}
