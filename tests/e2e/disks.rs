//! Disks that lose, damage or mix up what they were given: each has a defined outcome, a clear message, and a way back.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use crate::cluster::{Agent, Cluster};
use crate::endings::COPIED;
use crate::fio::Verifying;
use crate::nbd::FLAG_FUA;
use crate::plan::Plan;
use crate::scratch::{self, LoopDisk};
use crate::seed;
use crate::tools;

const LIMIT: Duration = Duration::from_secs(60);
const BLOCK: u64 = 4096;
const MARKER: &[u8; 15] = b"NBDCAST-RECORD-";

/// A damaged replica leaves quickly.
fn impatient() -> Plan {
    Plan { lag_ms_max: 500, ..Plan::default() }
}

/// A cluster whose replicas all hold marked records, the youngest of them in their journals only as far as is known.
fn marked(plan: Plan) -> Cluster {
    let cluster = Cluster::serving(plan);
    let mut client = cluster.connect();
    for number in 0..64_u64 {
        let mut block = [number as u8; BLOCK as usize];
        block[..MARKER.len()].copy_from_slice(MARKER);
        client.write(number * BLOCK, &block, 0).expect("a write");
    }
    client.disconnect();
    for name in cluster.names() {
        cluster.wait_caught_up(name);
    }
    cluster
}

fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).expect("a file of the replica");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("a byte of it");
    file.write_all_at(&[byte[0] ^ 0x10], offset).expect("a flipped bit");
    file.sync_all().expect("a flipped bit");
}

/// One bit of a record in the middle of those in the journal.
fn damage_journal(replica: &Path) {
    let path = replica.join("journal");
    let journal = std::fs::read(&path).expect("the journal");
    let found = journal.windows(MARKER.len()).enumerate().filter(|(_, window)| window == MARKER);
    let places = found.map(|(place, _)| place as u64).collect::<Vec<_>>();
    assert!(places.len() > 32, "only {} records are in the journal", places.len());
    flip(&path, places[places.len() / 2] + 1_000);
}

/// One bit of each of the two slots.
fn damage_superblock(replica: &Path) {
    for slot in [0, 64 << 10] {
        flip(&replica.join("superblock"), slot + 40);
    }
}

/// c is damaged while it is down: it is refused for what it is, leaves, and is made anew when its directory is gone.
fn a_damaged_replica(test: &str, damage: fn(&Path), words: &[&str]) {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test(test);
    let mut cluster = marked(impatient());
    cluster.agent_mut("c").kill();
    damage(&cluster.agent("c").replica());
    cluster.agent_mut("c").start();
    let fio = Verifying::start(&cluster, rng.fork());
    cluster.wait_out_of_view("c");
    scratch::wait_until("status says why", LIMIT, || {
        let status = cluster.status();
        let reason = status.replica("c").reason.clone().unwrap_or_default();
        words.iter().all(|word| reason.contains(word))
    });
    cluster.wait_logged(&[&["replica c"], words].concat());
    fio.is_well();

    std::fs::remove_dir_all(cluster.agent("c").replica()).expect("removing the damaged replica");
    cluster.replica_resync("c", &[]).expect("an order to bring it back");
    fio.finish();
    cluster.end_well();
}

#[test]
fn a_damaged_journal_is_refused_and_the_replica_made_anew() {
    let test = "disks::a_damaged_journal_is_refused_and_the_replica_made_anew";
    a_damaged_replica(test, damage_journal, &["c/vol0", "the journal is damaged at record"]);
}

#[test]
fn a_damaged_superblock_is_refused_and_the_replica_made_anew() {
    let test = "disks::a_damaged_superblock_is_refused_and_the_replica_made_anew";
    a_damaged_replica(test, damage_superblock, &["c/vol0", "neither copy of the superblock is whole"]);
}

fn copy(from: &Path, to: &Path) {
    tools::run("cp", |command| {
        command.args(["-a", "--sparse=always"]).arg(from).arg(to);
    });
}

#[test]
fn the_directory_of_another_replica_is_refused_and_the_right_one_taken_back() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("disks::the_directory_of_another_replica_is_refused_and_the_right_one_taken_back");
    let mut cluster = marked(impatient());
    let fio = Verifying::start(&cluster, rng.fork());
    cluster.agent_mut("c").kill();
    let (place, aside) = (cluster.agent("c").replica(), cluster.directory().join("aside"));
    std::fs::rename(&place, &aside).expect("moving the replica aside");
    cluster.agent_mut("b").kill();
    copy(&cluster.agent("b").replica(), &place);
    cluster.agent_mut("b").start();
    cluster.agent_mut("c").start();
    cluster.wait_out_of_view("c");
    cluster.wait_member_again("b");
    scratch::wait_until("status says whose it is", LIMIT, || {
        let status = cluster.status();
        status.replica("c").reason.as_ref().is_some_and(|reason| reason.contains("replica b of volume vol0"))
    });
    fio.is_well();

    cluster.agent_mut("c").kill();
    std::fs::remove_dir_all(&place).expect("removing the copy");
    std::fs::rename(&aside, &place).expect("moving the replica back");
    cluster.agent_mut("c").start();
    cluster.wait_member_again("c");
    fio.finish();
    cluster.end_well();
}

