//! What an operator asks of a volume at work: replicas added, removed and copied anew, growth, and going on without replicas
//! that are lost. Everything is begun here and goes its way with the volume's other business; [`super::VolumeSnapshot`]
//! shows how far it is.

use protocol::ranges::ByteRange;
use protocol::record::{DirtyStep, Resize};
use protocol::{BLOCK_BYTES, REPLICAS_MAX, RecordKind, ReplicaName, Seq, ToAgent, VOLUME_BYTES_MAX};

use super::activation::Activation;
use super::peer::{Lacks, Link, Peer, Role};
use super::{Event, Notice, PeerId, Phase, ScrubMark, Time, Volume};

/// What an operator asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// The replica leaves for good. It takes effect at once if it is out of the view, else when its drop is in force.
    Remove {
        /// Which.
        replica: ReplicaName,
    },
    /// A replica out of the view is brought back now, without waiting.
    Resync {
        /// Which.
        replica: ReplicaName,
        /// All of it is copied anew; a member leaves the view for that.
        full: bool,
    },
    /// The volume grows.
    Resize {
        /// Its new size, bytes.
        size_bytes: u64,
    },
    /// All members are looked at and compared.
    Scrub {
        /// How far one of before was.
        from: ScrubMark,
    },
    /// A scrub ends where it is.
    StopScrub,
    /// Activation goes on without these members. What only they hold is lost.
    ActivateWithout {
        /// Which.
        replicas: Vec<ReplicaName>,
    },
}

/// Why a command is not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandRefusal {
    /// The volume has no such replica.
    #[error("the volume has no replica {replica}; it has {known}")]
    NoReplica {
        /// The name asked for.
        replica: ReplicaName,
        /// Those there are.
        known: String,
    },
    /// There is one of this name.
    #[error("the volume already has a replica {replica}")]
    HasReplica {
        /// The name.
        replica: ReplicaName,
    },
    /// No more replicas are possible.
    #[error("a volume has at most {REPLICAS_MAX} replicas")]
    TooMany,
    /// The volume does not serve.
    #[error("the volume does not serve just now")]
    NotServing,
    /// The volume is not waiting for replicas.
    #[error("the volume is not waiting for replicas that it could do without")]
    NotBlocked,
    /// It is there and need not be given up.
    #[error("replica {replica} answers: the volume need not do without it")]
    Answers {
        /// Which.
        replica: ReplicaName,
    },
    /// Without this replica the volume could not go on.
    #[error("replica {replica} cannot leave: too few members but it are in reach and hold everything")]
    Needed {
        /// Which.
        replica: ReplicaName,
    },
    /// It is a member.
    #[error("replica {replica} is a member of the view")]
    InSync {
        /// Which.
        replica: ReplicaName,
    },
    /// It left because of its bad blocks.
    #[error(
        "more blocks of replica {replica} were found bad than checksum_errors_max: have all of it copied anew (--full), or \
         replace it"
    )]
    Damaged {
        /// Which.
        replica: ReplicaName,
    },
    /// Another change of the replicas is on its way.
    #[error("another change of the view is not in force yet")]
    Busy,
    /// A scrub is under way.
    #[error("the volume is being scrubbed")]
    Scrubbing,
    /// No scrub is under way.
    #[error("the volume is not being scrubbed")]
    NotScrubbing,
    /// The size is not possible.
    #[error(
        "the size {size_bytes} is not possible: volumes only grow, by whole blocks of {BLOCK_BYTES} bytes; it has {now_bytes}"
    )]
    Size {
        /// The size asked for, bytes.
        size_bytes: u64,
        /// The size that it has, bytes.
        now_bytes: u64,
    },
    /// A replica cannot be reached, and all must make room.
    #[error("replica {replica} cannot be reached; a volume grows when all of its replicas can")]
    Unreachable {
        /// Which.
        replica: ReplicaName,
    },
}

/// A volume that grows.
#[derive(Debug)]
pub(super) struct Resizing {
    size_bytes: u64,
    /// Members that have not made room yet.
    asked: Vec<PeerId>,
    /// The record, once all have.
    seq: Option<Seq>,
}

impl<T> Volume<T> {
    fn find(&self, replica: &ReplicaName) -> Result<PeerId, CommandRefusal> {
        let present = |p: &Peer| p.role != Role::Gone;
        self.peers.iter().position(|p| present(p) && p.name == *replica).ok_or_else(|| {
            let known: Vec<&str> = self.peers.iter().filter(|p| present(p)).map(|p| p.name.as_str()).collect();
            CommandRefusal::NoReplica { replica: replica.clone(), known: known.join(", ") }
        })
    }

