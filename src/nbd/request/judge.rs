//! Decides what becomes of each request: the one place that knows which error a bad one gets.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::fmt;

use super::super::constants::*;
use super::super::reply::{Failure, ReplyStyle, WireError};
use super::RequestHeader;

/// What a request is judged against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportRules {
    /// Size of the export in bytes.
    pub size_bytes: u64,
    /// Whether changes are refused.
    pub read_only: bool,
    /// How the connection frames requests and replies.
    pub style: ReplyStyle,
    /// Whether BLOCK_STATUS was agreed on, for this export.
    pub has_context: bool,
}

/// A valid request. Its range is inside the export; the payload of a WRITE is still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Read 1 byte to 32 MiB.
    Read {
        /// Bytes.
        length: u32,
        /// Into one content chunk.
        unfragmented: bool,
    },
    /// Write the payload that follows.
    Write {
        /// Bytes, 1 to 32 Mi.
        length: u32,
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
    /// Tell how the range is kept.
    BlockStatus {
        /// One extent will do.
        one: bool,
    },
    /// Expect reads of the range.
    Cache,
}

impl Operation {
    /// Whether the operation changes the volume, so that a stale copy of it would do harm.
    pub fn is_change(self) -> bool {
        match self {
            Self::Read { .. } | Self::Flush | Self::BlockStatus { .. } | Self::Cache => false,
            Self::Write { .. } | Self::Trim { .. } | Self::WriteZeroes { .. } => true,
        }
    }
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Hand it to the backend.
    Submit(Operation),
    /// Read the payload, which is [`CONTEXT_FILTER_BYTES`] long, and judge what [`RequestHeader::with_filter`] makes
    /// of it; if that is nothing, answer [`Refusal::UNKNOWN_CONTEXT`].
    ReadFilter,
    /// Zero bytes of something: answer success, do nothing.
    Nothing,
    /// Throw the payload away, answer this error, go on.
    Reject(Refusal),
    /// The client says goodbye: finish outstanding work, answer nothing.
    Disconnect,
    /// The payload is too long even to throw away: cut the connection.
    HangUp,
}

/// A refused request: what is wrong with it, and which error that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// What is wrong.
    pub fault: Fault,
    /// What the client is told.
    pub error: WireError,
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing that this server knows.
    UnknownCommand,
    /// Flags that mean nothing for the command, or that were not offered.
    UnknownFlags,
    /// A list of contexts that is none.
    BadFilter,
    /// A context that was not offered.
    UnknownContext,
    /// The server takes on no more work.
    Stopping,
    /// A change of a read-only export.
    ReadOnly,
    /// No metadata context was chosen for this export.
    NoContext,
    /// The status of nothing.
    EmptyRange,
    /// More than one READ or WRITE may carry.
    TooLong,
    /// A flush has neither offset nor length.
    FlushWithRange,
    /// Not inside the export.
    PastEnd,
}

