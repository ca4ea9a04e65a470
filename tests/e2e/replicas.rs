//! Three agents and an engine: after a clean stop each image is the whole volume, plain and readable without nbdcast.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::cluster::{Agent, Cluster};
use crate::endings::offline;
use crate::nbd::{CMD_CACHE, CMD_TRIM, CMD_WRITE_ZEROES, Client, Endpoint, FLAG_FUA};
use crate::plan::{self, Plan, VOLUME};
use crate::program::{self, Program};
use crate::scratch::{self, Mounted};
use crate::seed::{self, Rng};
use crate::status::{self, Status};
use crate::tools;

/// Random requests of any offset and length, one at a time, with the volume as it must be kept beside it.
fn scribble(client: &mut Client, shadow: &mut [u8], rng: &mut Rng, requests: u64) {
    for _ in 0..requests {
        let length = if rng.chance(70) { rng.between(1, 9_000) } else { rng.between(1, 300_000) };
        let offset = rng.below(client.size - length);
        let range = offset as usize..(offset + length) as usize;
        match rng.below(10) {
            0 => {
                client.clear(CMD_TRIM, offset, length as u32).expect("a trim");
                // A trim may do nothing to the odd bytes at its ends: what it did is what counts from here on.
                let seen = client.read(offset, length as u32).expect("a read");
                let unchanged_or_zero =
                    seen.iter().zip(&shadow[range.clone()]).all(|(now, before)| now == before || *now == 0);
                assert!(unchanged_or_zero, "a trim at {offset}+{length} made up bytes");
                shadow[range].copy_from_slice(&seen);
            }
            1 => {
                client.clear(CMD_WRITE_ZEROES, offset, length as u32).expect("zeroes");
                shadow[range].fill(0);
            }
            2 => {
                let seen = client.read(offset, length as u32).expect("a read");
                assert!(seen == shadow[range], "a read at {offset}+{length} is not what was written");
            }
            3 => client.flush().expect("a flush"),
            _ => {
                rng.fill(&mut shadow[range.clone()]);
                let flags = if rng.chance(10) { FLAG_FUA } else { 0 };
                client.write(offset, &shadow[range], flags).expect("a write");
            }
        }
    }
}

#[test]
fn three_images_are_identical_and_equal_to_what_was_written() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("replicas::three_images_are_identical_and_equal_to_what_was_written");
    let mut cluster = Cluster::serving(Plan::default());
    let mut shadow = vec![0; cluster.plan.size as usize];
    for _ in 0..2 {
        let mut client = cluster.connect();
        assert_eq!(client.size, cluster.plan.size);
        scribble(&mut client, &mut shadow, &mut rng, 1_500);
        client.disconnect();
        cluster.stop();
        let image = cluster.identical_images(&cluster.names());
        assert!(image == shadow, "the images hold what the client wrote");

        cluster.start_agents();
        cluster.start_engine();
        let mut client = cluster.connect();
        assert!(client.read_all().expect("a read") == shadow, "a restart serves the same");
        client.disconnect();
    }
    cluster.stop();
}

#[test]
fn every_image_mounts_without_nbdcast() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("replicas::every_image_mounts_without_nbdcast");
    let mut cluster = Cluster::serving(Plan::default());
    let content = cluster.directory().join("content");
    std::fs::create_dir(&content).expect("a directory");
    let mut precious = vec![0; 3 << 20];
    rng.fill(&mut precious);
    std::fs::write(content.join("precious"), &precious).expect("a file");
    let filesystem = cluster.directory().join("fs.img");
    tools::run("mkfs.ext4", |command| {
        command.args(["-q", "-d"]).arg(&content).arg(&filesystem).arg("16M");
    });
    tools::run("nbdcopy", |command| {
        command.arg("--flush").arg(&filesystem).arg(cluster.uri());
    });
    cluster.stop();

    let mounts_work = scratch::loop_mounts_work("mounting each image with mount -o loop");
    for agent in &cluster.agents {
        tools::run("e2fsck", |command| {
            command.arg("-fn").arg(agent.image());
        });
        if mounts_work {
            let mountpoint = cluster.directory().join("mnt");
            let _mounted = Mounted::new(&agent.image(), &mountpoint, "loop,ro");
            let found = std::fs::read(mountpoint.join("precious")).expect("the file is there");
            assert!(found == precious, "the file in {}'s image is whole", agent.name);
        }
    }
}

