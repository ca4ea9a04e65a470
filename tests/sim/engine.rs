//! Engines as the runtime drives them. Each has a client of its own ([`crate::client`]).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use nbdcast::volume::{Answer, Command, CommandRefusal, Event, Failure, Notice, Volume, VolumeSettings};
use protocol::record::ViewChange;
use protocol::{AckPolicy, RecordHeader, RecordKind, ToAgent, ToEngine};

use crate::client::{Asked, Waiting};
use crate::net::ConnId;
use crate::oracle::Token;
use crate::rng::Rng;
use crate::world::{Happening, Setup, Time, World, ms, replica_name};

/// How often an engine looks at the clock.
const TICK: Duration = ms(5);

pub struct Engine {
    pub volume: Volume<Token>,
    started: Time,
    pub alive: bool,
    pub frozen_until: Time,
    conns: Vec<Option<ConnId>>,
    /// Peers that are not connected to any more.
    removed: BTreeSet<usize>,
    /// Its epoch, once it serves.
    pub reign: Option<u64>,
    /// What the client waits for.
    pub outstanding: BTreeMap<Token, Waiting>,
    pub answers: BTreeMap<Token, Result<Answer, Failure>>,
    pub depth: usize,
    stopping: bool,
}

impl Engine {
    pub fn is_serving(&self) -> bool {
        self.alive && self.reign.is_some()
    }

    pub fn is_idle(&self) -> bool {
        self.outstanding.is_empty()
    }
}

/// The ack policies that an engine is configured with: those of the setup, or drawn for each.
pub fn policies(setup: &Setup, engine: usize) -> (AckPolicy, AckPolicy) {
    if !setup.policies_change {
        return (setup.ack_write, setup.ack_flush);
    }
    let mut rng = Rng::new(setup.seed ^ (engine as u64 + 1));
    let mut any = || rng.pick(&[AckPolicy::First, AckPolicy::Majority, AckPolicy::All]);
    (any(), any())
}

fn settings(setup: &Setup, engine: usize, take_over: bool) -> VolumeSettings {
    let (ack_write, ack_flush) = policies(setup, engine);
    VolumeSettings {
        name: "vol".parse().unwrap(),
        size_bytes: setup.size_bytes,
        replicas: (0..setup.replicas).map(replica_name).collect(),
        ack_write,
        ack_flush,
        read: setup.read,
        reads_together: 8,
        lag_bytes_max: setup.lag_bytes_max,
        lag_max: setup.lag_max,
        throttle: setup.throttle,
        min_replicas: setup.min_replicas,
        freeze: setup.freeze,
        lease: setup.lease,
        start_timeout: ms(20_000),
        resync_rate_min: setup.resync_rate_min,
        checksum_errors_max: setup.checksum_errors_max,
        scrub_rate_min: setup.scrub_rate_min,
        take_over,
        engine: [engine as u8 + 1; 16],
    }
}

impl World {
    pub fn start_engine(&mut self, take_over: bool) -> usize {
        let index = self.engines.len();
        self.trace(|| format!("e{index} starts{}", if take_over { " to take over" } else { "" }));
        let volume = Volume::new(settings(&self.setup, index, take_over), Time::ZERO);
        self.engines.push(Engine {
            volume,
            started: self.now,
            alive: true,
            frozen_until: Time::ZERO,
            conns: vec![None; self.setup.replicas],
            removed: BTreeSet::new(),
            reign: None,
            outstanding: BTreeMap::new(),
            answers: BTreeMap::new(),
            depth: self.setup.depth,
            stopping: false,
        });
        for peer in 0..self.setup.replicas {
            self.redial(index, peer);
        }
        self.after(TICK, Happening::Tick { engine: index });
        index
    }

    pub fn engine_now(&self, index: usize) -> Time {
        self.now - self.engines[index].started
    }

    fn redial(&mut self, engine: usize, peer: usize) {
        let delay = self.rng.within(1, 20);
        self.after(ms(delay), Happening::Dial { engine, peer });
    }

