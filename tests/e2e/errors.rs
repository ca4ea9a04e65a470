//! What goes wrong around the programs: each error names the thing and the remedy, ends with the right code, loses nothing.

use std::net::TcpListener;
use std::process::Command;
use std::time::Duration;

use crate::cluster::{Agent, Cluster};
use crate::nbd::{Client, FLAG_FUA};
use crate::plan::Plan;
use crate::program::{self, Finished};
use crate::scratch::{self, LoopDisk};

/// Exit codes of the contract: what the user wrote is wrong; what the program found is wrong; or a matter of taste which.
const CONFIG: &[i32] = &[2];
const FAILED: &[i32] = &[1];
const EITHER: &[i32] = &[1, 2];

/// The program must have ended with one of `codes` and said all of `words` on stderr, in whatever quotes.
#[track_caller]
fn assert_refused(finished: &Finished, codes: &[i32], words: &[&str]) {
    let code = finished.status.code().unwrap_or(-1);
    assert!(codes.contains(&code), "not one of {codes:?}: {finished}");
    let said = finished.stderr.to_lowercase().replace(['`', '"', '\''], "");
    for word in words {
        assert!(said.contains(&word.to_lowercase()), "the message should name `{word}`: {finished}");
    }
    assert!(!said.contains("panicked"), "an error is not a panic: {finished}");
}

fn small() -> Plan {
    Plan { size: 8 << 20, journal_size: 4 << 20, lag_bytes_max: 2 << 20, ..Plan::default() }
}

fn nbdcast(words: &[&str]) -> Finished {
    let mut command = Command::new(program::nbdcast());
    command.args(words);
    program::finish(&mut command, Duration::from_secs(30))
}

#[test]
fn wrong_usage_ends_with_code_2() {
    assert_eq!(nbdcast(&[]).status.code(), Some(2), "no command");
    assert_refused(&nbdcast(&["dance"]), CONFIG, &["dance"]);
    assert_refused(&nbdcast(&["serve"]), CONFIG, &["--config"]);
    assert_eq!(nbdcast(&["--help"]).status.code(), Some(0), "help is not an error");
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_one() {
    let cluster = Cluster::planned(small());
    for (right, wrong) in [("lag_bytes_max", "lag_bytes_mx"), ("journal_size", "journalsize"), ("listen", "lisen")] {
        let spoilt = cluster.config_text().replacen(right, wrong, 1);
        std::fs::write(cluster.config(), spoilt).expect("cannot write the config file");
        assert_refused(&cluster.serve_refused(), CONFIG, &[wrong, right]);
        assert_refused(&cluster.nbdcast(&["create"]), CONFIG, &[wrong, right]);
    }
}

#[test]
fn a_bad_value_a_bad_file_and_a_missing_file_are_named() {
    let cluster = Cluster::planned(small());
    let text = cluster.config_text();
    let spoil = |right: &str, wrong: &str| {
        assert!(text.contains(right), "the config holds {right}");
        let spoilt = text.replacen(right, wrong, 1);
        std::fs::write(cluster.config(), spoilt).expect("cannot write the config file");
        cluster.serve_refused()
    };
    assert_refused(&spoil("\"8192KiB\"", "\"8192 KiloBites\""), CONFIG, &["size", "KiloBites"]);
    assert_refused(&spoil("on_lag = \"drop\"", "on_lag = \"hope\""), CONFIG, &["on_lag", "hope", "throttle"]);
    assert_refused(&spoil("name = \"b\"", "name = \"a\""), CONFIG, &["replica", "a"]);
    assert_refused(&spoil("\"4096KiB\"", "\"1024KiB\""), CONFIG, &["journal_size", "lag_bytes_max"]);
    assert_refused(&spoil("[nbd]", "[nbd"), CONFIG, &["engine.toml"]);
    std::fs::remove_file(cluster.config()).expect("the config file");
    assert_refused(&cluster.serve_refused(), CONFIG, &["engine.toml"]);
}

#[test]
fn a_busy_port_is_named() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::planned(small());
    cluster.start_agents();
    cluster.create();
    let nbd_address = cluster.uri().replace("nbd://", "").replace("/vol0", "");
    let squatter = TcpListener::bind(&nbd_address).expect("a free port");
    assert_refused(&cluster.serve_refused(), FAILED, &[&nbd_address, "in use"]);
    drop(squatter);
    let admin_address = format!("127.0.0.1:{}", cluster.admin_port);
    let squatter = TcpListener::bind(&admin_address).expect("a free port");
    assert_refused(&cluster.serve_refused(), FAILED, &[&admin_address, "in use"]);
    drop(squatter);
    let twin = Agent::new("twin", cluster.directory().to_path_buf());
    let squatter = TcpListener::bind(("127.0.0.1", twin.port)).expect("a free port");
    assert_refused(&twin.start_refused(), FAILED, &[&twin.port.to_string(), "in use"]);
    drop(squatter);
    cluster.start_engine();
    cluster.stop();
}

