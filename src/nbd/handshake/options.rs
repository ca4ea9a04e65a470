//! The options of the handshake, each with what it does and what it is answered.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use bytes::{BufMut, BytesMut};

use super::super::access::Permit;
use super::super::backend::ExportInfo;
use super::super::constants::*;
use super::super::reply::ReplyStyle;
use super::answer::{Refusal, put_info, put_refusal, put_reply, transmission_flags};
use super::{Handshake, HandshakeError, Progress, TlsMode, meta_context};

/// The options that this server knows: the table to extend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KnownOption {
    ExportName,
    Abort,
    List,
    StartTls,
    Info,
    Go,
    StructuredReply,
    ListMetaContext,
    SetMetaContext,
    ExtendedHeaders,
}

impl KnownOption {
    pub(super) fn from_wire(option: u32) -> Option<Self> {
        match option {
            OPT_EXPORT_NAME => Some(Self::ExportName),
            OPT_ABORT => Some(Self::Abort),
            OPT_LIST => Some(Self::List),
            OPT_STARTTLS => Some(Self::StartTls),
            OPT_INFO => Some(Self::Info),
            OPT_GO => Some(Self::Go),
            OPT_STRUCTURED_REPLY => Some(Self::StructuredReply),
            OPT_LIST_META_CONTEXT => Some(Self::ListMetaContext),
            OPT_SET_META_CONTEXT => Some(Self::SetMetaContext),
            OPT_EXTENDED_HEADERS => Some(Self::ExtendedHeaders),
            _ => None,
        }
    }
}

impl<'a> Handshake<'a> {
    /// Does what the option asks for.
    pub(super) fn answer(
        &mut self,
        known: KnownOption,
        option: u32,
        data: &[u8],
        output: &mut BytesMut,
    ) -> Result<Progress, HandshakeError> {
        let answered = match known {
            KnownOption::ExportName => return self.on_export_name(data, output),
            KnownOption::Abort => Ok(Progress::Aborted),
            KnownOption::List => self.on_list(data, output),
            KnownOption::StartTls => self.on_start_tls(data),
            KnownOption::Info => self.describe(option, data, output).map(|_| Progress::Again),
            KnownOption::Go => self.describe(option, data, output).map(|export| self.chosen(export)),
            KnownOption::StructuredReply => self.on_structured_reply(data),
            KnownOption::ListMetaContext => self.on_list_meta_context(data, output),
            KnownOption::SetMetaContext => self.on_set_meta_context(data, output),
            KnownOption::ExtendedHeaders => self.on_extended_headers(data),
        };
        match answered {
            Ok(progress) => {
                put_reply(output, option, REP_ACK, &[]);
                Ok(progress)
            }
            Err(refusal) => {
                put_refusal(output, option, refusal);
                Ok(Progress::Again)
            }
        }
    }

    fn on_export_name(&self, name: &[u8], output: &mut BytesMut) -> Result<Progress, HandshakeError> {
        if self.haggled.style == ReplyStyle::Extended {
            return Err(HandshakeError::ExportNameAfterExtended);
        }
        let (index, export) = self.find(name).ok_or(HandshakeError::UnknownExport)?;
        match export.access.judge(&self.client) {
            Permit::Granted => {}
            Permit::NeedsTls | Permit::Denied => return Err(HandshakeError::NotPermitted),
        }
        output.put_u64(export.size_bytes);
        output.put_u16(transmission_flags(export, self.haggled.style, self.has_context(index)));
        if !self.no_zeroes {
            output.put_bytes(0, EXPORT_NAME_ZEROES_BYTES);
        }
        Ok(self.chosen(index))
    }

    fn on_list(&self, data: &[u8], output: &mut BytesMut) -> Result<Progress, Refusal> {
        if !data.is_empty() {
            return Err((REP_ERR_INVALID, "LIST carries no data"));
        }
        let granted = |export: &&&ExportInfo| export.access.judge(&self.client) == Permit::Granted;
        for export in self.offer.exports.iter().filter(granted) {
            let name = export.name.as_bytes();
            let length = (name.len() as u32).to_be_bytes();
            let description = export.description.as_bytes();
            put_reply(output, OPT_LIST, REP_SERVER, &[&length, name, description]);
        }
        Ok(Progress::Again)
    }

