//! A simulated world: machines with agents, engines with their clients, a network, and one clock that jumps from event
//! to event. Nothing in it depends on anything but its seed and what a test does to it.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use listener_agent::directory::NewReplica;
use listener_agent::superblock::Identity;
use nbdcast::volume::{Notice, ReadSpread, StartRefusal};
use protocol::{AckPolicy, Record, ReplicaName, View, VolumeUuid};

use crate::agent::Agent;
use crate::disk::{Disk, SECTOR};
use crate::engine::Engine;
use crate::fault_point::FaultPoint;
use crate::net::{Conn, ConnId};
use crate::oracle::Oracle;
use crate::rng::Rng;

/// Time since the beginning of the world.
pub type Time = Duration;

/// `count` milliseconds.
pub const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

const TRACE_LINES_MAX: usize = 40000;

thread_local! {
    static TRACE: RefCell<Option<VecDeque<String>>> = const { RefCell::new(None) };
}

/// Begins to keep what happens.
pub fn start_trace() {
    TRACE.with_borrow_mut(|t| *t = Some(VecDeque::new()));
}

/// What happened last.
pub fn take_trace() -> Vec<String> {
    TRACE.with_borrow_mut(|t| t.take().into_iter().flatten().collect())
}

/// How a world is made.
#[derive(Clone, Debug)]
pub struct Setup {
    pub seed: u64,
    pub replicas: usize,
    pub size_bytes: u64,
    pub journal_bytes: u64,
    pub ack_write: AckPolicy,
    pub ack_flush: AckPolicy,
    /// Each engine is configured with ack policies of its own.
    pub policies_change: bool,
    pub read: ReadSpread,
    pub lag_bytes_max: u64,
    pub lag_max: Duration,
    pub throttle: bool,
    pub min_replicas: usize,
    pub freeze: Duration,
    pub lease: Duration,
    pub resync_rate_min: u64,
    pub checksum_errors_max: u64,
    pub scrub_rate_min: u64,
    /// Engines scrub again and again.
    pub scrubs: bool,
    /// Longest time of a message, a job of a disk.
    pub slowest: Duration,
    /// Messages on their way to an agent at most: a socket takes no more.
    pub in_flight_max: usize,
    /// Clients ask for whole blocks only.
    pub whole_blocks: bool,
    /// Most requests of clients concern so many sectors, others now and then; zero if all are alike. A multiple of 8.
    pub hot_sectors: u64,
    /// Requests that a client keeps under way; zero for a client that a test drives.
    pub depth: usize,
}

impl Setup {
    /// Three replicas, small and quick, for a test that drives everything itself.
    pub fn quiet(seed: u64, ack: AckPolicy) -> Setup {
        Setup {
            seed,
            replicas: 3,
            size_bytes: 128 << 10,
            journal_bytes: 256 << 10,
            ack_write: ack,
            ack_flush: ack,
            policies_change: false,
            read: ReadSpread::Adaptive,
            lag_bytes_max: 64 << 10,
            lag_max: ms(2000),
            throttle: false,
            min_replicas: 1,
            freeze: ms(2000),
            lease: ms(300),
            resync_rate_min: 8 << 20,
            checksum_errors_max: 64,
            scrub_rate_min: 64 << 20,
            scrubs: false,
            slowest: ms(2),
            in_flight_max: 12,
            whole_blocks: false,
            hot_sectors: 0,
            depth: 0,
        }
    }
}

/// Something that happens at a time.
#[derive(Clone, Debug)]
pub enum Happening {
    ToAgent(ConnId),
    ToEngine(ConnId),
    LostAtAgent(ConnId),
    LostAtEngine(ConnId),
    Dial { engine: usize, peer: usize },
    Tick { engine: usize },
    Client { engine: usize },
    Look { agent: usize, life: u64 },
    Done { agent: usize, life: u64, job: u64 },
    StartAgent { agent: usize },
    Crash { agent: usize, power_cut: bool },
    StartEngine { take_over: bool },
    KillEngine { engine: usize },
    Goodbye { engine: usize },
    Scrub { engine: usize },
    Fault,
}

pub struct World {
    pub setup: Setup,
    pub rng: Rng,
    pub now: Time,
    pub agenda: BTreeMap<(Time, u64), Happening>,
    pub next_happening: u64,
    pub agents: Vec<Agent>,
    pub engines: Vec<Engine>,
    pub conns: BTreeMap<ConnId, Conn>,
    pub next_conn: ConnId,
    /// Engines and agents that cannot reach each other, and until when.
    pub severed: BTreeMap<(usize, usize), Time>,
    pub oracle: Oracle,
    pub next_token: u64,
    /// Where the sectors begin that most requests concern.
    pub hot_first: u64,
    /// Every record that was ever sent, by epoch and place.
    pub records: BTreeMap<(u64, u64), Record>,
    /// How many records were sent as later ones left them.
    pub amended: u64,
    /// Bytes that engines sent to syncing replicas.
    pub copied_bytes: u64,
    pub notices: Vec<Notice>,
    /// Connections that ended because a frame could not be read.
    pub unreadable_frames: usize,
    pub fault_point: FaultPoint,
    pub refusals: Vec<StartRefusal>,
    /// New engines start by themselves when none is alive, and faults are drawn.
    pub wild: bool,
}

pub fn replica_name(index: usize) -> ReplicaName {
    ["a", "b", "c", "d"][index].parse().unwrap()
}

