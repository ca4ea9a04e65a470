//! What a volume looks like from outside, for status and metrics.

use protocol::message::Condition;
use protocol::{Epoch, ReplicaName, Seq, VolumeUuid};

use super::notice::BAD_BLOCKS;
use super::peer::{Link, Role};
use super::resync::{Resync, ResyncSnapshot};
use super::scrub::ScrubSnapshot;
use super::{Phase, Time, Volume};

/// A volume at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSnapshot {
    /// Its identity, once a replica told it.
    pub uuid: Option<VolumeUuid>,
    /// The engine's epoch.
    pub epoch: Epoch,
    /// The last place given out.
    pub seq: Seq,
    /// Members of the view in force.
    pub view: Vec<ReplicaName>,
    /// What the volume is doing.
    pub state: VolumeState,
    /// Acknowledged journal bytes that fewer than two replicas hold; all of the volume with a single member.
    pub exposed_bytes: u64,
    /// Its replicas, in the order of the configuration.
    pub peers: Vec<PeerSnapshot>,
    /// Size, bytes.
    pub size_bytes: u64,
    /// Why it cannot start, while it waits for replicas.
    pub blocked: Option<String>,
    /// Reads taken.
    pub reads: u64,
    /// Changes taken.
    pub writes: u64,
    /// Questions for what is allocated, taken.
    pub statuses: u64,
    /// Hints that something will be read, taken.
    pub prefetches: u64,
    /// How far a scrub is.
    pub scrub: Option<ScrubSnapshot>,
}

/// What a volume is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeState {
    /// Not serving yet.
    Starting,
    /// Serving.
    Serving,
    /// Serving, but what is asked now waits: too few members can be reached.
    Frozen,
    /// Not serving any more.
    Failed,
}

/// A replica at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSnapshot {
    /// Its name.
    pub name: ReplicaName,
    /// What it is to the volume.
    pub state: PeerState,
    /// Every record up to here is durable there.
    pub durable: Seq,
    /// Records it lacks.
    pub lag_records: u64,
    /// Journal bytes it lacks.
    pub lag_bytes: u64,
    /// For how long it has lacked the oldest of them, ms.
    pub lag_ms: u64,
    /// Blocks found bad there.
    pub checksum_errors: u64,
    /// Of these, blocks that are good again.
    pub repaired_blocks: u64,
    /// Reads it was asked for and has not answered.
    pub reads_outstanding: usize,
    /// How far the copying to it is.
    pub resync: Option<ResyncSnapshot>,
    /// Why it was last refused or lost, while it is not in order.
    pub trouble: Option<String>,
}

/// What a replica is to the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerState {
    /// In the view and reachable.
    Member,
    /// Out of the view and being brought back.
    Syncing,
    /// Out of the view.
    Dropped,
    /// In the view, but not reachable.
    Offline,
    /// In the view, but its disk is full or failed.
    Failed,
}

impl<T> Volume<T> {
    /// The volume as it is now.
    #[must_use]
    pub fn snapshot(&self, now: Time) -> VolumeSnapshot {
        let last = self.log.as_ref().map_or(Seq(0), super::Log::last);
        VolumeSnapshot {
            uuid: self.uuid,
            epoch: self.epoch,
            seq: last,
            view: self.membership.as_ref().map(|m| m.in_force.members().to_vec()).unwrap_or_default(),
            state: self.state(),
            exposed_bytes: self.exposed_bytes(),
            peers: self.peers.iter().map(|p| self.peer_snapshot(p, last, now)).collect(),
            size_bytes: self.size_bytes,
            blocked: self.start_blocked().map(ToString::to_string),
            reads: self.counts.reads,
            writes: self.counts.writes,
            statuses: self.counts.statuses,
            prefetches: self.counts.prefetches,
            scrub: self.scrub_snapshot(now),
        }
    }

    fn state(&self) -> VolumeState {
        match &self.phase {
            Phase::Activating(_) => VolumeState::Starting,
            Phase::Dead => VolumeState::Failed,
            Phase::Serving if self.is_frozen() => VolumeState::Frozen,
            Phase::Serving => VolumeState::Serving,
        }
    }

    fn exposed_bytes(&self) -> u64 {
        let (Some(membership), Some(log)) = (&self.membership, &self.log) else { return 0 };
        let view = &membership.in_force;
        if view.len() == 1 {
            return self.size_bytes;
        }
        let mut durable: Vec<Seq> = self.peers.iter().filter(|p| view.contains(&p.name)).map(|p| p.durable).collect();
        durable.sort_unstable_by(|a, b| b.cmp(a));
        let acknowledged = self.committed(self.settings.ack_write);
        durable.get(1).map_or(0, |second| log.bytes_between(*second, acknowledged))
    }

    fn peer_snapshot(&self, peer: &super::Peer, last: Seq, now: Time) -> PeerSnapshot {
        let resync = self.resync.as_ref().filter(|r| self.peers[r.peer].name == peer.name);
        let state = match (peer.role, &peer.link) {
            (Role::Leaving | Role::Dropped | Role::Gone, _) => PeerState::Dropped,
            (Role::Syncing | Role::Joining, _) => PeerState::Syncing,
            (Role::Member, Link::Ready) if peer.condition != Condition::Healthy => PeerState::Failed,
            (Role::Member, Link::Ready) => PeerState::Member,
            (Role::Member | Role::Unknown, _) => PeerState::Offline,
        };
        // What a dropped replica holds is known up to its drop only.
        let follows = matches!(peer.role, Role::Member | Role::Syncing | Role::Joining);
        let log = self.log.as_ref().filter(|_| follows);
        let waiting = log.and_then(|l| l.queued_at(peer.durable.next()));
        let durable =
            if follows { peer.durable } else { self.tracked.get(&peer.name).copied().unwrap_or(peer.durable) };
        let is_well = matches!(state, PeerState::Member);
        PeerSnapshot {
            name: peer.name.clone(),
            state,
            durable,
            lag_records: last.ahead_of(durable),
            lag_bytes: log.map_or(0, |l| l.bytes_between(peer.durable, last)),
            lag_ms: waiting.map_or(0, |at| now.saturating_sub(at).as_millis() as u64),
            checksum_errors: peer.checksum_errors,
            repaired_blocks: peer.repaired_blocks,
            reads_outstanding: peer.reads.len(),
            resync: resync.map(Resync::snapshot),
            trouble: if peer.is_kept_out {
                Some(BAD_BLOCKS.to_owned())
            } else {
                peer.last_error.clone().filter(|_| !is_well)
            },
        }
    }
}
