//! The two halves of an encrypted connection: bytes between a socket and its TLS session.
//!
//! Both halves share the session behind one lock, which is held for as long as it takes to encrypt or decrypt some
//! records and to offer them to the socket, and never while waiting. Bytes are taken from a writer only when everything
//! taken before has left, so that little more than [`TAKEN_BYTES_MAX`] is ever unsent.

use std::io::{self, BufRead, IoSlice, Write};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use rustls::ServerConnection;
use tokio::io::ReadBuf;

use super::stream::{Sent, SocketRead, SocketWrite, WriteHalf};

/// Bytes taken from a writer at a time, before the socket has taken them.
const TAKEN_BYTES_MAX: usize = 128 << 10;
/// What is read from the socket at a time; more for a client that fills it.
const CIPHERTEXT_BYTES_MIN: usize = 4 << 10;
const CIPHERTEXT_BYTES_MAX: usize = 64 << 10;

/// An encrypted connection, not yet taken apart.
#[derive(Debug)]
pub(super) struct EncryptedStream(EncryptedRead);

/// Where decrypted bytes come from.
#[derive(Debug)]
pub(super) struct EncryptedRead {
    socket: SocketRead,
    /// What was read from the socket and the session has not seen: `start..end`.
    ciphertext: Box<[u8]>,
    start: usize,
    end: usize,
    socket_ended: bool,
    /// Found behind bytes that were still good.
    failure: Option<io::Error>,
    channel: Arc<EncryptedWrite>,
}

/// Where bytes go to be encrypted; usable from any thread without a runtime.
#[derive(Debug)]
pub(super) struct EncryptedWrite {
    socket: SocketWrite,
    session: Mutex<ServerConnection>,
}

/// What decrypting came to, beside the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decrypted {
    Full,
    NeedsCiphertext,
    End,
}

impl EncryptedStream {
    /// `connection` has finished its handshake, over this socket.
    pub(super) fn new((read, write): (SocketRead, SocketWrite), mut connection: ServerConnection) -> Self {
        connection.set_buffer_limit(Some(TAKEN_BYTES_MAX));
        let session = Mutex::new(connection);
        Self(EncryptedRead {
            socket: read,
            ciphertext: vec![0; CIPHERTEXT_BYTES_MIN].into_boxed_slice(),
            start: 0,
            end: 0,
            socket_ended: false,
            failure: None,
            channel: Arc::new(EncryptedWrite { socket: write, session }),
        })
    }

    pub(super) fn split(self) -> (EncryptedRead, Arc<EncryptedWrite>) {
        let write = Arc::clone(&self.0.channel);
        (self.0, write)
    }

    pub(super) fn peer_ip(&self) -> Option<IpAddr> {
        self.0.channel.socket.peer_ip()
    }

    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.poll_read(cx, buffer)
    }

    pub(super) async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        WriteHalf::Tls(Arc::clone(&self.0.channel)).write_all(bytes).await
    }
}

