//! Agents that die, freeze, are cut off or flap under a client that verifies: it sees nothing, and they all come back.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::endings::{BACK, COPIED, LEAVES};
use crate::fio::Verifying;
use crate::ledger::Ledger;
use crate::plan::{Plan, VOLUME};
use crate::scratch;
use crate::seed;
use crate::writer::{Load, Writer};

const LIMIT: Duration = Duration::from_secs(60);
const NAMES: [&str; 3] = ["a", "b", "c"];

/// A time limit that short outages keep and longer ones do not.
fn impatient() -> Plan {
    Plan { size: 64 << 20, lag_ms_max: 1_000, lag_bytes_max: 64 << 20, journal_size: 128 << 20, ..Plan::default() }
}

fn for_a_while(short_seconds: u64) -> Duration {
    Duration::from_secs(match (seed::long(), seed::quick()) {
        (true, _) => short_seconds * 10,
        (false, false) => short_seconds,
        (false, true) => short_seconds / 3,
    })
}

/// An outage lasts for a time; nothing is waited for in it.
fn last(duration: Duration) {
    let until = Instant::now() + duration;
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        std::thread::park_timeout(left);
    }
}

#[test]
fn every_agent_is_killed_in_turn_round_after_round() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("recovery::every_agent_is_killed_in_turn_round_after_round");
    let mut cluster = Cluster::serving(impatient());
    let fio = Verifying::start(&cluster, rng.fork());
    let (begun, mut kills) = (Instant::now(), 0);
    while begun.elapsed() < for_a_while(30) {
        for name in NAMES {
            cluster.agent_mut(name).kill();
            // Some are back in time, some have left the view by then.
            last(Duration::from_millis(if rng.chance(50) { rng.below(300) } else { rng.between(1_300, 1_800) }));
            cluster.agent_mut(name).start();
            kills += 1;
            // Sometimes the next one dies before this one is back, and even the last member may.
            if rng.chance(70) {
                cluster.wait_member_again(name);
            }
            fio.is_well();
        }
    }
    let runs = fio.finish();
    for name in NAMES {
        cluster.wait_member_again(name);
    }
    let (left, copied, back) =
        (cluster.times_logged(&[LEAVES]), cluster.times_logged(&[COPIED]), cluster.times_logged(&[BACK]));
    cluster.end_well();
    scratch::notice(&format!(
        "{kills} kills of agents under {runs} verified runs of fio: {left} times a replica left, {copied} times it was \
         copied to, {back} times it was back without"
    ));
    assert!(seed::quick() || (left > 0 && copied > 0 && back > 0), "both kinds of outages came about");
}

/// Freezes b for longer than it may lag.
fn freeze(cluster: &mut Cluster) {
    cluster.agent("b").process().freeze();
    cluster.wait_out_of_view("b");
}

#[test]
fn frozen_for_too_long_an_agent_leaves_and_comes_back() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("recovery::frozen_for_too_long_an_agent_leaves_and_comes_back");
    let mut cluster = Cluster::serving(impatient());
    let fio = Verifying::start(&cluster, rng.fork());
    for _ in 0..2 {
        freeze(&mut cluster);
        last(Duration::from_millis(rng.below(1_000)));
        cluster.agent("b").process().thaw();
        cluster.wait_member_again("b");
        fio.is_well();
    }
    fio.finish();
    assert!(cluster.times_logged(&["replica b", COPIED]) >= 2, "it was copied to each time");
    cluster.end_well();
}

#[test]
fn an_agent_that_is_cut_off_leaves_and_comes_back() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("recovery::an_agent_that_is_cut_off_leaves_and_comes_back");
    let mut cluster = Cluster::planned(impatient());
    let network = cluster.proxied("c");
    cluster.start_agents();
    cluster.create();
    cluster.start_engine();
    let fio = Verifying::start(&cluster, rng.fork());
    for _ in 0..2 {
        for _ in 0..rng.between(1, 8) {
            network.interrupt();
            last(Duration::from_millis(rng.below(200)));
        }
        network.cut();
        cluster.wait_out_of_view("c");
        network.mend();
        // The copying is broken as well, some of the times.
        if rng.chance(50) {
            cluster.wait_logged(&["replica c", COPIED]);
            network.interrupt();
        }
        cluster.wait_member_again("c");
        fio.is_well();
    }
    fio.finish();
    assert!(cluster.times_logged(&["replica c", COPIED]) >= 2, "it was copied to each time");
    cluster.end_well();
}

