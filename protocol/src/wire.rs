//! Frames: how messages travel over a byte stream. Each frame is a prefix of fixed size, a body of fields, and bulk data:
//!
//! ```text
//! 0   u32  magic "NBCF"          16  u32  CRC-32 of bytes 0..16 and the body
//! 4   u16  version               20  u32  reserved, zero
//! 6   u8   message number        24       body, then bulk data
//! 7   u8   reserved, zero
//! 8   u32  bytes of body (at most 32 KiB)
//! 12  u32  bytes of bulk data (at most 1 MiB)
//! ```
//!
//! Bulk data (payload of a record, bytes of a read) is not covered by the frame's checksum: the body carries its own, end
//! to end. All numbers are little-endian.

use bytes::{BufMut, Bytes, BytesMut};

use crate::RECORD_PAYLOAD_BYTES_MAX;
use crate::checksum::crc32_of_two;
use crate::cursor::{Malformed, Reader};
use crate::message::{ToAgent, ToEngine};

/// Version of the frames and messages.
pub const VERSION: u16 = 1;
/// Bytes of a frame's prefix.
pub const PREFIX_BYTES: usize = 24;

const MAGIC: u32 = u32::from_le_bytes(*b"NBCF");
const BODY_BYTES_MAX: u32 = 32 * 1024;
const CHECKED_PREFIX_BYTES: usize = 16;

/// Why a frame is refused. The stream is out of step after any of these and must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not a frame at all.
    #[error("the other side does not speak the nbdcast protocol")]
    Magic,
    /// Another version.
    #[error("the other side speaks protocol version {theirs}, this side {VERSION}: run the same release on both")]
    Version {
        /// The version in the frame.
        theirs: u16,
    },
    /// Longer than any frame may be.
    #[error("a frame of {body}+{bulk} bytes is longer than the protocol allows")]
    Length {
        /// Bytes of body.
        body: u32,
        /// Bytes of bulk data.
        bulk: u32,
    },
    /// The checksum does not match.
    #[error("a frame was damaged on the way (checksum mismatch)")]
    Checksum,
    /// A field makes no sense.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// A frame's prefix, checked for what can be checked before the body is there.
#[derive(Clone, Copy, Debug)]
pub struct Prefix {
    number: u8,
    body_bytes: u32,
    bulk_bytes: u32,
    crc: u32,
    checked: [u8; CHECKED_PREFIX_BYTES],
}

impl Prefix {
    /// Reads the prefix.
    pub fn decode(bytes: &[u8; PREFIX_BYTES]) -> Result<Prefix, WireError> {
        let mut r = Reader::new(bytes);
        if r.u32("magic")? != MAGIC {
            return Err(WireError::Magic);
        }
        let version = r.u16("version")?;
        if version != VERSION {
            return Err(WireError::Version { theirs: version });
        }
        let number = r.u8("message number")?;
        r.u8("reserved")?;
        let (body, bulk) = (r.u32("body length")?, r.u32("bulk length")?);
        if body > BODY_BYTES_MAX || bulk > RECORD_PAYLOAD_BYTES_MAX {
            return Err(WireError::Length { body, bulk });
        }
        let crc = r.u32("checksum")?;
        let mut checked = [0; CHECKED_PREFIX_BYTES];
        checked.copy_from_slice(&bytes[..CHECKED_PREFIX_BYTES]);
        Ok(Prefix { number, body_bytes: body, bulk_bytes: bulk, crc, checked })
    }

    /// Bytes that follow the prefix: at most 1 MiB + 32 KiB.
    #[must_use]
    pub fn rest_bytes(&self) -> usize {
        self.body_bytes as usize + self.bulk_bytes as usize
    }

    fn split(&self, mut rest: Bytes) -> Result<(Bytes, Bytes), WireError> {
        if rest.len() != self.rest_bytes() {
            return Err(WireError::Malformed(Malformed { field: "frame length" }));
        }
        let body = rest.split_to(self.body_bytes as usize);
        if crc32_of_two(&self.checked, &body) != self.crc {
            return Err(WireError::Checksum);
        }
        Ok((body, rest))
    }

