//! Parses transmission requests and decides what becomes of each.
//!
//! Sans-IO. [`judge`] is the one place that knows which error a bad request gets, and it logs the bad values. Nothing
//! here reads a payload: the verdict says how many bytes follow and whether they are wanted.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::fmt;

use super::constants::{
    CMD_DISC, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES,
    PAYLOAD_BYTES_MAX, REJECTED_PAYLOAD_BYTES_MAX, REQUEST_HEADER_BYTES, REQUEST_MAGIC,
};
use super::reply::WireError;

/// The fixed part of a request, as the client sent it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// Command flags.
    pub flags: u16,
    /// Command number.
    pub command: u16,
    /// The client's name for this request; its reply carries it back.
    pub cookie: u64,
    /// First byte, unchecked.
    pub offset: u64,
    /// Bytes, unchecked.
    pub length: u32,
}

/// The client is out of step, so nothing after this can be understood: disconnect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("request magic is {found:#010x}, not {REQUEST_MAGIC:#010x}")]
pub struct BadMagic {
    /// What stood in its place.
    pub found: u32,
}

impl RequestHeader {
    /// Parses the 28 bytes of a request header.
    pub fn parse(bytes: &[u8; REQUEST_HEADER_BYTES]) -> Result<Self, BadMagic> {
        let [a, b, c, d, f0, f1, t0, t1, rest @ ..] = *bytes;
        let found = u32::from_be_bytes([a, b, c, d]);
        if found != REQUEST_MAGIC {
            return Err(BadMagic { found });
        }
        let [c0, c1, c2, c3, c4, c5, c6, c7, rest @ ..] = rest;
        let [o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = rest;
        Ok(Self {
            flags: u16::from_be_bytes([f0, f1]),
            command: u16::from_be_bytes([t0, t1]),
            cookie: u64::from_be_bytes([c0, c1, c2, c3, c4, c5, c6, c7]),
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            length: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    /// Payload bytes that follow on the wire.
    pub fn payload_bytes(&self) -> u32 {
        if self.command == CMD_WRITE { self.length } else { 0 }
    }

    /// The flags the server understands for this command; `None` for a command it does not know.
    fn allowed_flags(&self) -> Option<u16> {
        match self.command {
            // FUA, once advertised, is legal everywhere; it acts only on changes.
            CMD_READ | CMD_WRITE | CMD_DISC | CMD_FLUSH | CMD_TRIM => Some(CMD_FLAG_FUA),
            CMD_WRITE_ZEROES => Some(CMD_FLAG_FUA | CMD_FLAG_NO_HOLE),
            _ => None,
        }
    }

    fn is_change(&self) -> bool {
        matches!(self.command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES)
    }
}

/// What a request is judged against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportRules {
    /// Size of the export in bytes.
    pub size_bytes: u64,
    /// Whether changes are refused.
    pub read_only: bool,
}

/// A valid request, its WRITE payload still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Read 1 byte to 32 MiB.
    Read,
    /// Write the payload that follows.
    Write {
        /// Durable before the reply.
        fua: bool,
    },
    /// Make answered changes durable.
    Flush,
    /// Forget the range.
    Trim {
        /// Durable before the reply.
        fua: bool,
    },
    /// Zero the range.
    WriteZeroes {
        /// Durable before the reply.
        fua: bool,
        /// Keep the range allocated.
        no_hole: bool,
    },
}

impl Operation {
    /// Whether the operation changes the volume, so that a stale copy of it would do harm.
    pub fn is_change(self) -> bool {
        match self {
            Self::Read | Self::Flush => false,
            Self::Write { .. } | Self::Trim { .. } | Self::WriteZeroes { .. } => true,
        }
    }
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Hand it to the backend.
    Submit(Operation),
    /// Zero bytes of something: answer success, do nothing.
    Nothing,
    /// Throw the payload away, answer this error, go on.
    Reject(WireError),
    /// The client says goodbye: finish outstanding work, answer nothing.
    Disconnect,
    /// The payload is too long even to throw away: cut the connection.
    HangUp,
}

/// Why a request is refused; only logged, the client gets a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    UnknownCommand,
    UnknownFlags,
    Stopping,
    ReadOnly,
    TooLong,
    FlushWithRange,
    PastEnd,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnknownCommand => "unknown command",
            Self::UnknownFlags => "unknown command flags",
            Self::Stopping => "the server is stopping",
            Self::ReadOnly => "the export is read-only",
            Self::TooLong => "longer than the maximum payload",
            Self::FlushWithRange => "a flush has no offset or length",
            Self::PastEnd => "past the end of the export",
        })
    }
}

