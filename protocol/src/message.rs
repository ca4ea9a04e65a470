//! What an engine and an agent say to each other, and the body of each message in bytes. How bodies are framed is the
//! business of [`crate::wire`].
//!
//! A session is either `Format` - `Formatted` and nothing else, or `Hello` - `Welcome`, `Promise` - `Promised` and from
//! there on records and reads in the volume's order. A replica that was out of the view is brought back with `Begin` -
//! `Begun`, records and `Copy` - `Copied`, and `Synced` - `InSync`. An agent refuses with `Refused` and closes the session.

use bytes::{BufMut, Bytes, BytesMut};

use crate::checksum::crc32;
use crate::cursor::{self, Malformed, Reader};
use crate::extents::{self, Extent};
use crate::position::{Epoch, EpochHistory, Position, Seq};
use crate::quorum::AckPolicies;
use crate::ranges::ByteRange;
use crate::record::{Record, RecordHeader};
use crate::scrub::{self, BlockFound};
use crate::view::{ReplicaName, View, ViewState, VolumeUuid};
use crate::{BLOCK_BYTES, RECORD_PAYLOAD_BYTES_MAX};

/// One running engine, drawn at random when it starts; tells two engines apart that ask for the same epoch.
pub type EngineId = [u8; 16];

/// From an engine to an agent.
#[derive(Clone, Debug, PartialEq)]
pub enum ToAgent {
    /// First message of a session.
    Hello(Hello),
    /// Makes a new, empty replica; the only message of its session.
    Format(Format),
    /// Asks for the promise to serve no lower epoch.
    Promise {
        /// The epoch asked for.
        epoch: Epoch,
        /// Who asks.
        engine: EngineId,
        /// How long after a `Ping` the engine counts on the promise, ms.
        lease_ms: u32,
    },
    /// The next record of the order.
    Append(Record),
    /// Every member holds the order durably up to here: agents need not keep these records for each other.
    Stable {
        /// Last such place.
        seq: Seq,
    },
    /// Confirms the lease.
    Ping {
        /// Comes back in the `Pong`.
        token: u64,
    },
    /// Asks about a range of the volume as of this place in the order of messages.
    Read {
        /// Comes back in the reply.
        id: u64,
        /// What is asked for.
        what: ReadKind,
        /// First byte.
        offset: u64,
        /// Bytes, at least 1 and at most [`ReadKind::bytes_max`].
        length: u64,
    },
    /// Asks for records of this agent's journal.
    Fetch {
        /// First place.
        from: Seq,
        /// Last place.
        to: Seq,
        /// What is wanted of them.
        what: FetchKind,
    },
    /// The engine leaves in good order: its lease is void.
    Goodbye,
    /// Makes the replica drop what it has beyond the volume's order and follow from a place on, syncing.
    Begin(Begin),
    /// Puts bytes that a syncing replica lacks, as of this place in the order of messages.
    Copy(Copy),
    /// Everything that the replica lacked is durable there: it is syncing no more.
    Synced,
    /// Asks what a replica out of the view lacks.
    ListDirty {
        /// The replica.
        subject: ReplicaName,
        /// From this byte of the volume on.
        from: u64,
    },
    /// Asks for room for a volume of this size; it is not of this size yet.
    Extend {
        /// The size, bytes.
        size_bytes: u64,
    },
    /// Nobody waits for the answer of a `Read` any more. It is answered all the same, but may be so with nothing.
    CancelRead {
        /// The id of the read.
        id: u64,
    },
}

/// What a read wants to know of its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadKind {
    /// Its bytes.
    Data,
    /// How it is kept, from its first byte on.
    Extents,
    /// Nothing: it will be read soon.
    Prefetch,
    /// What its disk holds of each block: of a range of whole blocks, exactly as of this place in the order of messages.
    Scrub,
}

impl ReadKind {
    /// How long a range one read can ask about, bytes.
    #[must_use]
    pub fn bytes_max(self) -> u64 {
        match self {
            ReadKind::Data | ReadKind::Scrub => RECORD_PAYLOAD_BYTES_MAX as u64,
            ReadKind::Extents => 64 << 30,
            ReadKind::Prefetch => 64 << 20,
        }
    }

