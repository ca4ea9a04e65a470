//! The bytes of one connection on their way in: one read buffer for headers and small payloads, and large payloads
//! straight into buffers of their own.
//!
//! Understands no request. Reports whether it had to wait for the peer, as what was waited for may be stale.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::AsyncReadExt;

use super::stream::ReadHalf;

/// Holds some thirty writes of 4 KiB, or thousands of headers, per system call.
const BUFFER_BYTES: usize = 128 << 10;
/// Payloads up to this long go through the buffer, so that what follows them arrives in the same system call.
const SMALL_PAYLOAD_BYTES_MAX: usize = BUFFER_BYTES / 2;

/// A payload, and whether the peer made us wait for some of it.
#[derive(Debug)]
pub(super) struct Payload {
    pub(super) data: Bytes,
    pub(super) waited: bool,
}

/// How a read of at least one byte went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fill {
    Read { waited: bool },
    EndOfStream,
}

/// The incoming side of one connection.
#[derive(Debug)]
pub(super) struct Intake {
    stream: ReadHalf,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Intake {
    /// `already_read` came with the handshake but belongs to what follows it; never more than a handshake buffers.
    pub(super) fn new(stream: ReadHalf, already_read: &[u8]) -> Self {
        let mut buffer = vec![0; BUFFER_BYTES.max(already_read.len())].into_boxed_slice();
        buffer[..already_read.len()].copy_from_slice(already_read);
        Self { stream, buffer, start: 0, end: already_read.len() }
    }

    /// Takes the next `N` bytes, if they are here.
    pub(super) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let taken = *self.buffer[self.start..self.end].first_chunk::<N>()?;
        self.start += N;
        Some(taken)
    }

    /// Whether so many bytes are here already.
    pub(super) fn holds(&self, length: usize) -> bool {
        self.buffered_bytes() >= length
    }

    fn buffered_bytes(&self) -> usize {
        self.end - self.start
    }

    /// Reads more into the buffer, which must not be full.
    pub(super) async fn fill(&mut self) -> io::Result<Fill> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let read = self.stream.read(&mut self.buffer[self.end..]);
        let (read_bytes, waited) = noting_wait(read).await?;
        self.end += read_bytes;
        Ok(if read_bytes == 0 { Fill::EndOfStream } else { Fill::Read { waited } })
    }

    /// Reads a payload into a buffer of exactly its size. The caller has checked `length` against its limits.
    ///
    /// A payload that trickles is given up as well as one that stops: it holds memory that other clients wait for.
    pub(super) async fn read_payload(&mut self, length: usize, stall_timeout: Duration) -> io::Result<Payload> {
        let limit = stall_timeout + Duration::from_secs((length / PAYLOAD_BYTES_PER_SECOND_MIN) as u64);
        let reading = self.read_payload_unless_stalled(length, stall_timeout);
        tokio::time::timeout(limit, reading).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    async fn read_payload_unless_stalled(&mut self, length: usize, stall_timeout: Duration) -> io::Result<Payload> {
        let mut any_waited = false;
        while length <= SMALL_PAYLOAD_BYTES_MAX && self.buffered_bytes() < length {
            match unless_stalled(stall_timeout, self.fill()).await? {
                Fill::Read { waited } => any_waited |= waited,
                Fill::EndOfStream => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let here = self.buffered_bytes().min(length);
        let mut data = BytesMut::with_capacity(length);
        data.put_slice(&self.buffer[self.start..self.start + here]);
        self.start += here;
        while data.len() < length {
            let filled = data.len();
            let mut room = (&mut data).limit(length - filled);
            let read = noting_wait(self.stream.read_buf(&mut room));
            let (read_bytes, waited) = unless_stalled(stall_timeout, read).await?;
            any_waited |= waited;
            if read_bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(Payload { data: data.freeze(), waited: any_waited })
    }

    /// Throws bytes away without keeping more of them than the buffer holds.
    pub(super) async fn discard(&mut self, length: usize, stall_timeout: Duration) -> io::Result<()> {
        let mut remaining = length;
        loop {
            let here = self.buffered_bytes().min(remaining);
            self.start += here;
            remaining -= here;
            if remaining == 0 {
                return Ok(());
            }
            if unless_stalled(stall_timeout, self.fill()).await? == Fill::EndOfStream {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Throws away whatever still comes, until the peer has closed too.
    pub(super) async fn discard_to_end(&mut self) -> io::Result<()> {
        loop {
            self.start = self.end;
            if self.fill().await? == Fill::EndOfStream {
                return Ok(());
            }
        }
    }
}

/// A client must send payloads at least this fast, beside [`super::Limits::stall_timeout`].
const PAYLOAD_BYTES_PER_SECOND_MIN: usize = 256 * 1024;

async fn unless_stalled<T>(stall_timeout: Duration, read: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(stall_timeout, read).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// A read, and whether it had to be waited for.
async fn noting_wait(read: impl Future<Output = io::Result<usize>>) -> io::Result<(usize, bool)> {
    let mut read = pin!(read);
    let mut waited = false;
    let read_bytes = poll_fn(|cx| {
        let polled = read.as_mut().poll(cx);
        waited |= polled.is_pending();
        polled
    })
    .await?;
    Ok((read_bytes, waited))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Poll;

    use crate::nbd::stream::Stream;
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixStream;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn intake() -> (Intake, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (read, _write) = Stream::Unix(ours).split();
        (Intake::new(read, b"ab"), theirs)
    }

    /// Reads a payload whose second half is sent only when the reader has begun to wait.
    async fn read_in_halves(length: usize) -> Payload {
        let (mut intake, mut peer) = intake();
        let sent = vec![b'x'; length - 2];
        let (first, second) = sent.split_at(length / 2);
        peer.write_all(first).await.unwrap();
        let mut reading = pin!(intake.read_payload(length, PATIENCE));
        let complete = poll_fn(|cx| Poll::Ready(reading.as_mut().poll(cx).is_ready())).await;
        assert!(!complete);
        peer.write_all(second).await.unwrap();
        let payload = reading.await.unwrap();
        assert_eq!(payload.data[..2], *b"ab");
        assert_eq!(payload.data[2..], sent);
        payload
    }

    #[tokio::test]
    async fn a_payload_that_had_to_be_waited_for_says_so() {
        for length in [4096, SMALL_PAYLOAD_BYTES_MAX + 1000] {
            let payload = read_in_halves(length).await;
            assert!(payload.waited);
            assert_eq!(payload.data.len(), length);
        }
    }

    #[tokio::test]
    async fn a_payload_that_is_here_is_not_waited_for() {
        let (mut intake, mut peer) = intake();
        peer.write_all(b"cdefgh").await.unwrap();
        let filled = intake.fill().await.unwrap();
        assert!(matches!(filled, Fill::Read { .. }));
        let payload = intake.read_payload(5, PATIENCE).await.unwrap();
        assert_eq!((&payload.data[..], payload.waited), (&b"abcde"[..], false));
        assert_eq!(intake.take::<3>(), Some(*b"fgh"));
        assert_eq!(intake.take::<1>(), None);
    }

    #[tokio::test]
    async fn a_payload_cut_short_is_an_error() {
        let (mut intake, peer) = intake();
        drop(peer);
        let error = intake.read_payload(5, PATIENCE).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
