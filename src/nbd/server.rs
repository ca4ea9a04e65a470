//! The NBD server: its exports, its accept loop, and its end.
//!
//! Binding, publishing exports and serving are separate steps, so that an engine can take the address first and
//! answer clients only when its volumes are ready.

use std::collections::HashSet;
use std::future::poll_fn;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::address::ListenAddress;
use super::admission::{Admission, Place};
use super::backend::Backend;
use super::budget::Budget;
use super::constants::STRING_BYTES_MAX;
use super::counters::{Counters, CountersSnapshot};
use super::limits::Limits;
use super::listen::{BindError, ListeningSocket, Socket};
use super::log_gate::LogGate;
use super::pulse::{BEAT_INTERVAL, Moment, Pulse};
use super::session::{serve_connection, stopped};
use super::stream::{Stream, tune};
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
    pub(super) tls: Tls,
    /// The export that the empty name means. Without it, the only one there is.
    pub(super) default_export: Option<String>,
    pub(super) budget: Budget,
    pub(super) pulse: Pulse,
    pub(super) admission: Admission,
    pub(super) counters: Counters,
    /// For lines about clients that came and went as they should.
    pub(super) log: LogGate,
    /// For lines about others.
    pub(super) trouble_log: LogGate,
    /// For lines about requests that are refused.
    pub(super) refusal_log: LogGate,
}

/// How a server meets its clients.
#[derive(Debug, Clone, Default)]
pub struct Manners {
    /// What it spends on them.
    pub limits: Limits,
    /// Whether they use TLS.
    pub tls: Tls,
    /// The export that the empty name means. Without it, the only one there is.
    pub default_export: Option<String>,
}

/// An NBD server, bound to its addresses.
pub struct NbdServer {
    listening: Vec<ListeningSocket>,
    exports: RwLock<Arc<[Arc<dyn Backend>]>>,
    shared: Arc<Shared>,
}

enum Acceptor {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl NbdServer {
    /// Takes one address. Nothing is accepted before [`Self::serve`]; clients that connect earlier wait.
    pub fn bind(listen: &ListenAddress, exports: Vec<Arc<dyn Backend>>, limits: Limits) -> Result<Self, BindError> {
        let server = Self::new(vec![ListeningSocket::bind(listen)?], Manners { limits, ..Manners::default() });
        for export in exports {
            server.publish(export)?;
        }
        Ok(server)
    }