#[test]
fn status_shows_the_volume_and_its_members() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::serving(Plan::default());
    cluster.connect().write(0, &[1; 8192], 0).expect("a write");
    for name in cluster.names() {
        cluster.wait_caught_up(name);
    }
    let admin = format!("http://127.0.0.1:{}", cluster.admin_port);
    let mut command = std::process::Command::new(program::nbdcast());
    command.args(["status", "--json", "--admin", &admin]);
    let finished = program::finish(&mut command, std::time::Duration::from_secs(30));
    assert!(finished.status.success(), "{finished}");
    let status = Status::of(&serde_json::from_str(&finished.stdout).expect("status --json prints JSON"));
    assert_eq!(status.view, ["a", "b", "c"]);
    assert_eq!(status.size, cluster.plan.size);
    assert!(status.epoch > 0, "an activation takes an epoch");
    for replica in &status.replicas {
        let facts = (replica.state.as_str(), replica.lag_records, replica.lag_bytes);
        assert_eq!(facts, ("member", 0, 0), "replica {}", replica.name);
    }

    let plain = cluster.nbdcast(&["status"]);
    assert!(plain.status.success() && plain.stdout.contains(VOLUME), "{plain}");
    let metrics = status::http_get(cluster.admin_port, "/metrics").expect("/metrics");
    assert!(metrics.contains("# TYPE "), "Prometheus text: {metrics}");
    for line in ["volume_block_statuses_total{volume=\"vol0\"} 0", "volume_caches_total{volume=\"vol0\"} 0"] {
        assert!(metrics.contains(line), "`{line}` is not in {metrics}");
    }
    cluster.connect().clear(CMD_CACHE, 0, 8192).expect("a hint");
    tools::run("nbdinfo", |command| {
        command.arg("--map").arg(cluster.uri());
    });
    let metrics = status::http_get(cluster.admin_port, "/metrics").expect("/metrics");
    assert!(metrics.contains("volume_caches_total{volume=\"vol0\"} 1"), "{metrics}");
    assert!(!metrics.contains("volume_block_statuses_total{volume=\"vol0\"} 0"), "{metrics}");
    status::http_get(cluster.admin_port, "/healthz").expect("/healthz is 200 while serving");
    cluster.stop();
}

#[test]
fn embedded_replicas_and_agents_serve_one_volume_over_a_unix_socket() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("replicas::embedded_replicas_and_agents_serve_one_volume_over_a_unix_socket");
    let mut cluster = Cluster::planned(Plan::default());
    let sockets = scratch::socket_directory();
    let socket = Endpoint::Unix(sockets.path().join("nbd.sock"));
    let embedded = |name: &str| {
        let path = cluster.agent(name).data.clone();
        (name.to_string(), format!("path = \"{}\"", path.display()))
    };
    let remote = ("a".to_string(), format!("address = \"127.0.0.1:{}\"", cluster.agent("a").port));
    let replicas = [remote, embedded("b"), embedded("c")];
    let text = plan::config_text(&cluster.plan, &socket, cluster.admin_port, &replicas);
    cluster.endpoint = socket;
    std::fs::write(cluster.config(), text).expect("cannot write the config file");
    cluster.agent_mut("a").start();
    cluster.create();
    cluster.start_engine();

    let mut shadow = vec![0; cluster.plan.size as usize];
    let mut client = cluster.connect();
    scribble(&mut client, &mut shadow, &mut rng, 500);
    client.disconnect();
    cluster.stop();
    let image = cluster.identical_images(&["a", "b", "c"]);
    assert!(image == shadow, "the images hold what the client wrote");
}

