//! kill -9 at random points under a writer that remembers every promise: a hundred rounds in all.
//!
//! Each round: write, kill, start again, read everything. Every block must hold its last answered write or one issued
//! later, and after a clean stop the replicas must be identical. What was read stays true in all rounds that follow.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::clients::Demo;
use crate::cluster::Cluster;
use crate::ledger::Ledger;
use crate::nbd::Client;
use crate::plan::{Plan, VOLUME};
use crate::scratch;
use crate::seed::{self, Rng};
use crate::writer::{Load, Writer};

const LIMIT: Duration = Duration::from_secs(60);

/// Reads the volume and holds it against the ledger. Returns its content.
fn check(client: &mut Client, ledger: &Mutex<Ledger>, round: u64) -> Vec<u8> {
    let content = client.read_all().expect("reading the volume after a crash");
    let verdict = ledger.lock().expect("the ledger").settle(&content);
    verdict.unwrap_or_else(|error| panic!("round {round}: {error}"));
    content
}

fn random_load(rng: &mut Rng) -> Load {
    Load {
        connections: rng.between(1, 3),
        depth: rng.between(1, 64) as usize,
        blocks_max: rng.between(1, 32),
        others_percent: rng.between(0, 30),
    }
}

/// What is killed, and in which order.
#[derive(Clone, Copy)]
enum Victims {
    Everything,
    EngineOnly,
    OneAgent,
}

fn crash_rounds(test: &str, victims: Victims, full: u64) {
    let _turn = scratch::shared_machine();
    let (seed, mut rng) = seed::of_test(test);
    // One agent that dies must not be dropped before it is back: its limit is out of a round's reach.
    let plan = Plan { lag_bytes_max: 64 << 20, journal_size: 128 << 20, ..Plan::default() };
    let plan = if matches!(victims, Victims::OneAgent) { plan } else { Plan::default() };
    let mut cluster = Cluster::serving(plan);
    let ledger = Arc::new(Mutex::new(Ledger::new(seed, cluster.plan.size)));
    for round in 0..seed::rounds(full) {
        let mut load = random_load(&mut rng);
        if matches!(victims, Victims::OneAgent) {
            (load.depth, load.blocks_max) = (4, 4);
        }
        println!("round {round}: {load:?}");
        let writer = Writer::start(&cluster.endpoint, VOLUME, &ledger, rng.fork(), load);
        writer.wait_answers(rng.below(800), LIMIT);
        match victims {
            Victims::Everything => {
                kill_everything(&mut cluster, &mut rng);
                writer.finish_after_crash();
                cluster.start_agents();
                cluster.start_engine();
            }
            Victims::EngineOnly => {
                cluster.kill_engine();
                writer.finish_after_crash();
                cluster.start_engine();
            }
            Victims::OneAgent => {
                let name = ["a", "b", "c"][rng.below(3) as usize];
                cluster.agent_mut(name).kill();
                writer.wait_answers(rng.below(300), LIMIT);
                cluster.agent_mut(name).start();
                writer.wait_answers(rng.below(300), LIMIT);
                writer.finish();
                cluster.wait_caught_up(name);
            }
        }
        let content = check(&mut cluster.connect(), &ledger, round);
        cluster.stop();
        let image = cluster.identical_images(&cluster.names());
        assert!(image == content, "round {round}: the images hold what was read");
        cluster.start_agents();
        cluster.start_engine();
    }
    cluster.stop();
}

/// Kills the engine and all agents one right after the other, in random order.
fn kill_everything(cluster: &mut Cluster, rng: &mut Rng) {
    let mut order: Vec<usize> = (0..=cluster.agents.len()).collect();
    for last in (1..order.len()).rev() {
        order.swap(last, rng.below(last as u64 + 1) as usize);
    }
    for victim in order {
        match cluster.agents.get_mut(victim) {
            Some(agent) => agent.kill(),
            None => cluster.kill_engine(),
        }
    }
}

#[test]
fn engine_and_agents_killed_one() {
    crash_rounds("crash::engine_and_agents_killed_one", Victims::Everything, 25);
}

#[test]
fn engine_and_agents_killed_two() {
    crash_rounds("crash::engine_and_agents_killed_two", Victims::Everything, 25);
}

#[test]
fn engine_alone_killed() {
    crash_rounds("crash::engine_alone_killed", Victims::EngineOnly, 20);
}

#[test]
fn one_agent_killed_and_the_client_sees_nothing() {
    crash_rounds("crash::one_agent_killed_and_the_client_sees_nothing", Victims::OneAgent, 15);
}

#[test]
fn demo_killed() {
    let _turn = scratch::shared_machine();
    let (seed, mut rng) = seed::of_test("crash::demo_killed");
    let size = 16 << 20;
    let mut demo = Demo::start(size);
    let ledger = Arc::new(Mutex::new(Ledger::new(seed, size)));
    for round in 0..seed::rounds(15) {
        let load = random_load(&mut rng);
        println!("round {round}: {load:?}");
        let writer = Writer::start(&demo.endpoint, "demo", &ledger, rng.fork(), load);
        writer.wait_answers(rng.below(800), LIMIT);
        demo.kill();
        writer.finish_after_crash();
        demo.restart();
        let content = check(&mut demo.connect(), &ledger, round);
        assert!(demo.stop() == content, "round {round}: the images hold what was read");
        demo.restart();
    }
    demo.stop();
}
