//! The seam between the NBD front and a volume: what the front asks for, and how it is answered.
//!
//! Owns no state. A [`Request`] here is already valid: inside the export, within the payload limit, and never a
//! change of a read-only export.

use bytes::Bytes;

use super::access::AccessRules;

/// What the handshake advertises for one volume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExportInfo {
    /// Name that clients ask for; at most 4096 bytes.
    pub name: String,
    /// Text for people, shown in lists; may be empty; at most 4096 bytes.
    pub description: String,
    /// Size in bytes at this moment; need not be a multiple of anything.
    pub size_bytes: u64,
    /// Whether changes are refused with EPERM.
    pub read_only: bool,
    /// Whether clients should treat it as a rotating disk, which seeks slowly.
    pub rotational: bool,
    /// Who may use it.
    pub access: AccessRules,
}

/// One thing a client wants done. Offsets and lengths are bytes; lengths are never zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Completed with exactly `length` bytes.
    Read {
        /// First byte.
        offset: u64,
        /// At most 32 MiB.
        length: u32,
    },
    /// Replaces `data.len()` bytes.
    Write {
        /// First byte.
        offset: u64,
        /// 1 byte to 32 MiB, in a buffer of its own.
        data: Bytes,
        /// Durable before completion.
        fua: bool,
    },
    /// Completed when every change answered before, on any connection, is durable.
    Flush,
    /// The range's content may be forgotten.
    Trim {
        /// First byte.
        offset: u64,
        /// Up to just under 4 GiB.
        length: u64,
        /// Durable before completion.
        fua: bool,
    },
    /// The range reads as zeroes from now on.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Up to just under 4 GiB.
        length: u64,
        /// Durable before completion.
        fua: bool,
        /// The range must stay allocated.
        no_hole: bool,
    },
    /// Completed with what is known of the allocation of the range, from its first byte on.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Any length that fits the export.
        length: u64,
        /// One extent is enough.
        one: bool,
    },
    /// The range will be read soon. Completed when that is known where it matters, at the latest; a hint.
    Cache {
        /// First byte.
        offset: u64,
        /// Any length that fits the export.
        length: u64,
    },
}

/// How a part of an export is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocation {
    /// It may hold anything, and takes space.
    Data,
    /// It reads as zeroes, and takes space.
    Zeroes,
    /// It reads as zeroes, and takes none.
    Hole,
}

/// A run of bytes that are kept alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; never zero.
    pub length: u64,
    /// How they are kept.
    pub allocation: Allocation,
}

/// What a request came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Done; for everything but reads and block status.
    Done,
    /// For a read: exactly the bytes it asked for.
    Data(Bytes),
    /// For a block status: at least one extent. They follow each other from the first byte asked for; together they
    /// may cover less than was asked for, never more.
    Extents(Vec<Extent>),
}

/// A change that was not taken in, as its client may have hung up, sent it again on another connection, and newer ones
/// after it. Handed back as it was given.
#[derive(Debug)]
pub struct Stale {
    /// What was asked for.
    pub request: Request,
    /// The duty to answer it.
    pub done: Completion,
}

/// What a backend may answer instead of success.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The data could not be read or made durable.
    #[error("I/O error")]
    Io,
    /// No replica has room for the change.
    #[error("no space left")]
    NoSpace,
    /// The volume is stopping.
    #[error("the volume is shutting down")]
    Shutdown,
    /// The request makes no sense to the volume.
    #[error("invalid request")]
    Invalid,
}

type OnAnswer = Box<dyn FnOnce(Result<Answer, IoError>) + Send>;

/// The right and duty to answer one request, once, from any thread. Dropped unanswered, it answers [`IoError::Io`],
/// so that no client waits for ever.
pub struct Completion(Option<OnAnswer>);

impl Completion {
    /// `answer` is called exactly once. It must not block; it may run on the thread that completes or drops.
    pub fn new(answer: impl FnOnce(Result<Answer, IoError>) + Send + 'static) -> Self {
        Self(Some(Box::new(answer)))
    }

    /// Answers, with the kind of [`Answer`] that belongs to the request.
    pub fn complete(mut self, result: Result<Answer, IoError>) {
        if let Some(answer) = self.0.take() {
            answer(result);
        }
    }
}

impl Completion {
    /// Gives up the right to answer: the connection ends without an answer.
    pub fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if let Some(answer) = self.0.take() {
            answer(Err(IoError::Io));
        }
    }
}

impl std::fmt::Debug for Completion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Completion")
    }
}

/// A volume as the NBD front sees it.
pub trait Backend: Send + Sync + 'static {
    /// What to advertise to a client that connects now. Only the size may change while the export is served.
    fn export(&self) -> ExportInfo;

    /// Size in bytes at this moment, asked for every request. It never shrinks.
    fn size_bytes(&self) -> u64;

    /// Takes one request. Must not block; may call `done` inline or later from any thread. Every request gets its
    /// place in the volume's order at the time of this call.
    ///
    /// `is_stale` tells whether the client has hung up, for all that is known. For a change it is asked when nothing else
    /// can get a place before this request does any more, however long this thread was held up: a change of a client
    /// that had hung up before another connection's request got its place never gets one after it. If it is stale, it is
    /// handed back and nothing is changed.
    fn submit(&self, request: Request, done: Completion, is_stale: &dyn Fn() -> bool) -> Result<(), Stale>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_completion_dropped_unanswered_answers_an_io_error() {
        let (sender, receiver) = mpsc::channel();
        drop(Completion::new(move |result| sender.send(result).unwrap()));
        assert_eq!(receiver.recv().unwrap(), Err(IoError::Io));
    }

    #[test]
    fn a_completion_answers_once() {
        let (sender, receiver) = mpsc::channel();
        Completion::new(move |result| sender.send(result).unwrap()).complete(Ok(Answer::Done));
        assert_eq!(receiver.iter().count(), 1);
    }

    #[test]
    fn a_forgotten_completion_answers_nothing() {
        let (sender, receiver) = mpsc::channel();
        Completion::new(move |result| sender.send(result).unwrap()).forget();
        assert_eq!(receiver.iter().count(), 0);
    }
}
