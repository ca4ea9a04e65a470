//! The bytes of one connection on their way in: one read buffer for headers and small payloads, and large payloads
//! straight into buffers of their own.
//!
//! Understands no request. Reads ahead of what is asked for when somebody has to know whether the connection has ended:
//! a peer's machine keeps the end back until there is room for all that comes before it.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::AsyncReadExt;

use super::budget::Loan;
use super::patience::{BYTES_PER_SECOND_MIN, Patience};
use super::pulse::Moment;
use super::stream::ReadHalf;

/// Holds some thirty writes of 4 KiB, or thousands of headers, per system call.
const BUFFER_BYTES: usize = 128 << 10;
/// Payloads up to this long go through the buffer, so that what follows them arrives in the same system call.
const SMALL_PAYLOAD_BYTES_MAX: usize = BUFFER_BYTES / 2;

/// The buffer when it is read ahead: more than the sockets of both machines hold, as Linux limits them by default (32 MiB
/// for the receiver and 4 MiB for the sender).
const READ_AHEAD_BYTES_MAX: usize = 40 << 20;
/// Requests may have to wait for so long, one after another, before it is read ahead of them; less than clients wait
/// before they ask elsewhere.
const READ_AHEAD_DELAY: Duration = Duration::from_millis(250);
/// A peer that has sent nothing for so long, with room for it, has nothing to send and has not hung up. Neither has one
/// that sends a little now and then: what is left behind on the way to an end comes as fast as the network takes it.
const SILENCE: Duration = Duration::from_millis(200);

/// How a read went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fill {
    /// At least one byte has come.
    Read,
    EndOfStream,
}

/// The incoming side of one connection.
#[derive(Debug)]
pub(super) struct Intake {
    stream: ReadHalf,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Pays for what the buffer is longer than usual.
    loan: Loan,
    /// When everything was read that had come.
    caught_up_at: Instant,
    /// How the stream ended, behind what is in the buffer.
    ended: Option<io::Result<()>>,
}

impl Intake {
    /// `already_read` came with the handshake but belongs to what follows it; never more than a handshake buffers.
    pub(super) fn new(stream: ReadHalf, already_read: &[u8], loan: Loan) -> Self {
        let mut buffer = vec![0; BUFFER_BYTES.max(already_read.len())].into_boxed_slice();
        buffer[..already_read.len()].copy_from_slice(already_read);
        Self { stream, buffer, start: 0, end: already_read.len(), loan, caught_up_at: Instant::now(), ended: None }
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

    /// Whether the end of the stream is known, however much lies before it.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    fn buffered_bytes(&self) -> usize {
        self.end - self.start
    }

    /// Reads more into the buffer, which must not be full.
    pub(super) async fn fill(&mut self) -> io::Result<Fill> {
        if let Some(ended) = &mut self.ended {
            return std::mem::replace(ended, Ok(())).map(|()| Fill::EndOfStream);
        }
        self.give_back_room();
        self.move_to_front();
        let read = self.stream.read(&mut self.buffer[self.end..]);
        let read_bytes = noting_when_caught_up(&mut self.caught_up_at, read).await?;
        self.end += read_bytes;
        Ok(if read_bytes == 0 { Fill::EndOfStream } else { Fill::Read })
    }

    /// Gives back what was borrowed, if what is buffered fits without it.
    fn give_back_room(&mut self) {
        let rest_bytes = self.buffered_bytes();
        if self.buffer.len() > BUFFER_BYTES && rest_bytes <= SMALL_PAYLOAD_BYTES_MAX {
            let mut buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
            buffer[..rest_bytes].copy_from_slice(&self.buffer[self.start..self.end]);
            self.buffer = buffer;
            (self.start, self.end) = (0, rest_bytes);
            self.loan.pay_back();
        }
    }

    fn move_to_front(&mut self) {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }

    /// Waits for something else. If this and the waits before it take long, reads ahead meanwhile, so that the end of the
    /// connection is seen when it comes.
    pub(super) async fn read_ahead_during<T>(&mut self, wait: impl Future<Output = T>) -> T {
        let mut wait = pin!(wait);
        let delay = READ_AHEAD_DELAY.saturating_sub(self.caught_up_at.elapsed());
        if let Ok(done) = tokio::time::timeout(delay, &mut wait).await {
            return done;
        }
        while self.can_read_ahead() {
            tokio::select! {
                biased;
                done = &mut wait => return done,
                () = self.read_ahead() => {}
            }
        }
        wait.await
    }

