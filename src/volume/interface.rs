//! What goes into a volume and what comes out: settings, requests, events. No behaviour.

use std::time::Duration;

use bytes::Bytes;
use protocol::message::EngineId;
use protocol::ranges::ByteRange;
use protocol::{AckPolicy, Epoch, Position, ReplicaName, Seq, View};

use super::{PeerId, StartRefusal};

/// What a volume is told when it starts.
#[derive(Clone, Debug)]
pub struct VolumeSettings {
    /// Its name, the same at every agent.
    pub name: ReplicaName,
    /// Its size, bytes.
    pub size_bytes: u64,
    /// All replicas, members or not.
    pub replicas: Vec<ReplicaName>,
    /// When a change is acknowledged.
    pub ack_write: AckPolicy,
    /// When a flush, or a change with FUA, is acknowledged.
    pub ack_flush: AckPolicy,
    /// How many members a read is sent to at once.
    pub read: ReadSpread,
    /// A member that lacks so many journal bytes that another has leaves the view.
    pub lag_bytes_max: u64,
    /// A member that lacks a record so long leaves the view.
    pub lag_max: Duration,
    /// Whether new changes wait for a member that is nearly too far behind.
    pub throttle: bool,
    /// With fewer members nothing is acknowledged.
    pub min_replicas: usize,
    /// Requests fail when too few members have been in reach for so long.
    pub freeze: Duration,
    /// How long a confirmation of the epoch allows reads.
    pub lease: Duration,
    /// How long activation may take.
    pub start_timeout: Duration,
    /// A resync copies at least so much, bytes per second.
    pub resync_rate_min: u64,
    /// Whether to fence another engine that is at work.
    pub take_over: bool,
    /// This engine.
    pub engine: EngineId,
}

/// How many members a read is sent to at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadSpread {
    /// To the member likely to be fastest; to the next if it takes unusually long.
    Adaptive,
    /// To all that can be asked; the first valid answer counts.
    Multicast,
}

/// What a client asks for. Ranges lie within the volume and are not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Bytes.
    Read(ByteRange),
    /// Puts bytes.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Bytes,
        /// Acknowledge by the flush policy.
        fua: bool,
    },
    /// Makes a range read as zeroes.
    Zero {
        /// Which.
        range: ByteRange,
        /// Acknowledge by the flush policy.
        fua: bool,
        /// How.
        how: Zeroing,
    },
    /// Waits for everything given out before.
    Flush,
}

/// How a range becomes zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// Its contents are of no use any more.
    Trim,
    /// It must read as zeroes.
    Zero,
    /// It must read as zeroes and keep its space.
    ZeroKeepAllocated,
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No member could do it in time, or no member holds a good copy.
    Io,
    /// Every member's disk is full.
    NoSpace,
    /// The engine stops.
    Shutdown,
}

/// What the volume wants done or known. `T` names a request of the client.
#[derive(Debug)]
pub enum Event<T> {
    /// A request ends.
    Completed(T, Result<Bytes, Failure>),
    /// The volume serves from here on.
    Serving,
    /// Activation was refused; the volume is dead.
    StartRefused(StartRefusal),
    /// Activation cannot go on for now; it is tried on and on.
    StartBlocked(StartRefusal),
    /// A higher epoch was promised: another engine took over; the volume is dead.
    Fenced {
        /// Its epoch.
        promised: Epoch,
        /// Who said so.
        replica: ReplicaName,
    },
    /// Close the connection of this peer and make a new one.
    Disconnect(PeerId),
    /// Close the connection of this peer for good: the replica is removed.
    Removed(PeerId),
    /// Something that people should know.
    Notice(Notice),
}

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
    /// A replica returned with less than it had acknowledged.
    LostData {
        /// Which.
        replica: ReplicaName,
        /// What it had acknowledged.
        acknowledged: Seq,
        /// What it has.
        found: Position,
    },
    /// A replica had a bad block or an error for a read.
    ReadFailed {
        /// Which.
        replica: ReplicaName,
        /// First byte of the bad block, if it is known.
        offset: Option<u64>,
    },
    /// A replica cannot be had while the volume starts; it is tried again.
    Waiting {
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
    /// An operator removes it, or has all of it copied anew.
    Operator,
}
