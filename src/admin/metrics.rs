//! The status report as Prometheus metrics.
//!
//! Owns metric names and labels, a contract with dashboards and alerts. Keeps no counters of its own: each scrape writes
//! the report of that moment.

use std::fmt;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::status::{
    Percentiles, ReplicaState, ReplicaStatus, ScrubState, ScrubStatus, StatusReport, VolumeState, VolumeStatus,
};

/// Content type of the text that `render` makes.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge<u64, AtomicU64>>;
type Seconds = Family<Labels, Gauge<f64, AtomicU64>>;
type Counters = Family<Labels, Counter>;

/// The metrics text of `report`.
pub(super) fn render(report: &StatusReport) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("nbdcast");
    let volumes = VolumeMetrics::register(&mut registry);
    let replicas = ReplicaMetrics::register(&mut registry);
    for volume in &report.volumes {
        volumes.set(volume);
        for replica in &volume.replicas {
            replicas.set(&volume.name, replica);
        }
    }
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

fn gauges(registry: &mut Registry, name: &str, help: &str) -> Gauges {
    let family = Gauges::default();
    registry.register(name, help, family.clone());
    family
}

fn seconds(registry: &mut Registry, name: &str, help: &str) -> Seconds {
    let family = Seconds::default();
    registry.register(name, help, family.clone());
    family
}

/// The text form adds `_total` to the name.
fn counters(registry: &mut Registry, name: &str, help: &str) -> Counters {
    let family = Counters::default();
    registry.register(name, help, family.clone());
    family
}

struct VolumeMetrics {
    serving: Gauges,
    blocked: Gauges,
    size: Gauges,
    epoch: Gauges,
    seq: Gauges,
    members: Gauges,
    exposed: Gauges,
    reads: Counters,
    writes: Counters,
    block_statuses: Counters,
    caches: Counters,
    read_bytes: Counters,
    written_bytes: Counters,
    latency: Seconds,
    scrub: ScrubMetrics,
}

impl VolumeMetrics {
    fn register(registry: &mut Registry) -> VolumeMetrics {
        let r = registry;
        VolumeMetrics {
            serving: gauges(r, "volume_serving", "1 if clients are answered, else 0"),
            blocked: gauges(r, "volume_blocked", "1 if the volume waits for replicas to be started, else 0"),
            size: gauges(r, "volume_size_bytes", "Size of the volume"),
            epoch: gauges(r, "volume_epoch", "Epoch of the running activation"),
            seq: gauges(r, "volume_seq", "Last place given out in the volume's order"),
            members: gauges(r, "volume_members", "Replicas in the view in force"),
            exposed: gauges(r, "volume_exposed_bytes", "Acknowledged bytes held by fewer than two replicas"),
            reads: counters(r, "volume_reads", "Reads answered"),
            writes: counters(r, "volume_writes", "Writes, TRIMs and WRITE_ZEROES answered"),
            block_statuses: counters(r, "volume_block_statuses", "BLOCK_STATUS requests"),
            caches: counters(r, "volume_caches", "CACHE requests"),
            read_bytes: counters(r, "volume_read_bytes", "Bytes of reads answered"),
            written_bytes: counters(r, "volume_written_bytes", "Bytes of writes answered"),
            latency: seconds(r, "volume_latency_seconds", "Recent latency as clients see it, by quantile"),
            scrub: ScrubMetrics::register(r),
        }
    }

    fn set(&self, volume: &VolumeStatus) {
        let labels: Labels = vec![("volume", volume.name.clone())];
        let serving = volume.state == VolumeState::Serving;
        let members = u64::try_from(volume.view.len()).unwrap_or(u64::MAX);
        for (family, value) in [
            (&self.serving, u64::from(serving)),
            (&self.blocked, u64::from(volume.blocked.is_some())),
            (&self.size, volume.size),
            (&self.epoch, volume.epoch),
            (&self.seq, volume.seq),
            (&self.members, members),
            (&self.exposed, volume.exposed_bytes),
        ] {
            family.get_or_create(&labels).set(value);
        }
        self.reads.get_or_create(&labels).inc_by(volume.reads);
        self.writes.get_or_create(&labels).inc_by(volume.writes);
        self.block_statuses.get_or_create(&labels).inc_by(volume.block_statuses);
        self.caches.get_or_create(&labels).inc_by(volume.caches);
        self.read_bytes.get_or_create(&labels).inc_by(volume.read_bytes);
        self.written_bytes.get_or_create(&labels).inc_by(volume.written_bytes);
        self.scrub.set(&labels, &volume.scrub);
        self.set_latency(&volume.name, "read", volume.latency_us.read);
        self.set_latency(&volume.name, "write", volume.latency_us.write);
    }

    fn set_latency(&self, volume: &str, operation: &str, latency: Percentiles) {
        for (quantile, microseconds) in [("0.5", latency.p50), ("0.99", latency.p99)] {
            let labels = vec![
                ("volume", volume.to_owned()),
                ("operation", operation.to_owned()),
                ("quantile", quantile.to_owned()),
            ];
            let seconds = microseconds as f64 / 1e6;
            self.latency.get_or_create(&labels).set(seconds);
        }
    }
}

