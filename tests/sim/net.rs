//! The simulated network: connections that keep order, delay, and break at any moment with what is on its way.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use protocol::wire::{PREFIX_BYTES, Prefix, WireError, frame_to_agent, frame_to_engine};
use protocol::{ToAgent, ToEngine};

use crate::world::{Happening, Time, World, ms};

pub type ConnId = u64;

#[derive(Debug)]
pub struct Conn {
    pub engine: usize,
    pub agent: usize,
    /// The process of the agent that it was made to.
    pub life: u64,
    pub open_at_engine: bool,
    pub open_at_agent: bool,
    /// Nothing gets through any more, whatever the two sides believe.
    broken: bool,
    to_agent: VecDeque<Bytes>,
    to_engine: VecDeque<Bytes>,
    last_to_agent: Time,
    last_to_engine: Time,
}

impl Conn {
    pub fn new(engine: usize, agent: usize, life: u64) -> Conn {
        Conn {
            engine,
            agent,
            life,
            open_at_engine: true,
            open_at_agent: true,
            broken: false,
            to_agent: VecDeque::new(),
            to_engine: VecDeque::new(),
            last_to_agent: Time::ZERO,
            last_to_engine: Time::ZERO,
        }
    }

    pub fn is_congested(&self, in_flight_max: usize) -> bool {
        self.to_agent.len() >= in_flight_max
    }
}

fn whole(head: &[u8], bulk: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(head.len() + bulk.len());
    frame.extend_from_slice(head);
    frame.extend_from_slice(bulk);
    frame.freeze()
}

fn decode<M>(frame: &Bytes, message: impl FnOnce(&Prefix, Bytes) -> Result<M, WireError>) -> Result<M, WireError> {
    let prefix = Prefix::decode(frame[..PREFIX_BYTES].try_into().unwrap())?;
    message(&prefix, frame.slice(PREFIX_BYTES..))
}

/// A message in few words.
pub fn brief_to_agent(message: &ToAgent) -> String {
    match message {
        ToAgent::Append(r) => {
            let h = &r.header;
            format!("Append {} {:?} {}+{}", h.position(), h.kind, h.offset, h.length)
        }
        ToAgent::Copy(c) => format!("Copy {} {}+{}", c.id, c.range.offset, c.range.length),
        other => format!("{other:?}"),
    }
}

/// A message in few words.
pub fn brief_to_engine(message: &ToEngine) -> String {
    match message {
        ToEngine::ReadDone { id, applied, .. } => format!("ReadDone {id} applied {applied}"),
        ToEngine::Fetched(r) => format!("Fetched {}", r.header.position()),
        other => format!("{other:?}"),
    }
}

impl World {
    pub fn send_to_agent(&mut self, id: ConnId, message: &ToAgent) {
        let delay = self.some_delay();
        let now = self.now;
        let Some(agent) = self.conns.get(&id).filter(|c| !c.broken).map(|c| c.agent) else { return };
        let frame = frame_to_agent(message);
        let part = self.flips_to_agent(agent, message);
        let frame = self.frame_on_its_way(agent, part, whole(&frame.head, &frame.bulk), frame.bulk.len());
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.to_agent.push_back(frame);
        conn.last_to_agent = conn.last_to_agent.max(now + delay);
        let at = conn.last_to_agent;
        self.at(at, Happening::ToAgent(id));
    }

    pub fn send_to_engine(&mut self, id: ConnId, message: &ToEngine) {
        let delay = self.some_delay();
        let now = self.now;
        let Some(agent) = self.conns.get(&id).filter(|c| !c.broken).map(|c| c.agent) else { return };
        let frame = frame_to_engine(message);
        let part = self.flips_to_engine(agent, message);
        let frame = self.frame_on_its_way(agent, part, whole(&frame.head, &frame.bulk), frame.bulk.len());
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.to_engine.push_back(frame);
        conn.last_to_engine = conn.last_to_engine.max(now + delay);
        let at = conn.last_to_engine;
        self.at(at, Happening::ToEngine(id));
    }

    pub fn deliver_to_agent(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let Some(frame) = conn.to_agent.pop_front() else { return };
        let (engine, agent) = (conn.engine, conn.agent);
        if conn.open_at_agent {
            let Ok(message) = decode(&frame, Prefix::to_agent) else { return self.cannot_be_read(id) };
            if !matches!(message, ToAgent::Ping { .. }) {
                self.trace(|| format!("e{engine} -> a{agent} #{id} {}", brief_to_agent(&message)));
            }
            self.agent_message(id, message);
        }
        self.pump_engine(engine);
    }

