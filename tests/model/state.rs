//! One moment of the modelled world: replicas with what is on their disks, engines with what they know, and how much of
//! the bounds is used up. Never decides what may happen next; that is `actions`.

use crate::record::{Blocks, Log, Members, REPLICAS_MAX, Record};

/// An agent. All of it is durable, except whether it is up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replica {
    pub up: bool,
    /// The highest epoch that was promised; messages of lower ones are refused.
    pub promised: u8,
    /// Its journal. After a begin, the records before the Follow record stand for its position only.
    pub log: Log,
    /// What its image shows.
    pub image: Blocks,
    /// Its image may lack records of its log.
    pub syncing: bool,
}

/// What a replica answers when it promises. It may change later, without the engine hearing of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Answer {
    pub log: Log,
    pub syncing: bool,
}

/// How far an engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Collects promises.
    Gathering,
    /// Has chosen the history, and given out the first record of its epoch.
    Starting,
    /// That record is durable on W members of the view in force. From here on it takes writes and acknowledges.
    Serving,
}

/// How far a dropped replica is on its way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// It promised; the Follow record is given out.
    Asked,
    /// It dropped its tail, is syncing, and gets every later record.
    Begun,
    /// It holds everything and is no longer syncing; it is no member yet.
    Synced,
}

/// A replica that comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Following {
    pub replica: usize,
    /// Where its Follow record is.
    pub at: usize,
    pub stage: Stage,
}

/// An engine. It is never told that it was overtaken: an engine that froze or was cut off is one that does nothing for a
/// while, one that crashed does nothing ever after. Both are histories of the model, as no action is ever forced.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Engine {
    pub epoch: u8,
    pub phase: Phase,
    /// What was answered while gathering.
    pub answers: [Option<Answer>; REPLICAS_MAX],
    /// The order as this engine has it: the history it chose, then its own records.
    pub order: Log,
    /// Per replica, how many records are known to be durable there; `None` if it takes no part. What is not yet
    /// delivered of `order` is what is in the queue to the replica.
    pub durable: [Option<usize>; REPLICAS_MAX],
    /// Whether the latest view change in `order` is not known to be in force.
    pub pending: bool,
    /// How many records of `order` this engine may have acknowledged to clients.
    pub committed: usize,
    pub following: Option<Following>,
}

/// What was used up of the bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Used {
    pub writes: u8,
    pub drops: u8,
    pub rejoins: u8,
    pub crashes: u8,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// Those beyond the model's number stay as they are.
    pub replicas: [Replica; REPLICAS_MAX],
    /// By rising epoch, the first is 1.
    pub engines: Vec<Engine>,
    pub used: Used,
}

impl Engine {
    /// One that has not asked anybody yet.
    pub fn new(epoch: u8, created: Members) -> Engine {
        Engine {
            epoch,
            phase: Phase::Gathering,
            answers: [const { None }; REPLICAS_MAX],
            order: Log::new(created),
            durable: [None; REPLICAS_MAX],
            pending: false,
            committed: 0,
            following: None,
        }
    }

    /// The view whose members' acknowledgements count.
    pub fn in_force(&self) -> Members {
        match self.order.changes().last() {
            Some(change) if self.pending => change.old,
            Some(change) => change.new,
            None => self.order.created,
        }
    }

    /// Members of `view` that are known to hold the first `len` records.
    pub fn holding(&self, view: Members, len: usize) -> usize {
        view.iter().filter(|replica| self.durable[*replica].is_some_and(|durable| durable >= len)).count()
    }

    /// Where its first own record is.
    pub fn start_at(&self) -> Option<usize> {
        self.order.records.iter().position(|record| record.epoch == self.epoch)
    }

    /// What it may have acknowledged.
    pub fn acknowledged(&self) -> &[Record] {
        &self.order.records[..self.committed]
    }

    /// Members that are being sent records and may be read from: those in force that no pending change drops.
    pub fn staying(&self) -> Members {
        let target = self.order.view();
        self.in_force().and(target)
    }
}
