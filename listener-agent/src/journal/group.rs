//! Records of the journal in bytes: encoding a group, decoding it. Of an *intent* the journal has no payload, only the
//! checksums of the blocks that it writes.

use bytes::{BufMut, Bytes};
use protocol::checksum::{crc32, crc32_salted};
use protocol::cursor::Reader;
use protocol::record::{JOURNAL_RECORD_OVERHEAD_BYTES, RecordError};
use protocol::{BLOCK_BYTES, Record, RecordHeader, RecordKind, Seq, VolumeUuid};

use crate::chain;
use crate::disk::aligned::AlignedBuffer;
use crate::image::CHECKSUM_BYTES;

/// Bytes before the payload of each record.
pub const ENTRY_HEADER_BYTES: usize = JOURNAL_RECORD_OVERHEAD_BYTES as usize;

const MAGIC: u32 = u32::from_le_bytes(*b"NBJR");
const _: () = assert!(ENTRY_HEADER_BYTES == 32 + RecordHeader::BYTES);

/// What the checksums of a journal's records start from. A payload may hold anything, the journal of another volume
/// among it (a volume that lies on a volume): only records of this one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Salt(u32);

impl Salt {
    /// The salt of a volume's journals.
    #[must_use]
    pub fn of(uuid: VolumeUuid) -> Salt {
        Salt(crc32(&uuid.0))
    }

    /// CRC-32 of bytes that belong to the volume.
    #[must_use]
    pub fn checksum(self, bytes: &[u8]) -> u32 {
        crc32_salted(self.0, bytes)
    }
}

/// What lies behind the header of a journaled record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// The payload.
    Payload,
    /// The stored checksums of the blocks that it writes, four bytes each; this is the CRC-32 of them.
    Intent {
        /// CRC-32 of the checksums.
        crc: u32,
    },
}

/// Says in the header of a record that it is an intent; the upper half of the field is the CRC-32 of its checksums.
const INTENT: u32 = 1;

impl Body {
    fn encode(self) -> u64 {
        match self {
            Body::Payload => 0,
            Body::Intent { crc } => u64::from(crc) << 32 | u64::from(INTENT),
        }
    }

    /// `None` if no record says so.
    fn decode(field: u64, record: &RecordHeader) -> Option<Body> {
        let may_be_intent = record.kind == RecordKind::Write && record.range() == record.range().aligned(BLOCK_BYTES);
        match field as u32 {
            0 if field == 0 => Some(Body::Payload),
            INTENT if may_be_intent => Some(Body::Intent { crc: (field >> 32) as u32 }),
            _ => None,
        }
    }
}

/// Bytes of the checksums in an intent.
fn intent_bytes(payload_bytes: u64) -> u64 {
    payload_bytes / BLOCK_BYTES * CHECKSUM_BYTES
}

/// A record as the journal has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The record. That of an intent has no payload, whatever its header says.
    pub record: Record,
    /// For an intent: the stored checksums of its blocks.
    pub intent: Option<Vec<u32>>,
}

/// The header of a journaled record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryHeader {
    /// The opening of the replica in which it was written.
    pub generation: u64,
    /// The first record of its group: all before that were durable when the group was written.
    pub group_first: Seq,
    /// What lies behind it.
    pub body: Body,
    /// The record's own header.
    pub record: RecordHeader,
}

impl EntryHeader {
    /// Reads a header; `None` if the bytes are no sound one.
    #[must_use]
    pub fn decode(salt: Salt, bytes: &[u8]) -> Option<EntryHeader> {
        let mut r = Reader::new(bytes.get(..ENTRY_HEADER_BYTES)?);
        let magic = r.u32("magic").ok()?;
        let crc = r.u32("crc").ok()?;
        if magic != MAGIC || crc != salt.checksum(&bytes[8..ENTRY_HEADER_BYTES]) {
            return None;
        }
        let generation = r.u64("generation").ok()?;
        let group_first = Seq(r.u64("group first").ok()?);
        let body = r.u64("body").ok()?;
        let record = RecordHeader::decode(&mut r).ok()?;
        Some(EntryHeader { generation, group_first, body: Body::decode(body, &record)?, record })
    }

    /// Bytes behind the header.
    #[must_use]
    pub fn body_bytes(&self) -> u64 {
        let payload = u64::from(self.record.payload_length);
        match self.body {
            Body::Payload => payload,
            Body::Intent { .. } => intent_bytes(payload),
        }
    }

