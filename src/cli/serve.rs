//! Runs an engine in the foreground until a signal or a failure, with its admin server beside it.
//!
//! Owns the order of starting and stopping. The admin address is taken first, so that a busy port is reported before any
//! replica is touched; it answers while volumes still start. A volume that waits for replicas does not keep others from
//! being served, and is served itself once it can be.

use std::collections::BTreeSet;
use std::io;

use listener_agent::config::Endpoint;
use listener_agent::console::{Failure, SHUTDOWN_MAX, ShutdownSignals, print_failure, say};
use listener_agent::service::{self, PassedSocket};
use tokio::sync::watch;

use super::PROGRAM;
use crate::admin::client::AdminUrl;
use crate::admin::{AdminError, AdminServer};
use crate::config::{EngineConfig, ReplicaPlace};
use crate::nbd::ListeningSocket;
use crate::runtime::{Engine, EngineEvent, StartError, StartOptions, refusal_remedy};

/// Reasons why volumes wait that are remembered, so that each is told once.
const REASONS_MAX: usize = 100;

/// Sockets that a service manager has passed, as the engine takes them.
pub(super) fn listening(passed: Vec<PassedSocket>) -> Result<Vec<ListeningSocket>, Failure> {
    let take_over = |socket| match socket {
        PassedSocket::Tcp(listener) => ListeningSocket::from_tcp(listener),
        PassedSocket::Unix(listener) => ListeningSocket::from_unix(listener),
    };
    passed.into_iter().map(take_over).collect::<io::Result<_>>().map_err(|error| {
        Failure::failed(format_args!("cannot use a socket that was passed in LISTEN_FDS: {error}"))
            .remedy("pass listening sockets with an address or a path: ListenStream= in the .socket unit")
    })
}

/// Prints the line `ready URI` of a volume.
pub(super) fn announce_ready(uri: &str, _admin: &AdminUrl) -> Result<(), Failure> {
    say(format_args!("ready {uri}"))
}

/// Serves `config` until SIGTERM or SIGINT; `announce` is called for every volume once it serves.
///
/// Returns within 5 s of the signal, with success if everything in flight was finished and marked clean.
pub(super) async fn run(
    config: &EngineConfig,
    options: StartOptions,
    announce: impl FnMut(&str, &AdminUrl) -> Result<(), Failure>,
) -> Result<(), Failure> {
    warn_if_open("admin.listen", &config.admin.listen);
    warn_of_open_agents(config);
    let mut signals = ShutdownSignals::install()?;
    let admin = AdminServer::bind(&config.admin.listen).await.map_err(admin_failure)?;
    let admin_url = AdminUrl::from(admin.local_address());
    let mut engine = tokio::select! {
        started = Engine::start(config, options) => started.map_err(not_started)?,
        name = signals.next() => {
            tracing::info!(signal = name, "stopped before any volume was served");
            return Ok(());
        }
    };
    // Dropping `stop` at the end of this function ends the admin server.
    let (_stop, stopping) = watch::channel(false);
    tokio::spawn(admin.serve(engine.control(), stopping));
    tracing::info!(admin = %admin_url, "started");

    let ended = tokio::select! {
        failure = follow(&mut engine, config.volumes.len(), &admin_url, announce) => Err(failure),
        name = signals.next() => {
            tracing::info!(signal = name, "stopping");
            Ok(())
        }
    };
    service::stopping();
    signals.exit_on_next(PROGRAM);
    let stopped = shut_down(engine).await;
    match ended {
        Ok(()) => stopped,
        Err(failure) => {
            if let Err(also) = stopped {
                tracing::warn!(error = also.message, "the failed engine did not stop cleanly");
            }
            Err(failure)
        }
    }
}