#[test]
fn an_agent_reads_its_settings_from_a_file_and_shows_its_replica_offline() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::serving(Plan::default());
    cluster.connect().write(5 * 4096, &[7; 4096], FLAG_FUA).expect("a write");
    cluster.stop();

    let agent = cluster.agent("b");
    let config = cluster.directory().join("listener-agent.toml");
    let text = format!("listen = \"127.0.0.1:{}\"\ndata = \"{}\"\n", agent.port, agent.data.display());
    std::fs::write(&config, text).expect("cannot write the config file");
    let mut running = Program::start("listener-agent b", &program::listener_agent(), |command| {
        command.arg("--config").arg(config);
    });
    let ready = format!("ready 127.0.0.1:{}", agent.port);
    running.wait_for_line(&ready, |line| line.trim() == ready);
    running.stop();

    let shown = offline(&["inspect", "--json"], agent);
    assert!(shown.status.success(), "{shown}");
    let document: serde_json::Value = serde_json::from_str(&shown.stdout).expect("inspect --json prints JSON");
    assert!(document.to_string().contains("\"b\""), "inspect names the replica: {document}");
    let verified = offline(&["verify"], agent);
    assert!(verified.status.success(), "{verified}");
}

#[test]
fn verify_names_the_block_that_rotted() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::serving(Plan::default());
    cluster.connect().write(77 * 4096, &[7; 4096], 0).expect("a write");
    cluster.stop();
    let agent = cluster.agent("c");
    let image = File::options().write(true).open(agent.image()).expect("the image");
    image.write_at(&[6], 77 * 4096 + 99).expect("one flipped bit");
    let verified = offline(&["verify"], agent);
    assert_eq!(verified.status.code(), Some(1), "{verified}");
    let said = format!("{}{}", verified.stdout, verified.stderr);
    assert!(said.contains("77"), "verify names block 77: {verified}");
}

/// Whether `verify` leaves blocks to the journal. The replica is sound, but for the blocks that are named.
fn leaves_some_to_the_journal(agent: &Agent, bad: &[u64]) -> bool {
    let verified = offline(&["verify"], agent);
    assert_eq!(verified.status.success(), bad.is_empty(), "{verified}");
    let named = verified.stdout.lines().filter_map(|line| line.strip_prefix("bad block at byte "));
    let named: Vec<&str> = named.map(|rest| rest.split(' ').next().unwrap_or(rest)).collect();
    assert_eq!(named, bad.iter().map(u64::to_string).collect::<Vec<_>>(), "{verified}");
    verified.stdout.contains("not judged")
}

#[test]
fn verify_takes_what_a_killed_agent_did_not_write_back_for_no_damage() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::serving(Plan::default());
    let write_all = |cluster: &Cluster, byte: u8| {
        let mut client = cluster.connect();
        for block in 0..64 {
            client.write(block * 3 * 4096 + 512, &[byte; 4096], 0).expect("a write");
        }
        client.disconnect();
        cluster.wait_caught_up("c");
    };
    // A checkpoint may come right between the last write and the kill, but not every time.
    let had_some = (1..=5).any(|byte| {
        write_all(&cluster, byte);
        cluster.agent_mut("c").kill();
        let has_some = leaves_some_to_the_journal(cluster.agent("c"), &[]);
        cluster.agent_mut("c").start();
        cluster.wait_member_again("c");
        has_some
    });
    assert!(had_some, "the journal had nothing to repair");

    let rotten = 500 * 4096;
    cluster.connect().write(rotten, &[7; 4096], FLAG_FUA).expect("a write");
    cluster.stop();
    cluster.start_agents();
    cluster.start_engine();
    write_all(&cluster, 9);
    cluster.agent_mut("c").kill();
    let image = File::options().write(true).open(cluster.agent("c").image()).expect("the image");
    image.write_at(&[6], rotten + 99).expect("one flipped bit");
    leaves_some_to_the_journal(cluster.agent("c"), &[rotten]);
    image.write_at(&[7], rotten + 99).expect("the bit as it was");
    cluster.agent_mut("c").start();
    let image = cluster.end_well();
    assert!(image[512..4096 + 512].iter().all(|byte| *byte == 9));
}
