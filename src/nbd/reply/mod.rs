//! Encodes replies of the transmission phase and owns the one mapping from failures to NBD error numbers.
//!
//! Sans-IO. Every reply is a sequence of chunks, each a short head and data that is never copied; a simple reply is one
//! chunk. How chunks of reads and of block status are made is in `read` and `status`.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod read;
mod status;

use bytes::Bytes;

pub use self::status::ExtentsError;
use super::backend::{Extent, IoError};
use super::constants::*;

/// Error numbers that this server puts on the wire. They are the protocol's own, not the system's errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum WireError {
    /// EPERM: a change of a read-only export.
    NotPermitted = 1,
    /// EIO.
    Io = 5,
    /// EINVAL.
    Invalid = 22,
    /// ENOSPC: also a change past the end.
    NoSpace = 28,
    /// EOVERFLOW: a read longer than one reply may be, where replies come in chunks.
    Overflow = 75,
    /// ESHUTDOWN: the server is stopping.
    Shutdown = 108,
}

/// Why a request fails, as its client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// For the program.
    pub error: WireError,
    /// For people; in replies that have room for it. At most 4096 bytes.
    pub text: &'static str,
}

/// What a client is told of what a backend answered.
pub fn failure(error: IoError) -> Failure {
    match error {
        IoError::Io => Failure { error: WireError::Io, text: "the volume could not read or store the data" },
        IoError::NoSpace => Failure { error: WireError::NoSpace, text: "no replica has room for the change" },
        IoError::Shutdown => Failure { error: WireError::Shutdown, text: "the volume is stopping" },
        IoError::Invalid => Failure { error: WireError::Invalid, text: "the volume cannot do this" },
    }
}

/// How requests and replies of one connection are framed, fixed by its handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyStyle {
    /// Compact requests. Replies of 16 bytes, then the data of a successful read.
    Simple,
    /// Compact requests. Replies in chunks with heads of 20 bytes.
    Structured,
    /// Requests and chunks of replies with heads of 32 bytes and 64-bit lengths.
    Extended,
}

/// Room for the longest head: that of an extended OFFSET_HOLE.
const HEAD_BYTES_MAX: usize = EXTENDED_REPLY_BYTES + 12;

/// The short part of a chunk that is made anew for each.
#[derive(Clone, PartialEq, Eq)]
pub struct Head {
    bytes: [u8; HEAD_BYTES_MAX],
    len: u8,
}

/// A part of a reply: `head`, then `data`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Header, and the fixed part of its payload.
    pub head: Head,
    /// The rest of the payload, such as a read's content; else empty.
    pub data: Bytes,
}

/// One encoded reply: chunks, of which the first needs no allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    first: Chunk,
    rest: Vec<Chunk>,
}

/// What a reply repeats of its request, and how it is framed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope {
    /// How replies are framed on this connection.
    pub style: ReplyStyle,
    /// The client's name for the request.
    pub cookie: u64,
    /// The request's offset, as the client sent it.
    pub offset: u64,
}

impl Head {
    fn new() -> Self {
        Self { bytes: [0; HEAD_BYTES_MAX], len: 0 }
    }

    fn with(mut self, part: &[u8]) -> Self {
        let start = usize::from(self.len);
        self.bytes[start..start + part.len()].copy_from_slice(part);
        self.len += part.len() as u8;
        self
    }

    /// What goes on the wire.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl std::fmt::Debug for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_bytes().fmt(f)
    }
}

impl Chunk {
    /// Bytes on the wire.
    pub fn len_bytes(&self) -> usize {
        usize::from(self.head.len) + self.data.len()
    }
}

impl From<Chunk> for Reply {
    fn from(only: Chunk) -> Self {
        Self { first: only, rest: Vec::new() }
    }
}

impl Reply {
    /// In the order in which they go on the wire.
    pub fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        std::iter::once(&self.first).chain(&self.rest)
    }

    /// Bytes on the wire.
    pub fn len_bytes(&self) -> usize {
        self.chunks().map(Chunk::len_bytes).sum()
    }
}

impl Envelope {
    /// Success without content.
    pub fn done(self) -> Reply {
        match self.style {
            ReplyStyle::Simple => self.simple(0, Bytes::new()).into(),
            ReplyStyle::Structured | ReplyStyle::Extended => {
                self.chunk(REPLY_FLAG_DONE, CHUNK_NONE, &[], Bytes::new()).into()
            }
        }
    }

    /// An error, with its text if there is room for it.
    pub fn failed(self, failure: Failure) -> Reply {
        let error = failure.error as u32;
        match self.style {
            ReplyStyle::Simple => self.simple(error, Bytes::new()).into(),
            ReplyStyle::Structured | ReplyStyle::Extended => {
                let text = Bytes::from_static(failure.text.as_bytes());
                let text_bytes = text.len() as u16;
                self.chunk(REPLY_FLAG_DONE, CHUNK_ERROR, &[&error.to_be_bytes(), &text_bytes.to_be_bytes()], text)
                    .into()
            }
        }
    }

    /// What was read: all the bytes that the request asked for, of which there is at least one. Unless
    /// `unfragmented`, long runs of zeroes are left out where the style allows it.
    pub fn read(self, data: Bytes, unfragmented: bool) -> Reply {
        match self.style {
            ReplyStyle::Simple => self.simple(0, data).into(),
            ReplyStyle::Structured | ReplyStyle::Extended => read::reply(self, data, unfragmented),
        }
    }

    /// How `length` bytes from the request's offset on are kept; with `one`, only the first extent. Not for the simple
    /// style, which has no such reply: nobody can ask for it there.
    pub fn status(self, extents: &[Extent], length: u64, one: bool) -> Result<Reply, ExtentsError> {
        status::reply(self, extents, length, one)
    }

    fn simple(self, error: u32, data: Bytes) -> Chunk {
        let head = Head::new()
            .with(&SIMPLE_REPLY_MAGIC.to_be_bytes())
            .with(&error.to_be_bytes())
            .with(&self.cookie.to_be_bytes());
        Chunk { head, data }
    }

    /// A chunk whose payload is `fixed` and then `data`.
    fn chunk(self, flags: u16, kind: u16, fixed: &[&[u8]], data: Bytes) -> Chunk {
        let payload_bytes = fixed.iter().map(|part| part.len()).sum::<usize>() + data.len();
        let head = match self.style {
            // The payload of the longest read has a 32-bit length.
            ReplyStyle::Simple | ReplyStyle::Structured => Head::new()
                .with(&STRUCTURED_REPLY_MAGIC.to_be_bytes())
                .with(&flags.to_be_bytes())
                .with(&kind.to_be_bytes())
                .with(&self.cookie.to_be_bytes())
                .with(&(payload_bytes as u32).to_be_bytes()),
            ReplyStyle::Extended => Head::new()
                .with(&EXTENDED_REPLY_MAGIC.to_be_bytes())
                .with(&flags.to_be_bytes())
                .with(&kind.to_be_bytes())
                .with(&self.cookie.to_be_bytes())
                .with(&self.offset.to_be_bytes())
                .with(&(payload_bytes as u64).to_be_bytes()),
        };
        let head = fixed.iter().fold(head, |head, part| head.with(part));
        Chunk { head, data }
    }
}

#[cfg(test)]
mod tests;
