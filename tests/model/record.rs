//! The order of a volume, in the abstract: records, logs of them, and what follows from a log alone (view, dirty blocks).
//! Knows neither replicas nor engines.

use std::fmt;

/// Replicas in a model at most: a, b, c, d.
pub const REPLICAS_MAX: usize = 4;

/// A set of replicas; of a view, its members.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Members(u8);

impl Members {
    /// The first so many replicas.
    pub fn first(count: usize) -> Members {
        Members((1 << count) - 1)
    }

    pub fn contains(self, replica: usize) -> bool {
        self.0 & (1 << replica) != 0
    }

    pub fn with(self, replica: usize) -> Members {
        Members(self.0 | (1 << replica))
    }

    pub fn without(self, replica: usize) -> Members {
        Members(self.0 & !(1 << replica))
    }

    /// Those in both.
    pub fn and(self, other: Members) -> Members {
        Members(self.0 & other.0)
    }

    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..REPLICAS_MAX).filter(move |replica| self.contains(*replica))
    }
}

impl fmt::Debug for Members {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iter().try_for_each(|replica| f.write_str(name(replica)))
    }
}

/// What a replica is called in a trace.
pub fn name(replica: usize) -> &'static str {
    ["a", "b", "c", "d"][replica]
}

/// A set of blocks. Every write of the model has a block of its own, so a set of blocks is also the set of writes whose
/// effect an image shows.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Blocks(u8);

impl Blocks {
    /// The block of one write, counted from 1.
    pub fn of_write(write: u8) -> Blocks {
        Blocks(1 << write)
    }

    pub fn and(self, other: Blocks) -> Blocks {
        Blocks(self.0 | other.0)
    }

    /// This image after the blocks `dirty` were copied from `source`.
    pub fn copied(self, dirty: Blocks, source: Blocks) -> Blocks {
        Blocks((self.0 & !dirty.0) | (source.0 & dirty.0))
    }
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries((0..8).filter(|block| self.0 & (1 << block) != 0)).finish()
    }
}

/// What a record does.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// The first record of an epoch.
    Start,
    /// A change of the one block that belongs to this write.
    Write(u8),
    /// The view from here on. A record that drops a replica says which blocks that one has not acknowledged.
    View { members: Members, lacking: Blocks },
    /// This dropped replica is about to come back; its own records that are not in this order changed these blocks.
    Follow { replica: u8, tail: Blocks },
}

/// A record and the epoch that gave it its place. The place is where it stands in a [`Log`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Record {
    pub epoch: u8,
    pub op: Op,
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.op {
            Op::Start => write!(f, "{}:start", self.epoch),
            Op::Write(write) => write!(f, "{}:w{write}", self.epoch),
            Op::View { members, .. } => write!(f, "{}:view({members:?})", self.epoch),
            Op::Follow { replica, .. } => write!(f, "{}:follow({})", self.epoch, name(replica.into())),
        }
    }
}

/// A view change in a log: where it is, and the views before and after.
#[derive(Clone, Copy)]
pub struct Change {
    pub at: usize,
    pub old: Members,
    pub new: Members,
}

/// Records in their order, from the creation of the volume on.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Log {
    /// The view that the volume was created with.
    pub created: Members,
    pub records: Vec<Record>,
}

impl Log {
    pub fn new(created: Members) -> Log {
        Log { created, records: Vec::new() }
    }

    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// (epoch, seq) of the last record; as tuples positions order by epoch first.
    pub fn position(&self) -> (u8, usize) {
        (self.records.last().map_or(0, |record| record.epoch), self.len())
    }

    pub fn up_to(&self, len: usize) -> Log {
        Log { created: self.created, records: self.records[..len].to_vec() }
    }

    pub fn is_prefix_of(&self, other: &Log) -> bool {
        other.records.starts_with(&self.records)
    }

    /// How many records this log and `other` have in common.
    pub fn common_len(&self, other: &Log) -> usize {
        self.records.iter().zip(&other.records).take_while(|(a, b)| a == b).count()
    }

    /// The blocks that the writes after the first `from` records changed.
    pub fn blocks_after(&self, from: usize) -> Blocks {
        self.records.iter().skip(from).fold(Blocks::default(), |blocks, record| match record.op {
            Op::Write(write) => blocks.and(Blocks::of_write(write)),
            Op::Start | Op::View { .. } | Op::Follow { .. } => blocks,
        })
    }

    /// All view changes, oldest first.
    pub fn changes(&self) -> impl Iterator<Item = Change> {
        let mut old = self.created;
        self.records.iter().enumerate().filter_map(move |(at, record)| match record.op {
            Op::View { members: new, .. } => Some(Change { at, old: std::mem::replace(&mut old, new), new }),
            Op::Start | Op::Write(_) | Op::Follow { .. } => None,
        })
    }

    /// The latest view.
    pub fn view(&self) -> Members {
        self.changes().last().map_or(self.created, |change| change.new)
    }

    /// The dirty bitmap that every member holding this log keeps for a dropped replica: what it had not acknowledged when
    /// it was dropped, every later write, and the tails it came back with.
    pub fn dirty(&self, dropped: usize) -> Blocks {
        let mut was_member = true;
        let mut dirty = Blocks::default();
        for record in &self.records {
            match record.op {
                Op::View { members, .. } if members.contains(dropped) => {
                    was_member = true;
                    dirty = Blocks::default();
                }
                Op::View { lacking, .. } => {
                    dirty = if was_member { lacking } else { dirty };
                    was_member = false;
                }
                Op::Write(write) if !was_member => dirty = dirty.and(Blocks::of_write(write)),
                Op::Follow { replica, tail } if usize::from(replica) == dropped => dirty = dirty.and(tail),
                Op::Start | Op::Write(_) | Op::Follow { .. } => {}
            }
        }
        dirty
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.records.fmt(f)
    }
}
