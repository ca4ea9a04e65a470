//! Encodes the server's part of the handshake: greeting, transmission flags, option replies. Decides nothing.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use bytes::{BufMut, BytesMut};

use super::super::backend::ExportInfo;
use super::super::constants::*;
use super::super::reply::ReplyStyle;

/// A refused option: the error reply's number and its text for people.
pub(super) type Refusal = (u32, &'static str);

/// What the server says first.
pub fn greeting() -> [u8; GREETING_BYTES] {
    let mut bytes = [0; GREETING_BYTES];
    bytes[..8].copy_from_slice(&SERVER_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    bytes
}

/// What transmission with this export offers, as far as agreed: `style` and whether block status was chosen for it.
pub fn transmission_flags(export: &ExportInfo, style: ReplyStyle, has_context: bool) -> u16 {
    let mut flags = TRANSMISSION_HAS_FLAGS
        | TRANSMISSION_SEND_FLUSH
        | TRANSMISSION_SEND_FUA
        | TRANSMISSION_CAN_MULTI_CONN
        | TRANSMISSION_SEND_CACHE;
    flags |= if export.read_only {
        TRANSMISSION_READ_ONLY
    } else {
        TRANSMISSION_SEND_TRIM | TRANSMISSION_SEND_WRITE_ZEROES | TRANSMISSION_SEND_FAST_ZERO
    };
    if export.rotational {
        flags |= TRANSMISSION_ROTATIONAL;
    }
    flags
        | match style {
            ReplyStyle::Simple => 0,
            ReplyStyle::Extended if has_context => TRANSMISSION_SEND_DF | TRANSMISSION_BLOCK_STATUS_PAYLOAD,
            ReplyStyle::Structured | ReplyStyle::Extended => TRANSMISSION_SEND_DF,
        }
}

pub(super) fn put_info(output: &mut BytesMut, option: u32, kind: [u8; 2], body: &[&[u8]]) {
    let length: usize = body.iter().map(|part| part.len()).sum();
    put_reply_header(output, option, REP_INFO, kind.len() + length);
    output.put_slice(&kind);
    body.iter().for_each(|part| output.put_slice(part));
}

pub(super) fn put_refusal(output: &mut BytesMut, option: u32, (kind, text): Refusal) {
    put_reply(output, option, kind, &[text.as_bytes()]);
}

pub(super) fn put_reply(output: &mut BytesMut, option: u32, kind: u32, body: &[&[u8]]) {
    put_reply_header(output, option, kind, body.iter().map(|part| part.len()).sum());
    body.iter().for_each(|part| output.put_slice(part));
}

/// `body_bytes` is at most two strings of 4096 bytes and a few numbers.
fn put_reply_header(output: &mut BytesMut, option: u32, kind: u32, body_bytes: usize) {
    output.put_u64(OPTION_REPLY_MAGIC);
    output.put_u32(option);
    output.put_u32(kind);
    output.put_u32(body_bytes as u32);
}
