//! The engine at work: joins the volumes' state machines with the NBD server, the agents and the clock.
//!
//! [`volume_task`] holds a volume and carries out what it wants, [`link`] keeps the connection to a listener agent,
//! [`embedded`] does the same for a replica in this process, [`format`] makes new volumes, [`report`] says how things
//! stand. No rule of ordering or replication is made here.

mod embedded;
mod format;
mod latency;
mod link;
mod report;
mod volume_task;

use std::io;
use std::net::ToSocketAddrs;
use std::sync::Arc;
use std::time::Duration;

use listener_agent::config::Endpoint;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::info;

use crate::config::EngineConfig;
use crate::nbd::{Backend, BindError, Limits, ListenAddress, NbdServer, PublishError};
use crate::status::StatusSource;
use crate::volume::StartRefusal;
pub use format::{CreateError, create};
use report::Reporter;
use volume_task::{Outcome, VolumeTask};

/// Time for clients' requests to end at shutdown; what follows has to fit into 5 s as well.
const DRAIN_MAX: Duration = Duration::from_millis(1500);
const CATCH_UP_MAX: Duration = Duration::from_millis(1000);
const CLOSE_MAX: Duration = Duration::from_millis(1500);

/// How to start.
#[derive(Clone, Copy, Debug, Default)]
pub struct StartOptions {
    /// Fence another engine that serves the same volume.
    pub take_over: bool,
}

/// Why an engine does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The NBD address cannot be listened at.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// An export cannot be offered.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The NBD address is no address.
    #[error("nbd.listen: cannot resolve {address}: {cause}")]
    Resolve {
        /// The address.
        address: Endpoint,
        /// Why.
        cause: io::Error,
    },
    /// A replica in this process cannot be opened, and the volume cannot start without it.
    #[error("volume {volume}, replica {replica}: {cause}")]
    Replica {
        /// The volume.
        volume: String,
        /// The replica.
        replica: String,
        /// Why.
        cause: listener_agent::directory::DirectoryError,
    },
    /// A volume refuses to start.
    #[error("volume {volume} does not start: {refusal}")]
    Refused {
        /// The volume.
        volume: String,
        /// Why.
        refusal: StartRefusal,
    },
    /// The volume's task ended.
    #[error("volume {volume}: its task ended unexpectedly")]
    Ended {
        /// The volume.
        volume: String,
    },
}

impl StartError {
    /// The exit code that it calls for.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            StartError::Resolve { .. } | StartError::Refused { refusal: StartRefusal::NotConfigured { .. }, .. } => 2,
            StartError::Bind(_)
            | StartError::Publish(_)
            | StartError::Replica { .. }
            | StartError::Refused { .. }
            | StartError::Ended { .. } => 1,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            // These say it themselves.
            StartError::Bind(_) | StartError::Publish(_) | StartError::Ended { .. } => None,
            StartError::Resolve { .. } => Some("write an IP address and a port, such as 127.0.0.1:10809".to_owned()),
            StartError::Replica { cause, .. } => cause.remedy(),
            StartError::Refused { refusal, .. } => Some(refusal_remedy(refusal).to_owned()),
        }
    }
}

fn refusal_remedy(refusal: &StartRefusal) -> &'static str {
    match refusal {
        StartRefusal::Unknown { .. } => {
            "start the listener agents, check `address` of each replica, and make a new volume with `nbdcast create`"
        }
        StartRefusal::Missing { .. } => {
            "bring the missing replicas back (start their agents, mount their disks) and start again; as long as they come back, \
             nothing is lost"
        }
        StartRefusal::Stalled { .. } => {
            "check the replica's disk and its agent's log, then start again; nothing is lost"
        }
        StartRefusal::NotConfigured { .. } => "add the replica to the configuration again",
        StartRefusal::OtherEngine { .. } => {
            "stop that engine, or start with --take-over to fence it and serve here instead"
        }
        StartRefusal::Mismatch { .. } => {
            "correct the volume in the configuration (`address`, `path`, `size` or `lag_bytes_max`)"
        }
    }
}

/// Why a running engine must stop.
#[derive(Debug, thiserror::Error)]
pub enum EngineFailure {
    /// Another engine took over.
    #[error("volume {volume}: another engine took over (replica {replica} promised epoch {promised}); this one stops")]
    Fenced {
        /// The volume.
        volume: String,
        /// The replica that said so.
        replica: String,
        /// The other engine's epoch.
        promised: u64,
    },
    /// The NBD server failed.
    #[error("the NBD server ended: {0}")]
    Nbd(String),
}

