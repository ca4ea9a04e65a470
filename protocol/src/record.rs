//! Records: the changes of a volume, each with its place in the order. Writes, trims, epoch starts and view changes are
//! all records of one sequence, so that every replica goes through the same states.

use bytes::{BufMut, Bytes, BytesMut};

use crate::checksum::crc32;
use crate::cursor::{self, Malformed, Reader};
use crate::position::{Epoch, Position, Seq};
use crate::ranges::ByteRange;
use crate::view::{ReplicaName, View};
use crate::{BLOCK_BYTES, RECORD_PAYLOAD_BYTES_MAX};

/// What a record does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// Puts the payload at `offset`.
    Write,
    /// Makes the range read as zeroes and may give its space back.
    Trim,
    /// Makes the range read as zeroes; keeps the space if [`RecordHeader::no_hole`].
    WriteZeroes,
    /// The first record of an epoch; the payload is its [`crate::quorum::AckPolicies`].
    EpochStart,
    /// Changes the view; the payload is a [`ViewChange`].
    ViewChange,
    /// Changes what members keep of a replica out of the view; the payload is a [`DirtyChange`].
    DirtyChange,
    /// The volume has another size from here on; the payload is a [`Resize`].
    Resize,
}

impl RecordKind {
    fn to_wire(self) -> u8 {
        match self {
            RecordKind::Write => 1,
            RecordKind::Trim => 2,
            RecordKind::WriteZeroes => 3,
            RecordKind::EpochStart => 4,
            RecordKind::ViewChange => 5,
            RecordKind::DirtyChange => 6,
            RecordKind::Resize => 7,
        }
    }

    fn from_wire(byte: u8) -> Option<RecordKind> {
        Some(match byte {
            1 => RecordKind::Write,
            2 => RecordKind::Trim,
            3 => RecordKind::WriteZeroes,
            4 => RecordKind::EpochStart,
            5 => RecordKind::ViewChange,
            6 => RecordKind::DirtyChange,
            7 => RecordKind::Resize,
            0 | 8..=u8::MAX => return None,
        })
    }
}

/// Bits of the flags of an encoded header.
const NO_HOLE: u8 = 1;
const AMENDED: u8 = 2;

/// Everything of a record but its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// The epoch that gave the place out.
    pub epoch: Epoch,
    /// The place.
    pub seq: Seq,
    /// What it does.
    pub kind: RecordKind,
    /// For [`RecordKind::WriteZeroes`]: the range must stay allocated.
    pub no_hole: bool,
    /// For [`RecordKind::Write`] of whole blocks: it comes from the journal of a member that has its bytes in the image alone,
    /// where later records may have changed them, and some may be bad. Whoever has it and not yet those records is ahead of
    /// its log there. The payload is that of [`Amended`].
    pub amended: bool,
    /// First byte of the volume that it changes; zero for records that change none.
    pub offset: u64,
    /// Bytes of the volume that it changes; zero for records that change none.
    pub length: u64,
    /// Bytes of payload.
    pub payload_length: u32,
    /// CRC-32 of the payload.
    pub payload_crc: u32,
}

/// Why a header makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// A field holds what it cannot hold.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The range leaves the volume.
    #[error("range {offset}+{length} leaves a volume of {size_bytes} bytes")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Size of the volume.
        size_bytes: u64,
    },
    /// The payload is not the one that the header was made for.
    #[error("payload of record {seq} does not match its checksum")]
    PayloadChecksum {
        /// Place of the record.
        seq: Seq,
    },
}

impl RecordHeader {
    /// Bytes of an encoded header.
    pub const BYTES: usize = 48;

    /// Where the record stands.
    #[must_use]
    pub fn position(&self) -> Position {
        Position { epoch: self.epoch, seq: self.seq }
    }

    /// The bytes of the volume that the record changes.
    #[must_use]
    pub fn range(&self) -> ByteRange {
        ByteRange { offset: self.offset, length: self.length }
    }

