//! A small journal that wraps a thousand times and more, with kill -9 around the wraps.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::cluster::Cluster;
use crate::ledger::Ledger;
use crate::plan::{Plan, VOLUME};
use crate::scratch;
use crate::seed;
use crate::writer::{Load, Writer};

const JOURNAL: u64 = 512 << 10;
const WRAPS_PER_ROUND: u64 = 52;
const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn a_small_journal_wraps_a_thousand_times() {
    let _turn = scratch::shared_machine();
    let (seed, mut rng) = seed::of_test("wraps::a_small_journal_wraps_a_thousand_times");
    // Throttled: with so little journal any hiccup of the machine would otherwise cost a member.
    let plan = Plan {
        size: 4 << 20,
        journal_size: JOURNAL,
        lag_bytes_max: JOURNAL / 2,
        on_lag: "throttle",
        ..Plan::default()
    };
    let mut cluster = Cluster::serving(plan);
    let ledger = Arc::new(Mutex::new(Ledger::new(seed, cluster.plan.size)));
    let mut wraps = 0;
    for round in 0..seed::rounds(20) {
        let load = Load {
            connections: 1,
            depth: rng.between(4, 16) as usize,
            blocks_max: rng.between(2, 8),
            others_percent: 10,
        };
        println!("round {round}: {load:?}, {wraps} wraps so far");
        let writer = Writer::start(&cluster.endpoint, VOLUME, &ledger, rng.fork(), load);
        // Every payload byte goes through the journal, so this many bytes are at least this many wraps. The kill falls
        // into the last or the first hundredth of a turn.
        let turn = JOURNAL * WRAPS_PER_ROUND;
        let around = JOURNAL / 50;
        writer.wait_bytes(turn - around / 2 + rng.below(around), LIMIT);
        cluster.kill_engine();
        cluster.kill_agents();
        wraps += writer.answered_bytes() / JOURNAL;
        writer.finish_after_crash();

        cluster.start_agents();
        cluster.start_engine();
        let content = cluster.connect().read_all().expect("reading the volume");
        let verdict = ledger.lock().expect("the ledger").settle(&content);
        verdict.unwrap_or_else(|error| panic!("round {round}: {error}"));
        cluster.stop();
        let image = cluster.identical_images(&cluster.names());
        assert!(image == content, "round {round}: the images hold what was read");
        let journal = std::fs::metadata(cluster.agent("a").replica().join("journal"));
        let length = journal.expect("the journal").len();
        assert!(length <= JOURNAL * 2, "a journal of {JOURNAL} bytes has grown to {length}");
        cluster.start_agents();
        cluster.start_engine();
    }
    cluster.stop();
    scratch::notice(&format!("the journal of 512 KiB has wrapped {wraps} times"));
    assert!(wraps >= 1_000 || seed::quick(), "only {wraps} wraps");
}
