//! Waiting for what an engine does by itself after an order, with a line about it now and then. An interrupted wait
//! interrupts nothing: the engine goes on.

use std::io::{IsTerminal, Write, stderr};
use std::time::Duration;

use listener_agent::console::Failure;
use tokio::time::Instant;

use super::not_answered;
use crate::admin::client::{AdminUrl, ask_status};
use crate::status::{ReplicaState, ReplicaStatus, ScrubResult, ScrubState, VolumeState, VolumeStatus, resync_progress};

const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Between two lines on a terminal, where each takes the place of the one before.
const TELL_TERMINAL_EVERY: Duration = Duration::from_secs(1);
/// Between two lines in a file or a pipe.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// A start without lost replicas takes a lease and some moments more.
const ACTIVATION_MAX: Duration = Duration::from_secs(90);

/// What takes less is not told of.
const TELL_AFTER: Duration = Duration::from_millis(800);

/// Lines about progress on standard error.
struct Teller {
    on_terminal: bool,
    told: bool,
    next_at: Instant,
}

impl Teller {
    fn new() -> Teller {
        Teller { on_terminal: stderr().is_terminal(), told: false, next_at: Instant::now() + TELL_AFTER }
    }

    fn tell(&mut self, line: impl FnOnce() -> String) {
        if Instant::now() < self.next_at {
            return;
        }
        self.next_at = Instant::now() + if self.on_terminal { TELL_TERMINAL_EVERY } else { TELL_EVERY };
        self.told = true;
        let line = line();
        // Without standard error there is nobody to tell.
        let _ = if self.on_terminal { write!(stderr(), "\r\x1b[K{line}") } else { writeln!(stderr(), "{line}") };
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        if self.on_terminal && self.told {
            let _ = write!(stderr(), "\r\x1b[K");
        }
    }
}

/// The volume as it is now.
pub(super) async fn volume_of(url: &AdminUrl, volume: &str) -> Result<VolumeStatus, Failure> {
    let report = ask_status(url).await.map_err(not_answered)?;
    let known: Vec<String> = report.volumes.iter().map(|v| v.name.clone()).collect();
    report.volumes.into_iter().find(|v| v.name == volume).ok_or_else(|| {
        Failure::failed(format_args!("there is no volume {volume}"))
            .remedy(format_args!("the engine serves {}", known.join(", ")))
    })
}

/// Waits until the replica is a member of the view.
pub(super) async fn until_member(url: &AdminUrl, volume: &str, replica: &str) -> Result<(), Failure> {
    let mut teller = Teller::new();
    loop {
        let status = volume_of(url, volume).await?;
        let Some(found) = status.replicas.iter().find(|r| r.name == replica) else {
            return Err(Failure::failed(format_args!("replica {replica} of volume {volume} was removed meanwhile")));
        };
        if found.state == ReplicaState::Member && status.view.iter().any(|member| member == replica) {
            return Ok(());
        }
        teller.tell(|| describe(found));
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn describe(replica: &ReplicaStatus) -> String {
    let what = replica.resync.as_ref().map(resync_progress).or_else(|| replica.reason.clone());
    format!("replica {} {}: {}", replica.name, replica.state.word(), what.unwrap_or_else(|| "waiting".to_owned()))
}

/// Waits until the volume has no such replica.
pub(super) async fn until_removed(url: &AdminUrl, volume: &str, replica: &str) -> Result<(), Failure> {
    let mut teller = Teller::new();
    while volume_of(url, volume).await?.replicas.iter().any(|r| r.name == replica) {
        teller.tell(|| format!("replica {replica} leaves when the others have taken note"));
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
}

/// Waits until the scrub of a volume has ended.
pub(super) async fn until_scrubbed(url: &AdminUrl, volume: &str) -> Result<ScrubResult, Failure> {
    let mut teller = Teller::new();
    loop {
        let status = volume_of(url, volume).await?;
        match status.scrub.last.filter(|_| status.scrub.state == ScrubState::Idle) {
            Some(last) => return Ok(last),
            None if status.state == VolumeState::Failed => {
                return Err(Failure::failed(format_args!("volume {volume} failed")));
            }
            None => teller.tell(|| format!("volume {volume}: scrub {}", status.scrub.progress())),
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Waits until a volume serves that was told to do without replicas.
pub(super) async fn until_serving(url: &AdminUrl, volume: &str) -> Result<(), Failure> {
    let mut teller = Teller::new();
    let begun = Instant::now();
    loop {
        let status = volume_of(url, volume).await?;
        match status.state {
            VolumeState::Serving | VolumeState::Frozen => return Ok(()),
            VolumeState::Failed => return Err(Failure::failed(format_args!("volume {volume} failed"))),
            VolumeState::Starting => {}
        }
        let blocked = status.blocked.unwrap_or_else(|| "the replicas answer".to_owned());
        if begun.elapsed() >= ACTIVATION_MAX {
            return Err(Failure::failed(format_args!("volume {volume} still waits: {blocked}")));
        }
        teller.tell(|| format!("volume {volume} starts: {blocked}"));
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