#[test]
fn a_volume_that_was_never_created_is_refused_with_the_remedy() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::planned(small());
    cluster.start_agents();
    assert_refused(&cluster.serve_refused(), FAILED, &["vol0", "create"]);
    cluster.create();
    cluster.start_engine();
    cluster.stop();
}

#[test]
fn create_refuses_replicas_that_hold_data_and_spares_them() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::serving(small());
    cluster.connect().write(4096, b"precious", FLAG_FUA).expect("a write");
    cluster.stop();
    cluster.start_agents();
    assert_refused(&cluster.nbdcast(&["create"]), FAILED, &["vol0"]);
    cluster.start_engine();
    assert_eq!(cluster.connect().read(4096, 8).expect("a read"), b"precious");
    cluster.stop();
}

#[test]
fn the_directory_of_another_volume_is_refused_by_name() {
    let _turn = scratch::shared_machine();
    let (mut one, mut two) = (Cluster::serving(small()), Cluster::serving(small()));
    one.connect().write(0, b"one", FLAG_FUA).expect("a write");
    two.connect().write(0, b"two", FLAG_FUA).expect("a write");
    one.stop();
    two.stop();
    let (mine, theirs) = (one.agent("b").replica(), two.agent("b").replica());
    let aside = one.directory().join("aside");
    std::fs::rename(&mine, &aside).expect("moving a replica aside");
    std::fs::rename(&theirs, &mine).expect("moving the other volume's replica in");
    one.start_agents();
    assert_refused(&one.serve_refused(), FAILED, &["vol0", "replica b", "volume"]);
    one.agent_mut("b").stop();
    std::fs::rename(&mine, &theirs).expect("moving it back");
    std::fs::rename(&aside, &mine).expect("moving it back");
    one.agent_mut("b").start();
    one.start_engine();
    assert_eq!(one.connect().read(0, 3).expect("a read"), b"one");
    one.stop();
    two.start_agents();
    two.start_engine();
    assert_eq!(two.connect().read(0, 3).expect("a read"), b"two");
    two.stop();
}

#[test]
fn a_config_of_another_size_is_refused() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::serving(small());
    cluster.stop();
    cluster.start_agents();
    cluster.plan.size *= 2;
    cluster.write_config();
    assert_refused(&cluster.serve_refused(), EITHER, &["vol0", "size"]);
    cluster.plan.size /= 2;
    cluster.write_config();
    cluster.start_engine();
    cluster.stop();
}

#[test]
fn a_missing_directory_is_named() {
    let _turn = scratch::shared_machine();
    let place = scratch::directory();
    let agent = Agent::new("a", place.path().join("nowhere"));
    let refused = agent.start_refused();
    assert_refused(&refused, EITHER, &["nowhere", "director"]);

    let mut cluster = Cluster::serving(small());
    cluster.stop();
    std::fs::remove_dir_all(cluster.agent("c").replica()).expect("a lost replica");
    cluster.start_agents();
    let said = cluster.start_engine_blocked();
    assert!(said.contains("replica c: "), "{said}");
    // It ends well while it waits.
    cluster.stop();
}

#[test]
fn an_unreachable_agent_is_named() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::planned(small());
    cluster.agent_mut("a").start();
    cluster.agent_mut("b").start();
    let address = format!("127.0.0.1:{}", cluster.agent("c").port);
    assert_refused(&cluster.nbdcast(&["create"]), FAILED, &["replica c", &address]);
    cluster.start_agents();
    cluster.create();
    cluster.agent_mut("c").stop();
    let said = cluster.start_engine_blocked();
    assert!(said.contains("replica c: ") && said.contains(&address), "{said}");
    cluster.agent_mut("c").start();
    cluster.wait_ready();
    cluster.stop();
    let url = format!("http://127.0.0.1:{}", cluster.admin_port);
    assert_refused(&nbdcast(&["status", "--admin", &url]), FAILED, &[&cluster.admin_port.to_string()]);
}