    fn number(self) -> u8 {
        match self {
            ReadKind::Data => 0,
            ReadKind::Extents => 1,
            ReadKind::Prefetch => 2,
            ReadKind::Scrub => 3,
        }
    }

    fn decode(r: &mut Reader<'_>) -> Result<ReadKind, Malformed> {
        Ok(match r.u8("what to read")? {
            0 => ReadKind::Data,
            1 => ReadKind::Extents,
            2 => ReadKind::Prefetch,
            3 => ReadKind::Scrub,
            4..=u8::MAX => return Err(Malformed { field: "what to read" }),
        })
    }
}

/// What is wanted of records in a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchKind {
    /// The records, for a member that lacks them. What one of them wrote may come as it was changed by later ones.
    Records,
    /// Which ranges they changed.
    Ranges,
}

impl FetchKind {
    fn number(self) -> u8 {
        match self {
            FetchKind::Records => 0,
            FetchKind::Ranges => 1,
        }
    }

    fn decode(r: &mut Reader<'_>) -> Result<FetchKind, Malformed> {
        match r.u8("what to fetch")? {
            0 => Ok(FetchKind::Records),
            1 => Ok(FetchKind::Ranges),
            2..=u8::MAX => Err(Malformed { field: "what to fetch" }),
        }
    }
}

/// From where on a syncing replica follows, and what it would know had it come there record by record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begin {
    /// It gets the records after this one.
    pub position: Position,
    /// Size of the volume, bytes.
    pub size_bytes: u64,
    /// The views of the latest view record.
    pub views: ViewState,
    /// Which epoch gave out which places.
    pub history: EpochHistory,
    /// The ack policies of the epoch.
    pub acks: AckPolicies,
    /// The other replicas out of the view, and up to where each is known to hold everything. What they lack is not said:
    /// all of the volume, as far as this replica is concerned.
    pub tracked: Vec<(ReplicaName, Seq)>,
}

/// Bytes of the volume for a syncing replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Copies are numbered upwards.
    pub id: u64,
    /// Which bytes.
    pub range: ByteRange,
    /// The bytes, whole blocks of them; empty if they are all zero.
    pub data: Bytes,
    /// CRC-32 of `data`, as the member sent it that the bytes were read at.
    pub crc: u32,
}

/// Names the replica that a session is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The volume's name.
    pub volume: ReplicaName,
    /// The replica's name.
    pub replica: ReplicaName,
    /// Who speaks.
    pub engine: EngineId,
}

/// A new replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Format {
    /// The volume's name.
    pub volume: ReplicaName,
    /// The replica's name.
    pub replica: ReplicaName,
    /// The volume's new identity.
    pub uuid: VolumeUuid,
    /// Size of the volume, bytes.
    pub size_bytes: u64,
    /// Size of the journal, bytes.
    pub journal_bytes: u64,
    /// The first view.
    pub view: View,
    /// Whether the replica is to be copied to and cannot stand for the volume, as one that is added to a volume.
    pub syncing: bool,
}

/// From an agent to an engine.
#[derive(Clone, Debug, PartialEq)]
pub enum ToEngine {
    /// The replica is there.
    Welcome(Welcome),
    /// The replica was made.
    Formatted,
    /// The promise is durable.
    Promised(Promised),
    /// Every record up to here is durable.
    Durable {
        /// Last such place.
        seq: Seq,
    },
    /// Answers a `Ping`.
    Pong {
        /// The token of the ping.
        token: u64,
    },
    /// Answers a `Read`.
    ReadDone {
        /// The id of the read.
        id: u64,
        /// The last record applied when the image was looked at: what the answer may show.
        applied: Seq,
        /// What was asked for, or why it is not there.
        outcome: ReadOutcome,
    },
    /// A record asked for with `Fetch`.
    Fetched(Record),
    /// The range of a record asked for with `Fetch`.
    Changed {
        /// Its place.
        seq: Seq,
        /// The bytes of the volume that it changed; empty if it changed none.
        range: ByteRange,
    },
    /// No more records will come for this `Fetch`. Some may be missing at the end: ask again from there.
    FetchEnd {
        /// First place that was not sent.
        next: Seq,
    },
    /// The replica cannot take records just now, or can again.
    Condition(Condition),
    /// The session is refused or ends.
    Refused(Refused),
    /// `Begin` is durable.
    Begun,
    /// Copies up to this one are durable.
    Copied {
        /// The last such copy.
        id: u64,
    },
    /// `Synced` is durable.
    InSync,
    /// Answers `ListDirty`.
    Dirty(Dirty),
    /// Answers `Extend`.
    Extended {
        /// The size asked for.
        size_bytes: u64,
        /// Why there is no room; empty if there is.
        refused: String,
    },
}