    /// Bytes of the record in the journal, header included.
    #[must_use]
    pub fn entry_bytes(&self) -> u64 {
        ENTRY_HEADER_BYTES as u64 + self.body_bytes()
    }

    /// The record with what lies behind its header, if these bytes are what was written there.
    #[must_use]
    pub fn with_body(&self, bytes: Bytes) -> Option<Entry> {
        let header = self.record;
        match self.body {
            Body::Payload => (crc32(&bytes) == header.payload_crc)
                .then_some(Entry { record: Record { header, payload: bytes }, intent: None }),
            Body::Intent { crc } => (crc32(&bytes) == crc).then(|| {
                let checksums = bytes.as_chunks().0.iter().map(|c| u32::from_le_bytes(*c)).collect();
                Entry { record: Record { header, payload: Bytes::new() }, intent: Some(checksums) }
            }),
        }
    }
}

/// Bytes that a record takes in a group; as an intent if it is one.
#[must_use]
pub fn entry_bytes(record: &Record, is_intent: bool) -> u64 {
    let payload = record.payload.len() as u64;
    ENTRY_HEADER_BYTES as u64 + if is_intent { intent_bytes(payload) } else { payload }
}

/// Bytes that a group of these records takes, of which those named are intents.
#[must_use]
pub fn group_bytes<'a>(records: impl IntoIterator<Item = &'a Record>, intents: &[Seq]) -> u64 {
    let packed: u64 = records.into_iter().map(|r| entry_bytes(r, intents.contains(&r.seq()))).sum();
    packed.next_multiple_of(BLOCK_BYTES)
}

/// Encodes a group. See [`encode_into`].
///
/// # Panics
/// If there are no records.
pub fn encode(salt: Salt, generation: u64, records: &[Record]) -> Result<AlignedBuffer, RecordError> {
    let mut out = AlignedBuffer::with_capacity(0);
    encode_into(salt, generation, records, &[], &mut out)?;
    Ok(out)
}

/// Encodes a group, of which the records named are intents, into a buffer that may be used again. Gives the stored checksums
/// of the blocks of each intent. It is an error if the bytes that came to lie in the buffer are not those that the records'
/// checksums are of: they would be taken for a torn write when they are needed.
///
/// # Panics
/// If there are no records.
pub fn encode_into(
    salt: Salt,
    generation: u64,
    records: &[Record],
    intents: &[Seq],
    out: &mut AlignedBuffer,
) -> Result<Vec<Vec<u32>>, RecordError> {
    out.reset(group_bytes(records, intents) as usize);
    let group_first = records[0].seq();
    let mut checksums = Vec::with_capacity(intents.len());
    for record in records {
        let changed = RecordError::PayloadChecksum { seq: record.seq() };
        let blocks = if intents.contains(&record.seq()) {
            let stored = chain::whole_blocks(record.header.offset, &record.payload, record.header.payload_crc);
            Some(stored.ok_or(changed)?)
        } else {
            None
        };
        let bytes: Option<Vec<u8>> =
            blocks.as_ref().map(|blocks| blocks.iter().flat_map(|checksum| checksum.to_le_bytes()).collect());
        let body = bytes.as_ref().map_or(Body::Payload, |bytes| Body::Intent { crc: crc32(bytes) });
        let mut fields = Vec::with_capacity(ENTRY_HEADER_BYTES);
        fields.put_u64_le(generation);
        fields.put_u64_le(group_first.0);
        fields.put_u64_le(body.encode());
        record.header.encode(&mut fields);
        out.put(&MAGIC.to_le_bytes());
        out.put(&salt.checksum(&fields).to_le_bytes());
        out.put(&fields);
        let body_at = out.len();
        out.put(bytes.as_deref().unwrap_or(&record.payload));
        if blocks.is_none() && crc32(&out.as_slice()[body_at..]) != record.header.payload_crc {
            return Err(changed);
        }
        checksums.extend(blocks);
    }
    out.pad_to_block();
    Ok(checksums)
}