/// Decides what becomes of a request. `stopping`: the server takes on no more work.
pub fn judge(header: &RequestHeader, rules: ExportRules, stopping: bool) -> Verdict {
    if header.command == CMD_DISC {
        return Verdict::Disconnect;
    }
    let Some(fault) = find_fault(header, rules, stopping) else {
        return operation(header);
    };
    let verdict = if header.payload_bytes() > REJECTED_PAYLOAD_BYTES_MAX {
        Verdict::HangUp
    } else {
        Verdict::Reject(match fault {
            Fault::UnknownCommand | Fault::UnknownFlags | Fault::TooLong | Fault::FlushWithRange => WireError::Invalid,
            Fault::Stopping => WireError::Shutdown,
            Fault::ReadOnly => WireError::NotPermitted,
            Fault::PastEnd if header.command == CMD_WRITE => WireError::NoSpace,
            Fault::PastEnd if header.command == CMD_WRITE_ZEROES => WireError::NoSpace,
            Fault::PastEnd => WireError::Invalid,
        })
    };
    if fault == Fault::Stopping {
        tracing::debug!(command = header.command, "NBD request refused: {fault}");
    } else {
        tracing::warn!(
            command = header.command,
            flags = header.flags,
            offset = header.offset,
            length = header.length,
            size = rules.size_bytes,
            ?verdict,
            "NBD request refused: {fault}"
        );
    }
    verdict
}

fn find_fault(header: &RequestHeader, rules: ExportRules, stopping: bool) -> Option<Fault> {
    let Some(allowed_flags) = header.allowed_flags() else {
        return Some(Fault::UnknownCommand);
    };
    if header.flags & !allowed_flags != 0 {
        return Some(Fault::UnknownFlags);
    }
    if stopping {
        return Some(Fault::Stopping);
    }
    if header.command == CMD_FLUSH {
        let has_range = header.offset != 0 || header.length != 0;
        return has_range.then_some(Fault::FlushWithRange);
    }
    if rules.read_only && header.is_change() {
        return Some(Fault::ReadOnly);
    }
    let carries_data = matches!(header.command, CMD_READ | CMD_WRITE);
    if carries_data && header.length > PAYLOAD_BYTES_MAX {
        return Some(Fault::TooLong);
    }
    let end = header.offset.checked_add(u64::from(header.length));
    let inside = end.is_some_and(|end| end <= rules.size_bytes);
    (!inside).then_some(Fault::PastEnd)
}