    /// A server at sockets that are bound already, without exports so far.
    pub fn new(listening: Vec<ListeningSocket>, manners: Manners) -> Self {
        let limits = manners.limits.raised_to_minimum();
        let shared = Shared {
            budget: Budget::new(limits.inflight_bytes_max, limits.connections_max),
            limits,
            tls: manners.tls,
            default_export: manners.default_export,
            pulse: Pulse::new(Moment::now()),
            admission: Admission::default(),
            counters: Counters::default(),
            log: LogGate::new(),
            trouble_log: LogGate::new(),
            refusal_log: LogGate::new(),
        };
        Self { listening, exports: RwLock::new(Arc::new([])), shared: Arc::new(shared) }
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

    /// Where the server listens, first of all; the port is the real one if port 0 was asked for.
    ///
    /// # Panics
    /// If the server was made without a socket.
    pub fn local_address(&self) -> &ListenAddress {
        self.listening[0].local_address()
    }

    /// The NBD URI of an export at the first address.
    ///
    /// # Panics
    /// If the server was made without a socket.
    pub fn uri(&self, export: &str) -> String {
        self.uri_at(&self.listening[0], export)
    }

    /// The NBD URIs of an export, one for each address.
    pub fn uris(&self, export: &str) -> Vec<String> {
        self.listening.iter().map(|socket| self.uri_at(socket, export)).collect()
    }

    fn uri_at(&self, socket: &ListeningSocket, export: &str) -> String {
        socket.local_address().uri(export, matches!(self.shared.tls, Tls::Require(_)))
    }

    /// What has been counted so far.
    pub fn counters(&self) -> CountersSnapshot {
        self.shared.counters.snapshot()
    }

    /// Serves until `shutdown` turns true (or its sender is gone). Then accepts no more, answers new requests with
    /// ESHUTDOWN, lets outstanding ones finish for [`Limits::shutdown_timeout`], and closes every connection. The
    /// addresses are free as soon as this begins, and the server cannot be served again. Needs a tokio runtime with I/O
    /// and time; fails only before the first connection.
    pub async fn serve(&self, shutdown: watch::Receiver<bool>) -> io::Result<()> {
        let acceptors: Vec<Acceptor> =
            self.listening.iter().map(|listening| Acceptor::new(listening.socket())).collect::<io::Result<_>>()?;
        // Nobody is served yet, so nothing can hide behind the time until now.
        self.shared.pulse.beat(Moment::now());
        let mut beating = JoinSet::new();
        beating.spawn(keep_beating(Arc::clone(&self.shared)));
        let mut sessions = JoinSet::new();
        let mut stop = std::pin::pin!(stopped(shutdown.clone()));
        let mut turn = 0;
        loop {
            tokio::select! {
                accepted = accept_any(&acceptors, &mut turn) => match accepted {
                    Ok(stream) => self.take_on(stream, &mut sessions, &shutdown),
                    Err(error) => self.on_accept_failed(&error).await,
                },
                Some(ended) = sessions.join_next() => report_panic(ended),
                () = &mut stop => break,
            }
        }
        drop(acceptors);
        self.listening.iter().for_each(ListeningSocket::stop);
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

    /// Without file descriptors, whoever has nothing to say yet gives one back.
    async fn on_accept_failed(&self, error: &io::Error) {
        if let Some(suppressed) = self.shared.trouble_log.pass() {
            tracing::warn!(%error, suppressed, "cannot accept an NBD connection");
        }
        let is_out_of_files =
            [Errno::MFILE, Errno::NFILE].map(|e| Some(e.raw_os_error())).contains(&error.raw_os_error());
        if !(is_out_of_files && self.shared.admission.send_one_away()) {
            tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
        }
    }

    fn take_on(&self, stream: Stream, sessions: &mut JoinSet<()>, shutdown: &watch::Receiver<bool>) {
        let shared = &self.shared;
        let limit = shared.limits.connections_max;
        if shared.admission.is_full(limit) {
            shared.counters.on_connection_refused();
            if let Some(suppressed) = shared.trouble_log.pass() {
                tracing::warn!(limit, suppressed, "NBD connection refused: too many");
            }
            return;
        }
        let exports = Arc::clone(&self.exports.read().unwrap_or_else(PoisonError::into_inner));
        let shutdown = shutdown.clone();
        let was_crowded = Place::take(shared, stream.peer_ip(), |place| {
            let shared = Arc::clone(shared);
            sessions.spawn(serve_connection(stream, shared, exports, place, shutdown))
        });
        if was_crowded {
            shared.counters.on_connection_refused();
            if let Some(suppressed) = shared.trouble_log.pass() {
                let limit = shared.limits.handshakes_max;
                tracing::warn!(limit, suppressed, "an NBD handshake was ended, of the address with most of too many");
            }
        }
    }
}

/// For as long as there are connections: they trust the pulse.
async fn keep_beating(shared: Arc<Shared>) {
    let mut beats = tokio::time::interval(BEAT_INTERVAL);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beats.tick().await;
        shared.pulse.beat(Moment::now());
    }
}

/// The next connection of any socket; `turn` says which is asked first, so that a busy one cannot keep out others.
async fn accept_any(acceptors: &[Acceptor], turn: &mut usize) -> io::Result<Stream> {
    poll_fn(|cx| {
        for step in 0..acceptors.len() {
            let index = (*turn + step) % acceptors.len();
            if let Poll::Ready(accepted) = acceptors[index].poll_accept(cx) {
                *turn = index + 1;
                return Poll::Ready(accepted);
            }
        }
        Poll::Pending
    })
    .await
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    // One that was cancelled had to give way.
    if let Err(error) = ended
        && error.is_panic()
    {
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

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Stream>> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = ready!(listener.poll_accept(cx))?;
                tune(&stream);
                Poll::Ready(Ok(Stream::Tcp(stream)))
            }
            Self::Unix(listener) => {
                let (stream, _) = ready!(listener.poll_accept(cx))?;
                Poll::Ready(Ok(Stream::Unix(stream)))
            }
        }
    }
}
