//! Engine and agents that prove who they are: everything works as without, and whoever is not who it should be is refused
//! by name while the volume goes on.

use std::time::Duration;

use crate::cluster::Cluster;
use crate::nbd::FLAG_FUA;
use crate::plan::{CERTIFICATES, Plan};
use crate::program::Program;
use crate::scratch;
use crate::seed;
use crate::tools;

const LIMIT: Duration = Duration::from_secs(60);

fn small() -> Plan {
    Plan { size: 8 << 20, journal_size: 8 << 20, lag_bytes_max: 4 << 20, tls: true, ..Plan::default() }
}

/// Waits until status says of the replica `name` something with `words` in it.
fn wait_for_reason(cluster: &Cluster, name: &str, words: &str) {
    scratch::wait_until(&format!("status says `{words}` of {name}"), LIMIT, || {
        cluster.status().replica(name).reason.as_deref().is_some_and(|reason| reason.contains(words))
    });
}

#[test]
fn a_volume_over_tls_takes_a_killed_agent_and_ends_with_three_equal_images() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("tls::a_volume_over_tls_takes_a_killed_agent_and_ends_with_three_equal_images");
    let mut cluster = Cluster::serving(small());
    let mut content = vec![0; cluster.plan.size as usize];
    rng.fill(&mut content);
    let file = cluster.directory().join("content");
    std::fs::write(&file, &content).expect("cannot write the file to copy");
    tools::run("nbdcopy", |command| {
        command.arg("--flush").arg(&file).arg(cluster.uri());
    });
    cluster.agent_mut("b").kill();
    let mut client = cluster.connect();
    for block in 0..200 {
        let range = block * 8192..block * 8192 + 4096;
        rng.fill(&mut content[range.clone()]);
        client.write(range.start as u64, &content[range], FLAG_FUA).expect("a write with two of three agents");
    }
    cluster.agent_mut("b").start();
    cluster.wait_caught_up("b");
    assert!(client.read_all().expect("a read") == content, "the volume holds what was written");
    client.disconnect();
    cluster.stop();
    assert!(cluster.identical_images(&cluster.names()) == content, "so do the images");
}

#[test]
fn an_agent_with_the_certificate_of_another_is_refused_by_name_and_the_volume_goes_on() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::serving(small());
    cluster.agent_mut("a").stop();
    let (own, of_b) = (cluster.certificates("agent-a"), cluster.certificates("agent-b"));
    cluster.agent_mut("a").certificates = Some(of_b);
    cluster.agent_mut("a").start();
    wait_for_reason(&cluster, "a", "the agent's certificate is for b, not for a");
    let mut client = cluster.connect();
    client.write(4096, &[7; 4096], FLAG_FUA).expect("a write without a");
    assert_eq!(client.read(4096, 4096).expect("a read without a"), [7; 4096]);
    client.disconnect();

    cluster.agent_mut("a").stop();
    cluster.agent_mut("a").certificates = Some(own);
    cluster.agent_mut("a").start();
    cluster.wait_caught_up("a");
    cluster.stop();
    cluster.identical_images(&cluster.names());
}

#[test]
fn agents_behind_unix_sockets_prove_who_they_are_as_well() {
    let _turn = scratch::shared_machine();
    let sockets = scratch::socket_directory();
    let mut cluster = Cluster::planned(small());
    for agent in &mut cluster.agents {
        agent.socket = Some(sockets.path().join(format!("{}.sock", agent.name)));
    }
    cluster.write_config();
    cluster.start_agents();
    cluster.create();
    cluster.start_engine();
    let mut client = cluster.connect();
    client.write(0, &[1; 4096], FLAG_FUA).expect("a write");
    // The socket file that it leaves behind is replaced.
    cluster.agent_mut("b").kill();
    client.write(4096, &[2; 4096], FLAG_FUA).expect("a write without b");
    cluster.agent_mut("b").start();
    cluster.wait_caught_up("b");

    cluster.agent_mut("a").stop();
    let (own, of_b) = (cluster.certificates("agent-a"), cluster.certificates("agent-b"));
    cluster.agent_mut("a").certificates = Some(of_b);
    cluster.agent_mut("a").start();
    wait_for_reason(&cluster, "a", "the agent's certificate is for b, not for a");
    client.write(8192, &[3; 4096], FLAG_FUA).expect("a write without a");
    cluster.agent_mut("a").stop();
    cluster.agent_mut("a").certificates = None;
    cluster.agent_mut("a").start();
    wait_for_reason(&cluster, "a", "the agent does not speak TLS");
    cluster.agent_mut("a").stop();
    cluster.agent_mut("a").certificates = Some(own);
    cluster.agent_mut("a").start();
    cluster.wait_caught_up("a");
    client.disconnect();
    cluster.stop();
    let image = cluster.identical_images(&cluster.names());
    for (block, byte) in [(0, 1), (1, 2), (2, 3)] {
        assert!(image[block * 4096..(block + 1) * 4096] == [byte; 4096], "block {block}");
    }
}

