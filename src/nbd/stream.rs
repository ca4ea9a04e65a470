//! One connection's socket, TCP or Unix, plain or encrypted, as a reading and a writing half. Moves bytes; knows no
//! protocol.

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, sockopt};
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};

use super::encrypted::{EncryptedRead, EncryptedStream, EncryptedWrite};

/// After this long without a word the kernel begins to probe whether the peer still exists.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// Between two probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Probes without an answer after which the peer is gone.
const KEEPALIVE_PROBES: u32 = 3;
/// Bytes that the peer's machine has not acknowledged for so long mean that it is gone.
const UNACKNOWLEDGED_MS_MAX: u32 = 60_000;

/// An accepted connection.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(EncryptedStream),
}

/// Where bytes come from.
#[derive(Debug)]
pub(super) enum ReadHalf {
    Plain(SocketRead),
    Tls(EncryptedRead),
}

/// Where bytes go; usable from any thread without a runtime, except for [`WriteHalf::writable`].
#[derive(Debug)]
pub(super) enum WriteHalf {
    Plain(SocketWrite),
    Tls(Arc<EncryptedWrite>),
}

/// A socket's own reading half.
#[derive(Debug)]
pub(super) enum SocketRead {
    Tcp(tcp::OwnedReadHalf),
    Unix(unix::OwnedReadHalf),
}

/// A socket's own writing half.
#[derive(Debug)]
pub(super) enum SocketWrite {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
}

/// What became of some bytes that were to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sent {
    /// How many of them were taken; never again to be given.
    pub(super) taken_bytes: usize,
    /// How many bytes the socket took, of these or of earlier ones, encrypted if they had to be.
    pub(super) socket_bytes: usize,
    /// The socket takes no more for now. On an encrypted connection, bytes that were taken may be still unsent: wait
    /// for room, then flush.
    pub(super) socket_full: bool,
}

impl Stream {
    pub(super) fn split(self) -> (ReadHalf, WriteHalf) {
        match self {
            Self::Tcp(stream) => {
                let (read, write) = split_tcp(stream);
                (ReadHalf::Plain(read), WriteHalf::Plain(write))
            }
            Self::Unix(stream) => {
                let (read, write) = split_unix(stream);
                (ReadHalf::Plain(read), WriteHalf::Plain(write))
            }
            Self::Tls(stream) => {
                let (read, write) = stream.split();
                (ReadHalf::Tls(read), WriteHalf::Tls(write))
            }
        }
    }

    /// Address of the peer; `None` for a Unix socket.
    pub(super) fn peer_ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(stream) => ip_or_nobody(stream.peer_addr()),
            Self::Unix(_) => None,
            Self::Tls(stream) => stream.peer_ip(),
        }
    }

    /// Sends all of it, waiting as long as that takes.
    pub(super) async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.write_all(bytes).await,
            Self::Unix(stream) => stream.write_all(bytes).await,
            Self::Tls(stream) => stream.write_all(bytes).await,
        }
    }
}

/// A peer that is gone already is nobody, which no rule lets in by name.
fn ip_or_nobody(peer: io::Result<SocketAddr>) -> Option<IpAddr> {
    Some(peer.map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.ip()))
}

pub(super) fn split_tcp(stream: TcpStream) -> (SocketRead, SocketWrite) {
    let (read, write) = stream.into_split();
    (SocketRead::Tcp(read), SocketWrite::Tcp(write))
}

pub(super) fn split_unix(stream: UnixStream) -> (SocketRead, SocketWrite) {
    let (read, write) = stream.into_split();
    (SocketRead::Unix(read), SocketWrite::Unix(write))
}

/// Replies must not wait for more bytes, and a client machine that vanished must not hold its place for ever. Neither
/// is worth refusing a client over.
pub(super) fn tune(stream: &TcpStream) {
    let tuned = stream
        .set_nodelay(true)
        .and_then(|()| Ok(sockopt::set_socket_keepalive(stream, true)?))
        .and_then(|()| Ok(sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?))
        .and_then(|()| Ok(sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?))
        .and_then(|()| Ok(sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?))
        .and_then(|()| Ok(sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED_MS_MAX)?));
    if let Err(error) = tuned {
        tracing::debug!(%error, "cannot tune an NBD socket");
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => stream.poll_read(cx, buffer),
        }
    }
}

impl AsyncRead for ReadHalf {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(half) => half.poll_read(cx, buffer),
            Self::Tls(half) => half.poll_read(cx, buffer),
        }
    }
}

