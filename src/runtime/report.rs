//! How the engine's volumes stand, in the form that people and their tools are shown.

use std::sync::Arc;

use super::events::EventLog;
use super::latency::Percentiles;
use super::seat::address_of;
use super::volume_task::VolumeTask;
use crate::config::ReplicaPlace;
use crate::status::{
    AckStatus, EventStatus, LatencyStatus, Percentiles as ShownPercentiles, ReplicaState, ReplicaStatus, ResyncStatus,
    StatusReport, StatusSource, VolumeState as ShownState, VolumeStatus,
};
use crate::volume::{PeerSnapshot, PeerState, ResyncSnapshot, VolumeState};

/// Makes reports, and hands orders to the volumes (see [`super::orders`]).
pub(super) struct Reporter {
    pub(super) volumes: Vec<Arc<VolumeTask>>,
    events: Arc<EventLog>,
}

impl Reporter {
    pub(super) fn new(volumes: Vec<Arc<VolumeTask>>, events: Arc<EventLog>) -> Reporter {
        Reporter { volumes, events }
    }
}

impl StatusSource for Reporter {
    fn status(&self) -> StatusReport {
        StatusReport { volumes: self.volumes.iter().map(|v| volume_status(v)).collect() }
    }

    fn events(&self) -> Vec<EventStatus> {
        self.events.all()
    }
}

fn volume_status(task: &VolumeTask) -> VolumeStatus {
    let (snapshot, places) = task.snapshot();
    let replicas = snapshot.peers.iter().zip(&places).map(|(peer, place)| replica_status(peer, place));
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
        blocked: snapshot.blocked.clone(),
        ack: AckStatus { write: task.settings.ack_write, flush: task.settings.ack_flush },
        exposed_bytes: snapshot.exposed_bytes,
        replicas: replicas.collect(),
        reads: snapshot.reads,
        writes: snapshot.writes,
        read_bytes: task.figures.read_bytes(),
        written_bytes: task.figures.written_bytes(),
        latency_us: LatencyStatus {
            read: shown(task.figures.read_latency()),
            write: shown(task.figures.change_latency()),
        },
        block_statuses: snapshot.statuses,
        caches: snapshot.prefetches,
        scrub: task.scrubbing.status(snapshot.scrub.as_ref()),
    }
}

fn shown(percentiles: Percentiles) -> ShownPercentiles {
    ShownPercentiles { p50: percentiles.p50, p99: percentiles.p99 }
}

fn replica_status(peer: &PeerSnapshot, place: &ReplicaPlace) -> ReplicaStatus {
    ReplicaStatus {
        name: peer.name.to_string(),
        address: address_of(place),
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
        resync: peer.resync.map(resync_status),
        reason: peer.trouble.clone(),
        checksum_errors: peer.checksum_errors,
        repaired_blocks: peer.repaired_blocks,
    }
}

fn resync_status(resync: ResyncSnapshot) -> ResyncStatus {
    let ResyncSnapshot { done_bytes, total_bytes, bytes_per_second, eta_seconds } = resync;
    ResyncStatus { done_bytes, total_bytes, bytes_per_second, eta_seconds }
}