/// A part of what a replica out of the view lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirty {
    /// The replica.
    pub subject: ReplicaName,
    /// The part begins at this byte.
    pub from: u64,
    /// The next part begins at this byte; the size of the volume if there is none.
    pub next: u64,
    /// What it lacks in this part, in order.
    pub ranges: Vec<ByteRange>,
    /// All that it lacks from `from` on, bytes.
    pub remaining_bytes: u64,
}

impl Dirty {
    /// Ranges in one part, at most.
    pub const RANGES_MAX: usize = 1024;
}

/// What came of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadOutcome {
    /// The bytes, with their CRC-32.
    Data {
        /// The bytes.
        data: Bytes,
        /// CRC-32 of `data`.
        crc: u32,
    },
    /// How the range is kept, from its first byte on; may end before the range does.
    Extents(Vec<Extent>),
    /// The system was told that the range will be read soon, or cannot be told.
    Prefetched,
    /// What was found of each block, in order.
    Scrubbed(Vec<BlockFound>),
    /// A block does not match its stored checksum.
    ChecksumMismatch {
        /// First byte of the first such block.
        offset: u64,
    },
    /// The disk reported an error, and it cannot be said for which block.
    Failed,
    /// The disk reports an error for a block.
    Unreadable {
        /// First byte of the first such block.
        offset: u64,
    },
    /// The read was cancelled before it was at work.
    Cancelled,
    /// The bytes changed between the replica, which had checked them, and whoever asked ([`ToEngine::checked`]). No
    /// agent says so.
    Damaged,
}

/// How well a replica is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It takes records.
    Healthy,
    /// Its disk is full: journaled records wait for space to be applied.
    NoSpace,
    /// A durable write failed: it takes nothing until it is restarted.
    Poisoned,
}

/// Answers `Hello`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The volume's identity.
    pub uuid: VolumeUuid,
    /// Size of the volume, bytes.
    pub size_bytes: u64,
    /// Room in the journal, bytes.
    pub journal_bytes: u64,
    /// Payload of a record at most, bytes.
    pub record_payload_bytes_max: u32,
    /// The highest promise given.
    pub promised: Epoch,
    /// How long ago another engine last confirmed its lease here, ms; `None` if none counts on it.
    pub other_engine_ms_ago: Option<u64>,
}

/// Answers `Promise`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promised {
    /// The epoch promised.
    pub epoch: Epoch,
    /// The last durable record.
    pub position: Position,
    /// Size of the volume as of that record, bytes.
    pub size_bytes: u64,
    /// The views of the latest view record.
    pub views: ViewState,
    /// Which epoch gave out which places.
    pub history: EpochHistory,
    /// The ack policies of the latest epoch that reached it; none if it never served.
    pub acks: Option<AckPolicies>,
    /// Whether the replica is being copied to and so cannot stand for the volume.
    pub syncing: bool,
    /// First record that the journal still holds; `position.seq` + 1 if none.
    pub journal_first: Seq,
    /// Up to here every member held the order durably, as far as it was told.
    pub stable: Seq,
    /// The replicas out of the view whose dirty ranges it keeps, and up to where each is known to hold everything.
    pub tracked: Vec<(ReplicaName, Seq)>,
    /// How long another engine may still count on an older promise, ms.
    pub lease_remaining_ms: u32,
    /// Whole blocks of which each is as before or as after a write that is not in its log: the replica died while it wrote
    /// there. Other members may hold the other of the two.
    pub unsettled: Vec<ByteRange>,
}

