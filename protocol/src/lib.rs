//! The vocabulary that the engine and its listener agents share: positions in the volume's order, views and quorums,
//! records, checksums, and the frames in which all of these travel.
//!
//! **Invariant:** nothing here touches a clock, a file, a socket or a task. Bytes that come from outside are checked
//! before anything is allocated for them, and never panic.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod checksum;
pub mod cursor;
pub mod extents;
pub mod message;
pub mod position;
pub mod quorum;
pub mod ranges;
pub mod record;
pub mod scrub;
pub mod view;
pub mod wire;

pub use message::{ToAgent, ToEngine};
pub use position::{Epoch, EpochHistory, Position, Seq};
pub use quorum::AckPolicy;
pub use record::{Record, RecordHeader, RecordKind};
pub use view::{ReplicaName, View, ViewState, VolumeUuid};

/// Bytes in one checksummed block of the image, and the alignment of everything on an agent's disk.
pub const BLOCK_BYTES: u64 = 4096;

/// The largest payload of one record, bytes. A longer client write is given several consecutive places in the order.
pub const RECORD_PAYLOAD_BYTES_MAX: u32 = 1 << 20;

/// The largest volume, bytes.
pub const VOLUME_BYTES_MAX: u64 = 64 << 40;

/// The most replicas that a volume can have.
pub const REPLICAS_MAX: usize = 16;
