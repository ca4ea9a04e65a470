//! The numbers of the NBD protocol as they appear on the wire, and the sizes this server advertises.
//!
//! Only numbers the server uses are here; names follow the protocol document without the `NBD_` prefix.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

/// First eight bytes a server sends, "NBDMAGIC".
pub const SERVER_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Second magic of the newstyle greeting and the magic of every option request, "IHAVEOPT".
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Magic of every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of every transmission request with a compact header.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of every transmission request with an extended header.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Magic of every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of every chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Magic of every chunk of an extended reply.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flag: the server speaks fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the server can leave out the 124 zeroes after EXPORT_NAME.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Client flag: fixed newstyle.
pub const CLIENT_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag: no zeroes.
pub const CLIENT_NO_ZEROES: u32 = 1 << 1;

/// Option: choose an export the old way; has no error reply.
pub const OPT_EXPORT_NAME: u32 = 1;
/// Option: end the handshake.
pub const OPT_ABORT: u32 = 2;
/// Option: list the exports.
pub const OPT_LIST: u32 = 3;
/// Option: encrypt the connection.
pub const OPT_STARTTLS: u32 = 5;
/// Option: describe an export.
pub const OPT_INFO: u32 = 6;
/// Option: describe an export and start transmission with it.
pub const OPT_GO: u32 = 7;
/// Option: replies in chunks.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: list what block status can tell of an export.
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// Option: choose what block status tells.
pub const OPT_SET_META_CONTEXT: u32 = 10;
/// Option: headers with 64-bit lengths, replies in chunks.
pub const OPT_EXTENDED_HEADERS: u32 = 11;

/// Option reply: done.
pub const REP_ACK: u32 = 1;
/// Option reply: one export of a list.
pub const REP_SERVER: u32 = 2;
/// Option reply: one piece of information about an export.
pub const REP_INFO: u32 = 3;
/// Option reply: one metadata context.
pub const REP_META_CONTEXT: u32 = 4;
/// Option reply: the server does not know the option.
pub const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
/// Option reply: the server is not willing.
pub const REP_ERR_POLICY: u32 = (1 << 31) + 2;
/// Option reply: the option's data makes no sense.
pub const REP_ERR_INVALID: u32 = (1 << 31) + 3;
/// Option reply: not without TLS.
pub const REP_ERR_TLS_REQD: u32 = (1 << 31) + 5;
/// Option reply: there is no such export.
pub const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
/// Option reply: the server is stopping.
pub const REP_ERR_SHUTDOWN: u32 = (1 << 31) + 7;
/// Option reply: the option's data is longer than the server takes.
pub const REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;
/// Option reply: extended headers were agreed on already and rule out the option.
pub const REP_ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;

/// Information type: size and transmission flags.
pub const INFO_EXPORT: u16 = 0;
/// Information type: canonical name.
pub const INFO_NAME: u16 = 1;
/// Information type: description.
pub const INFO_DESCRIPTION: u16 = 2;
/// Information type: block sizes.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flag: the flags field is valid.
pub const TRANSMISSION_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: writes are refused.
pub const TRANSMISSION_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: FLUSH works.
pub const TRANSMISSION_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: FUA works.
pub const TRANSMISSION_SEND_FUA: u16 = 1 << 3;
/// Transmission flag: seeking is slow.
pub const TRANSMISSION_ROTATIONAL: u16 = 1 << 4;
/// Transmission flag: TRIM works.
pub const TRANSMISSION_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: WRITE_ZEROES works.
pub const TRANSMISSION_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: READ can be asked for one content chunk.
pub const TRANSMISSION_SEND_DF: u16 = 1 << 7;
/// Transmission flag: FLUSH covers writes answered on every connection.
pub const TRANSMISSION_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: CACHE works.
pub const TRANSMISSION_SEND_CACHE: u16 = 1 << 10;
/// Transmission flag: WRITE_ZEROES can be asked to be fast or to fail.
pub const TRANSMISSION_SEND_FAST_ZERO: u16 = 1 << 11;
/// Transmission flag: BLOCK_STATUS takes a list of contexts.
pub const TRANSMISSION_BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

/// Command: read.
pub const CMD_READ: u16 = 0;
/// Command: write.
pub const CMD_WRITE: u16 = 1;
/// Command: the client is leaving; has no reply.
pub const CMD_DISC: u16 = 2;
/// Command: make answered writes durable.
pub const CMD_FLUSH: u16 = 3;
/// Command: the range's content is no longer needed.
pub const CMD_TRIM: u16 = 4;
/// Command: the range will be read soon.
pub const CMD_CACHE: u16 = 5;
/// Command: the range reads as zeroes from now on.
pub const CMD_WRITE_ZEROES: u16 = 6;
/// Command: how the range is kept.
pub const CMD_BLOCK_STATUS: u16 = 7;