impl World {
    /// A world with formatted replicas, agents at work, and no engine.
    pub fn new(setup: Setup) -> World {
        let mut rng = Rng::new(setup.seed);
        let names: Vec<ReplicaName> = (0..setup.replicas).map(replica_name).collect();
        let view = View::new(names.clone()).unwrap();
        let make = |name: &ReplicaName| {
            let identity = Identity {
                uuid: VolumeUuid([7; 16]),
                volume: "vol".parse().unwrap(),
                replica: name.clone(),
                size_bytes: setup.size_bytes,
                journal_bytes: setup.journal_bytes,
            };
            let new = NewReplica { identity, view: view.clone(), image: None, syncing: false };
            Agent::new(Disk::format(&new, rng.fork()))
        };
        let agents: Vec<Agent> = names.iter().map(make).collect();
        let mut world = World {
            oracle: Oracle::new(setup.size_bytes as usize / SECTOR),
            rng,
            now: Time::ZERO,
            agenda: BTreeMap::new(),
            next_happening: 0,
            agents,
            engines: Vec::new(),
            conns: BTreeMap::new(),
            next_conn: 1,
            severed: BTreeMap::new(),
            next_token: 1,
            hot_first: 0,
            records: BTreeMap::new(),
            amended: 0,
            copied_bytes: 0,
            notices: Vec::new(),
            unreadable_frames: 0,
            fault_point: FaultPoint::default(),
            refusals: Vec::new(),
            wild: false,
            setup,
        };
        for agent in 0..world.agents.len() {
            world.start_agent(agent);
        }
        world
    }

    pub fn trace(&self, line: impl FnOnce() -> String) {
        TRACE.with_borrow_mut(|t| {
            if let Some(lines) = t {
                if lines.len() == TRACE_LINES_MAX {
                    lines.pop_front();
                }
                lines.push_back(format!("{:>10.3} ms  {}", self.now.as_secs_f64() * 1e3, line()));
            }
        });
    }

    pub fn at(&mut self, time: Time, happening: Happening) {
        self.next_happening += 1;
        self.agenda.insert((time.max(self.now), self.next_happening), happening);
    }

    pub fn after(&mut self, delay: Duration, happening: Happening) {
        self.at(self.now + delay, happening);
    }

    /// A time up to the slowest, mostly much less.
    pub fn some_delay(&mut self) -> Duration {
        let longest = self.setup.slowest.as_micros() as u64;
        let limit = if self.rng.percent(85) { (longest / 10).max(1) } else { longest };
        Duration::from_micros(self.rng.within(1, limit))
    }

    /// Lets the next thing happen.
    pub fn step(&mut self) {
        let Some(((time, _), happening)) = self.agenda.pop_first() else { panic!("nothing happens any more") };
        self.now = time;
        // What stands still does nothing now, but all of it in order later.
        if let Some(until) = self.stands_still(&happening)
            && until > self.now
        {
            return self.at(until, happening);
        }
        match happening {
            Happening::ToAgent(conn) => self.deliver_to_agent(conn),
            Happening::ToEngine(conn) => self.deliver_to_engine(conn),
            Happening::LostAtAgent(conn) => self.lost_at_agent(conn),
            Happening::LostAtEngine(conn) => self.lost_at_engine(conn),
            Happening::Dial { engine, peer } => self.dial(engine, peer),
            Happening::Tick { engine } => self.tick(engine),
            Happening::Client { engine } => self.client(engine),
            Happening::Look { agent, life } => self.look(agent, life),
            Happening::Done { agent, life, job } => self.job_done(agent, life, job),
            Happening::StartAgent { agent } => self.start_agent(agent),
            Happening::Crash { agent, power_cut } => self.crash(agent, power_cut, ms(200)),
            Happening::StartEngine { take_over } => {
                self.start_engine(take_over);
            }
            Happening::KillEngine { engine } => self.kill_engine(engine),
            Happening::Goodbye { engine } => self.goodbye(engine),
            Happening::Scrub { engine } => self.scrub_again(engine),
            Happening::Fault => self.draw_fault(),
        }
    }

    fn stands_still(&self, happening: &Happening) -> Option<Time> {
        let agent = |agent: usize| Some(self.agents[agent].stalled_until);
        let engine = |engine: usize| Some(self.engines[engine].frozen_until);
        match happening {
            Happening::ToAgent(conn) | Happening::LostAtAgent(conn) => {
                let conn = self.conns.get(conn)?;
                let link = self.link_down_until(conn.engine, conn.agent);
                Some(self.agents[conn.agent].stalled_until.max(link))
            }
            Happening::ToEngine(conn) | Happening::LostAtEngine(conn) => {
                let conn = self.conns.get(conn)?;
                let link = self.link_down_until(conn.engine, conn.agent);
                Some(self.engines[conn.engine].frozen_until.max(link))
            }
            Happening::Dial { engine: e, .. }
            | Happening::Tick { engine: e }
            | Happening::Client { engine: e }
            | Happening::Scrub { engine: e }
            | Happening::Goodbye { engine: e } => engine(*e),
            Happening::Look { agent: a, .. } | Happening::Done { agent: a, .. } => agent(*a),
            Happening::StartAgent { .. }
            | Happening::Crash { .. }
            | Happening::StartEngine { .. }
            | Happening::KillEngine { .. }
            | Happening::Fault => None,
        }
    }

    /// Runs for a time.
    pub fn run_for(&mut self, time: Duration) {
        let until = self.now + time;
        while self.agenda.first_key_value().is_some_and(|((at, _), _)| *at <= until) {
            self.step();
        }
        self.now = until;
    }

    /// Runs until something is so; whether it was before `limit` was over.
    pub fn run_until(&mut self, limit: Duration, is_so: impl Fn(&World) -> bool) -> bool {
        let until = self.now + limit;
        while !is_so(self) {
            if self.agenda.first_key_value().is_none_or(|((at, _), _)| *at > until) {
                return false;
            }
            self.step();
        }
        true
    }
}