    /// Begins what an operator asks for.
    pub fn command(&mut self, now: Time, command: Command) -> Result<(), CommandRefusal> {
        let serving = matches!(self.phase, Phase::Serving) && !self.stopping;
        match command {
            Command::ActivateWithout { replicas } => self.activate_without(now, replicas),
            Command::Remove { .. }
            | Command::Resync { .. }
            | Command::Resize { .. }
            | Command::Scrub { .. }
            | Command::StopScrub
                if !serving =>
            {
                Err(CommandRefusal::NotServing)
            }
            Command::Remove { replica } => {
                let id = self.find(&replica)?;
                self.remove(now, id)
            }
            Command::Resync { replica, full } => {
                let id = self.find(&replica)?;
                self.resync_now(now, id, full)
            }
            Command::Resize { size_bytes } => self.resize(now, size_bytes),
            Command::Scrub { from } => self.begin_scrub(now, from),
            Command::StopScrub => self.stop_scrub(),
        }?;
        self.settle(now);
        Ok(())
    }

    /// Makes room for a replica that is to be added; its connection is wired under the id given. It is copied to as one
    /// that was dropped.
    pub fn add_replica(&mut self, now: Time, replica: ReplicaName) -> Result<PeerId, CommandRefusal> {
        if !matches!(self.phase, Phase::Serving) || self.stopping {
            return Err(CommandRefusal::NotServing);
        }
        if self.find(&replica).is_ok() {
            return Err(CommandRefusal::HasReplica { replica });
        }
        if self.peers.iter().filter(|p| p.role != Role::Gone).count() >= REPLICAS_MAX {
            return Err(CommandRefusal::TooMany);
        }
        let peer = Peer::in_role(replica, Role::Dropped, now);
        match self.peers.iter().position(|p| p.role == Role::Gone) {
            Some(id) => {
                self.peers[id] = peer;
                Ok(id)
            }
            None => {
                self.peers.push(peer);
                Ok(self.peers.len() - 1)
            }
        }
    }

    /// Lets a member go, as soon as others hold what it holds.
    fn let_go(&mut self, id: PeerId) -> Result<(), CommandRefusal> {
        let replica = self.peers[id].name.clone();
        match self.peers[id].role {
            Role::Joining | Role::Unknown => return Err(CommandRefusal::Busy),
            // Its drop is on its way already.
            Role::Leaving | Role::Dropped | Role::Syncing | Role::Gone => return Ok(()),
            Role::Member => {}
        }
        if !self.can_drop(id) {
            return Err(CommandRefusal::Needed { replica });
        }
        self.peers[id].must_leave = true;
        Ok(())
    }

    fn remove(&mut self, now: Time, id: PeerId) -> Result<(), CommandRefusal> {
        self.let_go(id)?;
        self.peers[id].is_removed = true;
        self.finish_removals(now);
        Ok(())
    }

    /// Forgets removed replicas once they are out of the view.
    pub(super) fn finish_removals(&mut self, now: Time) {
        let out = |p: &Peer| p.is_removed && matches!(p.role, Role::Dropped | Role::Syncing);
        while let Some(id) = self.peers.iter().position(out) {
            if self.resync.as_ref().is_some_and(|r| r.peer == id) {
                self.end_resync(now, "it is removed".to_owned());
            }
            let subject = self.peers[id].name.clone();
            if !matches!(self.peers[id].link, Link::Down { .. }) {
                self.disconnect(now, id);
            }
            if self.tracked.remove(&subject).is_some() {
                self.append_dirty(now, subject.clone(), DirtyStep::Forget);
            }
            self.peers[id] = Peer::in_role(subject.clone(), Role::Gone, now);
            self.repairs.give_up(id);
            self.events.push_back(Event::Removed(id));
            self.notice(Notice::Removed { replica: subject });
        }
    }

    fn resync_now(&mut self, now: Time, id: PeerId, full: bool) -> Result<(), CommandRefusal> {
        let replica = self.peers[id].name.clone();
        match self.peers[id].role {
            Role::Leaving | Role::Dropped if self.peers[id].is_kept_out && !full => {
                return Err(CommandRefusal::Damaged { replica });
            }
            Role::Member if full => self.let_go(id)?,
            Role::Member | Role::Joining => return Err(CommandRefusal::InSync { replica }),
            Role::Syncing | Role::Dropped if full && self.resync.as_ref().is_some_and(|r| r.peer == id) => {
                self.end_resync(now, "all of it is to be copied anew".to_owned());
            }
            Role::Syncing | Role::Leaving | Role::Dropped | Role::Gone | Role::Unknown => {}
        }
        let peer = &mut self.peers[id];
        peer.wants_full_resync |= full;
        peer.backoff = Default::default();
        Ok(())
    }

