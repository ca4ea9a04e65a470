//! Binding a listening socket, or taking one over, separately from serving, so that an engine can fail before it touches
//! a volume.
//!
//! Owns the socket and, for a Unix path that it bound itself, the file, which it removes again. Never removes a file
//! that is not a dead socket, or not its own.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
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

/// Who may connect to a Unix socket, by its file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SocketFile {
    /// Permission bits; without them, as the process's umask leaves them.
    pub mode: Option<u32>,
    /// User number of the owner; without it, the process's.
    pub owner: Option<u32>,
    /// Group number; without it, the process's.
    pub group: Option<u32>,
}

/// A bound, listening socket. Clients that connect wait until it is served.
#[derive(Debug)]
pub struct ListeningSocket {
    socket: Socket,
    address: ListenAddress,
    /// Device and inode of the socket file, to know it again; none if it is somebody else's.
    file: Option<(u64, u64)>,
    /// Whoever passed it may listen on after us.
    is_inherited: bool,
}

impl ListeningSocket {
    /// Binds and listens. Needs no async runtime.
    pub fn bind(address: &ListenAddress) -> Result<Self, BindError> {
        Self::bind_with(address, SocketFile::default())
    }

    /// As [`Self::bind`]; nobody can connect to a Unix socket before its file is as `file` says.
    pub fn bind_with(address: &ListenAddress, file: SocketFile) -> Result<Self, BindError> {
        let system = |source| BindError::System { address: address.clone(), source };
        match address {
            ListenAddress::Tcp(wanted) => {
                let listener = TcpListener::bind(wanted).map_err(|error| match error.kind() {
                    io::ErrorKind::AddrInUse => BindError::PortInUse { address: *wanted },
                    _ => system(error),
                })?;
                listener.set_nonblocking(true).map_err(system)?;
                let address = ListenAddress::Tcp(listener.local_addr().map_err(system)?);
                Ok(Self { socket: Socket::Tcp(listener), address, file: None, is_inherited: false })
            }
            ListenAddress::Unix(path) => {
                remove_dead_socket(address, path)?;
                let in_use = || BindError::SocketInUse { path: path.clone() };
                let listener = bind_unix(path, file).map_err(|error| match error.kind() {
                    io::ErrorKind::AddrInUse | io::ErrorKind::AlreadyExists => in_use(),
                    _ => system(error),
                })?;
                let metadata = fs::symlink_metadata(path).map_err(system)?;
                let file = Some((metadata.dev(), metadata.ino()));
                let bound =
                    Self { socket: Socket::Unix(listener), address: address.clone(), file, is_inherited: false };
                bound.set_nonblocking().map_err(system)?;
                Ok(bound)
            }
        }
    }

    /// Takes over a TCP socket that another program has bound and listens with.
    pub fn from_tcp(listener: TcpListener) -> io::Result<Self> {
        let address = ListenAddress::Tcp(listener.local_addr()?);
        Self::inherit(Socket::Tcp(listener), address)
    }

    /// Takes over a Unix socket that another program has bound and listens with. Its file stays that program's.
    pub fn from_unix(listener: UnixListener) -> io::Result<Self> {
        let path = listener.local_addr()?.as_pathname().map(Path::to_path_buf);
        let path = path.ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "a Unix socket without a path"))?;
        Self::inherit(Socket::Unix(listener), ListenAddress::Unix(path))
    }

    fn inherit(socket: Socket, address: ListenAddress) -> io::Result<Self> {
        let inherited = Self { socket, address, file: None, is_inherited: true };
        inherited.set_nonblocking()?;
        Ok(inherited)
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        match &self.socket {
            Socket::Tcp(listener) => listener.set_nonblocking(true),
            Socket::Unix(listener) => listener.set_nonblocking(true),
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
    ///
    /// One that was passed to us is left alone: clients that connect to it are for whoever listens next.
    pub(super) fn stop(&self) {
        if self.is_inherited {
            return;
        }
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

/// Binds at `path` so that what the file is to be is true before anybody can find it: in a directory of its own that
/// only we may enter, from which it is moved.
fn bind_unix(path: &Path, file: SocketFile) -> io::Result<UnixListener> {
    if file == SocketFile::default() {
        return UnixListener::bind(path);
    }
    let directory = path.parent().unwrap_or(Path::new("/")).join(format!(".{}", std::process::id()));
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        // Left behind by an earlier process of our number, or not there.
        Ok(()) | Err(_) => {}
    }
    fs::DirBuilder::new().mode(0o700).create(&directory)?;
    let bound = bind_and_move(&directory.join("s"), path, file);
    fs::remove_dir_all(&directory)?;
    bound
}

fn bind_and_move(hidden: &Path, path: &Path, file: SocketFile) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(hidden)?;
    if file.owner.is_some() || file.group.is_some() {
        std::os::unix::fs::chown(hidden, file.owner, file.group)?;
    }
    if let Some(mode) = file.mode {
        fs::set_permissions(hidden, fs::Permissions::from_mode(mode))?;
    }
    renameat_with(CWD, hidden, CWD, path, RenameFlags::NOREPLACE)?;
    Ok(listener)
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
