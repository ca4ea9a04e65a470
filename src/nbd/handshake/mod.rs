//! The fixed newstyle handshake as a state machine: bytes in, bytes and an outcome out.
//!
//! Sans-IO: the shell owns socket, encryption and deadline. The machine answers one option per call, so that the shell
//! can send the answer before the next one is looked at and no client can pile answers up in memory. It never keeps
//! more of the input than one option that it will look at, and never allocates for a length that is only claimed.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod answer;
mod meta_context;
mod options;

use bytes::{Buf, BytesMut};

use self::answer::{Refusal, put_refusal};
pub use self::answer::{greeting, transmission_flags};
use self::options::KnownOption;
use super::access::Client;
use super::backend::ExportInfo;
use super::constants::*;
use super::reply::ReplyStyle;

/// What one call of [`Handshake::advance`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing more can be done before more input arrives.
    NeedInput,
    /// Something was taken in; send the output, then call again.
    Again,
    /// The client left politely; send the output, then close.
    Aborted,
    /// Send the output, encrypt the connection, call [`Handshake::on_tls`], then go on with decrypted input.
    StartTls,
    /// Transmission starts; send the output first.
    Chosen(Agreement),
}

/// What client and server agreed on for the transmission phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreement {
    /// Index of the export in [`Offer::exports`].
    pub export: usize,
    /// How requests and replies are framed.
    pub style: ReplyStyle,
    /// Whether BLOCK_STATUS may be asked, of `base:allocation`.
    pub has_context: bool,
}

/// Whether clients use TLS.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TlsMode {
    /// They cannot.
    #[default]
    Off,
    /// They may.
    On,
    /// They must, before they learn anything.
    Require,
}

/// What a server offers its clients.
#[derive(Debug, Clone, Default)]
pub struct Offer<'a> {
    /// All exports, those that a client may not use included.
    pub exports: Vec<&'a ExportInfo>,
    /// Name of the export that the empty name means; `None`: the only one, if there is just one.
    pub default_export: Option<&'a str>,
    /// Whether clients use TLS.
    pub tls: TlsMode,
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
    /// EXPORT_NAME asked for an export that this client may not use, or not without TLS.
    #[error("EXPORT_NAME asks for an export that this client may not use")]
    NotPermitted,
    /// EXPORT_NAME has no form with extended headers.
    #[error("EXPORT_NAME after extended headers were agreed on")]
    ExportNameAfterExtended,
    /// EXPORT_NAME, which cannot be answered with an error, came while the server stops.
    #[error("EXPORT_NAME while the server is stopping")]
    Stopping,
    /// Bytes that came unencrypted behind STARTTLS could be anybody's.
    #[error("unencrypted bytes behind STARTTLS")]
    InputBehindStartTls,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    ClientFlags,
    Options,
    Discarding { remaining_bytes: usize },
    StartingTls,
}

/// What options have agreed on so far; forgotten when TLS starts.
#[derive(Debug, Clone, Copy)]
struct Haggled {
    style: ReplyStyle,
    /// Index of the export for which `base:allocation` is chosen.
    context_export: Option<usize>,
}

impl Haggled {
    const NOTHING: Self = Self { style: ReplyStyle::Simple, context_export: None };
}

/// One connection's handshake.
#[derive(Debug)]
pub struct Handshake<'a> {
    offer: Offer<'a>,
    client: Client,
    phase: Phase,
    fixed_newstyle: bool,
    no_zeroes: bool,
    haggled: Haggled,
    options_seen: u32,
    is_stopping: bool,
}

impl<'a> Handshake<'a> {
    /// Starts after the greeting. `client` is what the connection tells before the first byte.
    pub fn new(offer: Offer<'a>, client: Client) -> Self {
        Self {
            offer,
            client,
            phase: Phase::ClientFlags,
            fixed_newstyle: false,
            no_zeroes: false,
            haggled: Haggled::NOTHING,
            options_seen: 0,
            is_stopping: false,
        }
    }

