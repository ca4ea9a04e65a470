//! The fixed newstyle handshake as a state machine: bytes in, bytes and an outcome out.
//!
//! Sans-IO: the shell owns socket and deadline. The machine answers one option per call, so that the shell can send
//! the answer before the next one is looked at and no client can pile answers up in memory. It never keeps more of
//! the input than one option that it will look at, and never allocates for a length that is only claimed.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use bytes::{Buf, BufMut, BytesMut};

use super::backend::ExportInfo;
use super::constants::*;

/// What one call of [`Handshake::advance`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing more can be done before more input arrives.
    NeedInput,
    /// Something was taken in; send the output, then call again.
    Again,
    /// The client left politely; send the output, then close.
    Aborted,
    /// Transmission starts with the export at this index; send the output first.
    Chosen(usize),
}

/// Why a handshake ends without a word: the client broke the protocol, or the option has no way to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Client flags that this server does not know change the protocol in unknown ways.
    #[error("unknown client flags {flags:#010x}")]
    ClientFlags {
        /// What the client sent.
        flags: u32,
    },
    /// Out of step.
    #[error("option magic is {found:#018x}, not {OPTION_MAGIC:#018x}")]
    OptionMagic {
        /// What stood in its place.
        found: u64,
    },
    /// More option data than the server is willing to throw away.
    #[error("option {option} claims {length} bytes of data, more than {OPTION_DISCARD_BYTES_MAX}")]
    OptionTooLong {
        /// Option number.
        option: u32,
        /// Claimed bytes.
        length: u32,
    },
    /// More than [`OPTIONS_MAX`] options.
    #[error("more than {OPTIONS_MAX} options")]
    TooManyOptions,
    /// EXPORT_NAME, which cannot be answered with an error, asked for an export that is not there.
    #[error("EXPORT_NAME asks for an export that does not exist")]
    UnknownExport,
}

/// The options that this server knows: the table to extend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KnownOption {
    ExportName,
    Abort,
    List,
    Info,
    Go,
}