    fn on_start_tls(&mut self, data: &[u8]) -> Result<Progress, Refusal> {
        if self.client.is_tls {
            return Err((REP_ERR_INVALID, "the connection is encrypted already"));
        }
        if self.offer.tls == TlsMode::Off {
            return Err((REP_ERR_POLICY, "this server does not offer TLS"));
        }
        if !self.fixed_newstyle {
            return Err((REP_ERR_POLICY, "TLS is for clients that speak fixed newstyle"));
        }
        if !data.is_empty() {
            return Err((REP_ERR_INVALID, "STARTTLS carries no data"));
        }
        self.phase = super::Phase::StartingTls;
        Ok(Progress::StartTls)
    }

    fn on_structured_reply(&mut self, data: &[u8]) -> Result<Progress, Refusal> {
        if !data.is_empty() {
            return Err((REP_ERR_INVALID, "STRUCTURED_REPLY carries no data"));
        }
        if self.haggled.style == ReplyStyle::Extended {
            return Err((REP_ERR_EXT_HEADER_REQD, "extended headers were agreed on already"));
        }
        self.haggled.style = ReplyStyle::Structured;
        Ok(Progress::Again)
    }

    fn on_extended_headers(&mut self, data: &[u8]) -> Result<Progress, Refusal> {
        if !data.is_empty() {
            return Err((REP_ERR_INVALID, "EXTENDED_HEADERS carries no data"));
        }
        self.haggled.style = ReplyStyle::Extended;
        Ok(Progress::Again)
    }

    fn on_list_meta_context(&self, data: &[u8], output: &mut BytesMut) -> Result<Progress, Refusal> {
        let (_, query) = self.parse_context_query(data)?;
        if query.lists_allocation() {
            put_context(output, OPT_LIST_META_CONTEXT, 0);
        }
        Ok(Progress::Again)
    }

    /// Whatever was chosen before is replaced, also by a choice that fails.
    fn on_set_meta_context(&mut self, data: &[u8], output: &mut BytesMut) -> Result<Progress, Refusal> {
        self.haggled.context_export = None;
        let (export, query) = self.parse_context_query(data)?;
        if query.chooses_allocation() {
            self.haggled.context_export = Some(export);
            put_context(output, OPT_SET_META_CONTEXT, CONTEXT_ALLOCATION_ID);
        }
        Ok(Progress::Again)
    }

    fn parse_context_query<'d>(&self, data: &'d [u8]) -> Result<(usize, meta_context::ContextQuery<'d>), Refusal> {
        if self.haggled.style == ReplyStyle::Simple {
            return Err((REP_ERR_INVALID, "metadata contexts need structured replies"));
        }
        let query = meta_context::parse(data)?;
        // TLS_REQD is an answer to INFO and GO only.
        let needs_tls = (REP_ERR_POLICY, "the export is for encrypted connections");
        let (export, _) = self.find_permitted(query.export, needs_tls)?;
        Ok((export, query))
    }

    /// Answers INFO and GO up to their ACK.
    fn describe(&self, option: u32, data: &[u8], output: &mut BytesMut) -> Result<usize, Refusal> {
        let (name, wanted) =
            split_info_data(data).ok_or((REP_ERR_INVALID, "the option's lengths do not fit its data"))?;
        if name.len() > STRING_BYTES_MAX {
            return Err((REP_ERR_TOO_BIG, "the export name is too long"));
        }
        // A server or a client without TLS cannot be asked for it.
        let needs_tls =
            if self.offer.tls == TlsMode::Off || !self.fixed_newstyle { REP_ERR_POLICY } else { REP_ERR_TLS_REQD };
        let (index, export) = self.find_permitted(name, (needs_tls, "the export is for encrypted connections"))?;

        let mut put_info = |kind: u16, body: &[&[u8]]| put_info(output, option, kind.to_be_bytes(), body);
        let size = export.size_bytes.to_be_bytes();
        let flags = transmission_flags(export, self.haggled.style, self.has_context(index));
        put_info(INFO_EXPORT, &[&size, &flags.to_be_bytes()]);
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
        Ok(index)
    }

    /// The export of this name, if the client may use it.
    fn find_permitted(&self, name: &[u8], needs_tls: Refusal) -> Result<(usize, &'a ExportInfo), Refusal> {
        let found = self.find(name).ok_or((REP_ERR_UNKNOWN, "there is no such export"))?;
        match found.1.access.judge(&self.client) {
            Permit::Granted => Ok(found),
            Permit::NeedsTls => Err(needs_tls),
            Permit::Denied => Err((REP_ERR_POLICY, "the export is not for this client")),
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

fn put_context(output: &mut BytesMut, option: u32, id: u32) {
    put_reply(output, option, REP_META_CONTEXT, &[&id.to_be_bytes(), CONTEXT_ALLOCATION.as_bytes()]);
}