#[test]
fn an_agent_that_flaps_is_not_resynced_without_end() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("recovery::an_agent_that_flaps_is_not_resynced_without_end");
    let mut cluster = Cluster::serving(Plan { lag_ms_max: 300, ..impatient() });
    let fio = Verifying::start(&cluster, rng.fork());
    let (begun, mut flaps) = (Instant::now(), 0);
    while begun.elapsed() < for_a_while(30) {
        cluster.agent_mut("b").kill();
        last(Duration::from_millis(rng.between(350, 1_000)));
        cluster.agent_mut("b").start();
        flaps += 1;
        last(Duration::from_millis(rng.between(800, 1_200)));
        fio.is_well();
    }
    let copied = cluster.times_logged(&["replica b", COPIED]);
    let settled = Instant::now();
    cluster.wait_member_again("b");
    let took = settled.elapsed();
    fio.finish();
    cluster.end_well();
    scratch::notice(&format!("{flaps} flaps of an agent led to {copied} resyncs; a member {took:.1?} after the last"));
    // Each pause is twice as long as the one before; a minute is the longest.
    let allowed = 2 + begun.elapsed().as_secs().ilog2() as usize + begun.elapsed().as_secs() as usize / 60;
    assert!(copied <= allowed, "{copied} resyncs within {flaps} flaps, at most {allowed} are in order");
    assert!(took < Duration::from_secs(75), "it was left alone for {took:?}");
}

#[test]
fn with_all_agents_dead_the_client_waits_and_goes_on_when_they_are_back() {
    let _turn = scratch::shared_machine();
    let test = "recovery::with_all_agents_dead_the_client_waits_and_goes_on_when_they_are_back";
    let (seed, mut rng) = seed::of_test(test);
    let mut cluster = Cluster::serving(impatient());
    let ledger = Arc::new(Mutex::new(Ledger::new(seed, cluster.plan.size)));
    let load = Load { depth: 8, ..Load::default() };
    let writer = Writer::start(&cluster.endpoint, VOLUME, &ledger, rng.fork(), load);
    for _ in 0..2 {
        writer.wait_answers(300, LIMIT);
        cluster.kill_agents();
        writer.wait_for_silence(Duration::from_millis(500), LIMIT);
        let order = [["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"]][rng.below(3) as usize];
        for name in order {
            cluster.agent_mut(name).start();
            last(Duration::from_millis(rng.below(1_500)));
        }
        writer.wait_answers(300, LIMIT);
        for name in NAMES {
            cluster.wait_member_again(name);
        }
    }
    writer.finish();
    let content = cluster.connect().read_all().expect("reading the volume");
    let verdict = ledger.lock().expect("the ledger").settle(&content);
    verdict.unwrap_or_else(|error| panic!("{error}"));
    assert!(cluster.end_well() == content, "the images hold what was read");
}

#[test]
fn with_all_agents_dead_for_too_long_requests_fail_until_they_are_back() {
    let _turn = scratch::shared_machine();
    const EIO: i32 = 5;
    let mut cluster = Cluster::serving(Plan { freeze_ms: 1_000, ..impatient() });
    let mut client = cluster.connect();
    client.write(0, &[1; 4096], 0).expect("a write");
    cluster.kill_agents();
    let asked = Instant::now();
    let error = client.write(4096, &[2; 4096], 0).expect_err("a write that nobody holds");
    assert_eq!(error.raw_os_error(), Some(EIO), "{error}");
    let waited = asked.elapsed();
    assert!(waited >= Duration::from_millis(900), "it was held back for freeze_ms, not for {waited:?}");
    assert!(waited < Duration::from_secs(10), "freeze_ms is 1 s, not {waited:?}");
    let error = client.read(0, 4096).expect_err("a read that nobody answers");
    assert_eq!(error.raw_os_error(), Some(EIO), "{error}");
    assert!(cluster.times_logged(&["frozen, too few members"]) > 0, "the log says so");

    cluster.start_agents();
    scratch::wait_until("writes go on", LIMIT, || client.write(8192, &[3; 4096], 0).is_ok());
    assert_eq!(client.read(0, 4096).expect("a read"), [1; 4096]);
    client.disconnect();
    let image = cluster.end_well();
    assert!(image[8192..12_288].iter().all(|byte| *byte == 3));
}
