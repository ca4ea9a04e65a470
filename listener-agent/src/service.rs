//! What a service manager gives to both programs and is told by them: sockets that are open already, a directory, and how
//! things stand. Without one, nothing happens here.

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use listenfd::ListenFd;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;

use crate::config::Endpoint;
use crate::console::Failure;

/// A listening socket that was passed to this process.
#[derive(Debug)]
pub enum PassedSocket {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix stream socket.
    Unix(UnixListener),
}

impl PassedSocket {
    /// Where it listens.
    pub fn endpoint(&self) -> io::Result<Endpoint> {
        match self {
            PassedSocket::Tcp(listener) => {
                let address = listener.local_addr()?;
                Ok(Endpoint::Tcp { host: address.ip().to_canonical().to_string(), port: address.port() })
            }
            PassedSocket::Unix(listener) => {
                let path = listener.local_addr()?.as_pathname().map(Path::to_path_buf);
                let unnamed = || io::Error::new(io::ErrorKind::Unsupported, "a Unix socket without a path");
                path.map(Endpoint::Unix).ok_or_else(unnamed)
            }
        }
    }
}

/// The directory that the service manager made for what the program keeps (STATE_DIRECTORY); the first of several.
#[must_use]
pub fn state_directory() -> Option<PathBuf> {
    let directories = std::env::var_os("STATE_DIRECTORY")?;
    std::env::split_paths(&directories).next().filter(|directory| directory.is_absolute())
}

/// Takes the sockets that were passed (LISTEN_FDS), in their order. Call once, before there is a second thread: it
/// changes the environment, so that no child takes them for its own.
pub fn passed_sockets() -> Result<Vec<PassedSocket>, Failure> {
    let mut passed = ListenFd::from_env();
    let mut sockets = Vec::new();
    for index in 0..passed.len() {
        let unix = passed.take_unix_listener(index).ok().flatten().map(PassedSocket::Unix);
        let socket = unix.or_else(|| passed.take_tcp_listener(index).ok().flatten().map(PassedSocket::Tcp));
        sockets.push(socket.ok_or_else(|| {
            Failure::usage(format_args!(
                "socket {} of those passed in LISTEN_FDS is neither TCP nor a Unix stream socket",
                index + 1
            ))
            .remedy("use ListenStream= in the .socket unit")
        })?);
    }
    Ok(sockets)
}

/// Tells that this program does its work now, and how things stand.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Tells how things stand.
pub fn status(status: &str) {
    tell(&[NotifyState::Status(status)]);
}

/// Tells that this program is about to end.
pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "cannot tell the service manager how things stand");
    }
}

/// Lets this process open as many files as it may: each connection takes one, and the usual limit is kept low for
/// programs of another kind.
pub fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
}
