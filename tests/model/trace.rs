//! Histories in words: steps, and the moment at which a history ends. Decides nothing.

use std::fmt;

use crate::actions::Action;
use crate::record::name;
use crate::state::{Engine, Replica, State};

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = |f: &mut fmt::Formatter<'_>, engine: usize, what: &str, replica: usize| {
            write!(f, "engine {}: {what} {}", engine + 1, name(replica))
        };
        match *self {
            Action::Promise { engine, replica } => by(f, engine, "is promised its epoch by", replica),
            Action::Choose { engine } => write!(f, "engine {}: chooses the history and starts its epoch", engine + 1),
            Action::Deliver { engine, replica } => by(f, engine, "its next record is durable on", replica),
            Action::Write { engine } => write!(f, "engine {}: gives out a write", engine + 1),
            Action::Drop { engine, replica } => by(f, engine, "gives out the view without", replica),
            Action::InForce { engine } => write!(f, "engine {}: takes the pending view into force", engine + 1),
            Action::Follow { engine, replica } => by(f, engine, "gives out the Follow record of", replica),
            Action::Begin { engine } => write!(f, "engine {}: the returning replica begins", engine + 1),
            Action::Copy { engine, from } => by(f, engine, "the returning replica is synced, copied from", from),
            Action::Add { engine } => write!(f, "engine {}: gives out the view with the returned replica", engine + 1),
            Action::Crash { replica } => write!(f, "{} crashes", name(replica)),
            Action::Restart { replica } => write!(f, "{} starts again", name(replica)),
        }
    }
}

impl fmt::Display for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "promised {}, {:?}, shows {:?}", self.promised, self.log, self.image)?;
        f.write_str(if self.syncing { ", syncing" } else { "" })?;
        f.write_str(if self.up { "" } else { ", down" })
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (view, target) = (self.in_force(), self.order.view());
        write!(f, "{:?}, view {view:?}", self.phase)?;
        if self.pending {
            write!(f, ", pending {target:?}")?;
        }
        write!(f, ", {} of {:?} acknowledged", self.committed, self.order)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let created = self.engines[0].order.created;
        created.iter().try_for_each(|replica| writeln!(f, "  {}: {}", name(replica), self.replicas[replica]))?;
        self.engines.iter().try_for_each(|engine| writeln!(f, "  engine {}: {engine}", engine.epoch))
    }
}
