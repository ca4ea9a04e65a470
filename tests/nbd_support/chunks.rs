//! The raw client's side of replies in chunks, structured and extended.

use std::net::TcpStream;

use super::{RawClient, go, option, request_with};

pub const NONE: u16 = 0;
pub const OFFSET_DATA: u16 = 1;
pub const OFFSET_HOLE: u16 = 2;
pub const BLOCK_STATUS_CHUNK: u16 = 5;
pub const BLOCK_STATUS_EXT_CHUNK: u16 = 6;
pub const ERROR: u16 = 0x8001;

pub const STRUCTURED_REPLY: u32 = 8;
pub const SET_META_CONTEXT: u32 = 10;
pub const EXTENDED_HEADERS: u32 = 11;

/// One chunk of a reply, whichever its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub is_last: bool,
    pub kind: u16,
    pub cookie: u64,
    pub payload: Vec<u8>,
}

impl Chunk {
    /// Error number and text.
    pub fn error(&self) -> (u32, &str) {
        assert!(self.is_last && self.kind == ERROR, "{self:?}");
        let length = usize::from(u16::from_be_bytes([self.payload[4], self.payload[5]]));
        assert_eq!(self.payload.len(), 6 + length);
        (number(&self.payload[..4]) as u32, std::str::from_utf8(&self.payload[6..]).unwrap())
    }

    /// Length and flags of each extent.
    pub fn extents(&self) -> Vec<(u64, u64)> {
        assert!(self.is_last, "{self:?}");
        assert_eq!(number(&self.payload[..4]), 1);
        let (start, width) = match self.kind {
            BLOCK_STATUS_CHUNK => (4, 4),
            BLOCK_STATUS_EXT_CHUNK => (8, 8),
            other => panic!("chunk {other}"),
        };
        let pairs = self.payload[start..].chunks_exact(2 * width);
        pairs.map(|pair| (number(&pair[..width]), number(&pair[width..]))).collect()
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A SET_META_CONTEXT for `base:allocation`.
pub fn allocation_of(export: &str) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend(b"\0\0\0\x01\0\0\0\x0fbase:allocation");
    option(SET_META_CONTEXT, &data)
}

pub fn extended_request(command: u16, flags: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    request_with(0x21e4_1c71, command, flags, cookie, offset, &length.to_be_bytes())
}

impl RawClient {
    /// As [`RawClient::go`], with options before it that must all be acknowledged.
    pub fn go_with(stream: TcpStream, options: &[Vec<u8>], export: &str) -> Self {
        let mut client = Self::greet(stream);
        for option in options.iter().cloned().chain([go(export)]) {
            client.send(&option);
            loop {
                match client.option_reply().1 {
                    1 => break,
                    kind => assert!(kind < 1 << 31, "{kind:#x}"),
                }
            }
        }
        client
    }

    /// With structured replies and block status.
    pub fn structured(stream: TcpStream, export: &str) -> Self {
        Self::go_with(stream, &[option(STRUCTURED_REPLY, b""), allocation_of(export)], export)
    }

    /// With extended headers and block status.
    pub fn extended(stream: TcpStream, export: &str) -> Self {
        Self::go_with(stream, &[option(EXTENDED_HEADERS, b""), allocation_of(export)], export)
    }

    /// The next chunk of a structured reply.
    pub fn chunk(&mut self) -> Chunk {
        let head = self.take::<20>();
        assert_eq!(head[..4], 0x668e_33ef_u32.to_be_bytes());
        self.chunk_behind(&head[4..16], number(&head[16..]))
    }

    /// The next chunk of an extended reply, and the offset that it repeats.
    pub fn extended_chunk(&mut self) -> (Chunk, u64) {
        let head = self.take::<32>();
        assert_eq!(head[..4], 0x6e8a_278c_u32.to_be_bytes());
        (self.chunk_behind(&head[4..16], number(&head[24..])), number(&head[16..24]))
    }

    fn chunk_behind(&mut self, head: &[u8], length: u64) -> Chunk {
        let payload = self.take_data(length as u32);
        let (is_last, kind) = (head[1] == 1, u16::from_be_bytes([head[2], head[3]]));
        Chunk { is_last, kind, cookie: number(&head[4..]), payload }
    }

    /// The content of a read of this range from its chunks, which may come in any number; and how many came.
    pub fn content(&mut self, offset: u64, length: u32, mut chunk: impl FnMut(&mut Self) -> Chunk) -> (Vec<u8>, usize) {
        let mut content = vec![0xee; length as usize];
        let (mut covered, mut count) = (0, 0);
        loop {
            let chunk = chunk(self);
            let start = (number(&chunk.payload[..8]) - offset) as usize;
            let bytes = match chunk.kind {
                OFFSET_DATA => chunk.payload[8..].to_vec(),
                OFFSET_HOLE => vec![0; number(&chunk.payload[8..]) as usize],
                other => panic!("chunk {other}"),
            };
            content[start..start + bytes.len()].copy_from_slice(&bytes);
            covered += bytes.len();
            count += 1;
            if chunk.is_last {
                assert_eq!(covered, content.len());
                return (content, count);
            }
        }
    }
}