/// The most ranges that a replica names as unsettled: as many as a frame has room for beside the longest history.
pub const UNSETTLED_MAX: usize = 512;

/// Why a session is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The kind of reason.
    pub reason: RefusedReason,
    /// For people.
    pub text: String,
}

/// Kinds of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedReason {
    /// A higher epoch was promised to another engine.
    Fenced {
        /// That epoch.
        promised: Epoch,
    },
    /// There is no such replica here.
    NoReplica,
    /// A replica with data is there already.
    HasData,
    /// The replica cannot be opened or written.
    Unusable,
    /// The engine said what it may not say.
    Protocol,
}

impl ToAgent {
    /// The number of the message in a frame.
    #[must_use]
    pub fn number(&self) -> u8 {
        match self {
            ToAgent::Hello(_) => 1,
            ToAgent::Format(_) => 2,
            ToAgent::Promise { .. } => 3,
            ToAgent::Append(_) => 4,
            ToAgent::Stable { .. } => 5,
            ToAgent::Ping { .. } => 6,
            ToAgent::Read { .. } => 7,
            ToAgent::Fetch { .. } => 8,
            ToAgent::Goodbye => 9,
            ToAgent::Begin(_) => 10,
            ToAgent::Copy(_) => 11,
            ToAgent::Synced => 12,
            ToAgent::ListDirty { .. } => 13,
            ToAgent::Extend { .. } => 14,
            ToAgent::CancelRead { .. } => 15,
        }
    }

    /// Appends the body to `out`; returns the bulk data that follows it.
    pub fn encode_body(&self, out: &mut BytesMut) -> Bytes {
        match self {
            ToAgent::Hello(hello) => {
                cursor::put_text(out, hello.volume.as_str());
                cursor::put_text(out, hello.replica.as_str());
                out.put_slice(&hello.engine);
            }
            ToAgent::Format(format) => {
                cursor::put_text(out, format.volume.as_str());
                cursor::put_text(out, format.replica.as_str());
                cursor::put_uuid(out, format.uuid);
                out.put_u64_le(format.size_bytes);
                out.put_u64_le(format.journal_bytes);
                cursor::put_view(out, &format.view);
                out.put_u8(u8::from(format.syncing));
            }
            ToAgent::Promise { epoch, engine, lease_ms } => {
                out.put_u64_le(epoch.0);
                out.put_slice(engine);
                out.put_u32_le(*lease_ms);
            }
            ToAgent::Append(record) => {
                record.header.encode(out);
                return record.payload.clone();
            }
            ToAgent::Stable { seq } => out.put_u64_le(seq.0),
            ToAgent::Ping { token } => out.put_u64_le(*token),
            ToAgent::Read { id, what, offset, length } => {
                out.put_u64_le(*id);
                out.put_u8(what.number());
                out.put_u64_le(*offset);
                out.put_u64_le(*length);
            }
            ToAgent::Fetch { from, to, what } => {
                out.put_u64_le(from.0);
                out.put_u64_le(to.0);
                out.put_u8(what.number());
            }
            ToAgent::Goodbye | ToAgent::Synced => {}
            ToAgent::Begin(begin) => encode_begin(begin, out),
            ToAgent::Copy(copy) => {
                out.put_u64_le(copy.id);
                out.put_u64_le(copy.range.offset);
                out.put_u64_le(copy.range.length);
                out.put_u32_le(copy.crc);
                return copy.data.clone();
            }
            ToAgent::ListDirty { subject, from } => {
                cursor::put_text(out, subject.as_str());
                out.put_u64_le(*from);
            }
            ToAgent::Extend { size_bytes } => out.put_u64_le(*size_bytes),
            ToAgent::CancelRead { id } => out.put_u64_le(*id),
        }
        Bytes::new()
    }

