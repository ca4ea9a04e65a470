//! The superblock: who a replica is, what it promised, and where its recovery starts. Two slots in one file are written
//! in turn; of the slots that are whole the later one counts, so a torn write costs nothing but the write.
//!
//! ```text
//! slot at 0 and at 64 KiB (in multiples of 4 KiB):
//! 0   8 bytes  magic "NBCASTSB"      16  u32  bytes of body
//! 8   u32      format version        20  u32  CRC-32 of bytes 0..20 and the body
//! 12  u32      reserved              24       body, in the order of the fields of Superblock
//! ```
//!
//! **Invariant:** only [`crate::replica`] decides what a superblock says, and nothing that it frees (journal space, an
//! older promise) is used before the superblock that frees it is durable.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::io;

use bytes::{BufMut, BytesMut};
use protocol::checksum::crc32_of_two;
use protocol::cursor::{self, Malformed, Reader};
use protocol::message::{EngineId, UNSETTLED_MAX};
use protocol::quorum::AckPolicies;
use protocol::ranges::{ByteRange, DIRTY_UNIT_BYTES};
use protocol::{BLOCK_BYTES, Epoch, EpochHistory, Position, ReplicaName, Seq, ViewState, VolumeUuid};

use crate::disk::RawFile;
use crate::disk::aligned::AlignedBuffer;

/// Version of all formats in a replica's directory, as this release writes them.
pub const FORMAT_VERSION: u32 = 2;
/// The first version, which knew no intents, and which is still read.
const VERSION_WITHOUT_INTENTS: u32 = 1;
/// Bytes of one slot.
pub const SLOT_BYTES: u64 = 64 * 1024;
/// Bytes of the file.
pub const FILE_BYTES: u64 = 2 * SLOT_BYTES;

const MAGIC: &[u8; 8] = b"NBCASTSB";
const PREFIX_BYTES: usize = 24;

/// What a replica is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The volume's identity.
    pub uuid: VolumeUuid,
    /// The volume's name.
    pub volume: ReplicaName,
    /// The replica's name.
    pub replica: ReplicaName,
    /// Size of the volume, bytes; a multiple of a block. In a superblock it is as of [`Superblock::tracked_seq`].
    pub size_bytes: u64,
    /// Size of the journal file, bytes; a multiple of a block.
    pub journal_bytes: u64,
}

/// The most replicas out of the view of which dirty bitmaps are kept.
pub const TRACKED_MAX: usize = 16;

/// What a superblock says of a replica out of the view. Its bitmaps are in the pages of its slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrackedHeader {
    /// The replica.
    pub name: ReplicaName,
    /// Where its pages are, below [`TRACKED_MAX`].
    pub slot: u8,
    /// The record with which the account of it begins.
    pub id: Seq,
    /// The generation in which the account was begun. With `id` it tells the pages of this account from leftovers.
    pub generation: u64,
    /// It is known to hold everything up to here.
    pub acknowledged: Seq,
    /// Marks of later records are in the plane of recent ones.
    pub rotated_at: Seq,
    /// Here everything is to be copied, whatever the pages say; whole units.
    pub solid: ByteRange,
}

/// Where the journal starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalTail {
    /// Where the oldest record kept is, or would be: bytes behind the journal's header.
    pub offset: u64,
    /// Its place in the order.
    pub seq: Seq,
    /// Records of an older generation found here are leftovers.
    pub generation: u64,
}

/// The superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Who the replica is.
    pub identity: Identity,
    /// Counts the writes of superblocks; the slot with the higher one counts.
    pub write_count: u64,
    /// Counts the openings of the replica. Journal records carry it, so that leftovers of an earlier life are known.
    pub generation: u64,
    /// Whether the replica was closed in good order and not opened since.
    pub clean: bool,
    /// No engine of a lower epoch is served.
    pub promised: Epoch,
    /// To whom that was promised.
    pub engine: EngineId,
    /// How long that engine counts on the promise after it last heard of it, ms; 0 once it left in good order.
    pub lease_ms: u32,
    /// Whether the replica is being copied to and cannot stand for the volume.
    pub syncing: bool,
    /// The last record whose effect is durable in the image.
    pub checkpoint: Position,
    /// Size of the volume as of the checkpoint, bytes: image and checksums have it for certain.
    pub image_bytes: u64,
    /// Views as of some durable record at or after the checkpoint; `views.seq` tells which view records are in it.
    pub views: ViewState,
    /// Epoch history as of the same record.
    pub history: EpochHistory,
    /// The ack policies of the epoch that wrote that record; none if the volume never served.
    pub acks: Option<AckPolicies>,
    /// Where the journal starts; at or before the record after the checkpoint.
    pub tail: JournalTail,
    /// Up to here every member held the order durably.
    pub stable: Seq,
    /// The replicas out of the view, as of `tracked_seq`.
    pub tracked: Vec<TrackedHeader>,
    /// A durable record at or after the checkpoint. What is kept of replicas out of the view is exactly as of this one.
    pub tracked_seq: Seq,
    /// Whole blocks of which some may be ahead of the log: each is as the log has it, or as a write left it that is not in
    /// the log (yet). Ascending, apart from each other.
    pub unsettled: Vec<ByteRange>,
    /// Records up to here change nothing of that any more.
    pub unsettled_seq: Seq,
}

