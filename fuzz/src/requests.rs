//! Requests of a client in the transmission phase, and the replies to them: what is let through lies in the export, and
//! a reply says what the volume said.

use bytes::{Buf, Bytes};
use nbdcast::nbd::constants::*;
use nbdcast::nbd::reply::{Envelope, Reply, ReplyStyle, failure};
use nbdcast::nbd::request::{ExportRules, Operation, RequestHeader, Verdict, judge};
use nbdcast::nbd::{Allocation, Extent, IoError};

use super::input::Input;

/// Reads up to this length are answered for real.
const ANSWERED_BYTES_MAX: u32 = 64 << 10;

pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let setup = input.u8();
    let rules = ExportRules {
        size_bytes: input.number(),
        read_only: setup & 4 != 0,
        style: [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended][usize::from(setup % 3)],
        has_context: setup & 8 != 0,
    };
    while !input.is_empty() {
        let Some(header) = header(&mut input, rules.style) else { return };
        let payload = header.payload_bytes();
        assert!(payload == 0 || payload == header.length);
        let envelope = Envelope { style: rules.style, cookie: header.cookie, offset: header.offset };
        match judge(&header, rules, setup & 16 != 0) {
            Verdict::Submit(operation) => submit(&header, operation, rules, envelope, &mut input),
            Verdict::ReadFilter => {
                let payload = std::array::from_fn(|_| input.u8());
                if let Some(header) = header.with_filter(&payload)
                    && let Verdict::Submit(operation) = judge(&header, rules, false)
                {
                    submit(&header, operation, rules, envelope, &mut input);
                }
            }
            Verdict::Reject(refusal) => {
                assert!(payload <= u64::from(REJECTED_PAYLOAD_BYTES_MAX));
                assert!(!bytes_of(&envelope.failed(refusal.failure())).is_empty());
            }
            Verdict::Nothing => assert!(!bytes_of(&envelope.done()).is_empty()),
            Verdict::Disconnect | Verdict::HangUp => {}
        }
    }
}

/// A header, with the right magic nearly always.
fn header(input: &mut Input<'_>, style: ReplyStyle) -> Option<RequestHeader> {
    let is_extended = style == ReplyStyle::Extended;
    let mut bytes = [0; EXTENDED_REQUEST_HEADER_BYTES];
    let magic = if is_extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
    bytes[..4].copy_from_slice(&magic.to_be_bytes());
    bytes[4..6].copy_from_slice(&(input.u16() & if input.u8() & 1 == 0 { 0x3f } else { 0xffff }).to_be_bytes());
    bytes[6..8].copy_from_slice(&u16::from(input.u8() % 10).to_be_bytes());
    bytes[8..16].copy_from_slice(&input.u64().to_be_bytes());
    bytes[16..24].copy_from_slice(&input.number().to_be_bytes());
    let length = input.number();
    if input.u8() == 255 {
        bytes[input.u8() as usize % 4] ^= 1;
    }
    if is_extended {
        bytes[24..32].copy_from_slice(&length.to_be_bytes());
        RequestHeader::parse_extended(&bytes).ok()
    } else {
        bytes[24..28].copy_from_slice(&(length as u32).to_be_bytes());
        RequestHeader::parse(bytes.first_chunk().expect("a compact header is shorter")).ok()
    }
}

fn submit(header: &RequestHeader, operation: Operation, rules: ExportRules, envelope: Envelope, input: &mut Input<'_>) {
    assert!(!(rules.read_only && operation.is_change()));
    let end = u128::from(header.offset) + u128::from(header.length);
    assert!(end <= u128::from(rules.size_bytes) || operation == Operation::Flush);
    match operation {
        Operation::Read { length, unfragmented } if length <= ANSWERED_BYTES_MAX => {
            assert_eq!(u64::from(length), header.length);
            let data = content(length as usize, input);
            let reply = bytes_of(&envelope.read(data.clone(), unfragmented));
            assert_eq!(understood(&reply, envelope, data.len(), unfragmented), data);
        }
        Operation::Read { length, .. } | Operation::Write { length, .. } => {
            assert!((1..=PAYLOAD_BYTES_MAX).contains(&length));
        }
        Operation::BlockStatus { one } => {
            assert!(rules.has_context && rules.style != ReplyStyle::Simple);
            let kinds = [Allocation::Data, Allocation::Zeroes, Allocation::Hole];
            let extents: Vec<Extent> = (0..input.u8() % 16)
                .map(|_| Extent { length: input.number(), allocation: kinds[usize::from(input.u8() % 3)] })
                .collect();
            if let Ok(reply) = envelope.status(&extents, header.length, one) {
                check_status(&bytes_of(&reply), envelope, header.length, one);
            }
        }
        Operation::Flush | Operation::Trim { .. } | Operation::WriteZeroes { .. } | Operation::Cache => {
            assert!(!bytes_of(&envelope.failed(failure(IoError::NoSpace))).is_empty());
        }
    }
}

