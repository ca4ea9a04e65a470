//! Runs an engine in the foreground until a signal or a failure, with its admin server beside it.
//!
//! Owns the order of starting and stopping. The admin address is taken first, so that a busy port is reported before any
//! replica is touched; it answers once the volumes serve.

use listener_agent::config::Endpoint;
use listener_agent::console::{Failure, SHUTDOWN_MAX, ShutdownSignals, say};
use tokio::sync::watch;

use super::PROGRAM;
use crate::admin::client::AdminUrl;
use crate::admin::{AdminError, AdminServer};
use crate::config::EngineConfig;
use crate::runtime::{Engine, StartError, StartOptions};

/// Prints one line `ready URI` per volume.
pub(super) fn announce_ready(uris: &[String], _admin: &AdminUrl) -> Result<(), Failure> {
    uris.iter().try_for_each(|uri| say(format_args!("ready {uri}")))
}

/// Serves `config` until SIGTERM or SIGINT; `announce` is called once when every volume serves.
///
/// Returns within 5 s of the signal, with success if everything in flight was finished and marked clean.
pub(super) async fn run(
    config: &EngineConfig,
    take_over: bool,
    announce: impl FnOnce(&[String], &AdminUrl) -> Result<(), Failure>,
) -> Result<(), Failure> {
    warn_if_open("nbd.listen", &config.nbd.listen);
    warn_if_open("admin.listen", &config.admin.listen);
    let mut signals = ShutdownSignals::install()?;
    let admin = AdminServer::bind(&config.admin.listen).await.map_err(admin_failure)?;
    let admin_url = AdminUrl::from(admin.local_address());
    let engine = tokio::select! {
        started = Engine::start(config, StartOptions { take_over }) => started.map_err(not_started)?,
        name = signals.next() => {
            tracing::info!(signal = name, "stopped before any volume was served");
            return Ok(());
        }
    };
    // Dropping `stop` at the end of this function ends the admin server.
    let (_stop, stopping) = watch::channel(false);
    tokio::spawn(admin.serve(engine.status_source(), stopping));
    tracing::info!(admin = %admin_url, "serving");
    announce(&engine.uris(), &admin_url)?;

    let failure = tokio::select! {
        failure = engine.failed() => Some(failure),
        name = signals.next() => {
            tracing::info!(signal = name, "stopping");
            None
        }
    };
    signals.exit_on_next(PROGRAM);
    let stopped = shut_down(engine).await;
    match failure {
        None => stopped,
        Some(failure) => {
            if let Err(also) = stopped {
                tracing::warn!(error = also.message, "the failed engine did not stop cleanly");
            }
            Err(Failure::failed(failure))
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

fn warn_if_open(key: &str, address: &Endpoint) {
    if !address.is_local() {
        tracing::warn!(
            %address,
            "{key} can be reached from other machines, without encryption or authentication"
        );
    }
}
