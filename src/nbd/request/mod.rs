//! Parses transmission requests, with compact and with extended headers.
//!
//! Sans-IO. Nothing here reads a payload: the header says how many bytes follow. What becomes of a request is decided
//! in `judge`.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod judge;

pub use self::judge::{ExportRules, Fault, Operation, Refusal, Verdict, judge};
use super::constants::*;

/// The fixed part of a request, as the client sent it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// Whether it came with an extended header.
    pub extended: bool,
    /// Command flags.
    pub flags: u16,
    /// Command number.
    pub command: u16,
    /// The client's name for this request; its reply carries it back.
    pub cookie: u64,
    /// First byte, unchecked.
    pub offset: u64,
    /// Bytes, unchecked.
    pub length: u64,
}

/// The client is out of step, so nothing after this can be understood: disconnect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("request magic is {found:#010x}, not {expected:#010x}")]
pub struct BadMagic {
    /// What stood in its place.
    pub found: u32,
    /// The magic of the kind of header that was agreed on.
    pub expected: u32,
}

impl RequestHeader {
    /// Parses the 28 bytes of a compact header.
    pub fn parse(bytes: &[u8; REQUEST_HEADER_BYTES]) -> Result<Self, BadMagic> {
        let [rest @ .., l0, l1, l2, l3] = *bytes;
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        Self::parse_common(rest, REQUEST_MAGIC, length.into())
    }

    /// Parses the 32 bytes of an extended header.
    pub fn parse_extended(bytes: &[u8; EXTENDED_REQUEST_HEADER_BYTES]) -> Result<Self, BadMagic> {
        let [rest @ .., l0, l1, l2, l3, l4, l5, l6, l7] = *bytes;
        let length = u64::from_be_bytes([l0, l1, l2, l3, l4, l5, l6, l7]);
        Self::parse_common(rest, EXTENDED_REQUEST_MAGIC, length)
    }

    fn parse_common(bytes: [u8; 24], expected: u32, length: u64) -> Result<Self, BadMagic> {
        let [a, b, c, d, f0, f1, t0, t1, rest @ ..] = bytes;
        let found = u32::from_be_bytes([a, b, c, d]);
        if found != expected {
            return Err(BadMagic { found, expected });
        }
        let [c0, c1, c2, c3, c4, c5, c6, c7, o0, o1, o2, o3, o4, o5, o6, o7] = rest;
        Ok(Self {
            extended: expected == EXTENDED_REQUEST_MAGIC,
            flags: u16::from_be_bytes([f0, f1]),
            command: u16::from_be_bytes([t0, t1]),
            cookie: u64::from_be_bytes([c0, c1, c2, c3, c4, c5, c6, c7]),
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            length,
        })
    }

    /// Payload bytes that follow on the wire. With extended headers the flag PAYLOAD_LEN announces a payload. A WRITE
    /// has one without it too: it should say so, but QEMU 10 does not when it sets FUA.
    pub fn payload_bytes(&self) -> u64 {
        let is_announced = self.extended && self.has_flag(CMD_FLAG_PAYLOAD_LEN);
        let has_payload = self.command == CMD_WRITE || is_announced;
        if has_payload { self.length } else { 0 }
    }

    /// The same request without its payload, for a BLOCK_STATUS whose payload names contexts: `None` if it names
    /// others than the one there is.
    pub fn with_filter(self, payload: &[u8; CONTEXT_FILTER_BYTES]) -> Option<Self> {
        let [length @ .., c0, c1, c2, c3] = *payload;
        let is_known = u32::from_be_bytes([c0, c1, c2, c3]) == CONTEXT_ALLOCATION_ID;
        let flags = self.flags & !CMD_FLAG_PAYLOAD_LEN;
        is_known.then_some(Self { flags, length: u64::from_be_bytes(length), ..self })
    }

    /// Whether a command flag is set.
    pub fn has_flag(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

#[cfg(test)]
mod tests;