    /// Appends the encoded header.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u64_le(self.epoch.0);
        out.put_u64_le(self.seq.0);
        out.put_u64_le(self.offset);
        out.put_u64_le(self.length);
        out.put_u32_le(self.payload_length);
        out.put_u32_le(self.payload_crc);
        out.put_u8(self.kind.to_wire());
        out.put_u8(if self.no_hole { NO_HOLE } else { 0 } | if self.amended { AMENDED } else { 0 });
        out.put_slice(&[0; 6]);
    }

    /// Reads a header and checks that its fields fit each other. Does not know the volume's size: see
    /// [`RecordHeader::check_range`].
    pub fn decode(reader: &mut Reader<'_>) -> Result<RecordHeader, Malformed> {
        let epoch = Epoch(reader.u64("record epoch")?);
        let seq = Seq(reader.u64("record seq")?);
        let offset = reader.u64("record offset")?;
        let length = reader.u64("record length")?;
        let payload_length = reader.u32("record payload length")?;
        let payload_crc = reader.u32("record payload checksum")?;
        let kind = RecordKind::from_wire(reader.u8("record kind")?).ok_or(Malformed { field: "record kind" })?;
        let flags = reader.u8("record flags")?;
        let (no_hole, amended) = (flags & NO_HOLE != 0, flags & AMENDED != 0);
        if flags & !(NO_HOLE | AMENDED) != 0 || (amended && kind != RecordKind::Write) {
            return Err(Malformed { field: "record flags" });
        }
        reader.bytes(6, "record padding")?;
        let header = RecordHeader { epoch, seq, kind, no_hole, amended, offset, length, payload_length, payload_crc };
        header.check_shape()?;
        Ok(header)
    }

    fn check_shape(&self) -> Result<(), Malformed> {
        let has_range = self.length > 0;
        let payload = self.payload_length;
        let in_bounds = payload <= RECORD_PAYLOAD_BYTES_MAX && self.offset.checked_add(self.length).is_some();
        let fits = in_bounds
            && match self.kind {
                RecordKind::Write if self.amended => has_range && self.missing_blocks().is_some(),
                RecordKind::Write => has_range && u64::from(payload) == self.length,
                RecordKind::Trim | RecordKind::WriteZeroes => has_range && payload == 0,
                RecordKind::EpochStart | RecordKind::ViewChange | RecordKind::DirtyChange | RecordKind::Resize => {
                    !has_range && self.offset == 0 && payload > 0
                }
            };
        if fits && self.seq > Seq(0) { Ok(()) } else { Err(Malformed { field: "record shape" }) }
    }

    /// How many blocks an amended record has no bytes for, if its range and its payload fit each other.
    fn missing_blocks(&self) -> Option<u64> {
        let left_out = self.length.checked_sub(self.payload_length.into())?;
        let whole = self.range() == self.range().aligned(BLOCK_BYTES);
        let is_small = self.length <= RECORD_PAYLOAD_BYTES_MAX.into();
        let missing = left_out / (BLOCK_BYTES - MISSING_BYTES);
        (whole
            && is_small
            && left_out.is_multiple_of(BLOCK_BYTES - MISSING_BYTES)
            && missing <= self.length / BLOCK_BYTES)
            .then_some(missing)
    }

    /// Checks that the record stays within a volume of `size_bytes`.
    pub fn check_range(&self, size_bytes: u64) -> Result<(), RecordError> {
        if self.range().end() <= size_bytes {
            Ok(())
        } else {
            Err(RecordError::OutOfRange { offset: self.offset, length: self.length, size_bytes })
        }
    }

    /// What the record takes in an agent's journal at most, bytes: a group of records starts at a block, so that a
    /// record alone in its group costs whole blocks.
    #[must_use]
    pub fn journal_bytes_max(&self) -> u64 {
        (JOURNAL_RECORD_OVERHEAD_BYTES + u64::from(self.payload_length)).next_multiple_of(BLOCK_BYTES)
    }
}

/// What a journal adds to the payload of each record, bytes.
pub const JOURNAL_RECORD_OVERHEAD_BYTES: u64 = 80;

/// A record with its payload. Cloning shares the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The header.
    pub header: RecordHeader,
    /// The payload; empty for trims and zeroings.
    pub payload: Bytes,
}

impl Record {
    /// A record of `kind` that carries `payload`, with the checksum computed.
    #[must_use]
    pub fn new(position: Position, kind: RecordKind, range: ByteRange, payload: Bytes) -> Record {
        let payload_crc = crc32(&payload);
        Record::carrying(position, kind, range, payload, payload_crc)
    }

    /// A record of bytes that came with their checksum, which they are compared with wherever the record goes.
    #[must_use]
    pub fn carrying(
        position: Position,
        kind: RecordKind,
        range: ByteRange,
        payload: Bytes,
        payload_crc: u32,
    ) -> Record {
        let header = RecordHeader {
            epoch: position.epoch,
            seq: position.seq,
            kind,
            no_hole: false,
            amended: false,
            offset: range.offset,
            length: range.length,
            payload_length: payload.len() as u32,
            payload_crc,
        };
        Record { header, payload }
    }