/// Tells what happens to the engine, until it must stop.
async fn follow(
    engine: &mut Engine,
    volumes: usize,
    admin: &AdminUrl,
    mut announce: impl FnMut(&str, &AdminUrl) -> Result<(), Failure>,
) -> Failure {
    let mut told = BTreeSet::new();
    let mut reporter = Reporter::new(volumes);
    loop {
        match engine.next_event().await {
            EngineEvent::Ready { volume, uris } => {
                if let Err(failure) = uris.iter().try_for_each(|uri| announce(uri, admin)) {
                    return failure;
                }
                reporter.on_serving(volume);
            }
            EngineEvent::Blocked { volume, refusal } => {
                reporter.on_blocked(&volume);
                let message = format!("volume {volume} waits to be started: {refusal}");
                if told.len() >= REASONS_MAX {
                    told.clear();
                }
                if told.insert(message.clone()) {
                    let failure = Failure::failed(message).remedy(refusal_remedy(&volume, &refusal));
                    print_failure(PROGRAM, &failure);
                }
            }
            EngineEvent::NotStarted(error) => return not_started(error),
            EngineEvent::Failed(failure) => return Failure::failed(failure),
        }
    }
}

/// What the service manager is told: ready once every volume serves or waits for replicas, and how many do.
struct Reporter {
    volumes: usize,
    serving: BTreeSet<String>,
    waiting: BTreeSet<String>,
    is_ready: bool,
}

impl Reporter {
    fn new(volumes: usize) -> Reporter {
        Reporter { volumes, serving: BTreeSet::new(), waiting: BTreeSet::new(), is_ready: false }
    }

    fn on_serving(&mut self, volume: String) {
        self.waiting.remove(&volume);
        self.serving.insert(volume);
        self.report();
    }

    fn on_blocked(&mut self, volume: &str) {
        self.serving.remove(volume);
        self.waiting.insert(volume.to_owned());
        self.report();
    }

    fn report(&mut self) {
        let status = self.status();
        self.is_ready |= self.serving.len() + self.waiting.len() >= self.volumes;
        if self.is_ready { service::ready(&status) } else { service::status(&status) }
    }

    fn status(&self) -> String {
        let mut status = format!("serves {} of {} volumes", self.serving.len(), self.volumes);
        if !self.waiting.is_empty() {
            let waiting: Vec<&str> = self.waiting.iter().map(String::as_str).collect();
            status.push_str(&format!("; waiting for replicas: {}", waiting.join(", ")));
        }
        status
    }
}

async fn shut_down(engine: Engine) -> Result<(), Failure> {
    match tokio::time::timeout(SHUTDOWN_MAX, engine.shutdown()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Failure::failed(error)),
        Err(_) => Err(Failure::failed(format_args!(
            "work in flight did not finish within {} ms; stopped without marking the replicas clean",
            SHUTDOWN_MAX.as_millis()
        ))
        .remedy("nothing that was acknowledged is lost: the next start replays the journals")),
    }
}

fn not_started(error: StartError) -> Failure {
    Failure { exit_code: error.exit_code(), remedy: error.remedy(), message: error.to_string() }
}

fn admin_failure(error: AdminError) -> Failure {
    let failure = match error {
        AdminError::Bind { .. } => Failure::failed(&error),
        AdminError::NotTcp { .. } => Failure::usage(&error),
    };
    failure.remedy(error.remedy())
}

fn warn_of_open_agents(config: &EngineConfig) {
    if config.agents.certificates.is_some() {
        return;
    }
    let replicas = config.volumes.iter().flat_map(|volume| &volume.replicas);
    let open: Vec<String> = replicas.filter_map(|replica| open_address(&replica.place)).collect();
    if !open.is_empty() {
        tracing::warn!("data goes to {} without encryption or authentication", open.join(", "));
    }
}

fn open_address(place: &ReplicaPlace) -> Option<String> {
    match place {
        ReplicaPlace::Agent { address, .. } => (!address.is_local()).then(|| address.to_string()),
        ReplicaPlace::Embedded { .. } => None,
    }
}

fn warn_if_open(key: &str, address: &Endpoint) {
    if !address.is_local() {
        tracing::warn!(
            %address,
            "{key} can be reached from other machines, without encryption or authentication"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_manager_is_told_who_waits() {
        let mut reporter = Reporter::new(3);
        reporter.on_serving("vol0".to_owned());
        assert!(!reporter.is_ready);
        reporter.on_blocked("vol1");
        reporter.on_blocked("vol2");
        assert!(reporter.is_ready);
        assert_eq!(reporter.status(), "serves 1 of 3 volumes; waiting for replicas: vol1, vol2");
        reporter.on_serving("vol2".to_owned());
        assert_eq!(reporter.status(), "serves 2 of 3 volumes; waiting for replicas: vol1");
    }
}