    /// Reads ahead until the connection has ended, the peer is silent or almost, or there is no room for more. Returns
    /// the moment when this began: if the process stood still since, it tells nothing.
    pub(super) async fn read_ahead_to_silence(&mut self) -> Moment {
        let since = Moment::now();
        let mut patience = Patience::new(SILENCE);
        while self.can_read_ahead() {
            let (buffered_bytes, waiting_since) = (self.buffered_bytes(), Instant::now());
            if tokio::time::timeout(patience.left(), self.read_ahead()).await.is_err() {
                break;
            }
            patience.on_waited(waiting_since.elapsed());
            patience.on_taken(self.buffered_bytes() - buffered_bytes);
        }
        since
    }

    /// Whether there is more to read and room for it, which this makes if it can.
    fn can_read_ahead(&mut self) -> bool {
        if self.has_ended() {
            return false;
        }
        if self.end < self.buffer.len() {
            return true;
        }
        let length = self.buffer.len();
        let longer = (2 * length).min(READ_AHEAD_BYTES_MAX);
        // Moving many bytes again and again to make room for few would take for ever.
        if self.start < length / 2 && longer > length && self.loan.try_borrow(longer - length) {
            let mut buffer = vec![0; longer].into_boxed_slice();
            buffer[..self.buffered_bytes()].copy_from_slice(&self.buffer[self.start..self.end]);
            self.buffer = buffer;
            (self.start, self.end) = (0, self.buffered_bytes());
        } else if self.start >= length / 4 {
            self.move_to_front();
        }
        self.end < self.buffer.len()
    }

    /// One read, for which there is room.
    async fn read_ahead(&mut self) {
        let read = self.stream.read(&mut self.buffer[self.end..]);
        match noting_when_caught_up(&mut self.caught_up_at, read).await {
            Ok(0) => self.ended = Some(Ok(())),
            Ok(read_bytes) => self.end += read_bytes,
            Err(error) => self.ended = Some(Err(error)),
        }
    }

    /// Reads a payload into a buffer of exactly its size. The caller has checked `length` against its limits.
    ///
    /// A payload that trickles is given up as well as one that stops: it holds memory that other clients wait for.
    pub(super) async fn read_payload(&mut self, length: usize, stall_timeout: Duration) -> io::Result<Bytes> {
        let limit = stall_timeout + Duration::from_secs(length as u64 / BYTES_PER_SECOND_MIN);
        let reading = self.read_payload_unless_stalled(length, stall_timeout);
        tokio::time::timeout(limit, reading).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    async fn read_payload_unless_stalled(&mut self, length: usize, stall_timeout: Duration) -> io::Result<Bytes> {
        while length <= SMALL_PAYLOAD_BYTES_MAX && self.buffered_bytes() < length {
            if unless_stalled(stall_timeout, self.fill()).await? == Fill::EndOfStream {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let here = self.buffered_bytes().min(length);
        let mut data = BytesMut::with_capacity(length);
        data.put_slice(&self.buffer[self.start..self.start + here]);
        self.start += here;
        if data.len() < length {
            self.give_back_room();
        }
        while data.len() < length {
            if let Some(ended) = &mut self.ended {
                std::mem::replace(ended, Ok(()))?;
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let filled = data.len();
            let mut room = (&mut data).limit(length - filled);
            let read = noting_when_caught_up(&mut self.caught_up_at, self.stream.read_buf(&mut room));
            if unless_stalled(stall_timeout, read).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(data.freeze())
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

/// A read that has to wait has found all that had come.
async fn noting_when_caught_up<T>(caught_up_at: &mut Instant, read: impl Future<Output = T>) -> T {
    let mut read = pin!(read);
    poll_fn(|cx| {
        let progress = read.as_mut().poll(cx);
        if progress.is_pending() {
            *caught_up_at = Instant::now();
        }
        progress
    })
    .await
}

async fn unless_stalled<T>(stall_timeout: Duration, read: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(stall_timeout, read).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
#[path = "intake_tests.rs"]
mod tests;