    pub fn deliver_to_engine(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let Some(frame) = conn.to_engine.pop_front() else { return };
        let (engine, agent) = (conn.engine, conn.agent);
        if conn.open_at_engine {
            let Ok(message) = decode(&frame, Prefix::to_engine) else { return self.cannot_be_read(id) };
            if !matches!(message, ToEngine::Pong { .. }) {
                self.trace(|| format!("a{agent} -> e{engine} #{id} {}", brief_to_engine(&message)));
            }
            self.engine_message(id, message);
        }
    }

    /// Whoever got a frame that cannot be read ends the connection.
    fn cannot_be_read(&mut self, id: ConnId) {
        assert!(self.fault_point.sprung > 0, "what was framed can be read");
        self.unreadable_frames += 1;
        self.cut(id, false);
    }

    /// The agent closes: what it sent before still arrives.
    pub fn close_from_agent(&mut self, id: ConnId) {
        let delay = self.some_delay();
        let now = self.now;
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.open_at_agent = false;
        conn.to_agent.clear();
        conn.last_to_engine = conn.last_to_engine.max(now + delay);
        let at = conn.last_to_engine;
        self.at(at, Happening::LostAtEngine(id));
    }

    /// The engine closes: what it sent before may arrive or not.
    pub fn close_from_engine(&mut self, id: ConnId) {
        let delay = self.some_delay();
        let lose = self.rng.percent(50);
        let now = self.now;
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.open_at_engine = false;
        conn.to_engine.clear();
        if lose {
            conn.to_agent.clear();
        }
        conn.last_to_agent = conn.last_to_agent.max(now + delay);
        let at = conn.last_to_agent;
        self.at(at, Happening::LostAtAgent(id));
    }

    /// The connection breaks: both sides lose what is on its way, and learn of it sooner or later.
    pub fn cut(&mut self, id: ConnId, late: bool) {
        let longest = if late { 1500 } else { 20 };
        let (to_agent, to_engine) = (self.rng.below(longest), self.rng.below(longest));
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.broken = true;
        conn.to_agent.clear();
        conn.to_engine.clear();
        let (agent, engine) = (conn.agent, conn.engine);
        self.trace(|| format!("connection #{id} of e{engine} and a{agent} breaks"));
        self.after(ms(to_agent), Happening::LostAtAgent(id));
        self.after(ms(to_engine), Happening::LostAtEngine(id));
    }

    pub fn lost_at_agent(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if !std::mem::take(&mut conn.open_at_agent) {
            return self.forget_if_closed(id);
        }
        let (agent, life) = (conn.agent, conn.life);
        self.agent_session_lost(agent, life, id);
        self.forget_if_closed(id);
    }

    pub fn lost_at_engine(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if !std::mem::take(&mut conn.open_at_engine) {
            return self.forget_if_closed(id);
        }
        let (engine, peer) = (conn.engine, conn.agent);
        self.engine_connection_lost(engine, peer, id);
        self.forget_if_closed(id);
    }

    fn forget_if_closed(&mut self, id: ConnId) {
        if self.conns.get(&id).is_some_and(|c| !c.open_at_agent && !c.open_at_engine) {
            self.conns.remove(&id);
        }
    }

    /// Connections of an agent that are open at either end.
    pub fn conns_of_agent(&self, agent: usize) -> Vec<ConnId> {
        self.conns.iter().filter(|(_, c)| c.agent == agent).map(|(id, _)| *id).collect()
    }

    /// An engine and an agent cannot reach each other for a while; nothing breaks.
    pub fn sever(&mut self, engine: usize, agent: usize, time: Duration) {
        self.trace(|| format!("nothing passes between e{engine} and a{agent} for {time:?}"));
        self.severed.insert((engine, agent), self.now + time);
    }

    /// Until when nothing passes between an engine and an agent.
    pub fn link_down_until(&self, engine: usize, agent: usize) -> Time {
        let severed = self.severed.get(&(engine, agent)).copied().unwrap_or_default();
        self.agents[agent].cut_off_until.max(severed)
    }

    /// An agent can be reached by nobody for a while; nothing breaks.
    pub fn cut_off(&mut self, agent: usize, time: Duration) {
        self.trace(|| format!("a{agent} is cut off for {time:?}"));
        self.agents[agent].cut_off_until = self.now + time;
    }
}