/// Why an engine did not stop in good order.
#[derive(Debug, thiserror::Error)]
pub enum ShutdownError {
    /// A replica in this process could not be marked clean.
    #[error(
        "volume {volume}: a replica did not finish its work in time and was not marked clean; the next start replays its journal"
    )]
    Unclean {
        /// The volume.
        volume: String,
    },
}

/// A running engine.
pub struct Engine {
    server: Arc<NbdServer>,
    stop_server: watch::Sender<bool>,
    serving: JoinHandle<io::Result<()>>,
    volumes: Vec<Arc<VolumeTask>>,
    reporter: Arc<Reporter>,
}

impl Engine {
    /// Takes the NBD address, activates every volume, then lets clients in. May be dropped at any moment.
    pub async fn start(config: &EngineConfig, options: StartOptions) -> Result<Engine, StartError> {
        let address = resolve(&config.nbd.listen)?;
        let limits = Limits {
            connections_max: config.nbd.connections_max as usize,
            inflight_bytes_max: config.nbd.inflight_bytes_max.bytes() as usize,
            shutdown_timeout: DRAIN_MAX,
            ..Limits::default()
        };
        let server = Arc::new(NbdServer::bind(&address, Vec::new(), limits)?);
        let mut volumes = Vec::new();
        for volume in &config.volumes {
            volumes.push(VolumeTask::start(volume, options.take_over).await?);
        }
        for volume in &volumes {
            match volume.started().await {
                Some(Outcome::Serving) => {}
                Some(Outcome::Refused(refusal)) => {
                    return Err(StartError::Refused { volume: volume.name().to_owned(), refusal });
                }
                Some(Outcome::Starting | Outcome::Fenced { .. }) | None => {
                    return Err(StartError::Ended { volume: volume.name().to_owned() });
                }
            }
            server.publish(volume.clone())?;
        }
        let (stop_server, stopping) = watch::channel(false);
        let accepting = server.clone();
        let serving = tokio::spawn(async move { accepting.serve(stopping).await });
        let reporter = Arc::new(Reporter::new(volumes.clone()));
        Ok(Engine { server, stop_server, serving, volumes, reporter })
    }

    /// Where clients find the volumes.
    #[must_use]
    pub fn uris(&self) -> Vec<String> {
        self.volumes.iter().map(|v| self.server.uri(&v.export().name)).collect()
    }

    /// What status and metrics are made from.
    #[must_use]
    pub fn status_source(&self) -> Arc<dyn StatusSource> {
        self.reporter.clone()
    }

    /// Waits until the engine must stop.
    pub async fn failed(&self) -> EngineFailure {
        let mut waiting = tokio::task::JoinSet::new();
        for volume in &self.volumes {
            let volume = volume.clone();
            waiting.spawn(async move {
                let (promised, replica) = volume.fenced().await;
                EngineFailure::Fenced { volume: volume.name().to_owned(), replica, promised }
            });
        }
        match waiting.join_next().await {
            Some(Ok(failure)) => failure,
            Some(Err(e)) => EngineFailure::Nbd(e.to_string()),
            // An engine without volumes has nothing that could fail.
            None => std::future::pending().await,
        }
    }

    /// Lets requests end, lets replicas catch up as far as they can in a second, and marks those in this process clean.
    pub async fn shutdown(self) -> Result<(), ShutdownError> {
        self.stop_server.send_replace(true);
        match self.serving.await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => tracing::warn!("the NBD server ended with an error: {e}"),
            Err(e) => tracing::warn!("the NBD server ended with an error: {e}"),
        }
        let catch_up_until = Instant::now() + CATCH_UP_MAX;
        for volume in &self.volumes {
            volume.stop(catch_up_until).await;
        }
        let close_until = Instant::now() + CLOSE_MAX;
        let mut outcome = Ok(());
        let closing: Vec<_> =
            self.volumes.iter().cloned().map(|v| tokio::spawn(async move { v.close(close_until).await })).collect();
        for (volume, closed) in self.volumes.iter().zip(closing) {
            if !closed.await.unwrap_or(false) {
                outcome = Err(ShutdownError::Unclean { volume: volume.name().to_owned() });
            }
        }
        info!("stopped");
        outcome
    }
}

fn resolve(listen: &Endpoint) -> Result<ListenAddress, StartError> {
    match listen {
        Endpoint::Unix(path) => Ok(ListenAddress::Unix(path.clone())),
        Endpoint::Tcp { host, port } => {
            let failed = |cause| StartError::Resolve { address: listen.clone(), cause };
            let mut addresses = (host.as_str(), *port).to_socket_addrs().map_err(failed)?;
            addresses.next().map(ListenAddress::Tcp).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
        }
    }
}