/// Decodes the records of one group, as long as they are sound and in order.
#[must_use]
pub fn decode(salt: Salt, bytes: &Bytes) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut at = 0;
    while let Some(header) = bytes.get(at..).and_then(|rest| EntryHeader::decode(salt, rest)) {
        let start = at + ENTRY_HEADER_BYTES;
        let end = start + header.body_bytes() as usize;
        if end > bytes.len() {
            break;
        }
        let Some(entry) = header.with_body(bytes.slice(start..end)) else { break };
        if entries.last().is_some_and(|last| last.record.seq().next() != entry.record.seq()) {
            break;
        }
        entries.push(entry);
        at = end;
    }
    entries
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use protocol::ranges::ByteRange;
    use protocol::{Epoch, Position, RecordKind};

    pub(crate) fn write(seq: u64, length: usize) -> Record {
        let position = Position { epoch: Epoch(1), seq: Seq(seq) };
        let range = ByteRange { offset: 0, length: length as u64 };
        Record::new(position, RecordKind::Write, range, vec![seq as u8; length].into())
    }

    pub(crate) const SALT: Salt = Salt(7);

    #[test]
    fn a_record_of_another_volumes_journal_is_none() {
        let bytes = Bytes::copy_from_slice(encode(SALT, 1, &[write(1, 100)]).unwrap().as_slice());
        assert_eq!(decode(Salt(8), &bytes), []);
    }

    #[test]
    fn a_group_comes_back_as_it_was() {
        let records = [write(1, 100), write(2, 4096), write(3, 1)];
        let bytes = encode(SALT, 1, &records).unwrap();
        assert_eq!(bytes.len() as u64, group_bytes(&records, &[]));
        assert_eq!(records_of(&Bytes::copy_from_slice(bytes.as_slice())), records);
    }

    fn records_of(bytes: &Bytes) -> Vec<Record> {
        decode(SALT, bytes).into_iter().map(|entry| entry.record).collect()
    }

    #[test]
    fn an_intent_has_the_checksums_of_its_blocks_and_no_payload() {
        let records = [write(1, 100), write(2, 8192), write(3, 1)];
        let mut out = AlignedBuffer::with_capacity(0);
        let checksums = encode_into(SALT, 1, &records, &[Seq(2)], &mut out).unwrap();
        let of_block = protocol::checksum::stored_block_checksum(&[2; 4096]);
        assert_eq!(checksums, [vec![of_block; 2]]);
        assert_eq!(out.len() as u64, group_bytes(&records, &[Seq(2)]));
        let bytes = out.as_slice().to_vec();
        let found = decode(SALT, &bytes.clone().into());
        assert_eq!(
            found.iter().map(|entry| entry.record.header).collect::<Vec<_>>(),
            records.each_ref().map(|r| r.header)
        );
        assert_eq!((&found[1].intent, found[1].record.payload.len()), (&Some(vec![of_block; 2]), 0));
        assert_eq!((&found[2].intent, &found[2].record), (&None, &records[2]));
        // A damaged checksum ends the log there.
        let mut damaged = bytes;
        damaged[2 * ENTRY_HEADER_BYTES + 100 + 3] ^= 1;
        assert_eq!(decode(SALT, &damaged.into()).len(), 1);
    }

    #[test]
    fn only_whole_blocks_of_a_write_are_an_intent() {
        let header = |seq, length| write(seq, length).header;
        let intent = u64::from(INTENT) | 7 << 32;
        assert_eq!(Body::decode(intent, &header(1, 4096)), Some(Body::Intent { crc: 7 }));
        assert_eq!(Body::decode(intent, &header(1, 4095)), None);
        assert_eq!(Body::decode(7 << 32, &header(1, 4096)), None);
        assert_eq!(Body::decode(2, &header(1, 4096)), None);
        let trim = RecordHeader { kind: RecordKind::Trim, payload_length: 0, ..header(1, 4096) };
        assert_eq!(Body::decode(intent, &trim), None);
    }

    #[test]
    fn a_damaged_record_ends_the_group() {
        let records = [write(1, 100), write(2, 4096), write(3, 1)];
        let mut bytes = encode(SALT, 1, &records).unwrap().as_slice().to_vec();
        bytes[100 + 2 * ENTRY_HEADER_BYTES + 50] ^= 1;
        assert_eq!(records_of(&bytes.into()), records[..1]);
    }

    #[test]
    fn a_payload_that_changed_in_memory_is_not_journaled() {
        let mut records = [write(1, 100), write(2, 4096)];
        let mut changed = records[1].payload.to_vec();
        changed[4095] ^= 1;
        records[1].payload = changed.into();
        assert_eq!(encode(SALT, 1, &records).unwrap_err(), RecordError::PayloadChecksum { seq: Seq(2) });
    }
}
