//! The engine's memory while a replica hangs for good under full load.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::cluster::Cluster;
use crate::ledger::Ledger;
use crate::plan::{Plan, VOLUME};
use crate::scratch;
use crate::seed;
use crate::writer::{Load, Writer};

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// The default of the configuration.
const INFLIGHT_BYTES_MAX: u64 = 64 * MIB;
const MARGIN: u64 = 64 * MIB;

/// A line of the engine's `/proc/PID/status`, bytes.
fn memory(cluster: &Cluster, key: &str) -> u64 {
    let path = format!("/proc/{}/status", cluster.engine().pid());
    let text = std::fs::read_to_string(&path).expect("the engine's status");
    let line = text.lines().find_map(|line| line.strip_prefix(key)).expect("the line is there");
    let kibibytes = line.trim_start_matches(':').trim().trim_end_matches(" kB");
    kibibytes.parse::<u64>().expect("a number of kB") << 10
}

fn a_replica_hangs(test: &str, on_lag: &'static str) {
    let _turn = scratch::shared_machine();
    let (seed, mut rng) = seed::of_test(test);
    let plan = Plan { size: 64 * MIB, lag_bytes_max: 64 * MIB, journal_size: 128 * MIB, on_lag, ..Plan::default() };
    let lag_bytes_max = plan.lag_bytes_max;
    let mut cluster = Cluster::serving(plan);
    let ledger = Arc::new(Mutex::new(Ledger::new(seed, cluster.plan.size)));
    let at_start = memory(&cluster, "VmRSS");
    let load = Load { connections: 4, depth: 64, blocks_max: 64, others_percent: 5 };
    let writer = Writer::start(&cluster.endpoint, VOLUME, &ledger, rng.fork(), load);
    writer.wait_answers(500, LIMIT);
    cluster.agent("b").process().freeze();
    if on_lag == "drop" {
        cluster.wait_out_of_view("b");
        // As much again: nothing is kept for it any more.
        writer.wait_bytes(writer.answered_bytes() + 2 * lag_bytes_max, LIMIT);
    } else {
        writer.wait_for_silence(Duration::from_millis(700), LIMIT);
        assert_eq!(cluster.status().view, ["a", "b", "c"], "b stays a member");
    }
    let grown = memory(&cluster, "VmHWM") - at_start;
    cluster.agent("b").process().thaw();
    writer.wait_answers(500, LIMIT);
    writer.finish();
    let after = memory(&cluster, "VmHWM") - at_start;
    let bound = lag_bytes_max + INFLIGHT_BYTES_MAX + MARGIN;
    scratch::notice(&format!(
        "a replica hangs, on_lag = {on_lag}: the engine grew by {} MiB over {} MiB (by {} MiB until it was back), at most \
         {} MiB are in order",
        grown / MIB,
        at_start / MIB,
        after / MIB,
        bound / MIB
    ));
    let content = cluster.connect().read_all().expect("reading the volume");
    let verdict = ledger.lock().expect("the ledger").settle(&content);
    verdict.unwrap_or_else(|error| panic!("{error}"));
    assert!(cluster.end_well() == content, "the images hold what was read");
    assert!(grown <= bound && after <= bound, "{grown} and {after} bytes");
}

#[test]
fn memory_stays_bounded_when_a_hanging_replica_is_dropped() {
    a_replica_hangs("bounds::memory_stays_bounded_when_a_hanging_replica_is_dropped", "drop");
}

#[test]
fn memory_stays_bounded_when_a_hanging_replica_throttles() {
    a_replica_hangs("bounds::memory_stays_bounded_when_a_hanging_replica_throttles", "throttle");
}
