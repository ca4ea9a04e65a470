//! The NBD server: its exports, its accept loop, and its end.
//!
//! Binding, publishing exports and serving are separate steps, so that an engine can take the address first and
//! answer clients only when its volumes are ready.

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::address::ListenAddress;
use super::backend::Backend;
use super::budget::Budget;
use super::constants::STRING_BYTES_MAX;
use super::counters::{Counters, CountersSnapshot};
use super::limits::Limits;
use super::listen::{BindError, ListeningSocket, Socket};
use super::session::{serve_connection, stopped};
use super::stream::Stream;
use super::tls::Tls;

/// Pause after a failed accept: usually out of file descriptors, which passes when a connection closes.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Why an export cannot be offered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Two exports of one name could not be told apart.
    #[error("there is already an export named {name:?}")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// The protocol has no room for it.
    #[error("name and description of an export take at most {STRING_BYTES_MAX} bytes each; {name:.40?} has more")]
    TooLong {
        /// The export's name.
        name: String,
    },
}

/// What all connections share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) limits: Limits,
    pub(super) budget: Budget,
    pub(super) counters: Counters,
    pub(super) tls: Tls,
    /// Name of the export that the empty name means.
    pub(super) default_export: Option<String>,
}

/// An NBD server, bound to its address.
pub struct NbdServer {
    listening: ListeningSocket,
    exports: RwLock<Arc<[Arc<dyn Backend>]>>,
    shared: Arc<Shared>,
}

enum Acceptor {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Counts one open connection until dropped.
struct OpenConnection(Arc<Shared>);

impl NbdServer {
    /// Takes the address. Nothing is accepted before [`Self::serve`]; clients that connect earlier wait.
    pub fn bind(listen: &ListenAddress, exports: Vec<Arc<dyn Backend>>, limits: Limits) -> Result<Self, BindError> {
        let limits = limits.raised_to_minimum();
        let server = Self {
            listening: ListeningSocket::bind(listen)?,
            exports: RwLock::new(Arc::new([])),
            shared: Arc::new(Shared {
                budget: Budget::new(limits.inflight_bytes_max),
                limits,
                counters: Counters::default(),
                tls: Tls::default(),
                default_export: None,
            }),
        };
        for export in exports {
            server.publish(export)?;
        }
        Ok(server)
    }

    /// Offers one more export to connections that are accepted from now on.
    pub fn publish(&self, backend: Arc<dyn Backend>) -> Result<(), PublishError> {
        let export = backend.export();
        let name = export.name.clone();
        if name.len().max(export.description.len()) > STRING_BYTES_MAX {
            return Err(PublishError::TooLong { name });
        }
        let mut exports = self.exports.write().unwrap_or_else(PoisonError::into_inner);
        let names: HashSet<String> = exports.iter().map(|other| other.export().name).collect();
        if names.contains(&name) {
            return Err(PublishError::Duplicate { name });
        }
        *exports = exports.iter().cloned().chain([backend]).collect();
        Ok(())
    }

    /// Where the server listens; the port is the real one if port 0 was asked for.
    pub fn local_address(&self) -> &ListenAddress {
        self.listening.local_address()
    }

    /// The NBD URI of an export of this server.
    pub fn uri(&self, export: &str) -> String {
        self.local_address().uri(export)
    }

    /// What has been counted so far.
    pub fn counters(&self) -> CountersSnapshot {
        self.shared.counters.snapshot()
    }

    /// Serves until `shutdown` turns true (or its sender is gone). Then accepts no more, answers new requests with
    /// ESHUTDOWN, lets outstanding ones finish for [`Limits::shutdown_timeout`], and closes every connection. The
    /// address is free as soon as this begins, and the server cannot be served again. Needs a tokio runtime with I/O and time; fails only before the first connection.
    pub async fn serve(&self, shutdown: watch::Receiver<bool>) -> io::Result<()> {
        let acceptor = Acceptor::new(self.listening.socket())?;
        let mut sessions = JoinSet::new();
        let mut stop = std::pin::pin!(stopped(shutdown.clone()));
        loop {
            tokio::select! {
                accepted = acceptor.accept() => match accepted {
                    Ok(stream) => self.take_on(stream, &mut sessions, &shutdown),
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept an NBD connection");
                        tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                    }
                },
                Some(ended) = sessions.join_next() => report_panic(ended),
                () = &mut stop => break,
            }
        }
        drop(acceptor);
        self.listening.stop();
        let all_ended = async {
            while let Some(ended) = sessions.join_next().await {
                report_panic(ended);
            }
        };
        let timeout = self.shared.limits.shutdown_timeout;
        if tokio::time::timeout(timeout, all_ended).await.is_err() {
            let connections = sessions.len();
            tracing::warn!(connections, ?timeout, "closing NBD connections with unfinished requests");
            sessions.shutdown().await;
        }
        Ok(())
    }

    fn take_on(&self, stream: Stream, sessions: &mut JoinSet<()>, shutdown: &watch::Receiver<bool>) {
        let limit = self.shared.limits.connections_max;
        if sessions.len() >= limit {
            self.shared.counters.on_connection_refused();
            tracing::warn!(limit, "NBD connection refused: too many");
            return;
        }
        let exports = Arc::clone(&self.exports.read().unwrap_or_else(PoisonError::into_inner));
        let shared = Arc::clone(&self.shared);
        let open = OpenConnection::new(Arc::clone(&shared));
        let shutdown = shutdown.clone();
        sessions.spawn(async move {
            let _open = open;
            serve_connection(stream, shared, exports, shutdown).await;
        });
    }
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "an NBD connection ended in a panic");
    }
}

impl Acceptor {
    /// A second handle to the same listening socket.
    fn new(socket: &Socket) -> io::Result<Self> {
        match socket {
            Socket::Tcp(listener) => TcpListener::from_std(listener.try_clone()?).map(Self::Tcp),
            Socket::Unix(listener) => UnixListener::from_std(listener.try_clone()?).map(Self::Unix),
        }
    }

    async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => Ok(Stream::Tcp(listener.accept().await?.0)),
            Self::Unix(listener) => Ok(Stream::Unix(listener.accept().await?.0)),
        }
    }
}

impl OpenConnection {
    fn new(shared: Arc<Shared>) -> Self {
        shared.counters.on_connection_opened();
        Self(shared)
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.counters.on_connection_closed();
    }
}
