//! The journal: a replica's write-ahead log, a ring of fixed size in one file.
//!
//! Records are written in *groups*: everything that has arrived goes out in one durable write. A group starts at a
//! multiple of 4 KiB (so that no write touches a sector of an earlier, already acknowledged group), its records are
//! packed, and it never wraps: one that does not fit before the end of the ring starts over at the beginning.
//!
//! ```text
//! file:   4 KiB header (magic "NBCASTJL", version, volume uuid, CRC), then the ring
//! record: u32 magic "NBJR" | u32 CRC-32 of bytes 8..80, started from that of the volume uuid | u64 generation | u64 first seq of the group | u32 what follows: 0 payload, 1 intent | u32 CRC-32 of an intent's checksums
//!         | 48 bytes record header (protocol::record) | payload, or for an intent u32 checksum of each block
//! ```
//!
//! Recovery reads on from the tail that the superblock names. After each record the next may follow packed, at the next
//! block, or at the start of the ring; it counts if its seq is the next one, its checksums match, and its generation
//! (number of times the replica was opened) is not lower. What an earlier life left behind never passes: it has a lower
//! seq, or it is from a torn tail and then has a lower generation than the record before it.
//!
//! Only the last group can be torn, as groups are written one at a time. A sound group *behind* a broken record
//! therefore proves that acknowledged records are damaged: that is an error, never a quiet end of the log.
//!
//! The bytes of an *intent* go to the image instead, after its group and before the group counts as durable: what that means
//! after a crash is in [`crate::recovery`].

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod group;
pub mod intents;
pub mod recover;
pub mod ring;

use bytes::BufMut;
use protocol::checksum::crc32;
use protocol::cursor::Reader;
use protocol::{BLOCK_BYTES, RECORD_PAYLOAD_BYTES_MAX, VolumeUuid};

use crate::disk::RawFile;
use crate::disk::aligned::AlignedBuffer;

/// Bytes before the ring.
pub const HEADER_BYTES: u64 = BLOCK_BYTES;
/// The smallest journal file, bytes.
pub const FILE_BYTES_MIN: u64 = 128 * 1024;

const MAGIC: &[u8; 8] = b"NBCASTJL";
const VERSION: u32 = 1;

/// Bytes of the ring in a journal file of `file_bytes`.
#[must_use]
pub fn capacity_bytes(file_bytes: u64) -> u64 {
    file_bytes.saturating_sub(HEADER_BYTES)
}

/// The largest payload that a record may have here: several groups must fit into the ring.
#[must_use]
pub fn record_payload_bytes_max(file_bytes: u64) -> u32 {
    let eighth = capacity_bytes(file_bytes) / 8 / BLOCK_BYTES * BLOCK_BYTES;
    eighth.clamp(BLOCK_BYTES, u64::from(RECORD_PAYLOAD_BYTES_MAX)) as u32
}

/// The largest group, bytes: it bounds the memory and the time of one durable write.
#[must_use]
pub fn group_bytes_max(file_bytes: u64) -> u64 {
    (capacity_bytes(file_bytes) / 4 / BLOCK_BYTES * BLOCK_BYTES).min(4 << 20)
}

/// From this size on a write can be an intent, bytes: below it costs less to write it twice than to wait for two writes.
#[must_use]
pub fn intent_bytes_min(file_bytes: u64) -> u64 {
    let half = u64::from(record_payload_bytes_max(file_bytes)) / 2 / BLOCK_BYTES * BLOCK_BYTES;
    half.max(2 * BLOCK_BYTES)
}

/// The most intents in a group.
pub const INTENTS_MAX: usize = 32;
/// The most intents that a journal holds: as many ranges at most are ahead of the log at a member that gets its records from
/// here, as many bytes at most are read from the image for that, and then by an engine that settles them.
pub const INTENTS_HELD_MAX: usize = 256;
/// What the intents of a group write, bytes, at most: it bounds the time of one group.
pub const INTENTS_BYTES_MAX: u64 = 4 << 20;

/// Why a journal is not this replica's.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// It cannot be read.
    #[error("cannot read the journal: {0}")]
    Io(#[from] std::io::Error),
    /// It is not a journal, or damaged.
    #[error("the journal's header is damaged")]
    Damaged,
    /// It was written by another release.
    #[error("the journal has version {found}, this release reads version {VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// It belongs to another volume.
    #[error("the journal belongs to volume {found}")]
    OtherVolume {
        /// The volume in the header.
        found: VolumeUuid,
    },
}

/// The header block of a new journal.
#[must_use]
pub fn encode_header(uuid: VolumeUuid) -> AlignedBuffer {
    let mut fields = Vec::with_capacity(32);
    fields.put_slice(MAGIC);
    fields.put_u32_le(VERSION);
    fields.put_slice(&uuid.0);
    let crc = crc32(&fields);
    fields.put_u32_le(crc);
    let mut block = AlignedBuffer::with_capacity(HEADER_BYTES as usize);
    block.put(&fields);
    block.pad_to_block();
    block
}

/// Checks that the file is the journal of the volume `uuid`.
pub fn check_header(file: &dyn RawFile, uuid: VolumeUuid) -> Result<(), HeaderError> {
    let mut block = vec![0; HEADER_BYTES as usize];
    file.read_at(0, &mut block)?;
    let mut r = Reader::new(&block);
    let mut read = || -> Result<_, protocol::cursor::Malformed> {
        let magic = r.bytes(8, "magic")? == MAGIC;
        let version = r.u32("version")?;
        Ok((magic, version, r.uuid("uuid")?, r.u32("crc")?))
    };
    match read() {
        Ok((true, found, _, crc)) if crc == crc32(&block[..28]) && found != VERSION => {
            Err(HeaderError::Version { found })
        }
        Ok((true, _, found, crc)) if crc == crc32(&block[..28]) => {
            if found == uuid {
                Ok(())
            } else {
                Err(HeaderError::OtherVolume { found })
            }
        }
        Ok(_) | Err(_) => Err(HeaderError::Damaged),
    }
}
