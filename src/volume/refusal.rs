//! Why a volume does not start, in words. No behaviour.

use std::fmt;

use protocol::{Position, ReplicaName, Seq, View};

/// A replica that is needed and did not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingReplica {
    /// Its name.
    pub replica: ReplicaName,
    /// What stood in the way.
    pub reason: String,
}

/// Why a volume does not start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartRefusal {
    /// Not enough replicas answered at all to know the view.
    Unknown {
        /// Those that did not.
        missing: Vec<MissingReplica>,
    },
    /// Too few members of the last view answered: records that were acknowledged may be on the missing ones only.
    Missing {
        /// The last view.
        view: View,
        /// How many of its members must answer.
        needed: usize,
        /// Those that did not.
        missing: Vec<MissingReplica>,
        /// The most advanced that did, and where it stands.
        best: Option<(ReplicaName, Position)>,
        /// Up to here the missing ones are known to have held everything.
        held_at_least: Seq,
    },
    /// A member of the view is not in the configuration.
    NotConfigured {
        /// Which.
        replica: ReplicaName,
        /// The view.
        view: View,
    },
    /// Another engine serves the volume.
    OtherEngine {
        /// The replica that said so.
        replica: ReplicaName,
    },
    /// A replica that is needed takes no records.
    Stalled {
        /// Which.
        replica: ReplicaName,
        /// The record it stopped at.
        at: Seq,
    },
    /// A replica is not one of this volume.
    Mismatch {
        /// Which.
        replica: ReplicaName,
        /// What differs.
        what: String,
    },
}

impl fmt::Display for StartRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, missing: &[MissingReplica]| -> fmt::Result {
            for (i, m) in missing.iter().enumerate() {
                write!(f, "{}replica {}: {}", if i == 0 { "" } else { "; " }, m.replica, m.reason)?;
            }
            Ok(())
        };
        match self {
            StartRefusal::Unknown { missing } => {
                write!(f, "no replica gave its position (")?;
                list(f, missing)?;
                write!(f, ")")
            }
            StartRefusal::Missing { view, needed, missing, best, held_at_least } => {
                write!(f, "{needed} of the members {view} must answer to start; missing are ")?;
                list(f, missing)?;
                write!(f, "; they held everything up to record {held_at_least}")?;
                if let Some((replica, position)) = best {
                    write!(f, ", the most advanced of the others, {replica}, stands at {position}")?;
                }
                write!(f, "; writes acknowledged after that may be on the missing ones alone")
            }
            StartRefusal::NotConfigured { replica, view } => {
                write!(f, "replica {replica} is a member of the last view ({view}) but not in the configuration")
            }
            StartRefusal::OtherEngine { replica } => {
                write!(f, "another engine serves the volume, as replica {replica} says")
            }
            StartRefusal::Stalled { replica, at } => {
                write!(f, "replica {replica} took no record after {at} for too long")
            }
            StartRefusal::Mismatch { replica, what } => write!(f, "replica {replica} {what}"),
        }
    }
}