    pub fn dial(&mut self, engine: usize, peer: usize) {
        let at = &self.engines[engine];
        if !at.alive || at.conns[peer].is_some() || at.removed.contains(&peer) {
            return;
        }
        let now = self.engine_now(engine);
        if let Some(conn) = self.accept(engine, peer) {
            self.engines[engine].conns[peer] = Some(conn);
            self.engines[engine].volume.peer_connected(now, peer);
        } else {
            self.engines[engine].volume.peer_disconnected(now, peer, "connection refused".to_owned());
            self.redial(engine, peer);
        }
        self.pump_engine(engine);
    }

    pub fn engine_connection_lost(&mut self, engine: usize, peer: usize, conn: ConnId) {
        let now = self.engine_now(engine);
        let at = &mut self.engines[engine];
        if !at.alive || at.conns[peer] != Some(conn) {
            return;
        }
        at.conns[peer] = None;
        at.volume.peer_disconnected(now, peer, "connection lost".to_owned());
        self.redial(engine, peer);
        self.pump_engine(engine);
    }

    pub fn engine_message(&mut self, conn: ConnId, message: ToEngine) {
        let (engine, peer) = (self.conns[&conn].engine, self.conns[&conn].agent);
        let now = self.engine_now(engine);
        let at = &mut self.engines[engine];
        if at.alive && at.conns[peer] == Some(conn) {
            let message = self.checked_by_engine(peer, message.checked());
            self.engines[engine].volume.peer_message(now, peer, message);
            self.pump_engine(engine);
        }
    }

    pub fn tick(&mut self, engine: usize) {
        if self.engines[engine].alive {
            let now = self.engine_now(engine);
            self.engines[engine].volume.tick(now);
            self.pump_engine(engine);
            self.after(TICK, Happening::Tick { engine });
        }
    }

    /// Deals with what the volume wants, and sends what there is to send.
    pub fn pump_engine(&mut self, engine: usize) {
        while let Some(event) = self.engines[engine].volume.poll_event() {
            self.engine_event(engine, event);
        }
        if !self.engines[engine].alive {
            return;
        }
        let now = self.engine_now(engine);
        for peer in 0..self.setup.replicas {
            let Some(conn) = self.engines[engine].conns[peer] else { continue };
            while self.conns.get(&conn).is_some_and(|c| !c.is_congested(self.setup.in_flight_max))
                && self.engines[engine].volume.outbox_due(now, peer).is_some_and(|due| due <= now)
            {
                for message in self.engines[engine].volume.take_outbox(now, peer, 16 << 10) {
                    self.note_record(engine, &message);
                    self.send_to_agent(conn, &message);
                }
            }
        }
    }

    /// No place of an epoch is ever given out twice, and no view change before the one before it is in force.
    fn note_record(&mut self, engine: usize, message: &ToAgent) {
        if let ToAgent::Copy(copy) = message {
            self.copied_bytes += copy.range.length;
        }
        let ToAgent::Append(record) = message else { return };
        let position = record.header.position();
        let key = (position.epoch.0, position.seq.0);
        if record.header.kind == RecordKind::ViewChange && !self.records.contains_key(&key) {
            let of_epoch = self.records.range((key.0, 0)..key);
            let before = of_epoch.rev().find(|(_, r)| r.header.kind == RecordKind::ViewChange);
            let before = before.map(|(_, r)| ViewChange::decode(&r.payload).unwrap()).filter(|change| !change.forced);
            let in_force = self.engines[engine].volume.snapshot(self.engine_now(engine)).view;
            let settled = before.is_none_or(|change| change.view.members() == in_force);
            assert!(settled, "view change {position} comes while another is pending");
        }
        let known = self.records.entry(key).or_insert_with(|| record.clone());
        // What another member gives of an intent is as later records left it.
        if record.header.amended {
            self.amended += 1;
            let header = RecordHeader {
                payload_length: known.header.payload_length,
                payload_crc: known.header.payload_crc,
                amended: false,
                ..record.header
            };
            assert!(known.header == header, "a record with the position {position} is amended beyond recognition");
            return;
        }
        assert!(known == record, "two records have the position {position}");
    }