    /// The client, as far as it is known by now.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The server is stopping: every option but ABORT is refused from here on.
    pub fn stop(&mut self) {
        self.is_stopping = true;
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
            Phase::StartingTls if input.is_empty() => Ok(Progress::StartTls),
            Phase::StartingTls => Err(HandshakeError::InputBehindStartTls),
        }
    }

    /// The connection is encrypted now, after [`Progress::StartTls`]; `names` are those of the client's certificate,
    /// which was verified. What was agreed on before could have been anybody's wish, and is forgotten.
    pub fn on_tls(&mut self, names: Vec<String>) {
        self.client.is_tls = true;
        self.client.names = names;
        self.haggled = Haggled::NOTHING;
        self.phase = Phase::Options;
    }

    fn on_client_flags(&mut self, input: &mut BytesMut) -> Result<Progress, HandshakeError> {
        if input.len() < CLIENT_FLAGS_BYTES {
            return Ok(Progress::NeedInput);
        }
        let flags = input.get_u32();
        if flags & !(CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES) != 0 {
            return Err(HandshakeError::ClientFlags { flags });
        }
        self.fixed_newstyle = flags & CLIENT_FIXED_NEWSTYLE != 0;
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
        let known = match self.admit(option, length) {
            Ok(known) => known,
            Err((REP_ERR_TOO_BIG, _)) if option == OPT_EXPORT_NAME => return Err(HandshakeError::UnknownExport),
            Err((REP_ERR_SHUTDOWN, _)) if option == OPT_EXPORT_NAME => return Err(HandshakeError::Stopping),
            Err(_) if option == OPT_EXPORT_NAME => return Err(HandshakeError::NotPermitted),
            Err(refusal) => {
                if option == OPT_SET_META_CONTEXT {
                    self.haggled.context_export = None;
                }
                self.options_seen += 1;
                input.advance(OPTION_HEADER_BYTES);
                self.phase = Phase::Discarding { remaining_bytes: length_bytes };
                put_refusal(output, option, refusal);
                return Ok(Progress::Again);
            }
        };
        let length_bytes = if known == KnownOption::Abort { 0 } else { length_bytes };
        if input.len() < OPTION_HEADER_BYTES + length_bytes {
            return Ok(Progress::NeedInput);
        }
        self.options_seen += 1;
        input.advance(OPTION_HEADER_BYTES);
        let data = input.split_to(length_bytes);
        let progress = self.answer(known, option, &data, output)?;
        if progress == Progress::StartTls && !input.is_empty() {
            return Err(HandshakeError::InputBehindStartTls);
        }
        Ok(progress)
    }

    /// Whether the option is looked at. If not, its data is thrown away as it arrives.
    fn admit(&self, option: u32, length: u32) -> Result<KnownOption, Refusal> {
        let known = KnownOption::from_wire(option);
        if self.is_stopping && known != Some(KnownOption::Abort) {
            return Err((REP_ERR_SHUTDOWN, "the server is stopping"));
        }
        if self.offer.tls == TlsMode::Require && !self.client.is_tls {
            match known {
                Some(KnownOption::StartTls | KnownOption::Abort) => {}
                // A client that does not speak fixed newstyle cannot start TLS.
                Some(_) | None if !self.fixed_newstyle => {
                    return Err((REP_ERR_POLICY, "this server serves none without TLS"));
                }
                Some(_) | None => return Err((REP_ERR_TLS_REQD, "this server wants STARTTLS first")),
            }
        }
        let known = known.ok_or((REP_ERR_UNSUP, "this server does not know the option"))?;
        // Data of an ABORT is never looked at.
        if length > OPTION_DATA_BYTES_MAX && known != KnownOption::Abort {
            return Err((REP_ERR_TOO_BIG, "the option's data is too long"));
        }
        Ok(known)
    }

    /// The export of this name; the empty name means the default.
    fn find(&self, name: &[u8]) -> Option<(usize, &'a ExportInfo)> {
        let exports = &self.offer.exports;
        let named = |name: &[u8]| exports.iter().position(|export| export.name.as_bytes() == name);
        let index = named(name).or_else(|| match self.offer.default_export {
            Some(_) | None if !name.is_empty() => None,
            Some(default) => named(default.as_bytes()),
            None => (exports.len() == 1).then_some(0),
        })?;
        Some((index, exports[index]))
    }

    fn has_context(&self, export: usize) -> bool {
        self.haggled.context_export == Some(export)
    }

    fn chosen(&self, export: usize) -> Progress {
        let has_context = self.has_context(export);
        Progress::Chosen(Agreement { export, style: self.haggled.style, has_context })
    }
}

#[cfg(test)]
mod tests;
