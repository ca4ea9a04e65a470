//! How the engine's volumes stand, in the form that people and their tools are shown.

use std::sync::Arc;

use super::latency::Percentiles;
use super::volume_task::VolumeTask;
use crate::status::{
    AckStatus, LatencyStatus, Percentiles as ShownPercentiles, ReplicaState, ReplicaStatus, StatusReport, StatusSource,
    VolumeState as ShownState, VolumeStatus,
};
use crate::volume::{PeerSnapshot, PeerState, VolumeState};

/// Makes reports.
pub(super) struct Reporter {
    volumes: Vec<Arc<VolumeTask>>,
}

impl Reporter {
    pub(super) fn new(volumes: Vec<Arc<VolumeTask>>) -> Reporter {
        Reporter { volumes }
    }
}

impl StatusSource for Reporter {
    fn status(&self) -> StatusReport {
        StatusReport { volumes: self.volumes.iter().map(|v| volume_status(v)).collect() }
    }
}

fn volume_status(task: &VolumeTask) -> VolumeStatus {
    let snapshot = task.snapshot();
    let replicas = snapshot.peers.iter().zip(task.addresses()).map(|(p, address)| replica_status(p, address));
    VolumeStatus {
        name: task.name().to_owned(),
        uuid: snapshot.uuid.map(|u| u.to_string()).unwrap_or_default(),
        size: task.size_bytes(),
        epoch: snapshot.epoch.0,
        seq: snapshot.seq.0,
        view: snapshot.view.iter().map(ToString::to_string).collect(),
        state: match snapshot.state {
            VolumeState::Starting => ShownState::Starting,
            VolumeState::Serving => ShownState::Serving,
            VolumeState::Frozen => ShownState::Frozen,
            VolumeState::Failed => ShownState::Failed,
        },
        ack: AckStatus { write: task.ack_write(), flush: task.ack_flush() },
        exposed_bytes: snapshot.exposed_bytes,
        replicas: replicas.collect(),
        reads: snapshot.reads,
        writes: snapshot.writes,
        latency_us: LatencyStatus { read: shown(task.read_latency()), write: shown(task.write_latency()) },
    }
}

fn shown(percentiles: Percentiles) -> ShownPercentiles {
    ShownPercentiles { p50: percentiles.p50, p99: percentiles.p99 }
}

fn replica_status(peer: &PeerSnapshot, address: &str) -> ReplicaStatus {
    ReplicaStatus {
        name: peer.name.to_string(),
        address: address.to_owned(),
        state: match peer.state {
            PeerState::Member => ReplicaState::Member,
            PeerState::Syncing => ReplicaState::Syncing,
            PeerState::Dropped => ReplicaState::Dropped,
            PeerState::Offline => ReplicaState::Offline,
            PeerState::Failed => ReplicaState::Failed,
        },
        durable_seq: peer.durable.0,
        lag_records: peer.lag_records,
        lag_bytes: peer.lag_bytes,
        lag_ms: peer.lag_ms,
        resync: None,
        checksum_errors: peer.checksum_errors,
        repaired_blocks: 0,
    }
}