    /// The place of the record.
    #[must_use]
    pub fn seq(&self) -> Seq {
        self.header.seq
    }

    /// Checks the payload against the header.
    pub fn check_payload(&self) -> Result<(), RecordError> {
        let sound = self.payload.len() == self.header.payload_length as usize
            && crc32(&self.payload) == self.header.payload_crc;
        if sound { Ok(()) } else { Err(RecordError::PayloadChecksum { seq: self.header.seq }) }
    }
}

/// Bytes that an amended record has for a block that is missing.
const MISSING_BYTES: u64 = 4;

/// The payload of an amended record: the bytes of the blocks that could be read, then for each of the others its number in
/// the range, as a `u32`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Amended {
    /// First bytes of blocks, and what they hold; `None` for one that nobody can read any more.
    pub blocks: Vec<(u64, Option<Bytes>)>,
}

impl Amended {
    /// The record with these blocks in the place of another, of which only the header is known.
    #[must_use]
    pub fn record(self, header: &RecordHeader) -> Record {
        let mut payload = BytesMut::with_capacity(header.length as usize);
        self.blocks.iter().filter_map(|(_, bytes)| bytes.as_ref()).for_each(|bytes| payload.put_slice(bytes));
        for (index, (_, bytes)) in (0..).zip(&self.blocks) {
            if bytes.is_none() {
                payload.put_u32_le(index);
            }
        }
        let mut record = Record::new(header.position(), header.kind, header.range(), payload.freeze());
        record.header.amended = true;
        record
    }

    /// What an amended record holds.
    pub fn of(record: &Record) -> Result<Amended, Malformed> {
        let malformed = Malformed { field: "amended record" };
        let (header, mut payload) = (&record.header, record.payload.clone());
        let missing = header.missing_blocks().filter(|_| payload.len() == header.payload_length as usize);
        let missing = missing.ok_or(malformed)?;
        let numbers = payload.split_off(payload.len() - (missing * MISSING_BYTES) as usize);
        let mut numbers = numbers.as_chunks().0.iter().map(|number| u32::from_le_bytes(*number)).peekable();
        let mut blocks = Vec::new();
        for (index, offset) in (0..).zip((header.offset..header.range().end()).step_by(BLOCK_BYTES as usize)) {
            let is_missing = numbers.next_if_eq(&index).is_some();
            if !is_missing && payload.is_empty() {
                return Err(malformed);
            }
            blocks.push((offset, (!is_missing).then(|| payload.split_to(BLOCK_BYTES as usize))));
        }
        if numbers.next().is_none() { Ok(Amended { blocks }) } else { Err(malformed) }
    }
}

/// The payload of a view change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ViewChange {
    /// The new view.
    pub view: View,
    /// The replica that leaves or joins.
    pub subject: ReplicaName,
    /// For a replica that leaves: it holds every record up to here for certain. One that returns with less has lost data.
    pub acknowledged: Seq,
    /// For a replica that leaves: the ranges that records after `acknowledged` changed, in units of
    /// [`crate::ranges::DIRTY_UNIT_BYTES`]. With every later change they are what it lacks.
    pub unacknowledged: Vec<ByteRange>,
    /// An operator gave up the subject: the view is in force as it stands, whatever the view before it would ask for.
    pub forced: bool,
}

/// Ranges that fit into a view change or a dirty change with a payload of `payload_bytes_max`, next to the largest view.
#[must_use]
pub fn ranges_max(payload_bytes_max: u32) -> usize {
    let names = (crate::REPLICAS_MAX + 1) * (ReplicaName::BYTES_MAX + 2) + 32;
    (payload_bytes_max as usize).saturating_sub(names) / cursor::RANGE_BYTES
}

impl ViewChange {
    /// The payload.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        cursor::put_view(&mut out, &self.view);
        cursor::put_text(&mut out, self.subject.as_str());
        out.put_u64_le(self.acknowledged.0);
        out.put_u8(u8::from(self.forced));
        cursor::put_ranges(&mut out, &self.unacknowledged);
        out.freeze()
    }

    /// Reads a payload.
    pub fn decode(payload: &[u8]) -> Result<ViewChange, Malformed> {
        let mut reader = Reader::new(payload);
        let change = ViewChange {
            view: reader.view("view change members")?,
            subject: reader.name("view change subject")?,
            acknowledged: Seq(reader.u64("view change seq")?),
            forced: reader.bool("view change flags")?,
            unacknowledged: reader.ranges("view change ranges")?,
        };
        reader.finish("view change")?;
        Ok(change)
    }
}