/// Why a superblock cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SuperblockError {
    /// It cannot be read.
    #[error("cannot read the superblock: {0}")]
    Io(#[from] io::Error),
    /// Neither slot is whole.
    #[error("neither copy of the superblock is whole")]
    Damaged,
    /// It was written by another release.
    #[error("the replica has format version {found}, this release reads version {FORMAT_VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
}

impl Superblock {
    fn encode(&self) -> AlignedBuffer {
        let mut body = BytesMut::new();
        let id = &self.identity;
        cursor::put_uuid(&mut body, id.uuid);
        cursor::put_text(&mut body, id.volume.as_str());
        cursor::put_text(&mut body, id.replica.as_str());
        body.put_u64_le(id.size_bytes);
        body.put_u64_le(id.journal_bytes);
        body.put_u64_le(self.write_count);
        body.put_u64_le(self.generation);
        body.put_u8(u8::from(self.clean));
        body.put_u64_le(self.promised.0);
        body.put_slice(&self.engine);
        body.put_u32_le(self.lease_ms);
        body.put_u8(u8::from(self.syncing));
        cursor::put_position(&mut body, self.checkpoint);
        body.put_u64_le(self.image_bytes);
        cursor::put_view_state(&mut body, &self.views);
        cursor::put_history(&mut body, &self.history);
        AckPolicies::encode_known(self.acks, &mut body);
        body.put_u64_le(self.tail.offset);
        body.put_u64_le(self.tail.seq.0);
        body.put_u64_le(self.tail.generation);
        body.put_u64_le(self.stable.0);
        put_tracked(&mut body, &self.tracked);
        body.put_u64_le(self.tracked_seq.0);
        cursor::put_ranges(&mut body, &self.unsettled);
        body.put_u64_le(self.unsettled_seq.0);

        let mut prefix = Vec::with_capacity(PREFIX_BYTES);
        prefix.put_slice(MAGIC);
        prefix.put_u32_le(FORMAT_VERSION);
        prefix.put_u32_le(0);
        prefix.put_u32_le(body.len() as u32);
        let crc = crc32_of_two(&prefix, &body);
        prefix.put_u32_le(crc);
        let mut slot = AlignedBuffer::with_capacity(SLOT_BYTES as usize);
        slot.put(&prefix);
        slot.put(&body);
        slot.pad_to_block();
        slot
    }

    fn decode(slot: &[u8]) -> Result<Superblock, SlotError> {
        let mut r = Reader::new(slot);
        if r.bytes(8, "magic")? != MAGIC {
            return Err(SlotError::Damaged);
        }
        let version = r.u32("version")?;
        r.u32("reserved")?;
        let body_bytes = r.u32("body length")? as usize;
        let crc = r.u32("checksum")?;
        let body = r.bytes(body_bytes, "body")?;
        if crc32_of_two(&slot[..PREFIX_BYTES - 4], body) != crc {
            return Err(SlotError::Damaged);
        }
        // Compared after the checksum: a damaged version field must not pass for a newer release.
        match version {
            FORMAT_VERSION | VERSION_WITHOUT_INTENTS => Ok(Self::decode_body(version, body)?),
            _ => Err(SlotError::Version(version)),
        }
    }