    // ---- size --------------------------------------------------------------------------------------------------

    /// Bytes of the volume.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes of the volume as of the last record given out, whether that is acknowledged or not.
    pub(super) fn size_given_out(&self) -> u64 {
        self.resizing.as_ref().filter(|r| r.seq.is_some()).map_or(self.size_bytes, |r| r.size_bytes)
    }

    fn resize(&mut self, now: Time, size_bytes: u64) -> Result<(), CommandRefusal> {
        let now_bytes = self.size_bytes;
        if size_bytes <= now_bytes || !size_bytes.is_multiple_of(BLOCK_BYTES) || size_bytes > VOLUME_BYTES_MAX {
            return Err(CommandRefusal::Size { size_bytes, now_bytes });
        }
        if self.resizing.is_some() {
            return Err(CommandRefusal::Busy);
        }
        let concerned = |p: &Peer| matches!(p.role, Role::Member | Role::Leaving | Role::Joining | Role::Syncing);
        if let Some(peer) = self.peers.iter().find(|p| concerned(p) && !p.takes_records()) {
            return Err(CommandRefusal::Unreachable { replica: peer.name.clone() });
        }
        let asked: Vec<PeerId> = (0..self.peers.len()).filter(|id| concerned(&self.peers[*id])).collect();
        for id in &asked {
            self.peers[*id].push_urgent(ToAgent::Extend { size_bytes });
        }
        self.resizing = Some(Resizing { size_bytes, asked, seq: None });
        self.advance_resizing(now);
        Ok(())
    }

    pub(super) fn on_extended(&mut self, peer: PeerId, size_bytes: u64, refused: String) {
        let replica = self.peers[peer].name.clone();
        let Some(resizing) = self.resizing.as_mut().filter(|r| r.size_bytes == size_bytes && r.seq.is_none()) else {
            return;
        };
        if refused.is_empty() {
            resizing.asked.retain(|asked| *asked != peer);
        } else {
            self.resizing = None;
            let reason = format!("replica {replica}: {refused}");
            self.notice(Notice::ResizeFailed { size_bytes, reason });
        }
    }

    pub(super) fn advance_resizing(&mut self, now: Time) {
        let Some(resizing) = &self.resizing else { return };
        let size_bytes = resizing.size_bytes;
        if let Some(seq) = resizing.seq {
            // Whoever acknowledges a change beyond the old end must know the new one.
            if seq <= self.committed(self.settings.ack_write) {
                self.resizing = None;
                self.size_bytes = size_bytes;
                self.notice(Notice::Resized { size_bytes });
            }
            return;
        }
        if let Some(lost) = resizing.asked.iter().find(|id| !self.peers[**id].takes_records()) {
            let reason = format!("replica {} cannot be reached any more", self.peers[*lost].name);
            self.resizing = None;
            return self.notice(Notice::ResizeFailed { size_bytes, reason });
        }
        if resizing.asked.is_empty() {
            let nowhere = ByteRange { offset: 0, length: 0 };
            let payload = Resize { size_bytes }.encode();
            let seq = self.append(now, RecordKind::Resize, nowhere, false, payload);
            self.resizing = Some(Resizing { size_bytes, asked: Vec::new(), seq: Some(seq) });
        }
    }

    // ---- going on without --------------------------------------------------------------------------------------

    fn activate_without(&mut self, now: Time, replicas: Vec<ReplicaName>) -> Result<(), CommandRefusal> {
        for replica in &replicas {
            let id = self.find(replica)?;
            if self.answers(id) {
                return Err(CommandRefusal::Answers { replica: replica.clone() });
            }
        }
        let Phase::Activating(activation) = &mut self.phase else { return Err(CommandRefusal::NotBlocked) };
        if self.log.is_some() || !activation.is_blocked() {
            return Err(CommandRefusal::NotBlocked);
        }
        *activation = Activation::without(now, replicas, activation);
        self.start_over(now);
        Ok(())
    }

    /// What a member lacks that was out of reach or lost data when the volume was activated.
    pub(super) fn lacks_at_start(&self, id: PeerId, stable: Seq) -> Lacks {
        let found = self.peers[id].promised.as_ref().map(|p| p.position.seq);
        if found.is_some_and(|found| found < stable) { Lacks::Everything } else { Lacks::SinceStable }
    }
}
