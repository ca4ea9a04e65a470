//! The engine at work: joins the volumes' state machines with the NBD server, the agents and the clock.
//!
//! [`volume_task`] holds a volume and carries out what it wants, [`front`] lets its clients in, [`link`] keeps the connection to a listener agent that [`dial`] makes,
//! [`embedded`] does the same for a replica in this process, [`seat`] ties either to its volume, [`format`] makes new
//! replicas, [`orders`] does what an operator asks for, [`door`] opens the way in for clients, [`report`] says how things stand and [`events`] what happened, [`scrubbing`] when a volume is scrubbed. No
//! rule of ordering or replication is made here.

mod accounts;
mod dial;
mod door;
mod embedded;
mod events;
mod format;
mod front;
mod latency;
mod link;
mod orders;
mod report;
mod scrubbing;
mod seat;
mod volume_task;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use listener_agent::service;
use listener_agent::tls::TlsError;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tracing::info;

use crate::admin::control::Control;
use crate::config::EngineConfig;
use crate::nbd::{ListeningSocket, NbdServer, PublishError};
use crate::volume::StartRefusal;
use dial::Agents;
pub use dial::Trouble;
pub use door::DoorError;
use events::EventLog;
pub use format::{CreateError, FormatError, create};
use report::Reporter;
use volume_task::{Outcome, VolumeTask};

/// Time for clients' requests to end at shutdown; what follows has to fit into 5 s as well.
const DRAIN_MAX: Duration = Duration::from_millis(1500);
const CATCH_UP_MAX: Duration = Duration::from_millis(1000);
const CLOSE_MAX: Duration = Duration::from_millis(1500);

/// What happens to volumes is told one by one; few things do.
const EVENTS_QUEUED_MAX: usize = 16;

/// How to start.
#[derive(Debug, Default)]
pub struct StartOptions {
    /// Fence another engine that serves the same volume.
    pub take_over: bool,
    /// Sockets that were passed to this process; clients are served at these instead of the configured addresses.
    pub sockets: Vec<ListeningSocket>,
}

/// Why an engine does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Clients cannot be let in.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// An export cannot be offered.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The certificates for agents cannot be used.
    #[error("agents.certificates: {0}")]
    Tls(#[from] TlsError),
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
}

impl StartError {
    /// The exit code that it calls for.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            StartError::Door(error) => error.exit_code(),
            StartError::Tls(_) | StartError::Refused { refusal: StartRefusal::NotConfigured { .. }, .. } => 2,
            StartError::Publish(_) | StartError::Replica { .. } | StartError::Refused { .. } => 1,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            StartError::Door(error) => error.remedy(),
            StartError::Tls(cause) => Some(cause.remedy()),
            // It says so itself.
            StartError::Publish(_) => None,
            StartError::Replica { cause, .. } => cause.remedy(),
            StartError::Refused { volume, refusal } => Some(refusal_remedy(volume, refusal)),
        }
    }
}

/// What to do about a start that is refused, or that waits.
#[must_use]
pub fn refusal_remedy(volume: &str, refusal: &StartRefusal) -> String {
    let remedy = match refusal {
        StartRefusal::Unknown { .. } => {
            "start the listener agents, check `address` of each replica, and make a new volume with `nbdcast create`"
        }
        StartRefusal::Missing { missing, .. } => {
            let names: Vec<&str> = missing.iter().map(|m| m.replica.as_str()).collect();
            let without: Vec<String> = names.iter().map(|name| format!("--without {name}")).collect();
            return format!(
                "bring {} back (start the agent, mount the disk): the volume then starts by itself and nothing is lost; \
                 only if they are gone for good: `nbdcast activate {volume} {} --accept-data-loss` starts without them, \
                 and what only they held is lost",
                names.join(", "),
                without.join(" "),
            );
        }
        StartRefusal::Stalled { .. } => {
            "check the replica's disk and its agent's log; the volume starts by itself when it takes records, and nothing \
             is lost"
        }
        StartRefusal::NotConfigured { replica, .. } => {
            return format!(
                "add a [[volume.replica]] named {replica:?}, with its `address` or `path`, to volume {volume:?} in the \
                 configuration; if it is to leave, use `nbdcast replica remove {volume} {replica}` once the volume serves"
            );
        }
        StartRefusal::OtherEngine { .. } => {
            "stop that engine, or start with --take-over to fence it and serve here instead"
        }
        StartRefusal::Mismatch { .. } => {
            "correct the volume in the configuration (`address`, `path`, `size` or `lag_bytes_max`); a volume grows by \
             `nbdcast resize` while it is served, with `size` as it was before"
        }
    };
    remedy.to_owned()
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
    /// What waited in memory for replicas is not what it was.
    #[error(
        "volume {volume}: record {seq} changed in the memory of this engine, which stops; check the memory of this machine"
    )]
    Corrupt {
        /// The volume.
        volume: String,
        /// The record.
        seq: u64,
    },
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

/// What happens to an engine.
#[derive(Debug)]
pub enum EngineEvent {
    /// A volume serves, and clients find it here.
    Ready {
        /// The volume.
        volume: String,
        /// Its NBD URIs, one for each address.
        uris: Vec<String>,
    },
    /// A volume waits for replicas; it serves as soon as it can.
    Blocked {
        /// The volume.
        volume: String,
        /// What it waits for.
        refusal: StartRefusal,
    },
    /// A volume cannot be served.
    NotStarted(StartError),
    /// The engine must stop.
    Failed(EngineFailure),
}