    /// Reads a message from its number, body and bulk data. A record's payload is compared with its checksum here, by
    /// whoever reads the connection, so that nobody has to do it with a lock held.
    pub fn decode(number: u8, body: &[u8], bulk: Bytes) -> Result<ToAgent, Malformed> {
        let mut r = Reader::new(body);
        let mut bulk = Some(bulk);
        let message = match number {
            1 => {
                let (volume, replica) = (r.name("volume")?, r.name("replica")?);
                ToAgent::Hello(Hello { volume, replica, engine: r.uuid("engine")?.0 })
            }
            2 => ToAgent::Format(Format {
                volume: r.name("volume")?,
                replica: r.name("replica")?,
                uuid: r.uuid("uuid")?,
                size_bytes: r.u64("size")?,
                journal_bytes: r.u64("journal size")?,
                view: r.view("view")?,
                syncing: r.bool("syncing")?,
            }),
            3 => ToAgent::Promise {
                epoch: Epoch(r.u64("epoch")?),
                engine: r.uuid("engine")?.0,
                lease_ms: r.u32("lease")?,
            },
            4 => ToAgent::Append(decode_record(&mut r, &mut bulk)?),
            5 => ToAgent::Stable { seq: Seq(r.u64("seq")?) },
            6 => ToAgent::Ping { token: r.u64("token")? },
            7 => ToAgent::Read {
                id: r.u64("id")?,
                what: ReadKind::decode(&mut r)?,
                offset: r.u64("offset")?,
                length: r.u64("length")?,
            },
            8 => ToAgent::Fetch { from: Seq(r.u64("from")?), to: Seq(r.u64("to")?), what: FetchKind::decode(&mut r)? },
            9 => ToAgent::Goodbye,
            10 => ToAgent::Begin(decode_begin(&mut r)?),
            11 => ToAgent::Copy(decode_copy(&mut r, &mut bulk)?),
            12 => ToAgent::Synced,
            13 => ToAgent::ListDirty { subject: r.name("subject")?, from: r.u64("offset")? },
            14 => ToAgent::Extend { size_bytes: r.u64("size")? },
            15 => ToAgent::CancelRead { id: r.u64("id")? },
            0 | 16..=u8::MAX => return Err(Malformed { field: "message number" }),
        };
        finish(r, bulk)?;
        Ok(message)
    }
}

fn encode_tracked(tracked: &[(ReplicaName, Seq)], out: &mut BytesMut) {
    out.put_u8(tracked.len() as u8);
    for (name, acknowledged) in tracked {
        cursor::put_text(out, name.as_str());
        out.put_u64_le(acknowledged.0);
    }
}

fn decode_tracked(r: &mut Reader<'_>) -> Result<Vec<(ReplicaName, Seq)>, Malformed> {
    let count = r.u8("tracked replicas")?;
    (0..count).map(|_| Ok((r.name("tracked replica")?, Seq(r.u64("tracked replica")?)))).collect()
}

fn encode_begin(begin: &Begin, out: &mut BytesMut) {
    cursor::put_position(out, begin.position);
    out.put_u64_le(begin.size_bytes);
    cursor::put_view_state(out, &begin.views);
    cursor::put_history(out, &begin.history);
    AckPolicies::encode_known(Some(begin.acks), out);
    encode_tracked(&begin.tracked, out);
}

fn decode_begin(r: &mut Reader<'_>) -> Result<Begin, Malformed> {
    Ok(Begin {
        position: r.position("position")?,
        size_bytes: r.u64("size")?,
        views: r.view_state("views")?,
        history: r.history("history")?,
        acks: AckPolicies::decode_known(r)?.ok_or(Malformed { field: "ack policies" })?,
        tracked: decode_tracked(r)?,
    })
}

fn decode_copy(r: &mut Reader<'_>, bulk: &mut Option<Bytes>) -> Result<Copy, Malformed> {
    let (id, offset, length) = (r.u64("copy id")?, r.u64("offset")?, r.u64("length")?);
    let crc = r.u32("checksum")?;
    let data = bulk.take().unwrap_or_default();
    if crc32(&data) != crc {
        return Err(Malformed { field: "bytes of a copy (checksum mismatch)" });
    }
    let sound = length > 0
        && length.is_multiple_of(BLOCK_BYTES)
        && offset.is_multiple_of(BLOCK_BYTES)
        && offset.checked_add(length).is_some()
        && (data.is_empty() || data.len() as u64 == length);
    let range = ByteRange { offset, length };
    if sound { Ok(Copy { id, range, data, crc }) } else { Err(Malformed { field: "copy" }) }
}

