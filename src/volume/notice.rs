//! What people should know of a volume: each notice with its words and how serious it is. No behaviour.

use std::fmt;

use protocol::{Position, ReplicaName, Seq, View};

use super::{Damage, ScrubFound, ScrubMark};

/// Something that people should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A view came into force.
    ViewInForce {
        /// The view.
        view: View,
        /// Its record.
        seq: Seq,
    },
    /// A replica is being dropped.
    Dropping {
        /// Which.
        replica: ReplicaName,
        /// Why.
        reason: DropReason,
    },
    /// Records are being copied to a replica that is behind, at activation.
    Replaying {
        /// Which.
        replica: ReplicaName,
        /// From whose journal.
        source: ReplicaName,
        /// How many.
        records: u64,
    },
    /// Blocks of which a crash left two versions are read at one replica, and become those of all.
    Settling {
        /// At which, if its copies are sound.
        source: ReplicaName,
        /// How many bytes.
        bytes: u64,
    },
    /// A replica returned with less than it had acknowledged.
    LostData {
        /// Which.
        replica: ReplicaName,
        /// What it had acknowledged.
        acknowledged: Seq,
        /// What it has.
        found: Position,
    },
    /// A replica could not do a read, and it is not known for which block.
    ReadFailed {
        /// Which.
        replica: ReplicaName,
    },
    /// What a replica answered changed between its check and that of this engine: in memory, or on the network.
    DamagedAnswer {
        /// Which.
        replica: ReplicaName,
    },
    /// A block of a member is bad.
    BadBlock {
        /// Which member.
        replica: ReplicaName,
        /// First byte of the block.
        offset: u64,
        /// What is wrong with it.
        what: Damage,
    },
    /// A bad block is good again, by a repair or because a client changed all of it.
    Repaired {
        /// At which member.
        replica: ReplicaName,
        /// First byte of the block.
        offset: u64,
        /// What was wrong with it.
        what: Damage,
    },
    /// Members hold different bytes, and none that most of them hold.
    NoMajority {
        /// First byte of the block.
        offset: u64,
    },
    /// A block is bad at all members.
    NoGoodCopy {
        /// First byte of the block.
        offset: u64,
    },
    /// A replica cannot be had while the volume starts; it is tried again.
    Waiting {
        /// Which.
        replica: ReplicaName,
        /// Why.
        reason: String,
    },
    /// A replica answers, but does not serve.
    Refuses {
        /// Which.
        replica: ReplicaName,
        /// Why.
        reason: String,
    },
    /// The connection to a member is gone.
    Lost {
        /// Which.
        replica: ReplicaName,
        /// Why.
        reason: String,
    },
    /// A member is back and gets what it lacks.
    Back {
        /// Which.
        replica: ReplicaName,
        /// How much that is.
        records: u64,
    },
    /// A replica out of the view is being copied to.
    Resyncing {
        /// Which.
        replica: ReplicaName,
    },
    /// A replica that was being copied to is out of the view as before.
    ResyncEnded {
        /// Which.
        replica: ReplicaName,
        /// Why.
        reason: String,
    },
    /// A replica is no part of the volume any more.
    Removed {
        /// Which.
        replica: ReplicaName,
    },
    /// Replicas were given up by an operator; what only they held is lost.
    GivenUp {
        /// Which.
        replicas: Vec<ReplicaName>,
    },
    /// The volume has another size than the configuration says.
    SizeDiffers {
        /// The volume's size, bytes.
        size_bytes: u64,
    },
    /// The volume has a new size.
    Resized {
        /// The size, bytes.
        size_bytes: u64,
    },
    /// The volume cannot have the size asked for.
    ResizeFailed {
        /// The size asked for, bytes.
        size_bytes: u64,
        /// Why.
        reason: String,
    },
    /// Too few members are in reach to acknowledge anything, or enough again.
    Frozen(bool),
    /// The disk of a replica is full, or no longer.
    Space {
        /// Which.
        replica: ReplicaName,
        /// Whether it is full.
        full: bool,
    },
    /// A scrub begins, or goes on.
    Scrubbing {
        /// At this byte.
        position: u64,
    },
    /// A scrub is over.
    ScrubEnded {
        /// How far it came, and what it found.
        mark: ScrubMark,
        /// Whether that is the end of the volume.
        is_finished: bool,
    },
}

