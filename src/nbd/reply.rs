//! Encodes replies of the transmission phase and owns the one mapping from failures to NBD error numbers.
//!
//! Sans-IO. The only encoding so far is the simple reply; [`ReplyStyle`] is where structured replies go, as every
//! reply is built through it.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use bytes::Bytes;

use super::backend::IoError;
use super::constants::{SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC};

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
    /// ESHUTDOWN: the server is stopping.
    Shutdown = 108,
}

/// The error number for what a backend answered.
pub fn wire_error(error: IoError) -> WireError {
    match error {
        IoError::Io => WireError::Io,
        IoError::NoSpace => WireError::NoSpace,
        IoError::Shutdown => WireError::Shutdown,
        IoError::Invalid => WireError::Invalid,
    }
}

/// How replies of one connection are encoded, fixed by its handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyStyle {
    /// 16 bytes, then the data of a successful read.
    Simple,
}

/// One encoded reply: `head`, then `data`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The encoded header.
    pub head: [u8; SIMPLE_REPLY_BYTES],
    /// A successful read's content, else empty.
    pub data: Bytes,
}

impl Reply {
    /// Bytes on the wire.
    pub fn len_bytes(&self) -> usize {
        self.head.len() + self.data.len()
    }
}

impl ReplyStyle {
    /// The reply to the request with this cookie. `data` of a success must be what the request asked for: empty for
    /// all but reads.
    pub fn encode(self, cookie: u64, result: Result<Bytes, WireError>) -> Reply {
        match self {
            Self::Simple => {
                let (error, data) = match result {
                    Ok(data) => (0, data),
                    Err(error) => (error as u32, Bytes::new()),
                };
                let mut head = [0; SIMPLE_REPLY_BYTES];
                head[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
                head[4..8].copy_from_slice(&error.to_be_bytes());
                head[8..16].copy_from_slice(&cookie.to_be_bytes());
                Reply { head, data }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simple_success_carries_cookie_and_data() {
        let reply = ReplyStyle::Simple.encode(0x0102_0304_0506_0708, Ok(Bytes::from_static(b"abc")));
        assert_eq!(reply.head, *b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08");
        assert_eq!(reply.len_bytes(), 19);
    }

    #[test]
    fn every_backend_error_has_its_protocol_number_and_no_data() {
        let table = [(IoError::Io, 5), (IoError::NoSpace, 28), (IoError::Shutdown, 108), (IoError::Invalid, 22)];
        for (error, number) in table {
            let reply = ReplyStyle::Simple.encode(1, Err(wire_error(error)));
            assert_eq!(reply.head[4..8], u32::to_be_bytes(number), "{error:?}");
            assert!(reply.data.is_empty());
        }
    }
}