fn decode_record(r: &mut Reader<'_>, bulk: &mut Option<Bytes>) -> Result<Record, Malformed> {
    let header = RecordHeader::decode(r)?;
    let payload = bulk.take().unwrap_or_default();
    if payload.len() != header.payload_length as usize {
        return Err(Malformed { field: "record payload" });
    }
    let record = Record { header, payload };
    record.check_payload().map_err(|_| Malformed { field: "record payload (checksum mismatch)" })?;
    Ok(record)
}

fn finish(r: Reader<'_>, bulk: Option<Bytes>) -> Result<(), Malformed> {
    if bulk.is_some_and(|b| !b.is_empty()) {
        return Err(Malformed { field: "bulk data" });
    }
    r.finish("message body")
}

impl ToEngine {
    /// The number of the message in a frame.
    #[must_use]
    pub fn number(&self) -> u8 {
        match self {
            ToEngine::Welcome(_) => 1,
            ToEngine::Formatted => 2,
            ToEngine::Promised(_) => 3,
            ToEngine::Durable { .. } => 4,
            ToEngine::Pong { .. } => 5,
            ToEngine::ReadDone { .. } => 6,
            ToEngine::Fetched(_) => 7,
            ToEngine::FetchEnd { .. } => 8,
            ToEngine::Condition(_) => 9,
            ToEngine::Refused(_) => 10,
            ToEngine::Begun => 11,
            ToEngine::Copied { .. } => 12,
            ToEngine::InSync => 13,
            ToEngine::Dirty(_) => 14,
            ToEngine::Extended { .. } => 15,
            ToEngine::Changed { .. } => 16,
        }
    }

    /// Appends the body to `out`; returns the bulk data that follows it.
    pub fn encode_body(&self, out: &mut BytesMut) -> Bytes {
        match self {
            ToEngine::Welcome(w) => {
                cursor::put_uuid(out, w.uuid);
                out.put_u64_le(w.size_bytes);
                out.put_u64_le(w.journal_bytes);
                out.put_u32_le(w.record_payload_bytes_max);
                out.put_u64_le(w.promised.0);
                out.put_u8(u8::from(w.other_engine_ms_ago.is_some()));
                out.put_u64_le(w.other_engine_ms_ago.unwrap_or(0));
            }
            ToEngine::Formatted | ToEngine::Begun | ToEngine::InSync => {}
            ToEngine::Copied { id } => out.put_u64_le(*id),
            ToEngine::Dirty(dirty) => {
                cursor::put_text(out, dirty.subject.as_str());
                out.put_u64_le(dirty.from);
                out.put_u64_le(dirty.next);
                out.put_u64_le(dirty.remaining_bytes);
                cursor::put_ranges(out, &dirty.ranges);
            }
            ToEngine::Extended { size_bytes, refused } => {
                out.put_u64_le(*size_bytes);
                cursor::put_text(out, refused);
            }
            ToEngine::Promised(p) => {
                out.put_u64_le(p.epoch.0);
                cursor::put_position(out, p.position);
                out.put_u64_le(p.size_bytes);
                cursor::put_view_state(out, &p.views);
                cursor::put_history(out, &p.history);
                AckPolicies::encode_known(p.acks, out);
                out.put_u8(u8::from(p.syncing));
                out.put_u64_le(p.journal_first.0);
                out.put_u64_le(p.stable.0);
                encode_tracked(&p.tracked, out);
                out.put_u32_le(p.lease_remaining_ms);
                cursor::put_ranges(out, &p.unsettled);
            }
            ToEngine::Durable { seq } => out.put_u64_le(seq.0),
            ToEngine::Pong { token } => out.put_u64_le(*token),
            ToEngine::ReadDone { id, applied, outcome } => {
                out.put_u64_le(*id);
                out.put_u64_le(applied.0);
                match outcome {
                    ReadOutcome::Data { data, crc } => {
                        out.put_u8(0);
                        out.put_u32_le(*crc);
                        return data.clone();
                    }
                    ReadOutcome::ChecksumMismatch { offset } => {
                        out.put_u8(1);
                        out.put_u64_le(*offset);
                    }
                    ReadOutcome::Failed => out.put_u8(2),
                    ReadOutcome::Extents(found) => {
                        out.put_u8(3);
                        extents::put_extents(out, found);
                    }
                    ReadOutcome::Prefetched => out.put_u8(4),
                    ReadOutcome::Unreadable { offset } => {
                        out.put_u8(5);
                        out.put_u64_le(*offset);
                    }
                    ReadOutcome::Cancelled => out.put_u8(6),
                    ReadOutcome::Damaged => out.put_u8(255),
                    ReadOutcome::Scrubbed(found) => {
                        out.put_u8(7);
                        scrub::put_blocks(out, found);
                    }
                }
            }
            ToEngine::Fetched(record) => {
                record.header.encode(out);
                return record.payload.clone();
            }
            ToEngine::Changed { seq, range } => {
                out.put_u64_le(seq.0);
                out.put_u64_le(range.offset);
                out.put_u64_le(range.length);
            }
            ToEngine::FetchEnd { next } => out.put_u64_le(next.0),
            ToEngine::Condition(condition) => out.put_u8(match condition {
                Condition::Healthy => 0,
                Condition::NoSpace => 1,
                Condition::Poisoned => 2,
            }),
            ToEngine::Refused(refused) => encode_refused(refused, out),
        }
        Bytes::new()
    }