struct ScrubMetrics {
    running: Gauges,
    done: Gauges,
    total: Gauges,
    rate: Gauges,
    last_end: Seconds,
    last_found: Gauges,
}

impl ScrubMetrics {
    fn register(registry: &mut Registry) -> ScrubMetrics {
        let r = registry;
        ScrubMetrics {
            running: gauges(r, "volume_scrub_running", "1 if a scrub is under way, else 0"),
            done: gauges(r, "volume_scrub_done_bytes", "Bytes that a running scrub is done with"),
            total: gauges(r, "volume_scrub_total_bytes", "Bytes of a running scrub in all"),
            rate: gauges(r, "volume_scrub_bytes_per_second", "Recent rate of a running scrub"),
            last_end: seconds(
                r,
                "volume_scrub_last_end_seconds",
                "When the last scrub ended, since 1970; 0 if none has",
            ),
            last_found: gauges(
                r,
                "volume_scrub_last_found",
                "What the last scrub found, by kind: blocks, and bytes not compared with all replicas",
            ),
        }
    }

    fn set(&self, labels: &Labels, scrub: &ScrubStatus) {
        let running = u64::from(scrub.state != ScrubState::Idle);
        for (family, value) in [
            (&self.running, running),
            (&self.done, scrub.done_bytes),
            (&self.total, scrub.total_bytes),
            (&self.rate, scrub.bytes_per_second),
        ] {
            family.get_or_create(labels).set(value);
        }
        let ended_ms = scrub.last.map_or(0, |last| last.ended_ms);
        self.last_end.get_or_create(labels).set(ended_ms as f64 / 1e3);
        let counts = scrub.last.map(|last| last.counts).unwrap_or_default();
        for (kind, value) in [
            ("bad_blocks", counts.bad_blocks),
            ("differing_blocks", counts.differing_blocks),
            ("repaired_blocks", counts.repaired_blocks),
            ("unrepaired_blocks", counts.unrepaired_blocks),
            ("incomplete_bytes", counts.incomplete_bytes),
        ] {
            let labels: Labels = labels.iter().cloned().chain([("kind", kind.to_owned())]).collect();
            self.last_found.get_or_create(&labels).set(value);
        }
    }
}

struct ReplicaMetrics {
    state: Gauges,
    durable_seq: Gauges,
    lag_records: Gauges,
    lag_bytes: Gauges,
    lag_seconds: Seconds,
    resync_done: Gauges,
    resync_total: Gauges,
    resync_rate: Gauges,
    checksum_errors: Counters,
    repaired_blocks: Counters,
}

impl ReplicaMetrics {
    fn register(registry: &mut Registry) -> ReplicaMetrics {
        let r = registry;
        ReplicaMetrics {
            state: gauges(r, "replica_state", "1 for the state that the replica is in, else 0"),
            durable_seq: gauges(r, "replica_durable_seq", "Last seq that the replica holds durably"),
            lag_records: gauges(r, "replica_lag_records", "Records that the replica is behind"),
            lag_bytes: gauges(r, "replica_lag_bytes", "Bytes that the replica is behind"),
            lag_seconds: seconds(r, "replica_lag_seconds", "Time that the replica is behind"),
            resync_done: gauges(r, "replica_resync_done_bytes", "Bytes copied by a running resync"),
            resync_total: gauges(r, "replica_resync_total_bytes", "Bytes to copy by a running resync"),
            resync_rate: gauges(r, "replica_resync_bytes_per_second", "Recent rate of a running resync"),
            checksum_errors: counters(
                r,
                "replica_checksum_errors",
                "Blocks found bad: unreadable, or not what they should be",
            ),
            repaired_blocks: counters(
                r,
                "replica_repaired_blocks",
                "Bad blocks repaired from another member, or overwritten",
            ),
        }
    }

    fn set(&self, volume: &str, replica: &ReplicaStatus) {
        let labels: Labels = vec![("volume", volume.to_owned()), ("replica", replica.name.clone())];
        for state in ReplicaState::ALL {
            let mut labels = labels.clone();
            labels.push(("state", state.word().to_owned()));
            let here = u64::from(state == replica.state);
            self.state.get_or_create(&labels).set(here);
        }
        let (done, total, rate) = match replica.resync {
            Some(resync) => (resync.done_bytes, resync.total_bytes, resync.bytes_per_second),
            None => (0, 0, 0),
        };
        for (family, value) in [
            (&self.durable_seq, replica.durable_seq),
            (&self.lag_records, replica.lag_records),
            (&self.lag_bytes, replica.lag_bytes),
            (&self.resync_done, done),
            (&self.resync_total, total),
            (&self.resync_rate, rate),
        ] {
            family.get_or_create(&labels).set(value);
        }
        let lag_seconds = replica.lag_ms as f64 / 1e3;
        self.lag_seconds.get_or_create(&labels).set(lag_seconds);
        let errors = self.checksum_errors.get_or_create(&labels);
        errors.inc_by(replica.checksum_errors);
        let repaired = self.repaired_blocks.get_or_create(&labels);
        repaired.inc_by(replica.repaired_blocks);
    }
}
