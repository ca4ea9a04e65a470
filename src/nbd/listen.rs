//! Binding the listening socket, separately from serving, so that an engine can fail before it touches a volume.
//!
//! Owns the socket and, for a Unix path, the file, which it removes again. Never removes a file that is not a dead
//! socket, or not its own.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType};

use super::address::ListenAddress;

/// Why the server cannot listen or offer its exports.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The port is taken.
    #[error(
        "cannot listen on {address}: the port is in use, perhaps by another nbdcast or NBD server; stop it, or choose \
         another port in `listen` (`ss -ltnp` shows who has it)"
    )]
    PortInUse {
        /// The busy address.
        address: SocketAddr,
    },
    /// A server answers on the socket.
    #[error(
        "cannot listen on unix:{}: a running server is listening there; stop it, or choose another path in `listen`",
        path.display()
    )]
    SocketInUse {
        /// The busy path.
        path: PathBuf,
    },
    /// Something that is no socket has the path.
    #[error(
        "cannot listen on unix:{}: a file that is not a socket is there; move it away, or choose another path in \
         `listen`",
        path.display()
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused for another reason.
    #[error("cannot listen on {address}: {source}")]
    System {
        /// The address.
        address: ListenAddress,
        /// What the system said.
        source: io::Error,
    },
    /// An export cannot be offered.
    #[error(transparent)]
    Export(#[from] super::server::PublishError),
}

#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A bound, listening socket. Clients that connect wait until it is served.
#[derive(Debug)]
pub struct ListeningSocket {
    socket: Socket,
    address: ListenAddress,
    /// Device and inode of the socket file, to know it again.
    file: Option<(u64, u64)>,
}

impl ListeningSocket {
    /// Binds and listens. Needs no async runtime.
    pub fn bind(address: &ListenAddress) -> Result<Self, BindError> {
        let system = |source| BindError::System { address: address.clone(), source };
        match address {
            ListenAddress::Tcp(wanted) => {
                let listener = TcpListener::bind(wanted).map_err(|error| match error.kind() {
                    io::ErrorKind::AddrInUse => BindError::PortInUse { address: *wanted },
                    _ => system(error),
                })?;
                listener.set_nonblocking(true).map_err(system)?;
                let address = ListenAddress::Tcp(listener.local_addr().map_err(system)?);
                Ok(Self { socket: Socket::Tcp(listener), address, file: None })
            }
            ListenAddress::Unix(path) => {
                remove_dead_socket(address, path)?;
                let listener = UnixListener::bind(path).map_err(|error| match error.kind() {
                    io::ErrorKind::AddrInUse => BindError::SocketInUse { path: path.clone() },
                    _ => system(error),
                })?;
                let metadata = fs::symlink_metadata(path).map_err(system)?;
                let bound = Self {
                    socket: Socket::Unix(listener),
                    address: address.clone(),
                    file: Some((metadata.dev(), metadata.ino())),
                };
                match &bound.socket {
                    Socket::Unix(listener) => listener.set_nonblocking(true).map_err(system)?,
                    Socket::Tcp(_) => {}
                }
                Ok(bound)
            }
        }
    }

    /// Where it listens; the port is the real one if port 0 was asked for.
    pub fn local_address(&self) -> &ListenAddress {
        &self.address
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Listens no more, for good: clients are refused from now on instead of waiting in vain, and a successor can
    /// bind.
    pub(super) fn stop(&self) {
        let stopped = match &self.socket {
            Socket::Tcp(listener) => rustix::net::shutdown(listener, Shutdown::Both),
            Socket::Unix(listener) => rustix::net::shutdown(listener, Shutdown::Both),
        };
        if let Err(error) = stopped {
            tracing::debug!(%error, "the listening socket was closed already");
        }
        self.remove_file();
    }

    /// Removes the socket file, if it is still this socket's.
    fn remove_file(&self) {
        let (ListenAddress::Unix(path), Some(file)) = (&self.address, self.file) else {
            return;
        };
        let is_own = fs::symlink_metadata(path).is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == file);
        if is_own && let Err(error) = fs::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove the socket file");
        }
    }
}

impl Drop for ListeningSocket {
    fn drop(&mut self) {
        self.remove_file();
    }
}

/// Makes room for a new socket if the path holds one that nobody listens on.
fn remove_dead_socket(address: &ListenAddress, path: &Path) -> Result<(), BindError> {
    let system = |source| BindError::System { address: address.clone(), source };
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system(error)),
    };
    let path = path.to_path_buf();
    if !metadata.file_type().is_socket() {
        return Err(BindError::NotASocket { path });
    }
    match connect(&path) {
        Err(Errno::CONNREFUSED) => {
            tracing::info!(path = %path.display(), "replacing a socket file that nobody listens on");
            fs::remove_file(&path).map_err(system)
        }
        Err(Errno::NOENT) => Ok(()),
        // A full backlog (EAGAIN) is a living server too.
        Ok(()) | Err(Errno::AGAIN) => Err(BindError::SocketInUse { path }),
        Err(error) => Err(system(error.into())),
    }
}

/// Non-blocking, so that a living server that does not accept cannot hold us up.
fn connect(path: &Path) -> Result<(), Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&probe, &SocketAddrUnix::new(path)?)
}
