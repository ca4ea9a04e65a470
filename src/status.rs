//! What an engine reports about itself: the JSON of `/status`, which is also that of `nbdcast status --json`, and that of
//! `/events`.
//!
//! Owns the shape and names of the report, a contract with programs outside, and its rendering for people. Collects
//! nothing itself: a `StatusSource` does.

mod scrub;
mod table;

use serde::{Deserialize, Serialize};

use crate::config::AckPolicy;

pub use scrub::{ScrubCounts, ScrubResult, ScrubState, ScrubStatus};
pub use table::{render, resync_progress};

/// Something that can say how the engine is doing. Called for every request of the admin server, so it must be quick and
/// must not wait for a disk or a peer.
pub trait StatusSource: Send + Sync + 'static {
    /// The state at this moment.
    fn status(&self) -> StatusReport;

    /// The last events of all volumes, oldest first.
    fn events(&self) -> Vec<EventStatus>;
}

/// The whole engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Every configured volume, in the order of the config.
    pub volumes: Vec<VolumeStatus>,
}

/// One volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Name of the volume and its export.
    pub name: String,
    /// UUID given by `create`, in lower case with hyphens.
    pub uuid: String,
    /// Size in bytes.
    pub size: u64,
    /// Epoch of this engine's activation.
    pub epoch: u64,
    /// Last place given out in the volume's order.
    pub seq: u64,
    /// Names of the members of the view in force.
    pub view: Vec<String>,
    /// What it does for its clients.
    pub state: VolumeState,
    /// Why it cannot start, while it waits for replicas; null otherwise.
    pub blocked: Option<String>,
    /// The ack policies in force.
    pub ack: AckStatus,
    /// Acknowledged bytes held by fewer than two replicas.
    pub exposed_bytes: u64,
    /// Every configured replica, in the order of the config.
    pub replicas: Vec<ReplicaStatus>,
    /// Reads answered since the engine started.
    pub reads: u64,
    /// Writes, TRIMs and WRITE_ZEROES answered since the engine started.
    pub writes: u64,
    /// Bytes of these reads.
    pub read_bytes: u64,
    /// Bytes of these writes; TRIM and WRITE_ZEROES carry none.
    pub written_bytes: u64,
    /// Recent latencies as clients see them, in microseconds.
    pub latency_us: LatencyStatus,
    /// BLOCK_STATUS requests since the engine started.
    pub block_statuses: u64,
    /// CACHE requests since the engine started.
    pub caches: u64,
    /// Its scrubs.
    pub scrub: ScrubStatus,
}

/// What a volume does for its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeState {
    /// Being activated; clients are not served yet.
    Starting,
    /// Answering reads and writes.
    Serving,
    /// Holding I/O back: fewer than `min_replicas` members are left, or too few can be reached to acknowledge anything.
    Frozen,
    /// Answering with errors, until the engine is started again.
    Failed,
}

/// The ack policies of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AckStatus {
    /// For writes, TRIM and WRITE_ZEROES.
    pub write: AckPolicy,
    /// For FLUSH and FUA.
    pub flush: AckPolicy,
}

/// One replica as the engine sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Name of the replica.
    pub name: String,
    /// Address of its agent, or its path if it is embedded in the engine.
    pub address: String,
    /// Its part in the volume.
    pub state: ReplicaState,
    /// Last seq that it holds durably, as far as the engine knows.
    pub durable_seq: u64,
    /// Records that it is behind.
    pub lag_records: u64,
    /// Journal bytes of these records.
    pub lag_bytes: u64,
    /// Age of the oldest of these records, in milliseconds.
    pub lag_ms: u64,
    /// Progress of a running resync; null if none runs.
    pub resync: Option<ResyncStatus>,
    /// Why it is not in order, as far as that is known; null for a member.
    pub reason: Option<String>,
    /// Blocks found bad since the engine started: unreadable, or not what they should be.
    pub checksum_errors: u64,
    /// Of these, good again: repaired from another member, or overwritten.
    pub repaired_blocks: u64,
}