impl KnownOption {
    fn from_wire(option: u32) -> Option<Self> {
        match option {
            OPT_EXPORT_NAME => Some(Self::ExportName),
            OPT_ABORT => Some(Self::Abort),
            OPT_LIST => Some(Self::List),
            OPT_INFO => Some(Self::Info),
            OPT_GO => Some(Self::Go),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    ClientFlags,
    Options,
    Discarding { remaining_bytes: usize },
}

/// A refused option: the error reply's number and its text for people.
type Refusal = (u32, &'static str);

/// One connection's handshake.
#[derive(Debug)]
pub struct Handshake<'a> {
    exports: Vec<&'a ExportInfo>,
    phase: Phase,
    no_zeroes: bool,
    options_seen: u32,
}

/// What the server says first.
pub fn greeting() -> [u8; GREETING_BYTES] {
    let mut bytes = [0; GREETING_BYTES];
    bytes[..8].copy_from_slice(&SERVER_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    bytes
}

/// What transmission with this export offers.
pub fn transmission_flags(export: &ExportInfo) -> u16 {
    let always = TRANSMISSION_HAS_FLAGS | TRANSMISSION_SEND_FLUSH | TRANSMISSION_SEND_FUA | TRANSMISSION_CAN_MULTI_CONN;
    if export.read_only {
        always | TRANSMISSION_READ_ONLY
    } else {
        always | TRANSMISSION_SEND_TRIM | TRANSMISSION_SEND_WRITE_ZEROES
    }
}

impl<'a> Handshake<'a> {
    /// Starts after the greeting. [`Progress::Chosen`] is an index into `exports`.
    pub fn new(exports: Vec<&'a ExportInfo>) -> Self {
        Self { exports, phase: Phase::ClientFlags, no_zeroes: false, options_seen: 0 }
    }

    /// Takes what it can use from the front of `input`, at most one option, and appends the answer to `output`.
    /// Input of [`OPTION_HEADER_BYTES`] + [`OPTION_DATA_BYTES_MAX`] bytes always suffices for progress.
    pub fn advance(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> Result<Progress, HandshakeError> {
        match self.phase {
            Phase::ClientFlags => self.on_client_flags(input),
            Phase::Options => self.on_option(input, output),
            Phase::Discarding { remaining_bytes } => {
                let discarded = remaining_bytes.min(input.len());
                input.advance(discarded);
                let remaining_bytes = remaining_bytes - discarded;
                if remaining_bytes > 0 {
                    self.phase = Phase::Discarding { remaining_bytes };
                    return Ok(Progress::NeedInput);
                }
                self.phase = Phase::Options;
                Ok(Progress::Again)
            }
        }
    }

    fn on_client_flags(&mut self, input: &mut BytesMut) -> Result<Progress, HandshakeError> {
        if input.len() < CLIENT_FLAGS_BYTES {
            return Ok(Progress::NeedInput);
        }
        let flags = input.get_u32();
        if flags & !(CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES) != 0 {
            return Err(HandshakeError::ClientFlags { flags });
        }
        self.no_zeroes = flags & CLIENT_NO_ZEROES != 0;
        self.phase = Phase::Options;
        Ok(Progress::Again)
    }

    fn on_option(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> Result<Progress, HandshakeError> {
        if input.len() < OPTION_HEADER_BYTES {
            return Ok(Progress::NeedInput);
        }
        let mut header = &input[..OPTION_HEADER_BYTES];
        let found = header.get_u64();
        let option = header.get_u32();
        let length = header.get_u32();
        if found != OPTION_MAGIC {
            return Err(HandshakeError::OptionMagic { found });
        }
        if length > OPTION_DISCARD_BYTES_MAX {
            return Err(HandshakeError::OptionTooLong { option, length });
        }
        if self.options_seen >= OPTIONS_MAX {
            return Err(HandshakeError::TooManyOptions);
        }
        let length_bytes = length as usize;
        let Some(known) = KnownOption::from_wire(option) else {
            let refusal = (REP_ERR_UNSUP, "this server does not know the option");
            self.refuse_unread(input, output, option, length_bytes, refusal);
            return Ok(Progress::Again);
        };
        if length > OPTION_DATA_BYTES_MAX {
            if known == KnownOption::ExportName {
                return Err(HandshakeError::UnknownExport);
            }
            let refusal = (REP_ERR_TOO_BIG, "the option's data is too long");
            self.refuse_unread(input, output, option, length_bytes, refusal);
            return Ok(Progress::Again);
        }
        if input.len() < OPTION_HEADER_BYTES + length_bytes {
            return Ok(Progress::NeedInput);
        }
        self.options_seen += 1;
        input.advance(OPTION_HEADER_BYTES);
        let data = input.split_to(length_bytes);
        self.answer(known, option, &data, output)
    }

    /// Refuses an option without looking at its data, which is thrown away as it arrives.
    fn refuse_unread(
        &mut self,
        input: &mut BytesMut,
        output: &mut BytesMut,
        option: u32,
        remaining_bytes: usize,
        refusal: Refusal,
    ) {
        self.options_seen += 1;
        input.advance(OPTION_HEADER_BYTES);
        self.phase = Phase::Discarding { remaining_bytes };
        put_refusal(output, option, refusal);
    }

    fn answer(
        &mut self,
        known: KnownOption,
        option: u32,
        data: &[u8],
        output: &mut BytesMut,
    ) -> Result<Progress, HandshakeError> {
        match known {
            KnownOption::ExportName => self.on_export_name(data, output),
            KnownOption::Abort => {
                put_reply(output, option, REP_ACK, &[]);
                Ok(Progress::Aborted)
            }
            KnownOption::List => {
                self.on_list(option, data, output);
                Ok(Progress::Again)
            }
            KnownOption::Info | KnownOption::Go => match self.describe(option, data, output) {
                Ok(index) if known == KnownOption::Go => Ok(Progress::Chosen(index)),
                Ok(_) => Ok(Progress::Again),
                Err(refusal) => {
                    put_refusal(output, option, refusal);
                    Ok(Progress::Again)
                }
            },
        }
    }

    fn on_export_name(&self, name: &[u8], output: &mut BytesMut) -> Result<Progress, HandshakeError> {
        let (index, export) = self.find(name).ok_or(HandshakeError::UnknownExport)?;
        output.put_u64(export.size_bytes);
        output.put_u16(transmission_flags(export));
        if !self.no_zeroes {
            output.put_bytes(0, EXPORT_NAME_ZEROES_BYTES);
        }
        Ok(Progress::Chosen(index))
    }

    fn on_list(&self, option: u32, data: &[u8], output: &mut BytesMut) {
        if !data.is_empty() {
            put_refusal(output, option, (REP_ERR_INVALID, "LIST carries no data"));
            return;
        }
        for export in &self.exports {
            let name = export.name.as_bytes();
            let length = (name.len() as u32).to_be_bytes();
            let description = export.description.as_bytes();
            put_reply(output, option, REP_SERVER, &[&length, name, description]);
        }
        put_reply(output, option, REP_ACK, &[]);
    }

    /// Answers INFO and GO up to their ACK.
    fn describe(&self, option: u32, data: &[u8], output: &mut BytesMut) -> Result<usize, Refusal> {
        let (name, wanted) =
            split_info_data(data).ok_or((REP_ERR_INVALID, "the option's lengths do not fit its data"))?;
        if name.len() > STRING_BYTES_MAX {
            return Err((REP_ERR_TOO_BIG, "the export name is too long"));
        }
        let (index, export) = self.find(name).ok_or((REP_ERR_UNKNOWN, "there is no such export"))?;

        let mut put_info = |kind: u16, body: &[&[u8]]| put_info(output, option, kind.to_be_bytes(), body);
        let size = export.size_bytes.to_be_bytes();
        put_info(INFO_EXPORT, &[&size, &transmission_flags(export).to_be_bytes()]);
        let is_wanted = |kind: u16| wanted.chunks_exact(2).any(|info| info == kind.to_be_bytes());
        if is_wanted(INFO_NAME) {
            put_info(INFO_NAME, &[export.name.as_bytes()]);
        }
        if is_wanted(INFO_DESCRIPTION) {
            put_info(INFO_DESCRIPTION, &[export.description.as_bytes()]);
        }
        if is_wanted(INFO_BLOCK_SIZE) {
            let sizes = [BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, PAYLOAD_BYTES_MAX];
            let [min, preferred, max] = sizes.map(u32::to_be_bytes);
            put_info(INFO_BLOCK_SIZE, &[&min, &preferred, &max]);
        }
        put_reply(output, option, REP_ACK, &[]);
        Ok(index)
    }

    /// The export of this name; the empty name also means the only export, if there is just one.
    fn find(&self, name: &[u8]) -> Option<(usize, &'a ExportInfo)> {
        let mut exports = self.exports.iter().copied().enumerate();
        let named = exports.find(|(_, export)| export.name.as_bytes() == name);
        match self.exports[..] {
            [only] if name.is_empty() => Some((0, only)),
            _ => named,
        }
    }
}

/// Name and information requests (two bytes each) of INFO and GO, if the lengths add up exactly.
fn split_info_data(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (name_length, rest) = data.split_first_chunk::<4>()?;
    let name_length = u32::from_be_bytes(*name_length) as usize;
    let (name, rest) = rest.split_at_checked(name_length)?;
    let (count, wanted) = rest.split_first_chunk::<2>()?;
    let count = usize::from(u16::from_be_bytes(*count));
    (wanted.len() == count * 2).then_some((name, wanted))
}

fn put_info(output: &mut BytesMut, option: u32, kind: [u8; 2], body: &[&[u8]]) {
    let length: usize = body.iter().map(|part| part.len()).sum();
    put_reply_header(output, option, REP_INFO, kind.len() + length);
    output.put_slice(&kind);
    body.iter().for_each(|part| output.put_slice(part));
}

fn put_refusal(output: &mut BytesMut, option: u32, (kind, text): Refusal) {
    put_reply(output, option, kind, &[text.as_bytes()]);
}

fn put_reply(output: &mut BytesMut, option: u32, kind: u32, body: &[&[u8]]) {
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

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