    /// The message, if the bytes of a read in it are those that its replica checked. Whoever brings an answer to the volume
    /// asks this, wherever it came from: it is the one place where the bytes of reads are compared with their checksum.
    #[must_use]
    pub fn checked(self) -> ToEngine {
        match self {
            ToEngine::ReadDone { id, applied, outcome: ReadOutcome::Data { data, crc } } if crc32(&data) != crc => {
                ToEngine::ReadDone { id, applied, outcome: ReadOutcome::Damaged }
            }
            other => other,
        }
    }

    /// Reads a message from its number, body and bulk data. Payloads of records are compared with their checksums here; for
    /// the bytes of reads see [`ToEngine::checked`].
    pub fn decode(number: u8, body: &[u8], bulk: Bytes) -> Result<ToEngine, Malformed> {
        let mut r = Reader::new(body);
        let mut bulk = Some(bulk);
        let message = match number {
            1 => ToEngine::Welcome(decode_welcome(&mut r)?),
            2 => ToEngine::Formatted,
            3 => ToEngine::Promised(decode_promised(&mut r)?),
            4 => ToEngine::Durable { seq: Seq(r.u64("seq")?) },
            5 => ToEngine::Pong { token: r.u64("token")? },
            6 => ToEngine::ReadDone {
                id: r.u64("id")?,
                applied: Seq(r.u64("applied")?),
                outcome: decode_outcome(&mut r, &mut bulk)?,
            },
            7 => ToEngine::Fetched(decode_record(&mut r, &mut bulk)?),
            8 => ToEngine::FetchEnd { next: Seq(r.u64("next")?) },
            9 => ToEngine::Condition(match r.u8("condition")? {
                0 => Condition::Healthy,
                1 => Condition::NoSpace,
                2 => Condition::Poisoned,
                3..=u8::MAX => return Err(Malformed { field: "condition" }),
            }),
            10 => ToEngine::Refused(decode_refused(&mut r)?),
            11 => ToEngine::Begun,
            12 => ToEngine::Copied { id: r.u64("copy id")? },
            13 => ToEngine::InSync,
            14 => ToEngine::Dirty(Dirty {
                subject: r.name("subject")?,
                from: r.u64("offset")?,
                next: r.u64("offset")?,
                remaining_bytes: r.u64("remaining")?,
                ranges: r.ranges("ranges")?,
            }),
            15 => ToEngine::Extended { size_bytes: r.u64("size")?, refused: r.text("text")? },
            16 => ToEngine::Changed {
                seq: Seq(r.u64("seq")?),
                range: ByteRange { offset: r.u64("offset")?, length: r.u64("length")? },
            },
            0 | 17..=u8::MAX => return Err(Malformed { field: "message number" }),
        };
        finish(r, bulk)?;
        Ok(message)
    }
}