/// Puts an older copy in the place of c's directory. The agent must not run.
struct OlderCopy(std::path::PathBuf);

impl OlderCopy {
    /// Of c as it is now; the agent is stopped for it and then started again.
    fn take(cluster: &mut Cluster) -> Self {
        let aside = cluster.directory().join("older");
        cluster.agent_mut("c").stop();
        copy(&cluster.agent("c").replica(), &aside);
        cluster.agent_mut("c").start();
        cluster.wait_member_again("c");
        cluster.wait_caught_up("c");
        Self(aside)
    }

    fn put_back(&self, agent: &Agent) {
        std::fs::remove_dir_all(agent.replica()).expect("the present directory");
        copy(&self.0, &agent.replica());
    }
}

/// Writes that all replicas acknowledge.
fn write_on(cluster: &Cluster, byte: u8) {
    let mut client = cluster.connect();
    for block in 0..40 {
        client.write(block * 16 * BLOCK, &[byte; BLOCK as usize], FLAG_FUA).expect("a write");
    }
    client.disconnect();
    for name in cluster.names() {
        cluster.wait_caught_up(name);
    }
}

#[test]
fn a_directory_rolled_back_under_a_running_engine_is_noticed_and_copied_anew() {
    let _turn = scratch::shared_machine();
    for is_dropped_before in [false, true] {
        // Within its limits it comes back as a member that forgot; after them as one that left.
        let lag_ms_max = if is_dropped_before { 2_000 } else { 120_000 };
        let mut cluster = marked(Plan { lag_ms_max, ..Plan::default() });
        let older = OlderCopy::take(&mut cluster);
        write_on(&cluster, 0x77);
        cluster.agent_mut("c").kill();
        older.put_back(cluster.agent("c"));
        if is_dropped_before {
            cluster.wait_out_of_view("c");
        }
        cluster.agent_mut("c").start();
        cluster.wait_logged(&["replica c", "lost data"]);
        cluster.assert_event(&["c: ", "lost data", "copied anew"]);
        cluster.wait_logged(&["replica c", COPIED]);
        let image = cluster.end_well();
        assert!(image[16 * BLOCK as usize..][..BLOCK as usize].iter().all(|byte| *byte == 0x77));
    }
}

#[test]
fn a_directory_rolled_back_while_all_is_stopped_blocks_the_start_until_it_is_given_up() {
    let _turn = scratch::shared_machine();
    let mut cluster = marked(Plan::default());
    let older = OlderCopy::take(&mut cluster);
    write_on(&cluster, 0x33);
    cluster.stop();
    older.put_back(cluster.agent("c"));
    cluster.start_agents();
    let said = cluster.start_engine_blocked();
    assert!(said.contains("replica c") && said.contains("lost data"), "it names the replica and what happened: {said}");
    let status = cluster.status_document();
    let blocked = status["volumes"][0]["blocked"].as_str().expect("status says that the start is blocked");
    assert!(blocked.contains("replica c"), "{blocked}");
    let refused = cluster.activate_without("nobody", &["--accept-data-loss"]).expect_err("no such replica");
    assert!(refused.contains("nobody"), "{refused}");
    let refused = cluster.activate_without("c", &[]).expect_err("nobody said that data may be lost");
    assert!(refused.contains("--accept-data-loss"), "{refused}");

    cluster.activate_without("c", &["--accept-data-loss"]).expect("an order to go on without c");
    cluster.wait_ready();
    cluster.assert_event(&["started without c"]);
    let mut client = cluster.connect();
    assert_eq!(client.read(0, 1).expect("a read"), [0x33], "a and b hold everything");
    client.write(BLOCK, &[0x44; BLOCK as usize], 0).expect("a write");
    client.disconnect();
    let image = cluster.end_well();
    assert!(image[..BLOCK as usize].iter().all(|byte| *byte == 0x33) && image[BLOCK as usize] == 0x44);
}

#[test]
fn a_replica_whose_disk_was_full_comes_back_when_there_is_room() {
    let _turn = scratch::shared_machine();
    if !scratch::loop_mounts_work("the disk that is full for a while") {
        return;
    }
    let (_, mut rng) = seed::of_test("disks::a_replica_whose_disk_was_full_comes_back_when_there_is_room");
    let place = scratch::directory();
    let disk = LoopDisk::new(place.path(), "disk", 140 << 20);
    let plan = Plan { size: 64 << 20, journal_size: 32 << 20, lag_bytes_max: 16 << 20, ..Plan::default() };
    let mut cluster = Cluster::planned(plan);
    *cluster.agent_mut("b") = Agent::new("b", disk.path().to_path_buf());
    cluster.write_config();
    cluster.start_agents();
    cluster.create();
    cluster.start_engine();
    let ballast = disk.path().join("ballast");
    tools::attempt("dd", |command| {
        command.args(["if=/dev/zero", "bs=1M", "count=80"]).arg(format!("of={}", ballast.display()));
    });
    let fio = Verifying::start(&cluster, rng.fork());
    cluster.wait_out_of_view("b");
    cluster.assert_event(&["b: ", "its disk is full"]);
    fio.is_well();
    std::fs::remove_file(&ballast).expect("making room");
    cluster.wait_member_again("b");
    fio.finish();
    cluster.end_well();
}
