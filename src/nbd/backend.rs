//! The seam between the NBD front and a volume: what the front asks for, and how it is answered.
//!
//! Owns no state. A [`Request`] here is already valid: inside the export, within the payload limit, and never a
//! change of a read-only export.

use bytes::Bytes;

/// What the handshake advertises for one volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Name that clients ask for; at most 4096 bytes.
    pub name: String,
    /// Text for people, shown in lists; may be empty; at most 4096 bytes.
    pub description: String,
    /// Size in bytes at this moment; need not be a multiple of anything.
    pub size_bytes: u64,
    /// Whether changes are refused with EPERM.
    pub read_only: bool,
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

type Answer = Box<dyn FnOnce(Result<Bytes, IoError>) + Send>;

/// The right and duty to answer one request, once, from any thread. Dropped unanswered, it answers [`IoError::Io`],
/// so that no client waits for ever.
pub struct Completion(Option<Answer>);

impl Completion {
    /// `answer` is called exactly once. It must not block; it may run on the thread that completes or drops.
    pub fn new(answer: impl FnOnce(Result<Bytes, IoError>) + Send + 'static) -> Self {
        Self(Some(Box::new(answer)))
    }

    /// Answers. A read carries its data, everything else `Bytes::new()`.
    pub fn complete(mut self, result: Result<Bytes, IoError>) {
        if let Some(answer) = self.0.take() {
            answer(result);
        }
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
    fn submit(&self, request: Request, done: Completion);
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
        Completion::new(move |result| sender.send(result).unwrap()).complete(Ok(Bytes::new()));
        assert_eq!(receiver.iter().count(), 1);
    }
}