fn decode_outcome(r: &mut Reader<'_>, bulk: &mut Option<Bytes>) -> Result<ReadOutcome, Malformed> {
    Ok(match r.u8("outcome")? {
        0 => {
            let crc = r.u32("checksum")?;
            ReadOutcome::Data { data: bulk.take().unwrap_or_default(), crc }
        }
        1 => ReadOutcome::ChecksumMismatch { offset: r.u64("offset")? },
        2 => ReadOutcome::Failed,
        3 => ReadOutcome::Extents(extents::read_extents(r)?),
        4 => ReadOutcome::Prefetched,
        5 => ReadOutcome::Unreadable { offset: r.u64("offset")? },
        6 => ReadOutcome::Cancelled,
        7 => ReadOutcome::Scrubbed(scrub::read_blocks(r)?),
        255 => ReadOutcome::Damaged,
        8..=254 => return Err(Malformed { field: "outcome" }),
    })
}

fn decode_welcome(r: &mut Reader<'_>) -> Result<Welcome, Malformed> {
    let welcome = Welcome {
        uuid: r.uuid("uuid")?,
        size_bytes: r.u64("size")?,
        journal_bytes: r.u64("journal size")?,
        record_payload_bytes_max: r.u32("payload limit")?,
        promised: Epoch(r.u64("promised")?),
        other_engine_ms_ago: None,
    };
    let (is_some, ms) = (r.bool("other engine")?, r.u64("other engine")?);
    Ok(Welcome { other_engine_ms_ago: is_some.then_some(ms), ..welcome })
}

fn decode_unsettled(r: &mut Reader<'_>) -> Result<Vec<ByteRange>, Malformed> {
    let ranges = r.ranges("unsettled ranges")?;
    if ranges.len() <= UNSETTLED_MAX { Ok(ranges) } else { Err(Malformed { field: "unsettled ranges" }) }
}

fn decode_promised(r: &mut Reader<'_>) -> Result<Promised, Malformed> {
    Ok(Promised {
        epoch: Epoch(r.u64("epoch")?),
        position: r.position("position")?,
        size_bytes: r.u64("size")?,
        views: r.view_state("views")?,
        history: r.history("history")?,
        acks: AckPolicies::decode_known(r)?,
        syncing: r.bool("syncing")?,
        journal_first: Seq(r.u64("journal first")?),
        stable: Seq(r.u64("stable")?),
        tracked: decode_tracked(r)?,
        lease_remaining_ms: r.u32("lease")?,
        unsettled: decode_unsettled(r)?,
    })
}

fn encode_refused(refused: &Refused, out: &mut BytesMut) {
    let (number, promised) = match refused.reason {
        RefusedReason::Fenced { promised } => (1, promised),
        RefusedReason::NoReplica => (2, Epoch(0)),
        RefusedReason::HasData => (3, Epoch(0)),
        RefusedReason::Unusable => (4, Epoch(0)),
        RefusedReason::Protocol => (5, Epoch(0)),
    };
    out.put_u8(number);
    out.put_u64_le(promised.0);
    cursor::put_text(out, &refused.text);
}

fn decode_refused(r: &mut Reader<'_>) -> Result<Refused, Malformed> {
    let (number, promised) = (r.u8("reason")?, Epoch(r.u64("promised")?));
    let reason = match number {
        1 => RefusedReason::Fenced { promised },
        2 => RefusedReason::NoReplica,
        3 => RefusedReason::HasData,
        4 => RefusedReason::Unusable,
        5 => RefusedReason::Protocol,
        0 | 6..=u8::MAX => return Err(Malformed { field: "reason" }),
    };
    Ok(Refused { reason, text: r.text("text")? })
}
