//! Places in memory and on the network where a test has one bit flip, once: between two hops of the data, each of which
//! hands over to the next what it has checked. The shells around the state machines ask here with what they hand over.

use bytes::Bytes;
use listener_agent::replica::{ApplyJob, Changes, GroupJob};
use protocol::message::ReadOutcome;
use protocol::wire::PREFIX_BYTES;
use protocol::{Record, RecordKind, ToAgent, ToEngine};

use crate::world::World;

/// A part of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Magic, version, number, lengths, checksum.
    Prefix,
    Body,
    Bulk,
}

/// Where the bit flips.
#[derive(Clone, Copy)]
pub enum Spot {
    /// In a frame to an agent.
    ToAgent(fn(&ToAgent) -> bool, Part),
    /// In a frame to an engine.
    ToEngine(fn(&ToEngine) -> bool, Part),
    /// In the payload of a write that an agent has taken in, before it is journaled.
    BeforeJournal,
    /// In the payload of a write that is durable, before it is applied.
    BeforeImage,
    /// In a copy that a syncing replica has taken in, before it is applied.
    BeforeCopyImage,
    /// In the bytes of an answer that an agent has checked.
    AfterRead,
    /// In the bytes of an answer, if there are so many, after the engine has checked it.
    EngineAnswer(fn(usize) -> bool),
}

/// What is to flip, and whether it did.
#[derive(Default)]
pub struct FaultPoint {
    /// At which agent, or on the way from or to it; at any if none is named.
    armed: Option<(Option<usize>, Spot)>,
    /// Bits flipped so far.
    pub sprung: usize,
}

fn flipped(bytes: &[u8], at: usize) -> Bytes {
    let mut changed = bytes.to_vec();
    changed[at] ^= 0x08;
    changed.into()
}

fn flip_middle(bytes: &Bytes) -> Bytes {
    flipped(bytes, bytes.len() / 2)
}

impl World {
    /// Has a bit flip where `spot` is next passed at an agent, or at any.
    pub fn arm(&mut self, agent: impl Into<Option<usize>>, spot: Spot) {
        self.fault_point.armed = Some((agent.into(), spot));
    }

    fn springs(&mut self, agent: usize, is_here: impl FnOnce(Spot) -> bool) -> bool {
        let springs = self.fault_point.armed.is_some_and(|(at, spot)| at.is_none_or(|at| at == agent) && is_here(spot));
        if springs {
            self.fault_point.armed = None;
            self.fault_point.sprung += 1;
            self.trace(|| format!("a{agent}: a bit flips"));
        }
        springs
    }

    /// `frame` as it arrives.
    pub fn frame_on_its_way(&mut self, agent: usize, part: Option<Part>, frame: Bytes, bulk_bytes: usize) -> Bytes {
        let body = PREFIX_BYTES..frame.len() - bulk_bytes;
        let at = match part {
            None => return frame,
            // The last bytes of the prefix mean nothing.
            Some(Part::Prefix) => self.rng.below(PREFIX_BYTES as u64 - 4) as usize,
            Some(Part::Body) => body.start + self.rng.below(body.len() as u64) as usize,
            Some(Part::Bulk) => body.end + self.rng.below(bulk_bytes as u64) as usize,
        };
        self.trace(|| format!("a{agent}: byte {at} of {} of a frame flips", frame.len()));
        flipped(&frame, at)
    }

    /// Which part of a frame to an agent a bit flips in.
    pub fn flips_to_agent(&mut self, agent: usize, message: &ToAgent) -> Option<Part> {
        let mut hit = None;
        let is_here = |spot| {
            if let Spot::ToAgent(is_it, part) = spot
                && is_it(message)
            {
                hit = Some(part);
            }
            hit.is_some()
        };
        self.springs(agent, is_here).then_some(())?;
        hit
    }

    /// Which part of a frame to an engine a bit flips in.
    pub fn flips_to_engine(&mut self, agent: usize, message: &ToEngine) -> Option<Part> {
        let mut hit = None;
        let is_here = |spot| {
            if let Spot::ToEngine(is_it, part) = spot
                && is_it(message)
            {
                hit = Some(part);
            }
            hit.is_some()
        };
        self.springs(agent, is_here).then_some(())?;
        hit
    }

    /// What an engine has checked, by the time that it makes something of it.
    pub fn checked_by_engine(&mut self, agent: usize, message: ToEngine) -> ToEngine {
        let ToEngine::ReadDone { id, applied, outcome: ReadOutcome::Data { data, crc } } = &message else {
            return message;
        };
        if !self.springs(agent, |spot| matches!(spot, Spot::EngineAnswer(is_it) if is_it(data.len()))) {
            return message;
        }
        let outcome = ReadOutcome::Data { data: flip_middle(data), crc: *crc };
        ToEngine::ReadDone { id: *id, applied: *applied, outcome }
    }

    fn change_a_payload(&mut self, agent: usize, records: &mut [Record], is_here: impl Fn(Spot) -> bool) {
        let Some(record) = records.iter_mut().rfind(|r| r.header.kind == RecordKind::Write) else { return };
        if self.springs(agent, is_here) {
            record.payload = flip_middle(&record.payload);
        }
    }

    /// A group that is about to be journaled.
    pub fn about_to_journal(&mut self, agent: usize, job: &mut GroupJob) {
        self.change_a_payload(agent, &mut job.records, |spot| matches!(spot, Spot::BeforeJournal));
    }

    /// Changes that are about to be applied.
    pub fn about_to_apply(&mut self, agent: usize, job: &mut ApplyJob) {
        match &mut job.changes {
            Changes::Records(records) => {
                self.change_a_payload(agent, records, |spot| matches!(spot, Spot::BeforeImage));
            }
            Changes::Copies(copies) => {
                if let Some(copy) = copies.iter_mut().find(|copy| !copy.data.is_empty())
                    && self.springs(agent, |spot| matches!(spot, Spot::BeforeCopyImage))
                {
                    copy.data = flip_middle(&copy.data);
                }
            }
            Changes::Grow(_) => {}
        }
    }

    /// What was read and checked, by the time that it is framed.
    pub fn about_to_answer(&mut self, agent: usize, mut message: ToEngine) -> ToEngine {
        if let ToEngine::ReadDone { outcome: ReadOutcome::Data { data, .. }, .. } = &mut message
            && self.springs(agent, |spot| matches!(spot, Spot::AfterRead))
        {
            *data = flip_middle(data);
        }
        message
    }
}