#[test]
fn a_second_engine_on_the_same_volume_is_refused() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::serving(small());
    let mut client = cluster.connect();
    client.write(0, b"first", 0).expect("a write");
    let (nbd, admin) = (scratch::free_port(), scratch::free_port());
    let second = cluster
        .config_text()
        .replace(&cluster.uri().replace("nbd://", "").replace("/vol0", ""), &format!("127.0.0.1:{nbd}"))
        .replace(&format!("127.0.0.1:{}", cluster.admin_port), &format!("127.0.0.1:{admin}"));
    let path = cluster.directory().join("second.toml");
    std::fs::write(&path, second).expect("cannot write the config file");
    let refused = nbdcast(&["serve", "--config", &path.display().to_string()]);
    assert_refused(&refused, FAILED, &["vol0", "--take-over"]);
    client.write(8192, b"still the first", 0).expect("the first engine goes on");
    assert!(!cluster.engine_has_ended(), "the first engine goes on");
    client.disconnect();
    cluster.stop();
    cluster.identical_images(&["a", "b", "c"]);
}

#[test]
fn a_disk_too_small_for_a_new_volume_is_named() {
    let _turn = scratch::shared_machine();
    if !scratch::loop_mounts_work("the full disk at create") {
        return;
    }
    let place = scratch::directory();
    let disk = LoopDisk::new(place.path(), "disk", 16 << 20);
    let mut cluster = Cluster::planned(Plan::default());
    *cluster.agent_mut("b") = Agent::new("b", disk.path().to_path_buf());
    cluster.write_config();
    cluster.start_agents();
    assert_refused(&cluster.nbdcast(&["create"]), FAILED, &["replica b", "space"]);
    cluster.kill_agents();
}

#[test]
fn a_replica_whose_disk_fills_up_leaves_and_the_client_sees_nothing() {
    let _turn = scratch::shared_machine();
    if !scratch::loop_mounts_work("the full disk under one of three agents") {
        return;
    }
    let place = scratch::directory();
    let disk = LoopDisk::new(place.path(), "disk", 48 << 20);
    let mut cluster =
        Cluster::planned(Plan { size: 64 << 20, journal_size: 16 << 20, lag_bytes_max: 8 << 20, ..Plan::default() });
    let mut agent = Agent::new("b", disk.path().to_path_buf());
    std::mem::swap(cluster.agent_mut("b"), &mut agent);
    cluster.write_config();
    cluster.start_agents();
    cluster.create();
    cluster.start_engine();
    let mut client = cluster.connect();
    fill(&mut client).expect("the client sees nothing of it");
    cluster.wait_out_of_view("b");
    client.write(0, b"and goes on", 0).expect("a write");
    client.disconnect();
    cluster.agent_mut("b").kill();
    cluster.stop();
    let image = cluster.identical_images(&["a", "c"]);
    assert!(image[..11] == *b"and goes on" && image[1 << 20..].iter().all(|byte| *byte == 0xee));
}

/// Writes the whole export.
fn fill(client: &mut Client) -> std::io::Result<()> {
    for offset in (0..client.size).step_by(256 << 10) {
        client.write(offset, &[0xee; 256 << 10], 0)?;
    }
    Ok(())
}

#[test]
fn when_the_last_disk_is_full_the_client_gets_enospc_and_keeps_what_it_wrote() {
    let _turn = scratch::shared_machine();
    if !scratch::loop_mounts_work("the full disk under every agent") {
        return;
    }
    const ENOSPC: i32 = 28;
    let place = scratch::directory();
    let disk = LoopDisk::new(place.path(), "disk", 48 << 20);
    let mut cluster = Cluster::planned(Plan {
        size: 64 << 20,
        journal_size: 16 << 20,
        lag_bytes_max: 8 << 20,
        replicas: 1,
        ..Plan::default()
    });
    *cluster.agent_mut("a") = Agent::new("a", disk.path().to_path_buf());
    cluster.write_config();
    cluster.start_agents();
    cluster.create();
    cluster.start_engine();
    let mut client = cluster.connect();
    client.write(0, b"early and answered", FLAG_FUA).expect("a write");
    let error = loop_until_error(&mut client);
    assert_eq!(error.raw_os_error(), Some(ENOSPC), "{error}");
    let early = client.read(0, 18).expect("a read on a full disk");
    assert_eq!(early, b"early and answered");
}

fn loop_until_error(client: &mut Client) -> std::io::Error {
    for offset in (1 << 20..client.size).step_by(256 << 10) {
        if let Err(error) = client.write(offset, &[0xee; 256 << 10], 0) {
            return error;
        }
    }
    panic!("a disk of 48 MiB took 64 MiB and a journal");
}
