//! What bringing a replica back costs: the bytes that are copied, counted on the network, and the clients' latency.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::endings::COPIED;
use crate::fio;
use crate::plan::Plan;
use crate::proxy::Proxy;
use crate::scratch;
use crate::seed::{self, Rng};

const LIMIT: Duration = Duration::from_secs(120);
/// What members keep account of.
const UNIT: u64 = 64 << 10;

fn plan(size: u64) -> Plan {
    Plan { size, lag_ms_max: 300, lag_bytes_max: 64 << 20, journal_size: 128 << 20, ..Plan::default() }
}

/// A cluster whose replica c is behind a proxy, with a volume full of random bytes.
fn filled(size: u64, rng: &mut Rng) -> (Cluster, Proxy) {
    let mut cluster = Cluster::planned(plan(size));
    let network = cluster.proxied("c");
    cluster.start_agents();
    cluster.create();
    cluster.start_engine();
    write_units(&cluster, 0..size / UNIT, UNIT, rng);
    cluster.wait_caught_up("c");
    (cluster, network)
}

/// Writes `length` random bytes at the beginning of each of the units.
fn write_units(cluster: &Cluster, units: impl IntoIterator<Item = u64>, length: u64, rng: &mut Rng) {
    let mut client = cluster.connect();
    let mut bytes = vec![0; length as usize];
    for unit in units {
        rng.fill(&mut bytes);
        client.write(unit * UNIT, &bytes, 0).expect("a write");
    }
    client.disconnect();
}

#[test]
fn after_an_outage_only_what_changed_is_copied() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("resync::after_an_outage_only_what_changed_is_copied");
    let size = 64 << 20;
    let (mut cluster, network) = filled(size, &mut rng);
    let mut ratios = Vec::new();
    for dirtied in [40, 400] {
        network.cut();
        cluster.wait_out_of_view("c");
        let mut units = BTreeSet::new();
        while units.len() < dirtied {
            units.insert(rng.below(size / UNIT));
        }
        write_units(&cluster, units, 4096, &mut rng);
        let before = network.forwarded();
        network.mend();
        cluster.wait_member_again("c");
        cluster.wait_caught_up("c");
        let copied = network.forwarded() - before;
        let ratio = copied as f64 / (dirtied as u64 * UNIT) as f64;
        ratios.push(ratio);
        scratch::notice(&format!(
            "{dirtied} units of 64 KiB dirtied, {copied} bytes sent to bring it back: {ratio:.3}"
        ));
    }
    cluster.end_well();
    assert!(ratios.iter().all(|ratio| (0.99..=1.1).contains(ratio)), "{ratios:?}");
}

#[test]
fn an_engine_started_after_another_died_goes_on_with_its_resync() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("resync::an_engine_started_after_another_died_goes_on_with_its_resync");
    let dirtied = if seed::long() { 512 << 20 } else { 160 << 20 };
    let (mut cluster, network) = filled(dirtied + (32 << 20), &mut rng);
    network.cut();
    cluster.wait_out_of_view("c");
    write_units(&cluster, 0..dirtied / UNIT, UNIT, &mut rng);

    let before = network.forwarded();
    network.slow_down(dirtied / 8);
    network.mend();
    scratch::wait_until("half of it is copied", LIMIT, || network.forwarded() - before >= dirtied / 2);
    cluster.kill_engine();
    cluster.start_engine();
    network.slow_down(0);
    cluster.wait_member_again("c");
    cluster.wait_caught_up("c");
    let ratio = (network.forwarded() - before) as f64 / dirtied as f64;
    scratch::notice(&format!(
        "{} MiB dirtied, the engine killed when half of them was copied: {ratio:.3} times as much sent in all",
        dirtied >> 20
    ));
    cluster.end_well();
    assert!((0.99..=1.2).contains(&ratio), "{ratio}");
}

#[test]
fn clients_hardly_notice_a_resync() {
    let _turn = scratch::quiet_machine();
    let (_, mut rng) = seed::of_test("resync::clients_hardly_notice_a_resync");
    // More than is copied while fio runs.
    let size = if seed::long() { 512 << 20 } else { 128 << 20 };
    let (mut cluster, network) = filled(size, &mut rng);
    network.cut();
    cluster.wait_out_of_view("c");
    write_units(&cluster, 0..size / UNIT, UNIT, &mut rng);
    let seconds = if seed::long() { "--runtime=20" } else { "--runtime=6" };
    let limits = ["--time_based", seconds, "--rate_iops=500"];
    fio::randwrite(&cluster, 4, &["--io_size=4M"]);
    let before = fio::randwrite(&cluster, 4, &limits);
    network.mend();
    cluster.wait_logged(&["replica c", COPIED]);
    let begun = Instant::now();
    let sent = network.forwarded();
    let during = fio::randwrite(&cluster, 4, &limits);
    let rate = (network.forwarded() - sent) as f64 / begun.elapsed().as_secs_f64() / f64::from(1 << 20);
    let went_on = cluster.status().replica("c").state == "syncing";
    cluster.wait_member_again("c");
    let ratio = during.p99_us / before.p99_us;
    scratch::notice(&format!(
        "4k randwrite QD4 at {:.0} IOPS: p99 {:.0} us with a replica out of the view, {:.0} us while {rate:.0} MiB/s are \
         copied to it ({} to the end of the run): {ratio:.2} times as long",
        before.iops,
        before.p99_us,
        during.p99_us,
        if went_on { "up" } else { "not" },
    ));
    cluster.end_well();
    let bound = (before.p99_us * 20.0).max(before.p99_us + 100_000.0);
    assert!(during.p99_us < bound, "p99 rose from {:.0} us to {:.0} us", before.p99_us, during.p99_us);
}