impl EncryptedRead {
    /// As `AsyncRead`. The end of the stream is what the peer announced as such; a connection that just ends is an error.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let already_bytes = buffer.filled().len();
        loop {
            let decrypted = self.decrypt(buffer);
            let found_some = buffer.filled().len() > already_bytes;
            match decrypted {
                Ok(Decrypted::Full | Decrypted::End) => return Poll::Ready(Ok(())),
                Ok(Decrypted::NeedsCiphertext) if found_some => return Poll::Ready(Ok(())),
                Ok(Decrypted::NeedsCiphertext) => {}
                Err(failure) if found_some => {
                    self.failure = Some(failure);
                    return Poll::Ready(Ok(()));
                }
                Err(failure) => return Poll::Ready(Err(failure)),
            }
            self.channel.poll_flush(cx)?;
            ready!(self.poll_fill(cx))?;
        }
    }

    /// Moves decrypted bytes to `buffer`, as far as it has room and there is ciphertext.
    fn decrypt(&mut self, buffer: &mut ReadBuf<'_>) -> io::Result<Decrypted> {
        let mut connection = self.channel.lock();
        while buffer.remaining() > 0 {
            let mut reader = connection.reader();
            match reader.fill_buf() {
                Ok([]) => return Ok(Decrypted::End),
                Ok(plaintext) => {
                    let moved_bytes = plaintext.len().min(buffer.remaining());
                    buffer.put_slice(&plaintext[..moved_bytes]);
                    reader.consume(moved_bytes);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if let Some(failure) = self.failure.take() {
                return Err(failure);
            }
            if self.start == self.end && !self.socket_ended {
                return Ok(Decrypted::NeedsCiphertext);
            }
            // Nothing left tells the session that the socket has ended.
            let mut ciphertext = &self.ciphertext[self.start..self.end];
            let read_bytes = connection.read_tls(&mut ciphertext)?;
            self.start += read_bytes;
            if let Err(error) = connection.process_new_packets() {
                // Queued is an alert that tells the peer why; more than an attempt it is not worth.
                let _ = self.channel.flush(&mut connection);
                self.failure = Some(io::Error::new(io::ErrorKind::InvalidData, error));
            }
        }
        Ok(Decrypted::Full)
    }

    /// Reads ciphertext, when there is none.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.end == self.ciphertext.len() && self.end < CIPHERTEXT_BYTES_MAX {
            self.ciphertext = vec![0; CIPHERTEXT_BYTES_MAX].into_boxed_slice();
        }
        let mut buffer = ReadBuf::new(&mut self.ciphertext);
        ready!(self.socket.poll_read(cx, &mut buffer))?;
        (self.start, self.end) = (0, buffer.filled().len());
        self.socket_ended = self.end == 0;
        Poll::Ready(Ok(()))
    }
}

/// The socket as the session sees it.
struct SocketWriter<'a> {
    socket: &'a SocketWrite,
}

impl Write for SocketWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.try_write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.socket.try_write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl EncryptedWrite {
    pub(super) fn socket(&self) -> &SocketWrite {
        &self.socket
    }

    /// As [`WriteHalf::try_write_vectored`].
    pub(super) fn try_write_vectored(&self, parts: &[IoSlice<'_>]) -> io::Result<Sent> {
        let mut session = self.lock();
        let earlier = self.flush(&mut session)?;
        if earlier.socket_full {
            return Ok(earlier);
        }
        let taken_bytes = session.writer().write_vectored(parts)?;
        let sent = self.flush(&mut session)?;
        Ok(Sent { taken_bytes, socket_bytes: earlier.socket_bytes + sent.socket_bytes, ..sent })
    }

    /// As [`WriteHalf::try_flush`].
    pub(super) fn try_flush(&self) -> io::Result<Sent> {
        self.flush(&mut self.lock())
    }

    /// Announces the end, which leaves with the next flush.
    pub(super) fn announce_end(&self) {
        self.lock().send_close_notify();
    }

    /// Sends what reading has brought about, such as the answer to a change of keys, and has the reading task woken
    /// when the rest can go.
    fn poll_flush(&self, cx: &mut Context<'_>) -> io::Result<()> {
        while self.try_flush()?.socket_full {
            match self.socket.poll_writable(cx) {
                Poll::Ready(writable) => writable?,
                Poll::Pending => break,
            }
        }
        Ok(())
    }

    fn flush(&self, session: &mut ServerConnection) -> io::Result<Sent> {
        let mut sent = Sent { taken_bytes: 0, socket_bytes: 0, socket_full: false };
        while session.wants_write() {
            match session.write_tls(&mut SocketWriter { socket: &self.socket }) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(socket_bytes) => sent.socket_bytes += socket_bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Sent { socket_full: true, ..sent });
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(sent)
    }

    fn lock(&self) -> MutexGuard<'_, ServerConnection> {
        // A session that a panic left half-way refuses what comes next by itself.
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[path = "encrypted_tests.rs"]
mod tests;