/// Command flag: durable before the reply.
pub const CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag: WRITE_ZEROES must keep the range allocated.
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag: READ is answered with one content chunk at most.
pub const CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag: BLOCK_STATUS is answered with one extent.
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Command flag: WRITE_ZEROES fails if it would take as long as writing.
pub const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// Command flag, with extended headers: the length is that of a payload which follows.
pub const CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Flag of a reply's last chunk.
pub const REPLY_FLAG_DONE: u16 = 1 << 0;

/// Chunk: success, without content.
pub const CHUNK_NONE: u16 = 0;
/// Chunk: data at an offset.
pub const CHUNK_OFFSET_DATA: u16 = 1;
/// Chunk: zeroes at an offset.
pub const CHUNK_OFFSET_HOLE: u16 = 2;
/// Chunk: extents with 32-bit lengths.
pub const CHUNK_BLOCK_STATUS: u16 = 5;
/// Chunk: extents with 64-bit lengths.
pub const CHUNK_BLOCK_STATUS_EXT: u16 = 6;
/// Chunk: an error.
pub const CHUNK_ERROR: u16 = (1 << 15) + 1;

/// The one metadata context: how blocks are allocated.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";
/// What lists every context of its namespace.
pub const CONTEXT_BASE_ALL: &str = "base:";
/// The number by which replies name [`CONTEXT_ALLOCATION`].
pub const CONTEXT_ALLOCATION_ID: u32 = 1;
/// Extent flag: it takes no space.
pub const STATE_HOLE: u32 = 1 << 0;
/// Extent flag: it reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;

/// Bytes of the server's greeting: two magics and the handshake flags.
pub const GREETING_BYTES: usize = 18;
/// Bytes of the client's flags that answer the greeting.
pub const CLIENT_FLAGS_BYTES: usize = 4;
/// Bytes of an option request before its data.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of a transmission request before its payload.
pub const REQUEST_HEADER_BYTES: usize = 28;
/// Bytes of a transmission request with an extended header before its payload.
pub const EXTENDED_REQUEST_HEADER_BYTES: usize = 32;
/// Bytes of the payload of a BLOCK_STATUS that names a context: a length, and the one context that there is.
pub const CONTEXT_FILTER_BYTES: usize = 12;
/// Bytes of a simple reply before its data.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of a structured reply's chunk before its payload.
pub const STRUCTURED_REPLY_BYTES: usize = 20;
/// Bytes of an extended reply's chunk before its payload.
pub const EXTENDED_REPLY_BYTES: usize = 32;
/// Zero bytes after the EXPORT_NAME answer unless both sides agreed to leave them out.
pub const EXPORT_NAME_ZEROES_BYTES: usize = 124;

/// Longest name or description the protocol allows, in bytes.
pub const STRING_BYTES_MAX: usize = 4096;
/// Smallest I/O, in bytes.
pub const BLOCK_BYTES_MIN: u32 = 1;
/// I/O size that works best: the replicas checksum blocks of this many bytes.
pub const BLOCK_BYTES_PREFERRED: u32 = 4096;
/// Longest payload of one READ or WRITE, in bytes.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Longest WRITE payload that is thrown away to keep in step; a longer one ends the connection. With extended headers
/// [`PAYLOAD_BYTES_MAX`] is the limit for that too.
pub const REJECTED_PAYLOAD_BYTES_MAX: u32 = 256 << 20;
/// Longest option data the server looks at, in bytes: a name of 4096 and more information requests than exist.
pub const OPTION_DATA_BYTES_MAX: u32 = 16 << 10;
/// Longest option data that is thrown away to keep in step; longer ends the connection.
pub const OPTION_DISCARD_BYTES_MAX: u32 = 1 << 20;
/// Options answered in one handshake; a client that asks for more is cut off.
pub const OPTIONS_MAX: u32 = 1024;
/// Queries for metadata contexts in one option.
pub const META_QUERIES_MAX: u32 = 256;
/// Chunks in one reply to a READ; what would need more is sent as data.
pub const READ_CHUNKS_MAX: usize = 64;
/// Extents in one reply to a BLOCK_STATUS; the client asks again for what is behind them.
pub const EXTENTS_MAX: usize = 4096;