/// What a request without fault asks for.
fn operation(header: &RequestHeader) -> Verdict {
    if header.command == CMD_FLUSH {
        return Verdict::Submit(Operation::Flush);
    }
    if header.length == 0 {
        return Verdict::Nothing;
    }
    let fua = header.flags & CMD_FLAG_FUA != 0;
    let no_hole = header.flags & CMD_FLAG_NO_HOLE != 0;
    match header.command {
        CMD_READ => Verdict::Submit(Operation::Read),
        CMD_WRITE => Verdict::Submit(Operation::Write { fua }),
        CMD_TRIM => Verdict::Submit(Operation::Trim { fua }),
        CMD_WRITE_ZEROES => Verdict::Submit(Operation::WriteZeroes { fua, no_hole }),
        _ => Verdict::Reject(WireError::Invalid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 8 << 30;
    const RULES: ExportRules = ExportRules { size_bytes: SIZE, read_only: false };

    fn header(command: u16, flags: u16, offset: u64, length: u32) -> RequestHeader {
        RequestHeader { flags, command, cookie: 7, offset, length }
    }

    fn check(command: u16, flags: u16, offset: u64, length: u32) -> Verdict {
        judge(&header(command, flags, offset, length), RULES, false)
    }

    const EINVAL: Verdict = Verdict::Reject(WireError::Invalid);
    const ENOSPC: Verdict = Verdict::Reject(WireError::NoSpace);

    #[test]
    fn past_the_end_depends_on_the_command() {
        for (command, expected) in
            [(CMD_READ, EINVAL), (CMD_TRIM, EINVAL), (CMD_WRITE, ENOSPC), (CMD_WRITE_ZEROES, ENOSPC)]
        {
            assert_eq!(check(command, 0, SIZE - 512, 513), expected);
            assert_eq!(check(command, 0, u64::MAX - 10, 512), expected);
            assert_eq!(check(command, 0, SIZE + 1, 0), expected);
            assert_eq!(check(command, 0, SIZE, 0), Verdict::Nothing);
        }
    }

    #[test]
    fn the_last_byte_and_odd_ranges_are_fine() {
        assert_eq!(check(CMD_READ, 0, SIZE - 1, 1), Verdict::Submit(Operation::Read));
        let write = Verdict::Submit(Operation::Write { fua: false });
        assert_eq!(check(CMD_WRITE, 0, 3, 511), write);
    }

    #[test]
    fn fua_is_legal_everywhere_and_acts_on_changes() {
        assert_eq!(check(CMD_READ, 1, 0, 1), Verdict::Submit(Operation::Read));
        assert_eq!(check(CMD_FLUSH, 1, 0, 0), Verdict::Submit(Operation::Flush));
        assert_eq!(check(CMD_DISC, 1, 0, 0), Verdict::Disconnect);
        let write = Verdict::Submit(Operation::Write { fua: true });
        assert_eq!(check(CMD_WRITE, 1, 0, 1), write);
        let trim = Verdict::Submit(Operation::Trim { fua: true });
        assert_eq!(check(CMD_TRIM, 1, 0, 1), trim);
        let zeroes = Operation::WriteZeroes { fua: true, no_hole: true };
        assert_eq!(check(CMD_WRITE_ZEROES, 3, 0, 1), Verdict::Submit(zeroes));
    }

    #[test]
    fn unknown_commands_and_flags_are_invalid() {
        for command in [5, 7, 8, 9, u16::MAX] {
            assert_eq!(check(command, 0, 0, 1), EINVAL, "command {command}");
        }
        for (command, flags) in [(CMD_READ, 1 << 2), (CMD_WRITE, 2), (CMD_WRITE_ZEROES, 1 << 4)] {
            assert_eq!(check(command, flags, 0, 1), EINVAL);
        }
        assert_eq!(check(CMD_FLUSH, 0, 0, 1), EINVAL);
        assert_eq!(check(CMD_FLUSH, 0, 1, 0), EINVAL);
    }

    #[test]
    fn the_maximum_payload_binds_reads_and_writes_only() {
        for command in [CMD_READ, CMD_WRITE] {
            let fits = check(command, 0, 0, PAYLOAD_BYTES_MAX);
            assert!(matches!(fits, Verdict::Submit(_)));
            assert_eq!(check(command, 0, 0, PAYLOAD_BYTES_MAX + 1), EINVAL);
        }
        for command in [CMD_TRIM, CMD_WRITE_ZEROES] {
            assert!(matches!(check(command, 0, 0, u32::MAX), Verdict::Submit(_)));
        }
        assert_eq!(check(CMD_WRITE, 0, 0, u32::MAX), Verdict::HangUp);
        assert_eq!(check(CMD_READ, 0, 0, u32::MAX), EINVAL);
    }

    #[test]
    fn a_read_only_export_refuses_changes_and_nothing_else() {
        let rules = ExportRules { read_only: true, ..RULES };
        for command in [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES] {
            let verdict = judge(&header(command, 0, 0, 1), rules, false);
            assert_eq!(verdict, Verdict::Reject(WireError::NotPermitted));
        }
        for (command, length) in [(CMD_READ, 1), (CMD_FLUSH, 0)] {
            let verdict = judge(&header(command, 0, 0, length), rules, false);
            assert!(matches!(verdict, Verdict::Submit(_)));
        }
    }

    #[test]
    fn a_stopping_server_refuses_all_but_goodbye() {
        for command in [CMD_READ, CMD_WRITE, CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES] {
            let verdict = judge(&header(command, 0, 0, 0), RULES, true);
            assert_eq!(verdict, Verdict::Reject(WireError::Shutdown));
        }
        let goodbye = judge(&header(CMD_DISC, 0, 0, 0), RULES, true);
        assert_eq!(goodbye, Verdict::Disconnect);
    }

    #[test]
    fn a_wrong_magic_is_out_of_step() {
        let found = RequestHeader::parse(&[0; REQUEST_HEADER_BYTES]);
        assert_eq!(found, Err(BadMagic { found: 0 }));
    }

    proptest! {
        /// Whatever is submitted lies inside the export and within the payload limit.
        #[test]
        fn arbitrary_requests_are_judged_safely(
            tail in prop::array::uniform24(any::<u8>()),
            command in prop_oneof![0u16..10, any::<u16>()],
            size_bytes in prop_oneof![0u64..1000, any::<u64>()],
            read_only: bool,
        ) {
            let mut bytes = [0; REQUEST_HEADER_BYTES];
            bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            bytes[4..].copy_from_slice(&tail);
            bytes[6..8].copy_from_slice(&command.to_be_bytes());
            let header = RequestHeader::parse(&bytes).unwrap();
            let rules = ExportRules { size_bytes, read_only };
            if let Verdict::Submit(operation) = judge(&header, rules, false) {
                prop_assert!(!(read_only && operation.is_change()));
                let end = u128::from(header.offset) + u128::from(header.length);
                prop_assert!(end <= u128::from(size_bytes));
                if matches!(operation, Operation::Read | Operation::Write { .. }) {
                    prop_assert!(header.length <= PAYLOAD_BYTES_MAX && header.length > 0);
                }
            }
        }
    }
}
