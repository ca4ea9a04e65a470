//! Power cuts: the filesystem under the agents stops taking anything, and what was not synced is gone afterwards.
//!
//! A loop-mounted ext4 that is shut down without flushing its log loses its dirty pages and its unwritten metadata, as a
//! disk does when the machine's power goes. An agent that had answered "durable" too early is found out here, and only
//! here: kill -9 alone keeps the page cache.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::cluster::{Agent, Cluster};
use crate::ledger::Ledger;
use crate::plan::{Plan, VOLUME};
use crate::scratch::{self, LoopDisk};
use crate::seed;
use crate::writer::{Load, Writer};

const LIMIT: Duration = Duration::from_secs(60);

fn move_agents_to(cluster: &mut Cluster, places: &[(&str, &LoopDisk)]) {
    for (name, disk) in places {
        let data = disk.path().join(name);
        std::fs::create_dir_all(&data).expect("a directory on the loop disk");
        *cluster.agent_mut(name) = Agent::new(name, data);
    }
    cluster.write_config();
}

#[test]
fn the_power_of_everything_is_cut() {
    let test = "powercut::the_power_of_everything_is_cut";
    let _turn = scratch::shared_machine();
    if !scratch::loop_mounts_work("the power cuts") {
        return;
    }
    let (seed, mut rng) = seed::of_test(test);
    let plan = Plan { journal_size: 8 << 20, lag_bytes_max: 4 << 20, on_lag: "throttle", ..Plan::default() };
    let place = scratch::directory();
    // One disk for all three, so that one cut takes all of them at the same instant.
    let mut disk = LoopDisk::new(place.path(), "disk", 192 << 20);
    let mut cluster = Cluster::planned(plan);
    move_agents_to(&mut cluster, &[("a", &disk), ("b", &disk), ("c", &disk)]);
    cluster.start_agents();
    cluster.create();
    cluster.start_engine();
    let ledger = Arc::new(Mutex::new(Ledger::new(seed, cluster.plan.size)));
    for round in 0..seed::rounds(12) {
        let load = Load { depth: rng.between(1, 48) as usize, ..Load::default() };
        println!("round {round}: {load:?}");
        let writer = Writer::start(&cluster.endpoint, VOLUME, &ledger, rng.fork(), load);
        writer.wait_answers(rng.below(1_500), LIMIT);
        disk.cut_power();
        cluster.kill_agents();
        cluster.kill_engine();
        writer.finish_after_crash();
        disk.unmount();
        disk.mount();

        cluster.start_agents();
        cluster.start_engine();
        let content = cluster.connect().read_all().expect("reading the volume");
        let verdict = ledger.lock().expect("the ledger").settle(&content);
        verdict.unwrap_or_else(|error| panic!("round {round}: {error}"));
        cluster.stop();
        let image = cluster.identical_images(&cluster.names());
        assert!(image == content, "round {round}: the images hold what was read");
        cluster.start_agents();
        cluster.start_engine();
    }
    cluster.stop();
}

#[test]
fn one_disk_dies_and_the_client_sees_nothing() {
    let test = "powercut::one_disk_dies_and_the_client_sees_nothing";
    let _turn = scratch::shared_machine();
    if !scratch::loop_mounts_work("the death of one disk") {
        return;
    }
    let (seed, rng) = seed::of_test(test);
    let place = scratch::directory();
    let disk = LoopDisk::new(place.path(), "disk", 128 << 20);
    let mut cluster = Cluster::planned(Plan::default());
    move_agents_to(&mut cluster, &[("b", &disk)]);
    cluster.start_agents();
    cluster.create();
    cluster.start_engine();
    let ledger = Arc::new(Mutex::new(Ledger::new(seed, cluster.plan.size)));
    let writer = Writer::start(&cluster.endpoint, VOLUME, &ledger, rng, Load::default());
    writer.wait_answers(500, LIMIT);
    disk.cut_power();
    cluster.wait_out_of_view("b");
    writer.wait_answers(500, LIMIT);
    writer.finish();
    let content = cluster.connect().read_all().expect("reading the volume");
    let verdict = ledger.lock().expect("the ledger").settle(&content);
    verdict.unwrap_or_else(|error| panic!("{error}"));
    cluster.agent_mut("b").kill();
    cluster.stop();
    assert!(cluster.identical_images(&["a", "c"]) == content);
}