    fn decode_body(version: u32, body: &[u8]) -> Result<Superblock, Malformed> {
        let mut r = Reader::new(body);
        let superblock = Superblock {
            identity: Identity {
                uuid: r.uuid("uuid")?,
                volume: r.name("volume")?,
                replica: r.name("replica")?,
                size_bytes: r.u64("size")?,
                journal_bytes: r.u64("journal size")?,
            },
            write_count: r.u64("write count")?,
            generation: r.u64("generation")?,
            clean: r.bool("clean")?,
            promised: Epoch(r.u64("promised")?),
            engine: r.uuid("engine")?.0,
            lease_ms: r.u32("lease")?,
            syncing: r.bool("syncing")?,
            checkpoint: r.position("checkpoint")?,
            image_bytes: r.u64("image size")?,
            views: r.view_state("views")?,
            history: r.history("history")?,
            acks: AckPolicies::decode_known(&mut r)?,
            tail: JournalTail {
                offset: r.u64("tail offset")?,
                seq: Seq(r.u64("tail seq")?),
                generation: r.u64("tail generation")?,
            },
            stable: Seq(r.u64("stable")?),
            tracked: read_tracked(&mut r)?,
            tracked_seq: Seq(r.u64("tracked seq")?),
            unsettled: match version {
                VERSION_WITHOUT_INTENTS => Vec::new(),
                _ => r.ranges("unsettled ranges")?,
            },
            unsettled_seq: match version {
                VERSION_WITHOUT_INTENTS => Seq(0),
                _ => Seq(r.u64("unsettled seq")?),
            },
        };
        r.finish("superblock")?;
        let id = &superblock.identity;
        let sound = id.size_bytes > 0
            && id.size_bytes.is_multiple_of(BLOCK_BYTES)
            && id.journal_bytes >= crate::journal::FILE_BYTES_MIN
            && id.journal_bytes.is_multiple_of(BLOCK_BYTES)
            && superblock.tail.offset.is_multiple_of(BLOCK_BYTES)
            && superblock.tail.offset <= crate::journal::capacity_bytes(id.journal_bytes)
            && superblock.tail.seq > Seq(0)
            && superblock.tail.seq <= superblock.checkpoint.seq.next()
            && superblock.tracked_seq >= superblock.checkpoint.seq
            && superblock.unsettled.len() <= UNSETTLED_MAX
            && superblock.unsettled.iter().all(|range| *range == range.aligned(BLOCK_BYTES) && range.length > 0)
            && superblock.unsettled.is_sorted_by(|a, b| a.end() < b.offset)
            && superblock.image_bytes > 0
            && superblock.image_bytes.is_multiple_of(BLOCK_BYTES);
        if sound { Ok(superblock) } else { Err(Malformed { field: "superblock" }) }
    }

    /// Reads the slot that counts.
    pub fn read(file: &dyn RawFile) -> Result<Superblock, SuperblockError> {
        let mut best: Option<Superblock> = None;
        let mut other_version = None;
        for offset in [0, SLOT_BYTES] {
            let mut slot = vec![0; SLOT_BYTES as usize];
            file.read_at(offset, &mut slot)?;
            match Superblock::decode(&slot) {
                Ok(found) if best.as_ref().is_none_or(|b| b.write_count < found.write_count) => best = Some(found),
                Ok(_) | Err(SlotError::Damaged) => {}
                Err(SlotError::Version(found)) => other_version = Some(found),
            }
        }
        match (best, other_version) {
            // A slot of another version was written by another release after this one's: going on would undo its work.
            (_, Some(found)) => Err(SuperblockError::Version { found }),
            (Some(superblock), None) => Ok(superblock),
            (None, None) => Err(SuperblockError::Damaged),
        }
    }

    /// Writes the superblock durably, to the slot that does not hold the latest.
    pub fn write(&self, file: &dyn RawFile) -> io::Result<()> {
        let offset = (self.write_count % 2) * SLOT_BYTES;
        file.write_durable_at(offset, self.encode().as_slice())
    }
}

fn put_tracked(out: &mut BytesMut, tracked: &[TrackedHeader]) {
    out.put_u8(tracked.len() as u8);
    for header in tracked {
        cursor::put_text(out, header.name.as_str());
        out.put_u8(header.slot);
        out.put_u64_le(header.id.0);
        out.put_u64_le(header.generation);
        out.put_u64_le(header.acknowledged.0);
        out.put_u64_le(header.rotated_at.0);
        out.put_u64_le(header.solid.offset);
        out.put_u64_le(header.solid.length);
    }
}

fn read_tracked(r: &mut Reader<'_>) -> Result<Vec<TrackedHeader>, Malformed> {
    const FIELD: &str = "tracked replicas";
    let count = usize::from(r.u8(FIELD)?);
    let mut tracked: Vec<TrackedHeader> = Vec::new();
    for _ in 0..count {
        let header = TrackedHeader {
            name: r.name(FIELD)?,
            slot: r.u8(FIELD)?,
            id: Seq(r.u64(FIELD)?),
            generation: r.u64(FIELD)?,
            acknowledged: Seq(r.u64(FIELD)?),
            rotated_at: Seq(r.u64(FIELD)?),
            solid: ByteRange { offset: r.u64(FIELD)?, length: r.u64(FIELD)? },
        };
        let sound = usize::from(header.slot) < TRACKED_MAX
            && tracked.iter().all(|other| other.slot != header.slot && other.name != header.name)
            && header.solid.offset.is_multiple_of(DIRTY_UNIT_BYTES)
            && header.solid.length.is_multiple_of(DIRTY_UNIT_BYTES)
            && header.solid.offset.checked_add(header.solid.length).is_some();
        if !sound {
            return Err(Malformed { field: FIELD });
        }
        tracked.push(header);
    }
    Ok(tracked)
}

