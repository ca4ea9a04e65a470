//! Every ack policy serves, and answers writes for as long as its quorum is there.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::cluster::Cluster;
use crate::ledger::Ledger;
use crate::plan::{Plan, VOLUME};
use crate::scratch;
use crate::seed;
use crate::writer::{Load, Writer};

const LIMIT: Duration = Duration::from_secs(60);

fn a_policy_survives_a_crash(test: &str, policy: &'static str) {
    let _turn = scratch::shared_machine();
    let (seed, mut rng) = seed::of_test(test);
    let mut cluster = Cluster::serving(Plan { ack_write: policy, ack_flush: policy, ..Plan::default() });
    let ledger = Arc::new(Mutex::new(Ledger::new(seed, cluster.plan.size)));
    let writer = Writer::start(&cluster.endpoint, VOLUME, &ledger, rng.fork(), Load::default());
    writer.wait_answers(2_000, LIMIT);
    cluster.kill_agents();
    cluster.kill_engine();
    writer.finish_after_crash();

    cluster.start_agents();
    cluster.start_engine();
    let content = cluster.connect().read_all().expect("reading the volume");
    let verdict = ledger.lock().expect("the ledger").settle(&content);
    verdict.unwrap_or_else(|error| panic!("after the crash: {error}"));
    cluster.stop();
    let image = cluster.identical_images(&cluster.names());
    assert!(image == content, "the images hold what was read");
}

#[test]
fn majority_survives_a_crash() {
    a_policy_survives_a_crash("policies::majority_survives_a_crash", "majority");
}

#[test]
fn all_survives_a_crash() {
    a_policy_survives_a_crash("policies::all_survives_a_crash", "all");
}

#[test]
fn majority_goes_on_while_one_of_three_is_stopped_and_waits_while_two_are() {
    let _turn = scratch::shared_machine();
    let (seed, rng) = seed::of_test("policies::majority_goes_on_while_one_of_three_is_stopped_and_waits_while_two_are");
    let mut cluster = Cluster::serving(Plan { ack_write: "majority", ack_flush: "majority", ..Plan::default() });
    let ledger = Arc::new(Mutex::new(Ledger::new(seed, cluster.plan.size)));
    let load = Load { connections: 1, depth: 4, blocks_max: 1, others_percent: 0 };
    let writer = Writer::start(&cluster.endpoint, VOLUME, &ledger, rng, load);
    cluster.agent("a").process().freeze();
    writer.wait_answers(200, LIMIT);
    cluster.agent("b").process().freeze();
    writer.wait_for_silence(Duration::from_millis(500), LIMIT);
    cluster.agent("b").process().thaw();
    writer.wait_answers(200, LIMIT);
    cluster.agent("a").process().thaw();
    writer.finish();
    for name in cluster.names() {
        cluster.wait_caught_up(name);
    }
    cluster.stop();
    cluster.identical_images(&cluster.names());
}