/// A running engine.
pub struct Engine {
    front: Arc<Front>,
    volumes: Vec<Arc<VolumeTask>>,
    reporter: Arc<Reporter>,
    events: mpsc::Receiver<EngineEvent>,
    /// Tell of the volumes until the engine is dropped.
    _following: JoinSet<()>,
}

/// The NBD server, which lets clients in once there is a volume for them.
struct Front {
    server: Arc<NbdServer>,
    stop: watch::Sender<bool>,
    serving: Mutex<Option<JoinHandle<io::Result<()>>>>,
}

impl Front {
    fn publish(&self, volume: Arc<VolumeTask>) -> Result<(), PublishError> {
        self.server.publish(volume)?;
        let mut serving = self.serving.lock().expect("no thread panicked with the lock");
        if serving.is_none() {
            let (server, stopping) = (self.server.clone(), self.stop.subscribe());
            *serving = Some(tokio::spawn(async move { server.serve(stopping).await }));
        }
        Ok(())
    }
}

impl Engine {
    /// Takes the NBD address and begins to activate every volume; [`Engine::next_event`] tells how that goes. Clients are
    /// let in as soon as the first serves. May be dropped at any moment.
    pub async fn start(config: &EngineConfig, options: StartOptions) -> Result<Engine, StartError> {
        let server = Arc::new(door::open(config, options.sockets, DRAIN_MAX)?);
        let front = Arc::new(Front { server, stop: watch::Sender::new(false), serving: Mutex::default() });
        let log = Arc::new(EventLog::default());
        let agents = Arc::new(Agents::new(&config.agents)?);
        let state_directory = config.state.directory.clone().or_else(service::state_directory);
        let mut volumes = Vec::new();
        for volume in &config.volumes {
            let (agents, log) = (agents.clone(), log.clone());
            let task = VolumeTask::start(volume, agents, options.take_over, state_directory.as_deref(), log);
            volumes.push(task.await?);
        }
        let (tell, events) = mpsc::channel(EVENTS_QUEUED_MAX);
        let mut following = JoinSet::new();
        for volume in &volumes {
            following.spawn(follow(volume.clone(), front.clone(), tell.clone()));
        }
        let reporter = Arc::new(Reporter::new(volumes.clone(), log));
        Ok(Engine { front, volumes, reporter, events, _following: following })
    }

    /// What happens next. Safe to drop and call again.
    pub async fn next_event(&mut self) -> EngineEvent {
        match self.events.recv().await {
            Some(event) => event,
            // Nothing can happen any more, or there is no volume.
            None => std::future::pending().await,
        }
    }

    /// What status and metrics are made from, and who takes orders.
    #[must_use]
    pub fn control(&self) -> Arc<dyn Control> {
        self.reporter.clone()
    }

    /// Lets requests end, lets replicas catch up as far as they can in a second, and marks those in this process clean.
    pub async fn shutdown(self) -> Result<(), ShutdownError> {
        self.front.stop.send_replace(true);
        let serving = self.front.serving.lock().expect("no thread panicked with the lock").take();
        if let Some(serving) = serving {
            match serving.await {
                Ok(Ok(())) => {}
                Ok(Err(e)) => tracing::warn!("the NBD server ended with an error: {e}"),
                Err(e) => tracing::warn!("the NBD server ended with an error: {e}"),
            }
        }
        let catch_up_until = Instant::now() + CATCH_UP_MAX;
        let keeping: Vec<_> = self.volumes.iter().map(VolumeTask::keep_scrub).collect();
        for volume in &self.volumes {
            volume.stop(catch_up_until).await;
        }
        scrubbing::kept(keeping, catch_up_until).await;
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

/// Tells what becomes of a volume, and lets clients in when it serves.
async fn follow(volume: Arc<VolumeTask>, front: Arc<Front>, tell: mpsc::Sender<EngineEvent>) {
    let mut outcome = volume.outcome();
    let volume_name = || volume.name().to_owned();
    loop {
        let found = outcome.borrow_and_update().clone();
        let event = match found {
            Outcome::Starting => None,
            Outcome::Blocked(refusal) => Some(EngineEvent::Blocked { volume: volume_name(), refusal }),
            Outcome::Serving => Some(match front.publish(volume.clone()) {
                Ok(()) => EngineEvent::Ready { volume: volume_name(), uris: front.server.uris(volume.name()) },
                Err(e) => EngineEvent::NotStarted(e.into()),
            }),
            Outcome::Refused(refusal) => {
                Some(EngineEvent::NotStarted(StartError::Refused { volume: volume_name(), refusal }))
            }
            Outcome::Fenced { promised, replica } => {
                Some(EngineEvent::Failed(EngineFailure::Fenced { volume: volume_name(), replica, promised }))
            }
            Outcome::Corrupt { seq } => {
                Some(EngineEvent::Failed(EngineFailure::Corrupt { volume: volume_name(), seq }))
            }
        };
        if let Some(event) = event
            && tell.send(event).await.is_err()
        {
            return;
        }
        if outcome.changed().await.is_err() {
            return;
        }
    }
}