/// Bytes with runs of zeroes among them.
fn content(length: usize, input: &mut Input<'_>) -> Bytes {
    let mut data = Vec::with_capacity(length);
    while data.len() < length {
        let run = (usize::from(input.u8()) * 64 + 1).min(length - data.len());
        data.resize(data.len() + run, input.u8() % 3);
    }
    data.into()
}

fn bytes_of(reply: &Reply) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(reply.len_bytes());
    for chunk in reply.chunks() {
        bytes.extend_from_slice(chunk.head.as_bytes());
        bytes.extend_from_slice(&chunk.data);
    }
    assert_eq!(bytes.len(), reply.len_bytes());
    bytes
}

/// A chunk as a client reads it: flags, kind and payload.
fn next_chunk<'a>(reply: &mut &'a [u8], envelope: Envelope) -> (u16, u16, &'a [u8]) {
    let is_extended = envelope.style == ReplyStyle::Extended;
    let magic = if is_extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
    assert_eq!(reply.get_u32(), magic);
    let (flags, kind) = (reply.get_u16(), reply.get_u16());
    assert_eq!(reply.get_u64(), envelope.cookie);
    let length = if is_extended {
        assert_eq!(reply.get_u64(), envelope.offset);
        reply.get_u64() as usize
    } else {
        reply.get_u32() as usize
    };
    let (payload, rest) = reply.split_at(length);
    *reply = rest;
    (flags, kind, payload)
}

/// What a client makes of the reply to a read.
fn understood(mut reply: &[u8], envelope: Envelope, length: usize, unfragmented: bool) -> Vec<u8> {
    if envelope.style == ReplyStyle::Simple {
        return reply[SIMPLE_REPLY_BYTES..].to_vec();
    }
    let (mut data, mut covered, mut chunks) = (vec![255; length], 0, 0);
    loop {
        let (flags, kind, mut payload) = next_chunk(&mut reply, envelope);
        let at = (payload.get_u64() - envelope.offset) as usize;
        let bytes = match kind {
            CHUNK_OFFSET_DATA => payload.to_vec(),
            CHUNK_OFFSET_HOLE => vec![0; payload.get_u32() as usize],
            other => panic!("chunk {other} in the reply to a read"),
        };
        assert!(!bytes.is_empty());
        data[at..at + bytes.len()].copy_from_slice(&bytes);
        (covered, chunks) = (covered + bytes.len(), chunks + 1);
        if flags & REPLY_FLAG_DONE != 0 {
            break;
        }
    }
    assert!(reply.is_empty() && covered == length && chunks <= READ_CHUNKS_MAX);
    assert!(!unfragmented || chunks == 1);
    data
}

fn check_status(mut reply: &[u8], envelope: Envelope, length: u64, one: bool) {
    let (flags, kind, mut payload) = next_chunk(&mut reply, envelope);
    assert!(reply.is_empty() && flags & REPLY_FLAG_DONE != 0);
    assert_eq!(payload.get_u32(), CONTEXT_ALLOCATION_ID);
    let is_extended = envelope.style == ReplyStyle::Extended;
    assert_eq!(kind, if is_extended { CHUNK_BLOCK_STATUS_EXT } else { CHUNK_BLOCK_STATUS });
    if is_extended {
        assert_eq!(payload.get_u32() as usize * 16, payload.len());
    }
    let (mut covered, mut count) = (0, 0);
    while !payload.is_empty() {
        let extent = if is_extended { payload.get_u64() } else { payload.get_u32().into() };
        let state = if is_extended { payload.get_u64() } else { payload.get_u32().into() };
        assert!(extent > 0 && state <= 3 && state != 1);
        (covered, count) = (covered + extent, count + 1);
    }
    assert!(count >= 1 && covered <= length && (count == 1 || !one));
}