impl Fault {
    /// What is wrong, for people.
    pub fn text(self) -> &'static str {
        match self {
            Self::UnknownCommand => "unknown command",
            Self::UnknownFlags => "unknown command flags",
            Self::BadFilter => "the payload is no list of one metadata context",
            Self::UnknownContext => "unknown metadata context",
            Self::Stopping => "the server is stopping",
            Self::ReadOnly => "the export is read-only",
            Self::NoContext => "no metadata context was chosen for this export",
            Self::EmptyRange => "the status of no bytes",
            Self::TooLong => "longer than the maximum payload",
            Self::FlushWithRange => "a flush has no offset or length",
            Self::PastEnd => "past the end of the export",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl Refusal {
    /// The payload of a BLOCK_STATUS names a context that was not offered.
    pub const UNKNOWN_CONTEXT: Self = Self { fault: Fault::UnknownContext, error: WireError::Invalid };
    /// The server takes on no more work.
    pub const STOPPING: Self = Self { fault: Fault::Stopping, error: WireError::Shutdown };

    fn new(fault: Fault, header: &RequestHeader, style: ReplyStyle) -> Self {
        let error = match fault {
            Fault::Stopping => WireError::Shutdown,
            Fault::ReadOnly => WireError::NotPermitted,
            Fault::PastEnd if matches!(header.command, CMD_WRITE | CMD_WRITE_ZEROES) => WireError::NoSpace,
            Fault::TooLong if header.command == CMD_READ && style != ReplyStyle::Simple => WireError::Overflow,
            Fault::UnknownCommand
            | Fault::UnknownFlags
            | Fault::BadFilter
            | Fault::UnknownContext
            | Fault::NoContext
            | Fault::EmptyRange
            | Fault::TooLong
            | Fault::FlushWithRange
            | Fault::PastEnd => WireError::Invalid,
        };
        Self { fault, error }
    }

    /// What the client is told.
    pub fn failure(self) -> Failure {
        Failure { error: self.error, text: self.fault.text() }
    }
}

/// Decides what becomes of a request. `stopping`: the server takes on no more work.
pub fn judge(header: &RequestHeader, rules: ExportRules, stopping: bool) -> Verdict {
    if header.command == CMD_DISC {
        return Verdict::Disconnect;
    }
    // Clients that use extended headers know the limit; others can have grown up without one.
    let discard_bytes_max = if header.extended { PAYLOAD_BYTES_MAX } else { REJECTED_PAYLOAD_BYTES_MAX };
    match find_fault(header, rules, stopping) {
        None => accept(header),
        Some(_) if header.payload_bytes() > u64::from(discard_bytes_max) => Verdict::HangUp,
        Some(fault) => Verdict::Reject(Refusal::new(fault, header, rules.style)),
    }
}

/// The flags that a command may carry; `None` for a command that is not known. FUA, once advertised, is legal
/// everywhere; it acts only on changes.
fn allowed_flags(header: &RequestHeader, rules: ExportRules) -> Option<u16> {
    let payload = if header.extended { CMD_FLAG_PAYLOAD_LEN } else { 0 };
    let unfragmented = match rules.style {
        ReplyStyle::Simple => 0,
        ReplyStyle::Structured | ReplyStyle::Extended => CMD_FLAG_DF,
    };
    match header.command {
        CMD_READ => Some(CMD_FLAG_FUA | unfragmented),
        CMD_WRITE => Some(CMD_FLAG_FUA | payload),
        CMD_DISC | CMD_FLUSH | CMD_TRIM | CMD_CACHE => Some(CMD_FLAG_FUA),
        CMD_WRITE_ZEROES => Some(CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO),
        CMD_BLOCK_STATUS => Some(CMD_FLAG_FUA | CMD_FLAG_REQ_ONE | payload),
        _ => None,
    }
}

fn find_fault(header: &RequestHeader, rules: ExportRules, stopping: bool) -> Option<Fault> {
    let Some(allowed_flags) = allowed_flags(header, rules) else {
        return Some(Fault::UnknownCommand);
    };
    if header.flags & !allowed_flags != 0 {
        return Some(Fault::UnknownFlags);
    }
    let is_write = header.command == CMD_WRITE;
    if stopping {
        return Some(Fault::Stopping);
    }
    if header.command == CMD_FLUSH {
        let has_range = header.offset != 0 || header.length != 0;
        return has_range.then_some(Fault::FlushWithRange);
    }
    if header.command == CMD_BLOCK_STATUS {
        return find_status_fault(header, rules);
    }
    let is_change = is_write || matches!(header.command, CMD_TRIM | CMD_WRITE_ZEROES);
    if rules.read_only && is_change {
        return Some(Fault::ReadOnly);
    }
    let carries_data = is_write || header.command == CMD_READ;
    if carries_data && header.length > u64::from(PAYLOAD_BYTES_MAX) {
        return Some(Fault::TooLong);
    }
    past_end(header, rules)
}

fn find_status_fault(header: &RequestHeader, rules: ExportRules) -> Option<Fault> {
    if !rules.has_context || rules.style == ReplyStyle::Simple {
        return Some(Fault::NoContext);
    }
    if header.has_flag(CMD_FLAG_PAYLOAD_LEN) {
        // There is one context, so that any other length names none, or one twice, or one that does not exist.
        return (header.length != CONTEXT_FILTER_BYTES as u64).then_some(Fault::BadFilter);
    }
    past_end(header, rules).or_else(|| (header.length == 0).then_some(Fault::EmptyRange))
}

fn past_end(header: &RequestHeader, rules: ExportRules) -> Option<Fault> {
    let end = header.offset.checked_add(header.length);
    let inside = end.is_some_and(|end| end <= rules.size_bytes);
    (!inside).then_some(Fault::PastEnd)
}

/// What a request without fault asks for.
fn accept(header: &RequestHeader) -> Verdict {
    if header.command == CMD_FLUSH {
        return Verdict::Submit(Operation::Flush);
    }
    if header.length == 0 {
        return Verdict::Nothing;
    }
    let fua = header.has_flag(CMD_FLAG_FUA);
    let payload_length = u32::try_from(header.length).unwrap_or(PAYLOAD_BYTES_MAX);
    Verdict::Submit(match header.command {
        CMD_READ => Operation::Read { length: payload_length, unfragmented: header.has_flag(CMD_FLAG_DF) },
        CMD_WRITE => Operation::Write { length: payload_length, fua },
        CMD_TRIM => Operation::Trim { fua },
        // Zeroing is a record without payload, which is always faster than writing: FAST_ZERO asks for nothing else.
        CMD_WRITE_ZEROES => Operation::WriteZeroes { fua, no_hole: header.has_flag(CMD_FLAG_NO_HOLE) },
        CMD_CACHE => Operation::Cache,
        CMD_BLOCK_STATUS if header.has_flag(CMD_FLAG_PAYLOAD_LEN) => return Verdict::ReadFilter,
        CMD_BLOCK_STATUS => Operation::BlockStatus { one: header.has_flag(CMD_FLAG_REQ_ONE) },
        _ => return Verdict::Reject(Refusal { fault: Fault::UnknownCommand, error: WireError::Invalid }),
    })
}