/// The payload of a dirty change: how a replica out of the view comes closer to the volume, as the members keep it. As it
/// is a record, every member comes to the same account, and the next engine goes on from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyChange {
    /// The replica.
    pub subject: ReplicaName,
    /// What is new.
    pub step: DirtyStep,
}

/// How far a resync is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DirtyStep {
    /// The replica gets every record after this one, and what it lacks up to here is to be copied: what was kept of it,
    /// and these ranges. All of the volume if nothing was kept.
    Follow {
        /// Ranges that it changed and the volume did not, in units of [`crate::ranges::DIRTY_UNIT_BYTES`].
        ranges: Vec<ByteRange>,
    },
    /// Everything that was to be copied below `until` is durable there, and so is every record up to `followed`.
    Copied {
        /// Byte of the volume, a multiple of [`crate::ranges::DIRTY_UNIT_BYTES`] or the end of the volume.
        until: u64,
        /// Last such record.
        followed: Seq,
    },
    /// It will not come back: nothing is kept of it any more.
    Forget,
}

impl DirtyChange {
    /// The payload.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        cursor::put_text(&mut out, self.subject.as_str());
        match &self.step {
            DirtyStep::Follow { ranges } => {
                out.put_u8(1);
                cursor::put_ranges(&mut out, ranges);
            }
            DirtyStep::Copied { until, followed } => {
                out.put_u8(2);
                out.put_u64_le(*until);
                out.put_u64_le(followed.0);
            }
            DirtyStep::Forget => out.put_u8(3),
        }
        out.freeze()
    }

    /// Reads a payload.
    pub fn decode(payload: &[u8]) -> Result<DirtyChange, Malformed> {
        let mut reader = Reader::new(payload);
        let subject = reader.name("dirty change subject")?;
        let step = match reader.u8("dirty change step")? {
            1 => DirtyStep::Follow { ranges: reader.ranges("dirty change ranges")? },
            2 => DirtyStep::Copied {
                until: reader.u64("dirty change offset")?,
                followed: Seq(reader.u64("dirty change seq")?),
            },
            3 => DirtyStep::Forget,
            0 | 4..=u8::MAX => return Err(Malformed { field: "dirty change step" }),
        };
        reader.finish("dirty change")?;
        Ok(DirtyChange { subject, step })
    }
}

/// The payload of a resize. Volumes only grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resize {
    /// The new size, bytes; a multiple of a block.
    pub size_bytes: u64,
}

impl Resize {
    /// The payload.
    #[must_use]
    pub fn encode(self) -> Bytes {
        Bytes::copy_from_slice(&self.size_bytes.to_le_bytes())
    }

