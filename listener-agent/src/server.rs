//! The agent as engines meet it: listens, opens the replicas of its data directory, and joins each connection with the
//! replica it asks for. Owns no rule of replication.

mod door;
mod outbox;
mod replicas;
mod session;
#[cfg(test)]
mod tls_tests;

use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tracing::{debug, error, info, warn};

use crate::config::{AgentConfig, Endpoint};
use crate::connection::ConnectionError;
use crate::service::PassedSocket;
use crate::tls::TlsError;
use door::Door;
use replicas::{Replicas, volumes_in};
use session::Session;

const CLOSE_MAX: Duration = Duration::from_secs(4);

/// Why an agent does not serve.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The address cannot be listened at.
    #[error("cannot listen at {address}: {cause}")]
    Bind {
        /// The address.
        address: Endpoint,
        /// Why.
        cause: io::Error,
    },
    /// The certificates cannot be used.
    #[error("tls.certificates: {0}")]
    Tls(#[from] TlsError),
    /// The data directory is not there.
    #[error("the data directory {path} cannot be read: {cause}")]
    Data {
        /// The directory.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A replica could not be closed in good order.
    #[error("volume {volume}: the replica could not be marked clean: its disk is full, failed, or too slow")]
    Unclean {
        /// The volume.
        volume: String,
    },
}

impl AgentError {
    /// The exit code that it calls for.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            AgentError::Tls(_) => 2,
            AgentError::Bind { .. } | AgentError::Data { .. } | AgentError::Unclean { .. } => 1,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        Some(match self {
            AgentError::Bind { cause, .. } if cause.kind() == io::ErrorKind::AddrInUse => {
                "stop the program that listens there (`ss -ltnp` shows it), or choose another `listen`".to_owned()
            }
            AgentError::Bind { .. } => "choose another `listen`".to_owned(),
            AgentError::Tls(cause) => cause.remedy(),
            AgentError::Data { path, cause } if cause.kind() == io::ErrorKind::NotFound => {
                format!("mount the disk that holds it, or make it: mkdir -p {}", path.display())
            }
            AgentError::Data { .. } => "check the path and its permissions".to_owned(),
            AgentError::Unclean { .. } => "nothing is lost: the next start replays the journal".to_owned(),
        })
    }
}

enum Listener {
    Tcp(TcpListener),
    /// With the path of its file, unless that belongs to whoever passed the socket.
    Unix(UnixListener, Option<PathBuf>),
}

/// An agent that has its address and its replicas.
pub struct AgentServer {
    listener: Listener,
    address: String,
    replicas: Arc<Replicas>,
    /// How engines are let in; without it anybody is.
    door: Option<Arc<Door>>,
    connections_max: usize,
    /// Sessions that had promised nothing when last looked at, oldest first.
    idle: VecDeque<Idle>,
}

/// A session that may give way to a new one.
struct Idle {
    promised: Arc<AtomicBool>,
    task: AbortHandle,
}

impl AgentServer {
    /// Takes the address and opens all replicas. One that cannot be opened is reported and does not keep the others
    /// from service.
    pub async fn bind(config: &AgentConfig) -> Result<AgentServer, AgentError> {
        AgentServer::bind_at(config, None).await
    }

    /// As [`AgentServer::bind`], at a socket that was `passed` if there is one; `config.listen` is its address then.
    pub async fn bind_at(config: &AgentConfig, passed: Option<PassedSocket>) -> Result<AgentServer, AgentError> {
        let door = Door::of(&config.tls)?.map(Arc::new);
        if door.is_none() && !config.listen.is_local() {
            warn!("{} can be reached from other machines, without encryption or authentication", config.listen);
        }
        let bind_error = |cause| AgentError::Bind { address: config.listen.clone(), cause };
        let listener = match passed {
            Some(passed) => take_over(passed),
            None => listen(&config.listen).await,
        };
        let listener = listener.map_err(bind_error)?;
        let address = match &listener {
            Listener::Tcp(socket) => socket.local_addr().map_err(bind_error)?.to_string(),
            Listener::Unix(_, _) => config.listen.to_string(),
        };
        let replicas = Arc::new(Replicas::new(config.data.clone(), config.images.clone()));
        let opening = replicas.clone();
        let volumes =
            volumes_in(&config.data).map_err(|cause| AgentError::Data { path: config.data.clone(), cause })?;
        let holds_none = volumes.is_empty();
        let opened = tokio::task::spawn_blocking(move || {
            for volume in &volumes {
                if let Err(e) = opening.host(volume) {
                    error!("volume {volume}: {e}; it is not served");
                }
            }
        });
        opened.await.map_err(|e| AgentError::Data { path: config.data.clone(), cause: io::Error::other(e) })?;
        let served = replicas.open_volumes();
        if holds_none {
            warn!("{} holds no replica yet", config.data.display());
        } else {
            info!("serves {}", if served.is_empty() { "nothing".to_owned() } else { served.join(", ") });
        }
        let connections_max = config.limits.connections_max as usize;
        Ok(AgentServer { listener, address, replicas, door, connections_max, idle: VecDeque::new() })
    }

