//! Scrubs of a volume that clients write to: no false alarm, little delay for the clients, and rot repaired without anybody
//! noticing it.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::fio::{self, Verifying};
use crate::plan::Plan;
use crate::scratch;
use crate::seed;

const LIMIT: Duration = Duration::from_secs(120);
const BLOCK: u64 = 4096;

fn plan() -> Plan {
    Plan { size: 48 << 20, lag_bytes_max: 64 << 20, journal_size: 160 << 20, ..Plan::default() }
}

/// Flips a bit through the file, so that the page cache has it as well.
fn flip(image: &Path, offset: u64, bit: u64) {
    let file = File::options().read(true).write(true).open(image).expect("the image");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("a byte of it");
    file.write_all_at(&[byte[0] ^ (1 << bit)], offset).expect("a flipped bit");
}

/// What the status says of scrubs.
fn shown(cluster: &Cluster) -> serde_json::Value {
    cluster.status_document()["volumes"][0]["scrub"].clone()
}

fn fill(cluster: &Cluster) {
    let mut client = cluster.connect();
    for chunk in 0..cluster.plan.size >> 20 {
        client.write(chunk << 20, &vec![chunk as u8 + 1; 1 << 20], 0).expect("a write");
    }
    client.disconnect();
    cluster.names().into_iter().for_each(|name| cluster.wait_caught_up(name));
}

#[test]
fn scrubs_under_random_writes_give_no_false_alarm_and_delay_clients_little() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::serving(plan());
    fill(&cluster);
    // As much as there is room for, for minutes, or little for seconds, as others are at work beside it.
    let (seconds, depth, rate): (u64, u32, &str) =
        if seed::long() { (300, 32, "--rate_iops=0") } else { (8, 8, "--rate_iops=1500") };
    let run_time = format!("--runtime={seconds}");
    let limits = ["--time_based", &run_time, rate];
    let quiet_time = format!("--runtime={}", seconds.min(100));
    let quiet = fio::randwrite(&cluster, depth, &["--time_based", &quiet_time, rate]);
    let (mut scrubs, begun) = (0, Instant::now());
    let busy = std::thread::scope(|scope| {
        let writing = scope.spawn(|| fio::randwrite(&cluster, depth, &limits));
        while begun.elapsed() < Duration::from_secs(seconds - 1) {
            let said = cluster.scrub(&["--wait"]).expect("nothing is found");
            assert!(said.contains("all in order"), "{said}");
            scrubs += 1;
        }
        writing.join().expect("fio saw no error")
    });
    assert!(scrubs > 0);
    println!(
        "e2e: {scrubs} scrubs of 48 MiB in {seconds} s of random writes; {:.0} IOPS with a p99 of {:.0} us without, {:.0} and \
         {:.0} us with them",
        quiet.iops, quiet.p99_us, busy.iops, busy.p99_us
    );
    // Machines that share their cores with other tests are not to be measured; what is wrong shows all the same.
    assert!(busy.p99_us < quiet.p99_us * 10.0 + 100_000.0);
    let status = cluster.status();
    assert!(status.replicas.iter().all(|r| r.checksum_errors == 0), "no alarm, and none of the replicas is blamed");
    cluster.end_well();
}

#[test]
fn a_thousand_flipped_bits_in_two_of_three_images_are_repaired_and_no_client_notices() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) =
        seed::of_test("scrub::a_thousand_flipped_bits_in_two_of_three_images_are_repaired_and_no_client_notices");
    let mut cluster = Cluster::serving(plan());
    fill(&cluster);
    let fio = Verifying::start(&cluster, rng.fork());
    let images = ["a", "b"].map(|name| cluster.agent(name).image());
    // One flip a block and image, so that no flip undoes another.
    let mut flipped = BTreeSet::new();
    while flipped.len() < 1000 {
        let (image, block) = (rng.below(2) as usize, rng.below(cluster.plan.size / BLOCK));
        if flipped.insert((image, block)) {
            flip(&images[image], block * BLOCK + rng.below(BLOCK), rng.below(8));
        }
    }
    let said = cluster.scrub(&["--wait"]).expect("everything is repaired");
    assert!(said.contains("0 not repaired"), "{said}");
    fio.is_well();
    let last = shown(&cluster)["last"].clone();
    println!("{said}; status: {last}");
    assert!(last["counts"]["repaired_blocks"].as_u64().is_some_and(|repaired| repaired > 0), "{last}");
    // What fio read or partly wrote meanwhile was repaired without the scrub.
    let again = cluster.scrub(&["--wait"]).expect("nothing is left");
    assert!(again.contains("all in order"), "{again}");
    println!("fio verified {} times", fio.finish());
    let status = cluster.status();
    assert_eq!(status.view, ["a", "b", "c"]);
    let repaired: u64 = status.replicas.iter().map(|r| r.repaired_blocks).sum();
    let errors: u64 = status.replicas.iter().map(|r| r.checksum_errors).sum();
    assert_eq!(repaired, errors, "all that was found is good again");
    assert_eq!(status.replica("c").checksum_errors, 0);
    cluster.end_well();
}

#[test]
fn a_scrub_waits_for_a_replica_goes_on_after_a_restart_of_the_engine_and_can_be_stopped() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::serving(Plan { size: 256 << 20, ..plan() });
    let refused = cluster.scrub(&["--stop"]).expect_err("none is under way");
    assert!(refused.contains("is not being scrubbed") && refused.contains("remedy"), "{refused}");

    cluster.scrub(&[]).expect("a scrub");
    let refused = cluster.scrub(&[]).expect_err("one at a time");
    assert!(refused.contains("is being scrubbed"), "{refused}");
    let position = |cluster: &Cluster| shown(cluster)["done_bytes"].as_u64().expect("a number");
    scratch::wait_until("it is somewhere in the midst", LIMIT, || position(&cluster) > 2 << 20);
    cluster.agent_mut("c").kill();
    scratch::wait_until("it waits", LIMIT, || shown(&cluster)["state"] == "waiting");
    let text = cluster.nbdcast(&["status"]).stdout;
    assert!(text.contains(" % of 256 MiB, waits: replica c cannot be reached; so far all in order"), "{text}");
    let before = position(&cluster);

    cluster.take_engine().stop();
    cluster.agent_mut("c").start();
    cluster.start_engine();
    scratch::wait_until("it goes on", LIMIT, || {
        cluster.events().iter().any(|event| event.contains("scrub goes on at byte "))
    });
    assert!(position(&cluster) >= before || shown(&cluster)["state"] == "idle", "nothing is looked at twice");
    let said = cluster.scrub(&["--wait"]).expect("it ends well");
    assert!(said.contains("all in order"), "{said}");
    cluster.assert_event(&["scrub finished: 0 bad blocks"]);
    let text = cluster.nbdcast(&["status"]).stdout;
    assert!(text.contains("scrub: finished ") && text.contains("; next "), "{text}");
    let metrics = crate::status::http_get(cluster.admin_port, "/metrics").expect("metrics");
    for line in
        ["volume_scrub_running{volume=\"vol0\"} 0", "volume_scrub_last_found{volume=\"vol0\",kind=\"bad_blocks\"} 0"]
    {
        assert!(metrics.contains(line), "no {line} in {metrics}");
    }

    cluster.agent_mut("c").kill();
    cluster.scrub(&[]).expect("another one");
    cluster.scrub(&["--stop"]).expect("it is under way");
    assert_eq!(shown(&cluster)["last"]["is_finished"], false);
    cluster.agent_mut("c").start();
    cluster.end_well();
}