/// Why a replica is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// It lacks more bytes than `lag_bytes_max`.
    LagBytes,
    /// It lacks a record, or is unreachable, for longer than `lag_ms_max`.
    LagTime,
    /// Its disk is full while another's is not.
    NoSpace,
    /// Its durable writes fail.
    Poisoned,
    /// It returned with less than it had acknowledged, or with another history.
    LostData,
    /// It did not take part in activation.
    Absent,
    /// More of its blocks were found bad than `checksum_errors_max`.
    BadBlocks,
    /// An operator removes it, or has all of it copied anew.
    Operator,
}

/// How serious a notice is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// As it should be.
    Info,
    /// Worth a look.
    Warning,
    /// Something is lost or stands still until somebody acts.
    Error,
}

/// Why a replica with many bad blocks is out of the view, and what brings it back.
pub(super) const BAD_BLOCKS: &str = "more of its blocks were found bad than checksum_errors_max; it is not used again until it \
                                     is replaced or copied anew (replica resync --full)";

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DropReason::LagBytes => "it is behind by more than lag_bytes_max",
            DropReason::LagTime => "it is behind or unreachable for longer than lag_ms_max",
            DropReason::NoSpace => "its disk is full",
            DropReason::Poisoned => "a durable write failed there",
            DropReason::LostData => "it lost data that it had acknowledged",
            DropReason::Absent => "it took no part in the start of the engine",
            DropReason::BadBlocks => BAD_BLOCKS,
            DropReason::Operator => "an operator asked for it",
        })
    }
}

impl Notice {
    /// How serious it is.
    #[must_use]
    pub fn severity(&self) -> Severity {
        match self {
            Notice::ViewInForce { .. }
            | Notice::Replaying { .. }
            | Notice::Settling { .. }
            | Notice::Waiting { .. }
            | Notice::Back { .. }
            | Notice::Resyncing { .. }
            | Notice::Removed { .. }
            | Notice::Resized { .. }
            | Notice::Repaired { .. }
            | Notice::Frozen(false)
            | Notice::Space { full: false, .. }
            | Notice::Scrubbing { .. } => Severity::Info,
            Notice::ScrubEnded { mark, is_finished: true } if mark.found == ScrubFound::default() => Severity::Info,
            Notice::ScrubEnded { is_finished: false, .. } => Severity::Info,
            Notice::ScrubEnded { mark, .. } if mark.found.unrepaired_blocks > 0 => Severity::Error,
            Notice::Dropping { .. }
            | Notice::BadBlock { .. }
            | Notice::Lost { .. }
            | Notice::Refuses { .. }
            | Notice::ResyncEnded { .. }
            | Notice::SizeDiffers { .. }
            | Notice::ResizeFailed { .. }
            | Notice::ScrubEnded { .. } => Severity::Warning,
            Notice::LostData { .. }
            | Notice::ReadFailed { .. }
            | Notice::DamagedAnswer { .. }
            | Notice::NoGoodCopy { .. }
            | Notice::NoMajority { .. }
            | Notice::GivenUp { .. }
            | Notice::Frozen(true)
            | Notice::Space { full: true, .. } => Severity::Error,
        }
    }

    /// The replica that it is about.
    #[must_use]
    pub fn replica(&self) -> Option<&ReplicaName> {
        match self {
            Notice::Dropping { replica, .. }
            | Notice::Replaying { replica, .. }
            | Notice::Settling { source: replica, .. }
            | Notice::LostData { replica, .. }
            | Notice::ReadFailed { replica }
            | Notice::DamagedAnswer { replica }
            | Notice::BadBlock { replica, .. }
            | Notice::Repaired { replica, .. }
            | Notice::Waiting { replica, .. }
            | Notice::Lost { replica, .. }
            | Notice::Refuses { replica, .. }
            | Notice::Back { replica, .. }
            | Notice::Resyncing { replica }
            | Notice::ResyncEnded { replica, .. }
            | Notice::Removed { replica }
            | Notice::Space { replica, .. } => Some(replica),
            Notice::ViewInForce { .. }
            | Notice::NoGoodCopy { .. }
            | Notice::NoMajority { .. }
            | Notice::GivenUp { .. }
            | Notice::SizeDiffers { .. }
            | Notice::Resized { .. }
            | Notice::ResizeFailed { .. }
            | Notice::Frozen(_)
            | Notice::Scrubbing { .. }
            | Notice::ScrubEnded { .. } => None,
        }
    }
}