enum SlotError {
    Damaged,
    Version(u32),
}

impl From<Malformed> for SlotError {
    fn from(_: Malformed) -> SlotError {
        SlotError::Damaged
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::disk::file::{Caching, SystemFile};
    use protocol::View;

    pub(crate) fn sample() -> Superblock {
        let view = View::new(vec!["a".parse().unwrap(), "b".parse().unwrap()]).unwrap();
        let mut history = EpochHistory::default();
        history.note(Position { epoch: Epoch(2), seq: Seq(4) });
        Superblock {
            identity: Identity {
                uuid: VolumeUuid([3; 16]),
                volume: "v".parse().unwrap(),
                replica: "a".parse().unwrap(),
                size_bytes: 1 << 20,
                journal_bytes: 1 << 20,
            },
            write_count: 1,
            generation: 1,
            clean: false,
            promised: Epoch(2),
            engine: [5; 16],
            lease_ms: 3000,
            syncing: false,
            checkpoint: Position { epoch: Epoch(2), seq: Seq(9) },
            image_bytes: 1 << 20,
            views: ViewState::initial(view),
            history,
            acks: None,
            tail: JournalTail { offset: 8192, seq: Seq(5), generation: 1 },
            stable: Seq(7),
            tracked: vec![tracked("c", 3), tracked("d", 0)],
            tracked_seq: Seq(11),
            unsettled: vec![ByteRange { offset: 4096, length: 8192 }, ByteRange { offset: 65536, length: 4096 }],
            unsettled_seq: Seq(9),
        }
    }

    fn tracked(name: &str, slot: u8) -> TrackedHeader {
        TrackedHeader {
            name: name.parse().unwrap(),
            slot,
            id: Seq(6),
            generation: 1,
            acknowledged: Seq(5),
            rotated_at: Seq(10),
            solid: ByteRange { offset: DIRTY_UNIT_BYTES, length: 3 * DIRTY_UNIT_BYTES },
        }
    }

    #[allow(clippy::disallowed_types, reason = "the test brings the file that the product is handed")]
    fn file() -> (tempfile::TempDir, SystemFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("superblock");
        std::fs::File::create(&path).unwrap().set_len(FILE_BYTES).unwrap();
        let file = SystemFile::open(&path, Caching::Buffered).unwrap();
        (dir, file)
    }

    #[test]
    fn the_later_slot_counts_and_a_torn_one_does_not() {
        let (_dir, file) = file();
        let first = sample();
        let second = Superblock { write_count: 2, promised: Epoch(3), ..sample() };
        first.write(&file).unwrap();
        second.write(&file).unwrap();
        assert_eq!(Superblock::read(&file).unwrap(), second);
        file.write_at(100, &[0xff]).unwrap(); // in the slot of the second
        assert_eq!(Superblock::read(&file).unwrap(), first);
        file.write_at(SLOT_BYTES + 100, &[0xff]).unwrap();
        assert!(matches!(Superblock::read(&file), Err(SuperblockError::Damaged)));
    }

    #[test]
    fn another_format_version_is_refused_by_number() {
        let (_dir, file) = file();
        sample().write(&file).unwrap();
        let mut slot = vec![0; SLOT_BYTES as usize];
        file.read_at(SLOT_BYTES, &mut slot).unwrap();
        slot[8] = 9;
        let body_bytes = u32::from_le_bytes(slot[16..20].try_into().unwrap()) as usize;
        let crc = crc32_of_two(&slot[..20], &slot[24..24 + body_bytes]);
        slot[20..24].copy_from_slice(&crc.to_le_bytes());
        file.write_at(SLOT_BYTES, &slot).unwrap();
        assert!(matches!(Superblock::read(&file), Err(SuperblockError::Version { found: 9 })));
    }

    #[test]
    fn the_longest_superblock_fits_its_slot() {
        let name = |i: usize| format!("{:x<64}", i).parse::<ReplicaName>().unwrap();
        let view = View::new((0..protocol::REPLICAS_MAX).map(name).collect()).unwrap();
        let mut history = EpochHistory::default();
        for i in 1..=2000 {
            history.note(Position { epoch: Epoch(i), seq: Seq(i) });
        }
        let tracked = (0..TRACKED_MAX as u8).map(|i| tracked(name(i.into()).as_str(), i)).collect();
        let longest = Superblock { views: ViewState::initial(view), history, tracked, ..sample() };
        assert!(longest.encode().len() <= SLOT_BYTES as usize);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(mut bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
            let _ = Superblock::decode(&bytes);
            if bytes.len() >= PREFIX_BYTES {
                bytes[..8].copy_from_slice(MAGIC);
                let _ = Superblock::decode(&bytes);
                let _ = Superblock::decode_body(FORMAT_VERSION, &bytes[PREFIX_BYTES..]);
            }
        }
    }
}
