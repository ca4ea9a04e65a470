//! One connection's socket, TCP or Unix, as a reading and a writing half. Moves bytes; knows no protocol.

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, sockopt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};

/// After this long without a word the kernel begins to probe whether the peer still exists.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);

/// An accepted connection.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Where bytes come from.
#[derive(Debug)]
pub(super) enum ReadHalf {
    Tcp(tcp::OwnedReadHalf),
    Unix(unix::OwnedReadHalf),
}

/// Where bytes go; usable from any thread without a runtime, except for [`WriteHalf::writable`].
#[derive(Debug)]
pub(super) enum WriteHalf {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
}

impl Stream {
    /// Address of the peer; `None` for a Unix socket.
    pub(super) fn peer_ip(&self) -> Option<IpAddr> {
        match self {
            // A peer that is gone already is nobody, which no rule lets in by name.
            Self::Tcp(stream) => Some(stream.peer_addr().map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.ip())),
            Self::Unix(_) => None,
        }
    }

    /// Reads what there is, at least one byte unless the peer has closed.
    pub(super) async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer).await,
            Self::Unix(stream) => stream.read(buffer).await,
        }
    }

    pub(super) async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.write_all(bytes).await,
            Self::Unix(stream) => stream.write_all(bytes).await,
        }
    }

    pub(super) fn split(self) -> (ReadHalf, WriteHalf) {
        match self {
            Self::Tcp(stream) => {
                tune(&stream);
                let (read, write) = stream.into_split();
                (ReadHalf::Tcp(read), WriteHalf::Tcp(write))
            }
            Self::Unix(stream) => {
                let (read, write) = stream.into_split();
                (ReadHalf::Unix(read), WriteHalf::Unix(write))
            }
        }
    }
}

/// Replies must not wait for more bytes, and a client machine that vanished must not hold its place for ever. Neither
/// is worth refusing a client over.
fn tune(stream: &TcpStream) {
    let tuned = stream
        .set_nodelay(true)
        .and_then(|()| Ok(sockopt::set_socket_keepalive(stream, true)?))
        .and_then(|()| Ok(sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?));
    if let Err(error) = tuned {
        tracing::debug!(%error, "cannot tune an NBD socket");
    }
}

impl AsyncRead for ReadHalf {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(half) => Pin::new(half).poll_read(cx, buffer),
            Self::Unix(half) => Pin::new(half).poll_read(cx, buffer),
        }
    }
}

impl WriteHalf {
    pub(super) async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(half) => half.writable().await,
            Self::Unix(half) => half.writable().await,
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

    /// Ends the connection in both directions at once, whoever still holds a half.
    pub(super) fn shut_down(&self) {
        // Fails only if the peer was faster.
        let _ = rustix::net::shutdown(self.fd(), Shutdown::Both);
    }

    /// Tells the peer that nothing more will come.
    pub(super) fn shut_down_writing(&self) {
        // Fails only if the peer was faster.
        let _ = rustix::net::shutdown(self.fd(), Shutdown::Write);
    }

    /// Whether the peer has closed the connection or will send no more, even if bytes from it are still unread.
    pub(super) fn peer_hung_up(&self) -> bool {
        let fd = self.fd();
        let mut fds = [PollFd::new(&fd, PollFlags::RDHUP)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut fds, Some(&at_once)) {
            Ok(_) => fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR),
            // Only EINTR and ENOMEM are possible; without knowledge a connection counts as alive.
            Err(_) => false,
        }
    }
}