    /// Reads the message to an agent from what followed the prefix.
    pub fn to_agent(&self, rest: Bytes) -> Result<ToAgent, WireError> {
        let (body, bulk) = self.split(rest)?;
        Ok(ToAgent::decode(self.number, &body, bulk)?)
    }

    /// Reads the message to an engine from what followed the prefix.
    pub fn to_engine(&self, rest: Bytes) -> Result<ToEngine, WireError> {
        let (body, bulk) = self.split(rest)?;
        Ok(ToEngine::decode(self.number, &body, bulk)?)
    }
}

/// A message in bytes: write `head`, then `bulk`.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Prefix and body.
    pub head: Bytes,
    /// Bulk data, shared with the record or read that it came from.
    pub bulk: Bytes,
}

/// Frames a message to an agent.
#[must_use]
pub fn frame_to_agent(message: &ToAgent) -> Frame {
    frame(message.number(), |out| message.encode_body(out))
}

/// Frames a message to an engine.
#[must_use]
pub fn frame_to_engine(message: &ToEngine) -> Frame {
    frame(message.number(), |out| message.encode_body(out))
}

fn frame(number: u8, encode_body: impl FnOnce(&mut BytesMut) -> Bytes) -> Frame {
    let mut out = BytesMut::with_capacity(128);
    out.put_bytes(0, PREFIX_BYTES);
    let bulk = encode_body(&mut out);
    let body_bytes = (out.len() - PREFIX_BYTES) as u32;
    assert!(body_bytes <= BODY_BYTES_MAX && bulk.len() <= RECORD_PAYLOAD_BYTES_MAX as usize, "frame too long");
    let mut prefix = Vec::with_capacity(PREFIX_BYTES);
    prefix.put_u32_le(MAGIC);
    prefix.put_u16_le(VERSION);
    prefix.put_u8(number);
    prefix.put_u8(0);
    prefix.put_u32_le(body_bytes);
    prefix.put_u32_le(bulk.len() as u32);
    let crc = crc32_of_two(&prefix, &out[PREFIX_BYTES..]);
    prefix.put_u32_le(crc);
    prefix.put_u32_le(0);
    out[..PREFIX_BYTES].copy_from_slice(&prefix);
    Frame { head: out.freeze(), bulk }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::REPLICAS_MAX;
    use crate::checksum::crc32;
    use crate::extents::{Allocation, EXTENTS_MAX, Extent};
    use crate::message::{
        Begin, Condition, Copy, Dirty, FetchKind, Hello, Promised, ReadKind, ReadOutcome, Refused, RefusedReason,
        UNSETTLED_MAX, Welcome,
    };
    use crate::position::{Epoch, EpochHistory, Position, Seq};
    use crate::quorum::{AckPolicies, AckPolicy};
    use crate::ranges::ByteRange;
    use crate::record::{Record, RecordKind};
    use crate::scrub::BlockFound;
    use crate::view::{ReplicaName, View, ViewState, VolumeUuid};

    fn prefix_and_rest(frame: &Frame) -> ([u8; PREFIX_BYTES], Bytes) {
        let all = [&frame.head[..], &frame.bulk[..]].concat();
        (all[..PREFIX_BYTES].try_into().unwrap(), Bytes::copy_from_slice(&all[PREFIX_BYTES..]))
    }

    fn record() -> Record {
        let position = Position { epoch: Epoch(2), seq: Seq(9) };
        Record::new(position, RecordKind::Write, ByteRange { offset: 4096, length: 3 }, Bytes::from_static(b"abc"))
    }

    fn view() -> View {
        View::new(vec!["a".parse().unwrap(), "b".parse().unwrap()]).unwrap()
    }

    fn messages_to_agent() -> Vec<ToAgent> {
        let hello = Hello { volume: "v".parse().unwrap(), replica: "a".parse().unwrap(), engine: [7; 16] };
        let format = crate::message::Format {
            volume: "v".parse().unwrap(),
            replica: "a".parse().unwrap(),
            uuid: VolumeUuid([1; 16]),
            size_bytes: 1 << 30,
            journal_bytes: 1 << 20,
            view: view(),
            syncing: true,
        };
        let begin = Begin {
            position: Position { epoch: Epoch(2), seq: Seq(9) },
            size_bytes: 1 << 30,
            views: ViewState::initial(view()),
            history: EpochHistory::default(),
            acks: AckPolicies { write: AckPolicy::First, flush: AckPolicy::All },
            tracked: vec![("c".parse().unwrap(), Seq(4))],
        };
        let range = ByteRange { offset: 4096, length: 8192 };
        vec![
            ToAgent::Hello(hello),
            ToAgent::Format(format),
            ToAgent::Promise { epoch: Epoch(4), engine: [9; 16], lease_ms: 3000 },
            ToAgent::Append(record()),
            ToAgent::Stable { seq: Seq(3) },
            ToAgent::Ping { token: 5 },
            ToAgent::Read { id: 1, what: ReadKind::Data, offset: 2, length: 3 },
            ToAgent::Read { id: 1, what: ReadKind::Extents, offset: 2, length: 1 << 36 },
            ToAgent::Read { id: 1, what: ReadKind::Prefetch, offset: 2, length: 3 },
            ToAgent::Read { id: 1, what: ReadKind::Scrub, offset: 4096, length: 8192 },
            ToAgent::Fetch { from: Seq(1), to: Seq(2), what: FetchKind::Records },
            ToAgent::Fetch { from: Seq(1), to: Seq(2), what: FetchKind::Ranges },
            ToAgent::Goodbye,
            ToAgent::Begin(begin),
            ToAgent::Copy(Copy { id: 3, range, data: vec![7; 8192].into(), crc: crc32(&[7; 8192]) }),
            ToAgent::Copy(Copy { id: 4, range, data: Bytes::new(), crc: 0 }),
            ToAgent::Synced,
            ToAgent::ListDirty { subject: "b".parse().unwrap(), from: 65536 },
            ToAgent::Extend { size_bytes: 1 << 31 },
        ]
    }

    fn messages_to_engine() -> Vec<ToEngine> {
        let mut history = EpochHistory::default();
        history.note(Position { epoch: Epoch(2), seq: Seq(1) });
        let promised = Promised {
            epoch: Epoch(4),
            position: Position { epoch: Epoch(2), seq: Seq(9) },
            size_bytes: 1 << 30,
            views: ViewState::initial(view()),
            history,
            acks: None,
            syncing: false,
            journal_first: Seq(3),
            stable: Seq(2),
            tracked: vec![("b".parse().unwrap(), Seq(1))],
            lease_remaining_ms: 10,
            unsettled: vec![ByteRange { offset: 8192, length: 4096 }],
        };
        let dirty = Dirty {
            subject: "b".parse().unwrap(),
            from: 0,
            next: 1 << 20,
            ranges: vec![ByteRange { offset: 0, length: 65536 }],
            remaining_bytes: 65536,
        };
        let welcome = Welcome {
            uuid: VolumeUuid([1; 16]),
            size_bytes: 1 << 30,
            journal_bytes: 1 << 20,
            record_payload_bytes_max: 1 << 17,
            promised: Epoch(3),
            other_engine_ms_ago: Some(12),
        };
        let data = Bytes::from_static(b"xyz");
        let read = |outcome| ToEngine::ReadDone { id: 1, applied: Seq(8), outcome };
        let refused = |reason| ToEngine::Refused(Refused { reason, text: "why".into() });
        vec![
            ToEngine::Welcome(welcome.clone()),
            ToEngine::Welcome(Welcome { other_engine_ms_ago: None, ..welcome }),
            ToEngine::Formatted,
            ToEngine::Promised(promised),
            ToEngine::Durable { seq: Seq(9) },
            ToEngine::Pong { token: 4 },
            read(ReadOutcome::Data { crc: crc32(&data), data }),
            read(ReadOutcome::ChecksumMismatch { offset: 4096 }),
            read(ReadOutcome::Failed),
            read(ReadOutcome::Cancelled),
            read(ReadOutcome::Unreadable { offset: 4096 }),
            read(ReadOutcome::Extents(vec![Extent { length: 4096, allocation: Allocation::Zeroes }; EXTENTS_MAX])),
            read(ReadOutcome::Prefetched),
            read(ReadOutcome::Damaged),
            read(ReadOutcome::Scrubbed(vec![BlockFound::Sound { checksum: 7 }, BlockFound::Mismatch])),
            ToEngine::Fetched(record()),
            ToEngine::Changed { seq: Seq(2), range: ByteRange { offset: 4096, length: 512 } },
            ToEngine::FetchEnd { next: Seq(2) },
            ToEngine::Condition(Condition::Healthy),
            ToEngine::Condition(Condition::NoSpace),
            ToEngine::Condition(Condition::Poisoned),
            refused(RefusedReason::Fenced { promised: Epoch(8) }),
            refused(RefusedReason::NoReplica),
            refused(RefusedReason::HasData),
            refused(RefusedReason::Unusable),
            refused(RefusedReason::Protocol),
            ToEngine::Begun,
            ToEngine::Copied { id: 7 },
            ToEngine::InSync,
            ToEngine::Dirty(dirty),
            ToEngine::Extended { size_bytes: 1 << 31, refused: "no room".into() },
        ]
    }

    #[test]
    fn the_longest_answer_to_a_promise_fits_into_a_frame() {
        let name = |index: usize| format!("{index:0>64}").parse::<ReplicaName>().unwrap();
        let names: Vec<ReplicaName> = (0..REPLICAS_MAX).map(name).collect();
        let mut history = EpochHistory::default();
        (1..=2 * EpochHistory::ENTRIES_MAX as u64)
            .for_each(|n| history.note(Position { epoch: Epoch(n), seq: Seq(n) }));
        let promised = Promised {
            epoch: Epoch(4),
            position: Position { epoch: Epoch(4), seq: Seq(9) },
            size_bytes: 1 << 30,
            views: ViewState::initial(View::new(names.clone()).unwrap()),
            history,
            acks: None,
            syncing: false,
            journal_first: Seq(3),
            stable: Seq(2),
            tracked: names.into_iter().map(|name| (name, Seq(1))).collect(),
            lease_remaining_ms: 10,
            unsettled: vec![ByteRange { offset: 8192, length: 4096 }; UNSETTLED_MAX],
        };
        let message = ToEngine::Promised(promised);
        let (prefix, rest) = prefix_and_rest(&frame_to_engine(&message));
        assert!(rest.len() > 24 * 1024, "{} bytes are not the longest", rest.len());
        assert_eq!(Prefix::decode(&prefix).unwrap().to_engine(rest), Ok(message));
    }

    #[test]
    fn every_message_survives_the_trip() {
        for message in messages_to_agent() {
            let (prefix, rest) = prefix_and_rest(&frame_to_agent(&message));
            assert_eq!(Prefix::decode(&prefix).unwrap().to_agent(rest), Ok(message));
        }
        for message in messages_to_engine() {
            let (prefix, rest) = prefix_and_rest(&frame_to_engine(&message));
            assert_eq!(Prefix::decode(&prefix).unwrap().to_engine(rest), Ok(message));
        }
    }

    #[test]
    fn any_changed_bit_of_prefix_or_body_is_noticed() {
        let (prefix, rest) = prefix_and_rest(&frame_to_agent(&ToAgent::Append(record())));
        let body_bits = RecordHeaderBits::COUNT;
        for bit in 0..PREFIX_BYTES * 8 {
            let mut broken = prefix;
            broken[bit / 8] ^= 1 << (bit % 8);
            let reserved_tail = bit >= 20 * 8;
            let outcome = Prefix::decode(&broken).and_then(|p| p.to_agent(rest.clone()));
            assert!(outcome.is_err() || reserved_tail, "bit {bit} of the prefix");
        }
        for bit in 0..body_bits {
            let mut broken = rest.to_vec();
            broken[bit / 8] ^= 1 << (bit % 8);
            let outcome = Prefix::decode(&prefix).unwrap().to_agent(broken.into());
            assert_eq!(outcome, Err(WireError::Checksum), "bit {bit} of the body");
        }
    }

    #[test]
    fn any_changed_bit_of_any_message_is_noticed() {
        let to_agent = messages_to_agent().into_iter().map(|m| (frame_to_agent(&m), true));
        let to_engine = messages_to_engine().into_iter().map(|m| (frame_to_engine(&m), false));
        for (frame, is_to_agent) in to_agent.chain(to_engine) {
            // The end of the prefix means nothing, and a long body is as good as a short one.
            let checked = (0..PREFIX_BYTES - 4).chain(PREFIX_BYTES..frame.head.len().min(PREFIX_BYTES + 400));
            for bit in checked.flat_map(|byte| byte * 8..byte * 8 + 8) {
                let mut broken = [&frame.head[..], &frame.bulk[..]].concat();
                broken[bit / 8] ^= 1 << (bit % 8);
                let (prefix, rest) = broken.split_first_chunk().unwrap();
                let decoded = Prefix::decode(prefix).and_then(|prefix| {
                    let rest = Bytes::copy_from_slice(rest);
                    if is_to_agent { prefix.to_agent(rest).map(drop) } else { prefix.to_engine(rest).map(drop) }
                });
                assert!(decoded.is_err(), "bit {bit} of {frame:?}");
            }
        }
    }

    #[test]
    fn a_changed_bit_of_bulk_data_is_noticed() {
        let data = Bytes::from_static(b"xyz");
        let outcome = ReadOutcome::Data { crc: crc32(&data), data };
        let read = ToEngine::ReadDone { id: 1, applied: Seq(8), outcome };
        let append = frame_to_agent(&ToAgent::Append(record()));
        let range = ByteRange { offset: 4096, length: 4096 };
        let copy =
            frame_to_agent(&ToAgent::Copy(Copy { id: 3, range, data: vec![7; 4096].into(), crc: crc32(&[7; 4096]) }));
        let frames = [append, copy, frame_to_engine(&read), frame_to_engine(&ToEngine::Fetched(record()))];
        for (i, frame) in frames.iter().enumerate() {
            let (prefix, rest) = prefix_and_rest(frame);
            let mut broken = rest.to_vec();
            *broken.last_mut().unwrap() ^= 1;
            let prefix = Prefix::decode(&prefix).unwrap();
            let noticed = match i {
                0 | 1 => prefix.to_agent(broken.into()).is_err(),
                _ => match prefix.to_engine(broken.into()).map(ToEngine::checked) {
                    Ok(ToEngine::ReadDone { outcome, .. }) => outcome == ReadOutcome::Damaged,
                    Ok(other) => panic!("{other:?}"),
                    Err(_) => true,
                },
            };
            assert!(noticed, "frame {i}");
        }
    }

    struct RecordHeaderBits;
    impl RecordHeaderBits {
        const COUNT: usize = crate::record::RecordHeader::BYTES * 8;
    }

    #[test]
    fn lengths_are_checked_before_anything_is_read() {
        let (mut prefix, _) = prefix_and_rest(&frame_to_agent(&ToAgent::Goodbye));
        prefix[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(Prefix::decode(&prefix), Err(WireError::Length { .. })));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(
            number in proptest::num::u8::ANY,
            body in proptest::collection::vec(proptest::num::u8::ANY, 0..300),
            bulk in proptest::collection::vec(proptest::num::u8::ANY, 0..20),
        ) {
            let bulk = Bytes::from(bulk);
            let _ = ToAgent::decode(number, &body, bulk.clone());
            let _ = ToEngine::decode(number, &body, bulk);
        }
    }
}