impl SocketRead {
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(half) => Pin::new(half).poll_read(cx, buffer),
            Self::Unix(half) => Pin::new(half).poll_read(cx, buffer),
        }
    }
}

impl SocketWrite {
    async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(half) => half.writable().await,
            Self::Unix(half) => half.writable().await,
        }
    }

    /// For the one task that reads; others wait with [`WriteHalf::writable`].
    pub(super) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(half) => half.as_ref().poll_write_ready(cx),
            Self::Unix(half) => half.as_ref().poll_write_ready(cx),
        }
    }

    pub(super) fn try_write_vectored(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(half) => half.try_write_vectored(parts),
            Self::Unix(half) => half.try_write_vectored(parts),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(half) => half.as_ref().as_fd(),
            Self::Unix(half) => half.as_ref().as_fd(),
        }
    }

    pub(super) fn peer_ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(half) => ip_or_nobody(half.peer_addr()),
            Self::Unix(_) => None,
        }
    }

    pub(super) fn shut_down(&self, direction: Shutdown) {
        // Fails only if the peer was faster.
        let _ = rustix::net::shutdown(self.fd(), direction);
    }
}

impl WriteHalf {
    pub(super) async fn writable(&self) -> io::Result<()> {
        self.socket().writable().await
    }

    /// Writes what the socket takes at once. Never blocks, and never fails because the socket is full.
    pub(super) fn try_write_vectored(&self, parts: &[IoSlice<'_>]) -> io::Result<Sent> {
        match self {
            Self::Plain(socket) => {
                let wanted_bytes: usize = parts.iter().map(|part| part.len()).sum();
                match socket.try_write_vectored(parts) {
                    Ok(bytes) => {
                        Ok(Sent { taken_bytes: bytes, socket_bytes: bytes, socket_full: bytes < wanted_bytes })
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        Ok(Sent { taken_bytes: 0, socket_bytes: 0, socket_full: true })
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                        Ok(Sent { taken_bytes: 0, socket_bytes: 0, socket_full: false })
                    }
                    Err(error) => Err(error),
                }
            }
            Self::Tls(channel) => channel.try_write_vectored(parts),
        }
    }

    /// Sends bytes that were taken earlier, as far as the socket takes them. Never blocks.
    pub(super) fn try_flush(&self) -> io::Result<Sent> {
        match self {
            Self::Plain(_) => Ok(Sent { taken_bytes: 0, socket_bytes: 0, socket_full: false }),
            Self::Tls(channel) => channel.try_flush(),
        }
    }

    /// Whether bytes that are taken have left, or wait to be flushed.
    pub(super) fn keeps_unsent(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    pub(super) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        loop {
            let sent =
                if bytes.is_empty() { self.try_flush()? } else { self.try_write_vectored(&[IoSlice::new(bytes)])? };
            bytes = &bytes[sent.taken_bytes..];
            if sent.socket_full {
                self.writable().await?;
            } else if bytes.is_empty() {
                return Ok(());
            }
        }
    }

    fn socket(&self) -> &SocketWrite {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(channel) => channel.socket(),
        }
    }

    /// Ends the connection in both directions at once, whoever still holds a half.
    pub(super) fn shut_down(&self) {
        self.socket().shut_down(Shutdown::Both);
    }

    /// Tells the peer that nothing more will come, after all that was taken.
    pub(super) async fn shut_down_writing(&self) -> io::Result<()> {
        if let Self::Tls(channel) = self {
            channel.announce_end();
            self.write_all(&[]).await?;
        }
        self.socket().shut_down(Shutdown::Write);
        Ok(())
    }

    /// Whether the end of the connection can be on its way while bytes from before it are unread: the peer's machine
    /// keeps it back for as long as this one has no room.
    pub(super) fn can_hide_its_end(&self) -> bool {
        matches!(self.socket(), SocketWrite::Tcp(_))
    }

    /// Whether the peer has closed the connection or will send no more, even if bytes from it are still unread.
    pub(super) fn peer_hung_up(&self) -> bool {
        let fd = self.socket().fd();
        let mut fds = [PollFd::new(&fd, PollFlags::RDHUP)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut fds, Some(&at_once)) {
            Ok(_) => fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR),
            // Only EINTR and ENOMEM are possible; without knowledge a connection counts as alive.
            Err(_) => false,
        }
    }
}