    /// Where engines connect.
    #[must_use]
    pub fn local_address(&self) -> String {
        self.address.clone()
    }

    /// Serves until `shutdown` turns true, then marks every replica clean.
    pub async fn serve(mut self, mut shutdown: watch::Receiver<bool>) -> Result<(), AgentError> {
        let mut sessions = JoinSet::new();
        let stopped = async move {
            // A sender that is gone means the same as one that says stop.
            let _ = shutdown.wait_for(|stop| *stop).await;
        };
        tokio::pin!(stopped);
        loop {
            tokio::select! {
                accepted = self.accept(&mut sessions) => if let Err(e) = accepted {
                    warn!("cannot accept a connection: {e}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                },
                () = &mut stopped => break,
            }
        }
        if let Listener::Unix(_, Some(path)) = &self.listener {
            // Left behind it would do no harm: the next start replaces a socket nobody listens at.
            let _ = std::fs::remove_file(path);
        }
        let replicas = self.replicas.clone();
        let closing = tokio::task::spawn_blocking(move || replicas.close_all(Instant::now() + CLOSE_MAX));
        closing.await.unwrap_or(Ok(()))
    }

    async fn accept(&mut self, sessions: &mut JoinSet<()>) -> io::Result<()> {
        while sessions.try_join_next().is_some() {}
        match &self.listener {
            Listener::Tcp(listener) => {
                let (stream, from) = listener.accept().await?;
                stream.set_nodelay(true)?;
                self.begin(sessions, from.to_string(), stream, TcpStream::into_split);
            }
            Listener::Unix(listener, _) => {
                let stream = listener.accept().await?.0;
                self.begin(sessions, "a local engine".to_owned(), stream, UnixStream::into_split);
            }
        }
        Ok(())
    }

    fn begin<S, R, W>(&mut self, sessions: &mut JoinSet<()>, from: String, stream: S, split: fn(S) -> (R, W))
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        R: AsyncRead + Unpin + Send + 'static,
        W: AsyncWrite + Unpin + Send + 'static,
    {
        self.idle.retain(|idle| !idle.task.is_finished() && !idle.promised.load(Ordering::Relaxed));
        if sessions.len() >= self.connections_max {
            // Whoever only says hello must not keep out an engine that a volume depends on.
            let Some(oldest) = self.idle.pop_front() else {
                return warn!("refused {from}: limits.connections_max is reached");
            };
            oldest.task.abort();
        }
        let promised = Arc::new(AtomicBool::new(false));
        let session = Session::new(self.replicas.clone(), promised.clone());
        let door = self.door.clone();
        let task = sessions.spawn(async move {
            match session.run(door.as_deref(), stream, split).await {
                Ok(()) => debug!("session with {from} ended"),
                Err(e @ (ConnectionError::Closed | ConnectionError::Io(_))) => debug!("session with {from} ended: {e}"),
                Err(e @ ConnectionError::Wire(_)) => warn!("closed the session with {from}: {e}"),
                Err(ConnectionError::SpeaksTls) => {
                    warn!(
                        "refused {from}: it speaks TLS; give this agent `tls.certificates`, or take the engine's away"
                    );
                }
                Err(ConnectionError::Refused(why)) => warn!("refused {from}: {why}"),
            }
        });
        self.idle.push_back(Idle { promised, task });
    }
}

fn take_over(passed: PassedSocket) -> io::Result<Listener> {
    match passed {
        PassedSocket::Tcp(listener) => {
            listener.set_nonblocking(true)?;
            Ok(Listener::Tcp(TcpListener::from_std(listener)?))
        }
        PassedSocket::Unix(listener) => {
            listener.set_nonblocking(true)?;
            Ok(Listener::Unix(UnixListener::from_std(listener)?, None))
        }
    }
}

async fn listen(endpoint: &Endpoint) -> io::Result<Listener> {
    match endpoint {
        Endpoint::Tcp { host, port } => Ok(Listener::Tcp(TcpListener::bind((host.as_str(), *port)).await?)),
        Endpoint::Unix(path) => {
            remove_dead_socket(path).await?;
            Ok(Listener::Unix(UnixListener::bind(path)?, Some(path.clone())))
        }
    }
}

/// Makes room for a new socket if the path holds one that nobody listens at. Whatever else is there is left alone: a
/// slip in the configuration must not cost a file.
async fn remove_dead_socket(path: &Path) -> io::Result<()> {
    let metadata = match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    if !metadata.file_type().is_socket() {
        let text = "a file that is not a socket is there";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }
    match UnixStream::connect(path).await {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        // One that takes no more connections just now is alive too.
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::AddrInUse.into()),
        Err(e) => Err(e),
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::replicas::locked;
    use super::session::FIRST_MESSAGE_MAX;
    use super::*;
    use crate::connection::{FrameReader, write_frames};
    use crate::directory::{self, DirectoryError};
    use protocol::message::{Format, Hello};
    use protocol::wire::{Prefix, frame_to_agent};
    use protocol::{ToAgent, ToEngine};
    use std::collections::BTreeMap;

    #[tokio::test]
    async fn only_a_dead_socket_makes_room_for_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        std::fs::write(&path, "precious").unwrap();
        let endpoint = Endpoint::Unix(path.clone());
        let refused = listen(&endpoint).await.err().map(|e| e.kind());
        assert_eq!(refused, Some(io::ErrorKind::AlreadyExists));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");

        std::fs::remove_file(&path).unwrap();
        let alive = listen(&endpoint).await.unwrap();
        assert_eq!(listen(&endpoint).await.err().map(|e| e.kind()), Some(io::ErrorKind::AddrInUse));
        drop(alive);
        assert!(path.exists());
        listen(&endpoint).await.unwrap();
    }

    fn format(volume: &str) -> Format {
        Format {
            volume: volume.parse().unwrap(),
            replica: "a".parse().unwrap(),
            uuid: protocol::VolumeUuid([1; 16]),
            size_bytes: 1 << 20,
            journal_bytes: 1 << 20,
            view: protocol::View::new(vec!["a".parse().unwrap()]).unwrap(),
            syncing: false,
        }
    }

    /// Says the words and reads the answer to the last of them.
    async fn say(stream: &mut TcpStream, words: &[ToAgent]) -> Result<Vec<ToEngine>, ConnectionError> {
        write_frames(stream, words.iter().map(frame_to_agent).collect()).await?;
        tokio::time::timeout(FIRST_MESSAGE_MAX, FrameReader::new(stream).read(Prefix::to_engine)).await.unwrap()
    }

    #[tokio::test]
    async fn a_session_that_promised_nothing_makes_room_for_a_new_one() {
        let data = tempfile::tempdir().unwrap();
        let listen = Endpoint::Tcp { host: "127.0.0.1".to_owned(), port: 0 };
        let mut config = AgentConfig::new(listen, data.path().to_owned());
        config.limits.connections_max = 2;
        let server = AgentServer::bind(&config).await.unwrap();
        server.replicas.format(format("v")).unwrap();
        let address = server.local_address();
        let (_stop, stopping) = watch::channel(false);
        tokio::spawn(server.serve(stopping));

        let hello = |engine: u8| {
            let (volume, replica) = ("v".parse().unwrap(), "a".parse().unwrap());
            ToAgent::Hello(Hello { volume, replica, engine: [engine; 16] })
        };
        let promise = ToAgent::Promise { epoch: protocol::Epoch(1), engine: [1; 16], lease_ms: 100 };
        let mut serving = TcpStream::connect(&address).await.unwrap();
        assert!(matches!(say(&mut serving, &[hello(1)]).await.unwrap()[..], [ToEngine::Welcome(_)]));
        assert!(matches!(say(&mut serving, &[promise]).await.unwrap()[..], [ToEngine::Promised(_)]));
        let mut idle = TcpStream::connect(&address).await.unwrap();
        assert!(matches!(say(&mut idle, &[hello(2)]).await.unwrap()[..], [ToEngine::Welcome(_)]));
        let mut next = TcpStream::connect(&address).await.unwrap();
        assert!(matches!(say(&mut next, &[hello(3)]).await.unwrap()[..], [ToEngine::Welcome(_)]));
        assert!(say(&mut idle, &[]).await.is_err(), "the idle one gave way");
        let ping = ToAgent::Ping { token: 7 };
        assert_eq!(say(&mut serving, &[ping]).await.unwrap(), [ToEngine::Pong { token: 7 }]);
    }

    #[test]
    fn a_volume_does_not_wait_for_another_that_is_being_opened_or_made() {
        let data = tempfile::tempdir().unwrap();
        let replicas = Replicas::new(data.path().to_owned(), BTreeMap::new());
        replicas.format(format("busy")).unwrap();
        replicas.format(format("idle")).unwrap();
        let slot = locked(&replicas.slots)[&"busy".parse().unwrap()].clone();
        let _at_work = locked(&slot);
        replicas.host(&"idle".parse().unwrap()).unwrap();
        assert!(matches!(replicas.host(&"none".parse().unwrap()), Err(DirectoryError::Missing { .. })));
        assert_eq!(locked(&replicas.slots).len(), 2);
        replicas.close_all(Instant::now() + CLOSE_MAX).unwrap();
        let superblock = directory::read_superblock(&data.path().join("idle")).unwrap().0;
        assert!(superblock.clean);
    }
}