    fn engine_event(&mut self, engine: usize, event: Event<Token>) {
        match event {
            Event::Completed(token, outcome) => self.completed(engine, token, outcome),
            Event::Serving => {
                let reign = self.engines[engine].volume.snapshot(self.engine_now(engine)).epoch.0;
                self.oracle.begin_reign(reign);
                self.trace(|| format!("e{engine} serves in epoch {reign}"));
                self.engines[engine].reign = Some(reign);
                self.after(ms(1), Happening::Client { engine });
                self.plan_scrub(engine);
            }
            Event::StartRefused(refusal) => {
                self.trace(|| format!("e{engine} does not start: {refusal}"));
                self.refusals.push(refusal);
                self.kill_engine(engine);
            }
            Event::StartBlocked(refusal) => {
                self.trace(|| format!("e{engine} waits: {refusal}"));
                self.refusals.push(refusal);
            }
            Event::Removed(peer) => {
                self.engines[engine].removed.insert(peer);
                if let Some(conn) = self.engines[engine].conns[peer].take() {
                    self.close_from_engine(conn);
                }
            }
            Event::Fenced { promised, replica } => {
                self.trace(|| format!("e{engine} is fenced by {promised} at {replica}"));
                self.kill_engine(engine);
            }
            Event::Corrupt { seq } => {
                self.trace(|| format!("e{engine} finds that record {seq} changed"));
                assert!(self.fault_point.sprung > 0, "record {seq} changed in memory");
                self.kill_engine(engine);
            }
            Event::Disconnect(peer) => {
                if let Some(conn) = self.engines[engine].conns[peer].take() {
                    self.trace(|| format!("e{engine} disconnects a{peer}"));
                    self.close_from_engine(conn);
                    self.redial(engine, peer);
                }
            }
            Event::Notice(notice) => {
                self.trace(|| format!("e{engine}: {notice:?}"));
                if matches!(notice, Notice::ScrubEnded { .. }) {
                    self.plan_scrub(engine);
                }
                self.notices.push(notice);
            }
        }
    }

    /// The engine's process is gone.
    pub fn kill_engine(&mut self, engine: usize) {
        // What it said before it died counts.
        while let Some(event) = self.engines[engine].volume.poll_event() {
            if let Event::Completed(token, outcome) = event {
                self.completed(engine, token, outcome);
            }
        }
        let at = &mut self.engines[engine];
        if !std::mem::take(&mut at.alive) {
            return;
        }
        for (token, waiting) in std::mem::take(&mut at.outstanding) {
            if matches!(waiting.asked, Asked::Read | Asked::Status) {
                self.oracle.fail_read(token);
            }
        }
        let conns: Vec<ConnId> = at.conns.iter_mut().filter_map(Option::take).collect();
        self.trace(|| format!("e{engine} is gone"));
        for conn in conns {
            self.close_from_engine(conn);
        }
        if self.wild && self.engines.iter().all(|e| !e.alive) {
            let (delay, take_over) = (self.rng.within(1, 300), self.rng.percent(50));
            self.after(ms(delay), Happening::StartEngine { take_over });
        }
    }

    /// An operator asks for something; whether the engine does it.
    pub fn command(&mut self, engine: usize, command: Command) -> Result<(), CommandRefusal> {
        let now = self.engine_now(engine);
        let outcome = self.engines[engine].volume.command(now, command);
        self.pump_engine(engine);
        outcome
    }

    /// Adds the replica of an agent that the engine has none of.
    pub fn add_replica(&mut self, engine: usize, agent: usize) {
        let now = self.engine_now(engine);
        let added = self.engines[engine].volume.add_replica(now, replica_name(agent));
        assert_eq!(added, Ok(agent), "peers are numbered as agents are");
        self.engines[engine].removed.remove(&agent);
        self.dial(engine, agent);
    }

    pub fn freeze_engine(&mut self, engine: usize, time: Duration) {
        self.trace(|| format!("e{engine} freezes for {time:?}"));
        self.engines[engine].frozen_until = self.now + time;
    }

    /// Asks the engine to stop in good order.
    pub fn stop_engine(&mut self, engine: usize) {
        let now = self.engine_now(engine);
        self.engines[engine].volume.stop(now);
        self.engines[engine].stopping = true;
        self.pump_engine(engine);
        self.after(ms(200), Happening::Goodbye { engine });
    }

    pub fn goodbye(&mut self, engine: usize) {
        if self.engines[engine].alive {
            self.trace(|| format!("e{engine} says goodbye"));
            self.engines[engine].volume.goodbye();
            self.pump_engine(engine);
            self.after(ms(20), Happening::KillEngine { engine });
        }
    }
}
