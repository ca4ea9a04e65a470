//! Records of the journal in bytes: encoding a group, decoding one record.

use bytes::{BufMut, Bytes};
use protocol::checksum::{crc32, crc32_salted};
use protocol::cursor::Reader;
use protocol::record::{JOURNAL_RECORD_OVERHEAD_BYTES, RecordError};
use protocol::{BLOCK_BYTES, Record, RecordHeader, Seq, VolumeUuid};

use crate::disk::aligned::AlignedBuffer;

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

/// The header of a journaled record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryHeader {
    /// The opening of the replica in which it was written.
    pub generation: u64,
    /// The first record of its group: all before that were durable when the group was written.
    pub group_first: Seq,
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
        r.u64("reserved").ok()?;
        Some(EntryHeader { generation, group_first, record: RecordHeader::decode(&mut r).ok()? })
    }

    /// Bytes of the record in the journal, header included.
    #[must_use]
    pub fn entry_bytes(&self) -> u64 {
        ENTRY_HEADER_BYTES as u64 + u64::from(self.record.payload_length)
    }
}

/// Bytes that a group of these records takes.
#[must_use]
pub fn group_bytes<'a>(records: impl IntoIterator<Item = &'a Record>) -> u64 {
    let packed: u64 = records.into_iter().map(|r| (ENTRY_HEADER_BYTES + r.payload.len()) as u64).sum();
    packed.next_multiple_of(BLOCK_BYTES)
}

/// Encodes a group. See [`encode_into`].
///
/// # Panics
/// If there are no records.
pub fn encode(salt: Salt, generation: u64, records: &[Record]) -> Result<AlignedBuffer, RecordError> {
    let mut out = AlignedBuffer::with_capacity(0);
    encode_into(salt, generation, records, &mut out)?;
    Ok(out)
}

/// Encodes a group into a buffer that may be used again. It is an error if the bytes that came to lie in the buffer are not
/// those that the records' checksums are of: they would be taken for a torn write when they are needed.
///
/// # Panics
/// If there are no records.
pub fn encode_into(
    salt: Salt,
    generation: u64,
    records: &[Record],
    out: &mut AlignedBuffer,
) -> Result<(), RecordError> {
    out.reset(group_bytes(records) as usize);
    let group_first = records[0].seq();
    for record in records {
        let mut fields = Vec::with_capacity(ENTRY_HEADER_BYTES);
        fields.put_u64_le(generation);
        fields.put_u64_le(group_first.0);
        fields.put_u64_le(0);
        record.header.encode(&mut fields);
        out.put(&MAGIC.to_le_bytes());
        out.put(&salt.checksum(&fields).to_le_bytes());
        out.put(&fields);
        let payload_at = out.len();
        out.put(&record.payload);
        if crc32(&out.as_slice()[payload_at..]) != record.header.payload_crc {
            return Err(RecordError::PayloadChecksum { seq: record.seq() });
        }
    }
    out.pad_to_block();
    Ok(())
}

/// Decodes the records of one group, as long as they are sound and in order.
#[must_use]
pub fn decode(salt: Salt, bytes: &Bytes) -> Vec<Record> {
    let mut records: Vec<Record> = Vec::new();
    let mut at = 0;
    while let Some(entry) = bytes.get(at..).and_then(|rest| EntryHeader::decode(salt, rest)) {
        let start = at + ENTRY_HEADER_BYTES;
        let end = start + entry.record.payload_length as usize;
        if end > bytes.len() {
            break;
        }
        let record = Record { header: entry.record, payload: bytes.slice(start..end) };
        let follows = records.last().is_none_or(|last| last.seq().next() == record.seq());
        if !follows || record.check_payload().is_err() {
            break;
        }
        records.push(record);
        at = end;
    }
    records
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
        assert_eq!(bytes.len() as u64, group_bytes(&records));
        assert_eq!(decode(SALT, &Bytes::copy_from_slice(bytes.as_slice())), records);
    }

    #[test]
    fn a_damaged_record_ends_the_group() {
        let records = [write(1, 100), write(2, 4096), write(3, 1)];
        let mut bytes = encode(SALT, 1, &records).unwrap().as_slice().to_vec();
        bytes[100 + 2 * ENTRY_HEADER_BYTES + 50] ^= 1;
        assert_eq!(decode(SALT, &bytes.into()), records[..1]);
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