#[test]
fn nobody_but_an_engine_makes_or_reaches_a_replica() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::planned(small());
    cluster.make_certificates(&["--client", "guest"]);
    cluster.start_agents();
    let as_it_should_be = cluster.config_text();
    let refused = |text: &str, words: &[&str]| {
        std::fs::write(cluster.config(), text).expect("cannot write the config file");
        let finished = cluster.nbdcast(&["create"]);
        assert!(!finished.status.success(), "created: {finished}");
        for word in words {
            assert!(finished.stderr.contains(word), "it should say `{word}`: {finished}");
        }
    };
    let directory = format!("{CERTIFICATES}/engine");
    refused(
        &as_it_should_be.replace(&directory, &format!("{CERTIFICATES}/client-guest")),
        &["replica a", "the engine's certificate is for guest", "tls.engines"],
    );
    refused(&as_it_should_be.replace(&directory, &format!("{CERTIFICATES}/agent-a")), &["client-cert.pem"]);
    let without = as_it_should_be.replacen("certificates =", "# certificates =", 1);
    refused(&without, &["the agent speaks TLS", "[agents]"]);

    cluster.write_config();
    cluster.agent_mut("a").stop();
    let certificates = cluster.agent_mut("a").certificates.take();
    cluster.agent_mut("a").start();
    refused_plain_agent(&cluster);
    cluster.agent_mut("a").stop();
    cluster.agent_mut("a").certificates = certificates;
    cluster.agent_mut("a").start();
    cluster.create();
    cluster.start_engine();
    cluster.another_agent("d");
    let address = format!("127.0.0.1:{}", cluster.agent("d").port);
    let add = ["replica", "add", "vol0", "d", "--address", &address];
    let finished = cluster.nbdcast(&add);
    assert!(finished.stderr.contains("the agent does not speak TLS"), "{finished}");
    cluster.make_certificates(&["--replica", "node-d"]);
    cluster.agent_mut("d").stop();
    cluster.agent_mut("d").certificates = Some(cluster.certificates("agent-node-d"));
    cluster.agent_mut("d").start();
    let finished = cluster.nbdcast(&add);
    assert!(finished.stderr.contains("is for node-d, not for d"), "{finished}");
    let finished = cluster.nbdcast(&[&add[..], &["--certificate", "node-d"]].concat());
    assert!(finished.status.success() && finished.stdout.contains("certificate = \"node-d\""), "{finished}");
    cluster.stop();
    cluster.identical_images(&["a", "b", "c", "d"]);
}

fn refused_plain_agent(cluster: &Cluster) {
    let finished = cluster.nbdcast(&["create"]);
    assert!(finished.stderr.contains("the agent does not speak TLS"), "{finished}");
    assert!(finished.stderr.contains("--tls-certificates"), "{finished}");
}

#[test]
fn other_programs_take_the_certificates_and_none_is_made_twice() {
    let cluster = Cluster::planned(small());
    let before = std::fs::read(cluster.certificates("engine").join("client-key.pem")).expect("the engine's key");
    cluster.make_certificates(&["--client", "guest"]);
    let after = std::fs::read(cluster.certificates("engine").join("client-key.pem")).expect("the engine's key");
    assert!(before == after, "what was there is as it was");
    for (holder, side) in
        [("engine", "client"), ("engine", "server"), ("agent-a", "server"), ("client-guest", "client")]
    {
        let dir = cluster.certificates(holder);
        for purpose in ["client", "server"] {
            let finished = tools::attempt("openssl", |command| {
                command.args(["verify", "-x509_strict", "-purpose", &format!("ssl{purpose}"), "-CAfile"]);
                command.arg(dir.join("ca-cert.pem")).arg(dir.join(format!("{side}-cert.pem")));
            });
            assert_eq!(finished.status.success(), purpose == side, "{holder} as a {purpose}: {finished}");
        }
    }
    // Both of these use GnuTLS.
    let socket = scratch::socket_directory();
    let socket = socket.path().join("nbdkit.sock");
    let tls = format!("--tls-certificates={}", cluster.certificates("engine").display());
    let mut nbdkit = Program::start("nbdkit", &tools::find("nbdkit"), |command| {
        command.args(["-f", "-v", "--tls=require", "--tls-verify-peer", &tls, "-U"]).arg(&socket);
        command.args(["memory", "1M"]);
    });
    scratch::wait_until("nbdkit listens", LIMIT, || socket.exists());
    let uri = format!(
        "nbds+unix:///?socket={}&tls-hostname=localhost&tls-certificates={}",
        socket.display(),
        cluster.certificates("client-guest").display()
    );
    let size = tools::run("nbdinfo", |command| {
        command.args(["--size", &uri]);
    });
    assert_eq!(size.trim(), "1048576");
    assert!(!nbdkit.has_ended());
    nbdkit.kill();
}
