//! Runs an engine in the foreground until a signal or a failure, with its admin server beside it.
//!
//! Owns the order of starting and stopping. The admin address is taken first, so that a busy port is reported before any
//! replica is touched; it answers while volumes still start. A volume that waits for replicas does not keep others from
//! being served, and is served itself once it can be.

use std::collections::BTreeSet;

use listener_agent::config::Endpoint;
use listener_agent::console::{Failure, SHUTDOWN_MAX, ShutdownSignals, print_failure, say};
use tokio::sync::watch;

use super::PROGRAM;
use crate::admin::client::AdminUrl;
use crate::admin::{AdminError, AdminServer};
use crate::config::{EngineConfig, ReplicaPlace};
use crate::runtime::{Engine, EngineEvent, StartError, StartOptions, refusal_remedy};

/// Reasons why volumes wait that are remembered, so that each is told once.
const REASONS_MAX: usize = 100;

/// Prints the line `ready URI` of a volume.
pub(super) fn announce_ready(uri: &str, _admin: &AdminUrl) -> Result<(), Failure> {
    say(format_args!("ready {uri}"))
}

/// Serves `config` until SIGTERM or SIGINT; `announce` is called for every volume once it serves.
///
/// Returns within 5 s of the signal, with success if everything in flight was finished and marked clean.
pub(super) async fn run(
    config: &EngineConfig,
    take_over: bool,
    announce: impl FnMut(&str, &AdminUrl) -> Result<(), Failure>,
) -> Result<(), Failure> {
    warn_if_open("nbd.listen", &config.nbd.listen);
    warn_if_open("admin.listen", &config.admin.listen);
    warn_of_open_agents(config);
    let mut signals = ShutdownSignals::install()?;
    let admin = AdminServer::bind(&config.admin.listen).await.map_err(admin_failure)?;
    let admin_url = AdminUrl::from(admin.local_address());
    let mut engine = tokio::select! {
        started = Engine::start(config, StartOptions { take_over }) => started.map_err(not_started)?,
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
        failure = follow(&mut engine, &admin_url, announce) => Err(failure),
        name = signals.next() => {
            tracing::info!(signal = name, "stopping");
            Ok(())
        }
    };
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
    admin: &AdminUrl,
    mut announce: impl FnMut(&str, &AdminUrl) -> Result<(), Failure>,
) -> Failure {
    let mut told = BTreeSet::new();
    loop {
        match engine.next_event().await {
            EngineEvent::Ready { uri } => {
                if let Err(failure) = announce(&uri, admin) {
                    return failure;
                }
            }
            EngineEvent::Blocked { volume, refusal } => {
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