/// A replica's part in the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplicaState {
    /// In the view: its acknowledgements count.
    Member,
    /// Being brought up to date.
    Syncing,
    /// Left the view.
    Dropped,
    /// Cannot be reached.
    Offline,
    /// Reported a fault of its disk or data.
    Failed,
}

/// Progress of a resync.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncStatus {
    /// Bytes copied so far.
    pub done_bytes: u64,
    /// Bytes to copy in all.
    pub total_bytes: u64,
    /// Recent rate.
    pub bytes_per_second: u64,
    /// Time to go at this rate; null while the rate is unknown or zero.
    pub eta_seconds: Option<u64>,
}

/// Latencies of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LatencyStatus {
    /// Of reads.
    pub read: Percentiles,
    /// Of writes.
    pub write: Percentiles,
}

/// Two percentiles in microseconds; 0 if nothing was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Percentiles {
    /// Half are at most this.
    pub p50: u64,
    /// 99 of 100 are at most this.
    pub p99: u64,
}

/// Something that happened to a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventStatus {
    /// When, in milliseconds since 1970-01-01 UTC.
    pub time_ms: u64,
    /// Name of the volume.
    pub volume: String,
    /// Name of the replica; null if the event concerns all of the volume.
    pub replica: Option<String>,
    /// How serious it is.
    pub severity: EventSeverity,
    /// What happened, one line.
    pub text: String,
}

/// How serious an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventSeverity {
    /// As it should be.
    Info,
    /// Worth a look.
    Warning,
    /// Something is lost or stands still until somebody acts.
    Error,
}

impl EventSeverity {
    /// The word used in reports.
    pub fn word(self) -> &'static str {
        match self {
            EventSeverity::Info => "info",
            EventSeverity::Warning => "warning",
            EventSeverity::Error => "error",
        }
    }
}

impl VolumeState {
    /// The word used in reports.
    pub fn word(self) -> &'static str {
        match self {
            VolumeState::Starting => "starting",
            VolumeState::Serving => "serving",
            VolumeState::Frozen => "frozen",
            VolumeState::Failed => "failed",
        }
    }
}

impl ReplicaState {
    /// Every state, in the order of concern.
    pub const ALL: [ReplicaState; 5] = [
        ReplicaState::Member,
        ReplicaState::Syncing,
        ReplicaState::Dropped,
        ReplicaState::Offline,
        ReplicaState::Failed,
    ];

    /// The word used in reports.
    pub fn word(self) -> &'static str {
        match self {
            ReplicaState::Member => "member",
            ReplicaState::Syncing => "syncing",
            ReplicaState::Dropped => "dropped",
            ReplicaState::Offline => "offline",
            ReplicaState::Failed => "failed",
        }
    }
}

impl StatusReport {
    /// Why the engine is not healthy, one line per volume that does not serve; empty if all is well.
    ///
    /// A volume that serves with fewer members than replicas is healthy: clients notice nothing.
    pub fn complaints(&self) -> Vec<String> {
        if self.volumes.is_empty() {
            return vec!["no volume is served yet".to_owned()];
        }
        let troubled = |volume: &&VolumeStatus| volume.state != VolumeState::Serving;
        self.volumes
            .iter()
            .filter(troubled)
            .map(|volume| {
                if let Some(blocked) = &volume.blocked {
                    return format!("volume {} does not start: {blocked}", volume.name);
                }
                let absent: Vec<String> = volume
                    .replicas
                    .iter()
                    .filter(|replica| replica.state != ReplicaState::Member)
                    .map(|replica| format!("{} {}", replica.name, replica.state.word()))
                    .collect();
                let cause =
                    if absent.is_empty() { String::new() } else { format!(" (replicas: {})", absent.join(", ")) };
                format!("volume {} is {}{cause}", volume.name, volume.state.word())
            })
            .collect()
    }
}

#[cfg(test)]
pub(crate) mod tests;
