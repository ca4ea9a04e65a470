//! What goes into a volume and what comes out: settings, requests, events. No behaviour.

use std::time::Duration;

use bytes::Bytes;
use protocol::extents::Extent;
use protocol::message::EngineId;
use protocol::ranges::ByteRange;
use protocol::{AckPolicy, Epoch, ReplicaName, Seq};

use super::{Notice, PeerId, StartRefusal};

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
    /// So many small reads go to one member before the next is asked, while answers come fast; at least one. Over a network
    /// they cost each side one call of the system and one wake-up together, instead of one each.
    pub reads_together: usize,
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
    /// A member where more blocks were found bad leaves the view.
    pub checksum_errors_max: u64,
    /// A scrub looks at so much at least, bytes per second.
    pub scrub_rate_min: u64,
    /// Whether to fence another engine that is at work.
    pub take_over: bool,
    /// This engine.
    pub engine: EngineId,
}

/// How many members a read is sent to at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadSpread {
    /// To the member likely to be fastest; to the next if it takes unusually long: several times what most take.
    Adaptive,
    /// To all that can be asked; the first valid answer counts.
    Multicast,
    /// To the member likely to be fastest; to the next if it takes longer than 95 of 100 answers do.
    Hedged,
    /// To all; what they say is compared.
    Verify,
}

/// What a client asks for. Ranges lie within the volume and are not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Bytes.
    Read(ByteRange),
    /// How the range is kept, as fresh as a read of it would be.
    Status(ByteRange),
    /// The range will be read soon.
    Prefetch(ByteRange),
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

/// What a request came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done; for everything but reads and statuses.
    Done,
    /// For a read: exactly the bytes it asked for.
    Data(Bytes),
    /// For a status: at least one extent, none empty, which follow each other from the first byte asked for. They may all
    /// end before the range does, never behind it.
    Extents(Vec<Extent>),
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
    Completed(T, Result<Answer, Failure>),
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
    /// A record is not what it was when its place was given out: the memory of this engine cannot be trusted; the volume is
    /// dead.
    Corrupt {
        /// Its place.
        seq: Seq,
    },
    /// Close the connection of this peer and make a new one.
    Disconnect(PeerId),
    /// Close the connection of this peer for good: the replica is removed.
    Removed(PeerId),
    /// Something that people should know.
    Notice(Notice),
}