    /// Reads a payload.
    pub fn decode(payload: &[u8]) -> Result<Resize, Malformed> {
        let mut reader = Reader::new(payload);
        let size_bytes = reader.u64("size")?;
        reader.finish("resize")?;
        if size_bytes.is_multiple_of(BLOCK_BYTES) {
            Ok(Resize { size_bytes })
        } else {
            Err(Malformed { field: "size" })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write() -> Record {
        let position = Position { epoch: Epoch(3), seq: Seq(7) };
        Record::new(position, RecordKind::Write, ByteRange { offset: 512, length: 5 }, Bytes::from_static(b"hello"))
    }

    fn amended(missing: &[u64], blocks: u64) -> Record {
        let block = |index: u64| {
            let bytes = Bytes::from(vec![index as u8; BLOCK_BYTES as usize]);
            ((index + 3) * BLOCK_BYTES, (!missing.contains(&index)).then_some(bytes))
        };
        let range = ByteRange { offset: 3 * BLOCK_BYTES, length: blocks * BLOCK_BYTES };
        let header = RecordHeader { offset: range.offset, length: range.length, ..write().header };
        Amended { blocks: (0..blocks).map(block).collect() }.record(&header)
    }

    #[test]
    fn an_amended_record_keeps_what_could_be_read_and_says_what_could_not() {
        for missing in [&[][..], &[0], &[4], &[1, 3], &[0, 1, 2, 3, 4]] {
            let record = amended(missing, 5);
            assert_eq!(RecordHeader::decode(&mut Reader::new(&encoded(&record.header))), Ok(record.header));
            let blocks = Amended::of(&record).unwrap().blocks;
            for (index, (offset, bytes)) in (0..).zip(&blocks) {
                assert_eq!(*offset, (index + 3) * BLOCK_BYTES);
                assert_eq!(bytes.is_none(), missing.contains(&index));
                assert!(bytes.iter().flatten().all(|byte| u64::from(*byte) == index));
            }
            assert_eq!((blocks.len(), record.check_payload()), (5, Ok(())));
        }
    }

    #[test]
    fn an_amended_record_whose_numbers_make_no_sense_is_refused() {
        for (at, number) in [(0, 3), (0, 5), (1, 1), (1, 9)] {
            let mut record = amended(&[1, 3], 5);
            let mut payload = record.payload.to_vec();
            let numbers = payload.len() - 8;
            payload[numbers + at * 4..][..4].copy_from_slice(&u32::to_le_bytes(number));
            record.payload = payload.into();
            assert!(Amended::of(&record).is_err(), "{at} {number}");
        }
        let mut record = amended(&[], 5);
        record.header.payload_length -= 4;
        assert!(RecordHeader::decode(&mut Reader::new(&encoded(&record.header))).is_err());
    }

    fn encoded(header: &RecordHeader) -> Vec<u8> {
        let mut out = Vec::new();
        header.encode(&mut out);
        out
    }

    #[test]
    fn a_header_survives_the_trip() {
        let header = write().header;
        let bytes = encoded(&header);
        assert_eq!(bytes.len(), RecordHeader::BYTES);
        assert_eq!(RecordHeader::decode(&mut Reader::new(&bytes)), Ok(header));
    }

    #[test]
    fn headers_whose_fields_contradict_are_refused() {
        type Break = fn(&mut RecordHeader);
        let broken: [Break; 5] = [
            |h| h.length = 6,
            |h| h.kind = RecordKind::Trim,
            |h| h.seq = Seq(0),
            |h| h.offset = u64::MAX,
            |h| h.kind = RecordKind::EpochStart,
        ];
        for (i, change) in broken.into_iter().enumerate() {
            let mut header = write().header;
            change(&mut header);
            assert!(RecordHeader::decode(&mut Reader::new(&encoded(&header))).is_err(), "case {i}");
        }
    }

    #[test]
    fn a_changed_payload_is_noticed() {
        let mut record = write();
        assert_eq!(record.check_payload(), Ok(()));
        record.payload = Bytes::from_static(b"hellO");
        assert!(record.check_payload().is_err());
    }

    #[test]
    fn a_view_change_survives_the_trip_and_lies_about_its_length_are_refused() {
        let name = |n: &str| n.parse::<ReplicaName>().unwrap();
        let change = ViewChange {
            view: View::new(vec![name("a"), name("c")]).unwrap(),
            subject: name("b"),
            acknowledged: Seq(8),
            unacknowledged: vec![ByteRange { offset: 0, length: 65536 }],
            forced: true,
        };
        let payload = change.encode();
        assert_eq!(ViewChange::decode(&payload), Ok(change));
        assert!(ViewChange::decode(&payload[..payload.len() - 1]).is_err());
        let mut huge = payload.to_vec();
        let at = payload.len() - 20;
        huge[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(ViewChange::decode(&huge).is_err());
    }

    #[test]
    fn dirty_changes_and_resizes_survive_the_trip() {
        let ranges = vec![ByteRange { offset: 65536, length: 65536 }, ByteRange { offset: 1 << 40, length: 1 }];
        let steps = [
            DirtyStep::Follow { ranges },
            DirtyStep::Follow { ranges: vec![] },
            DirtyStep::Copied { until: 1 << 30, followed: Seq(7) },
            DirtyStep::Forget,
        ];
        for step in steps {
            let change = DirtyChange { subject: "b".parse().unwrap(), step };
            let payload = change.encode();
            assert_eq!(DirtyChange::decode(&payload), Ok(change));
            assert!(DirtyChange::decode(&payload[..payload.len() - 1]).is_err());
        }
        let resize = Resize { size_bytes: 1 << 40 };
        assert_eq!(Resize::decode(&resize.encode()), Ok(resize));
        assert!(Resize::decode(&Resize { size_bytes: 4095 }.encode()).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = ViewChange::decode(&bytes);
            let _ = DirtyChange::decode(&bytes);
            let _ = RecordHeader::decode(&mut Reader::new(&bytes));
        }
    }
}
