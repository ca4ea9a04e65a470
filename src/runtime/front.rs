//! A volume as its clients see it: their requests in the volume's words, its answers in theirs, and how long they took.
//! Decides nothing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use protocol::extents;
use protocol::ranges::ByteRange;

use super::latency::{Latency, Percentiles};
use super::volume_task::VolumeTask;
use crate::nbd::{Allocation, Answer, Backend, Completion, ExportInfo, Extent, IoError, Request as NbdRequest, Stale};
use crate::volume::{self, Failure, Request, Zeroing};

/// A client's request.
pub(super) struct Token {
    completion: Completion,
    begun: Instant,
    kind: Kind,
    length: u64,
}

/// What its latency is counted as, and what else its answer depends on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Change,
    Flush,
    Status {
        /// The first extent is enough.
        one: bool,
    },
    Prefetch,
}

/// What is measured of requests that were answered well.
pub(super) struct Figures {
    reads: Figure,
    changes: Figure,
}

/// What is measured of one kind of them.
struct Figure {
    latency: Latency,
    bytes: AtomicU64,
}

impl Figure {
    fn new() -> Figure {
        Figure { latency: Latency::new(), bytes: AtomicU64::new(0) }
    }

    fn record(&self, token: &Token) {
        self.latency.record(token.begun.elapsed());
        self.bytes.fetch_add(token.length, Ordering::Relaxed);
    }
}

impl Figures {
    pub(super) fn new() -> Figures {
        Figures { reads: Figure::new(), changes: Figure::new() }
    }

    pub(super) fn read_latency(&self) -> Percentiles {
        self.reads.latency.percentiles()
    }

    pub(super) fn change_latency(&self) -> Percentiles {
        self.changes.latency.percentiles()
    }

    /// Bytes read.
    pub(super) fn read_bytes(&self) -> u64 {
        self.reads.bytes.load(Ordering::Relaxed)
    }

    /// Bytes written; zeroes without payload do not count.
    pub(super) fn written_bytes(&self) -> u64 {
        self.changes.bytes.load(Ordering::Relaxed)
    }

    /// Answers a request, and measures it.
    pub(super) fn answer(&self, token: Token, outcome: Result<volume::Answer, Failure>) {
        if outcome.is_ok() {
            match token.kind {
                Kind::Read => self.reads.record(&token),
                Kind::Change => self.changes.record(&token),
                Kind::Flush | Kind::Status { .. } | Kind::Prefetch => {}
            }
        }
        let kind = token.kind;
        token.completion.complete(match (kind, outcome) {
            (_, Ok(volume::Answer::Done)) => Ok(Answer::Done),
            (_, Ok(volume::Answer::Data(data))) => Ok(Answer::Data(data)),
            (_, Ok(volume::Answer::Extents(found))) => Ok(Answer::Extents(shown(&found, kind))),
            // A hint that nobody could take is lost, and no error.
            (Kind::Prefetch, Err(Failure::Io | Failure::NoSpace)) => Ok(Answer::Done),
            (_, Err(Failure::Io)) => Err(IoError::Io),
            (_, Err(Failure::NoSpace)) => Err(IoError::NoSpace),
            (_, Err(Failure::Shutdown)) => Err(IoError::Shutdown),
        });
    }
}

/// Extents in the words of the front.
fn shown(found: &[extents::Extent], kind: Kind) -> Vec<Extent> {
    let count = if matches!(kind, Kind::Status { one: true }) { 1 } else { found.len() };
    let shown = |extent: &extents::Extent| Extent {
        length: extent.length,
        allocation: match extent.allocation {
            extents::Allocation::Data => Allocation::Data,
            extents::Allocation::Zeroes => Allocation::Zeroes,
            extents::Allocation::Hole => Allocation::Hole,
        },
    };
    found.iter().take(count).map(shown).collect()
}

impl Backend for VolumeTask {
    fn export(&self) -> ExportInfo {
        ExportInfo { size_bytes: VolumeTask::size_bytes(self), ..self.export.clone() }
    }

    fn size_bytes(&self) -> u64 {
        VolumeTask::size_bytes(self)
    }

    fn submit(&self, request: NbdRequest, completion: Completion, is_stale: &dyn Fn() -> bool) -> Result<(), Stale> {
        let (kind, length) = match &request {
            NbdRequest::Read { length, .. } => (Kind::Read, u64::from(*length)),
            NbdRequest::Write { data, .. } => (Kind::Change, data.len() as u64),
            // They carry nothing.
            NbdRequest::Trim { .. } | NbdRequest::WriteZeroes { .. } => (Kind::Change, 0),
            NbdRequest::Flush => (Kind::Flush, 0),
            NbdRequest::BlockStatus { one, .. } => (Kind::Status { one: *one }, 0),
            NbdRequest::Cache { .. } => (Kind::Prefetch, 0),
        };
        let is_change = kind == Kind::Change;
        let begun = Instant::now();
        let mut refused = Ok(());
        self.drive(|volume, now| {
            // With the volume locked: whoever wants a place for another request waits until this one has its own.
            if is_change && is_stale() {
                refused = Err(Stale { request, done: completion });
            } else {
                volume.submit(now, Token { completion, begun, kind, length }, in_the_words_of_the_volume(request));
            }
        });
        refused
    }
}

fn in_the_words_of_the_volume(request: NbdRequest) -> Request {
    match request {
        NbdRequest::Read { offset, length } => Request::Read(ByteRange { offset, length: length.into() }),
        NbdRequest::Write { offset, data, fua } => Request::Write { offset, data, fua },
        NbdRequest::Flush => Request::Flush,
        NbdRequest::BlockStatus { offset, length, .. } => Request::Status(ByteRange { offset, length }),
        NbdRequest::Cache { offset, length } => Request::Prefetch(ByteRange { offset, length }),
        NbdRequest::Trim { offset, length, fua } => {
            Request::Zero { range: ByteRange { offset, length }, fua, how: Zeroing::Trim }
        }
        NbdRequest::WriteZeroes { offset, length, fua, no_hole } => {
            let how = if no_hole { Zeroing::ZeroKeepAllocated } else { Zeroing::Zero };
            Request::Zero { range: ByteRange { offset, length }, fua, how }
        }
    }
}
