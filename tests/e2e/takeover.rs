//! One engine after another: killed and started again at once, or frozen and overtaken. No acknowledged write is lost, and
//! an engine that was overtaken never answers with old data.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::ledger::Ledger;
use crate::nbd::{CMD_READ, CMD_WRITE, Client, Endpoint, Receiver, Request, Sender};
use crate::plan::{self, Plan, VOLUME};
use crate::program::{self, Program};
use crate::scratch;
use crate::seed::{self, Rng};
use crate::writer::{Load, Writer};

const LIMIT: Duration = Duration::from_secs(60);

/// Rounds of: write, kill the engine, start another at once, read everything back.
fn restarts(test: &str, arguments: &[&str]) {
    let _turn = scratch::shared_machine();
    let (seed, mut rng) = seed::of_test(test);
    let mut cluster = Cluster::serving(Plan::default());
    let ledger = Arc::new(Mutex::new(Ledger::new(seed, cluster.plan.size)));
    let mut took = Vec::new();
    for round in 0..seed::rounds(6) {
        let load = Load { depth: rng.between(1, 48) as usize, ..Load::default() };
        let writer = Writer::start(&cluster.endpoint, VOLUME, &ledger, rng.fork(), load);
        writer.wait_answers(rng.between(100, 1_500), LIMIT);
        cluster.kill_engine();
        let killed = Instant::now();
        cluster.start_engine_with(arguments);
        took.push(killed.elapsed());
        writer.finish_after_crash();
        let content = cluster.connect().read_all().expect("reading the volume");
        let verdict = ledger.lock().expect("the ledger").settle(&content);
        verdict.unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
    took.sort();
    let (best, median, worst) = (took[0], took[took.len() / 2], took[took.len() - 1]);
    scratch::notice(&format!(
        "an engine started right after another was killed serves within {median:.0?} ({best:.0?} to {worst:.0?}; \
         lease_ms is 500{}{})",
        if arguments.is_empty() { "" } else { "; " },
        arguments.join(" ")
    ));
    assert!(median < Duration::from_secs(8), "starting takes {median:?}");
    cluster.end_well();
}

#[test]
fn an_engine_starts_again_right_after_it_was_killed() {
    restarts("takeover::an_engine_starts_again_right_after_it_was_killed", &[]);
}

#[test]
fn an_engine_takes_over_right_after_the_other_was_killed() {
    restarts("takeover::an_engine_takes_over_right_after_the_other_was_killed", &["--take-over"]);
}

/// One of the engines that overtake each other, each at addresses of its own.
struct Engine {
    program: Program,
    endpoint: Endpoint,
}

impl Engine {
    /// Takes the cluster's volume over.
    fn overtaking(cluster: &Cluster, round: u64) -> Self {
        let endpoint = Endpoint::Tcp(scratch::free_port());
        let config = config_of_another(cluster, &endpoint, round);
        let mut program = Program::start(&format!("nbdcast serve {round}"), &program::nbdcast(), |command| {
            command.args(["serve", "--take-over", "--config"]).arg(config);
        });
        let ready = format!("ready {}", endpoint.uri(VOLUME));
        program.wait_for_line(&format!("`{ready}`"), |line| line.trim() == ready);
        Self { program, endpoint }
    }

    fn connect(&self) -> Client {
        Client::connect(&self.endpoint, VOLUME).expect("cannot connect to the engine")
    }
}

fn config_of_another(cluster: &Cluster, endpoint: &Endpoint, round: u64) -> PathBuf {
    let replicas = cluster
        .agents
        .iter()
        .map(|agent| (agent.name.clone(), format!("address = \"127.0.0.1:{}\"", agent.port)))
        .collect::<Vec<_>>();
    let path = cluster.directory().join(format!("engine-{round}.toml"));
    let text = plan::config_text(&cluster.plan, endpoint, scratch::free_port(), &replicas);
    std::fs::write(&path, text).expect("cannot write the config file");
    path
}

/// Blocks of a round: one that the engine after it changes, and one that only the overtaken engine is asked to write.
const SHARED: u64 = 0;
const FORBIDDEN: u64 = 1 << 20;

fn read_of(offset: u64) -> Request {
    Request { command: CMD_READ, offset, length: 4096, ..Request::default() }
}

fn write_of(offset: u64, byte: u8) -> Request {
    Request { command: CMD_WRITE, offset, payload: vec![byte; 4096], ..Request::default() }
}

/// Receives until the connection ends; each answer must be an error.
fn expect_no_answer(mut receiver: Receiver, round: u64) -> usize {
    let mut errors = 0;
    while let Ok(reply) = receiver.receive() {
        assert!(
            reply.error != 0,
            "round {round}: the overtaken engine answered request {} with success: {:?}...",
            reply.cookie,
            &reply.data.get(..8)
        );
        errors += 1;
    }
    errors
}

/// Up to `most` requests over the old engine's connection.
fn ask(sender: &mut Sender, rng: &mut Rng, first_cookie: u64, most: u64) {
    for cookie in first_cookie..first_cookie + rng.between(1, most) {
        let request = if rng.chance(70) { read_of(SHARED) } else { write_of(FORBIDDEN, 0xbb) };
        // It may have closed the connection by now.
        if sender.send(cookie, &request).is_err() {
            return;
        }
    }
}

fn engines_overtake_frozen_ones(test: &str, policy: &'static str) {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test(test);
    let mut cluster = Cluster::serving(Plan { ack_write: policy, ack_flush: policy, ..Plan::default() });
    let endpoint = cluster.endpoint.clone();
    let mut old = Engine { program: cluster.take_engine(), endpoint };
    for round in 1..=seed::rounds(6) {
        let mut client = old.connect();
        client.write(SHARED, &[round as u8; 4096], 0).expect("a write");
        client.write(FORBIDDEN, &[0xaa; 4096], 0).expect("a write");
        let (mut sender, receiver) = client.split();

        old.program.freeze();
        ask(&mut sender, &mut rng, 1_000, 8);
        let new = Engine::overtaking(&cluster, round);
        let mut client = new.connect();
        assert_eq!(client.read(SHARED, 4096).expect("a read"), [round as u8; 4096], "round {round}");
        client.write(SHARED, &[round as u8 + 100; 4096], 0).expect("a write");
        ask(&mut sender, &mut rng, 2_000, 8);

        old.program.thaw();
        ask(&mut sender, &mut rng, 3_000, 20);
        let errors = expect_no_answer(receiver, round);
        println!("round {round}: the overtaken engine answered {errors} errors");
        let (status, printed, _) = old.program.wait(LIMIT);
        assert_eq!(status.code(), Some(1), "round {round}: {printed}");
        let last_words = printed.lines().filter(|line| line.contains("another engine took over")).collect::<Vec<_>>();
        assert!(
            last_words.iter().any(|line| line.contains("vol0") && line.contains("replica ")),
            "round {round}: it says who overtook it, naming a replica:\n{printed}"
        );

        assert_eq!(client.read(SHARED, 4096).expect("a read"), [round as u8 + 100; 4096], "round {round}");
        assert_eq!(client.read(FORBIDDEN, 4096).expect("a read"), [0xaa; 4096], "round {round}");
        client.disconnect();
        old = new;
    }
    old.program.stop();
    for agent in &mut cluster.agents {
        agent.stop();
    }
    let image = cluster.identical_images(&cluster.names());
    assert!(image[FORBIDDEN as usize..][..4096].iter().all(|byte| *byte == 0xaa));
    cluster.verify_replicas();
}

#[test]
fn a_frozen_engine_that_was_overtaken_answers_nothing_when_it_thaws() {
    let test = "takeover::a_frozen_engine_that_was_overtaken_answers_nothing_when_it_thaws";
    engines_overtake_frozen_ones(test, "first");
}

#[test]
fn with_majority_a_frozen_engine_that_was_overtaken_answers_nothing_either() {
    let test = "takeover::with_majority_a_frozen_engine_that_was_overtaken_answers_nothing_either";
    engines_overtake_frozen_ones(test, "majority");
}