fn write_scrub_ended(f: &mut fmt::Formatter<'_>, mark: &ScrubMark, is_finished: bool) -> fmt::Result {
    let ScrubMark { position, found } = mark;
    if is_finished {
        f.write_str("scrub finished: ")?;
    } else {
        write!(f, "scrub stopped at byte {position}: ")?;
    }
    write!(
        f,
        "{} bad blocks, {} differing, {} repaired, {} not repaired",
        found.bad_blocks, found.differing_blocks, found.repaired_blocks, found.unrepaired_blocks
    )?;
    match found.incomplete_bytes {
        0 => Ok(()),
        bytes => write!(f, "; of {bytes} bytes not all replicas could be looked at"),
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Notice::ViewInForce { view, seq } => write!(f, "the view is {view} since record {seq}"),
            Notice::Dropping { reason, .. } => write!(f, "leaves the view: {reason}"),
            Notice::Settling { bytes, .. } => {
                write!(f, "gives {bytes} bytes to all members, which were being written when replicas died")
            }
            Notice::Replaying { source, records, .. } => write!(f, "gets {records} missing records from {source}"),
            Notice::LostData { acknowledged, found, .. } => write!(
                f,
                "had acknowledged record {acknowledged} and came back at {found}: its disk lost data or it belongs to \
                 another history; all of it is copied anew"
            ),
            Notice::ReadFailed { .. } => f.write_str("a read failed"),
            Notice::DamagedAnswer { .. } => {
                f.write_str("the bytes of an answer changed on their way (checksum mismatch)")
            }
            Notice::BadBlock { offset, what, .. } => write!(f, "the block at byte {offset} {what}"),
            Notice::Repaired { offset, what, .. } => {
                write!(f, "the block at byte {offset} is good again; what was found: it {what}")
            }
            Notice::NoMajority { offset } => write!(
                f,
                "members hold different bytes in the block at byte {offset}, and none that most of them hold: who is right \
                 cannot be told; have all of the wrong one copied anew (replica resync --full)"
            ),
            Notice::NoGoodCopy { offset } => write!(
                f,
                "no member has a good copy of the block at byte {offset}: reads of it fail until all of it is written"
            ),
            Notice::Waiting { reason, .. } => write!(f, "waited for: {reason}"),
            Notice::Refuses { reason, .. } => write!(f, "cannot be used: {reason}"),
            Notice::Lost { reason, .. } => {
                write!(f, "out of reach: {reason}; its queue is kept up to the lag limits")
            }
            Notice::Back { records, .. } => write!(f, "back, {records} records behind"),
            Notice::Resyncing { .. } => f.write_str("follows again; what it lacks is copied"),
            Notice::ResyncEnded { reason, .. } => write!(f, "resync interrupted: {reason}; it is tried again"),
            Notice::Removed { .. } => f.write_str("removed from the volume"),
            Notice::GivenUp { replicas } => {
                let names: Vec<&str> = replicas.iter().map(ReplicaName::as_str).collect();
                write!(f, "started without {}, as an operator asked: what only they held is lost", names.join(", "))
            }
            Notice::SizeDiffers { size_bytes } => write!(
                f,
                "the volume has {size_bytes} bytes, the configuration says less; set its `size` to the size it has"
            ),
            Notice::Resized { size_bytes } => write!(f, "the volume has {size_bytes} bytes now"),
            Notice::ResizeFailed { size_bytes, reason } => {
                write!(f, "the volume cannot have {size_bytes} bytes: {reason}")
            }
            Notice::Frozen(true) => {
                f.write_str("frozen, too few members are in reach; I/O waits, and fails after freeze_ms")
            }
            Notice::Frozen(false) => f.write_str("enough members are in reach again"),
            Notice::Space { full: true, .. } => f.write_str("its disk is full; make room on it"),
            Notice::Space { full: false, .. } => f.write_str("has room again"),
            Notice::Scrubbing { position: 0 } => f.write_str("scrub begins"),
            Notice::Scrubbing { position } => write!(f, "scrub goes on at byte {position}"),
            Notice::ScrubEnded { mark, is_finished } => write_scrub_ended(f, mark, *is_finished),
        }
    }
}
