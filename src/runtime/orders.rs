//! Orders of an operator: looks at the place of a new replica, formats it if there is room, and hands the rest to the
//! volume's state machine. What an order means for a volume is decided there.

use std::sync::Arc;
use std::time::Duration;

use listener_agent::config::ByteSize;
use listener_agent::directory;
use protocol::{ReplicaName, View, VolumeUuid};

use super::format::{FormatError, Found, Shape, Target, format, look_at};
use super::report::Reporter;
use super::seat::{Link, address_of, name};
use super::volume_task::VolumeTask;
use crate::admin::control::{Control, Order, OrderOutcome, OrderRefused};
use crate::config::{InvalidConfig, ReplicaConfig, ReplicaPlace};
use crate::volume::{Command, CommandRefusal, VolumeState};

/// A growth that takes longer goes on by itself.
const RESIZE_MAX: Duration = Duration::from_secs(120);

impl Control for Reporter {
    fn order(&self, volume: &str, order: Order) -> OrderOutcome {
        let Some(task) = self.volumes.iter().find(|task| task.name() == volume).cloned() else {
            let known: Vec<&str> = self.volumes.iter().map(|task| task.name()).collect();
            let message = format!("there is no volume {volume}; there is {}", known.join(", "));
            return Box::pin(async { Err(OrderRefused { is_unknown: true, message, remedy: None }) });
        };
        let elsewhere = match &order {
            Order::AddReplica(replica) => self.use_of(&replica.place),
            Order::RemoveReplica { .. }
            | Order::Resync { .. }
            | Order::Resize { .. }
            | Order::Scrub { .. }
            | Order::Activate { .. } => None,
        };
        // In a task of its own: a client that goes away does not leave an order half carried out.
        let working = tokio::spawn(async move {
            match elsewhere {
                Some(message) => Err(refused(message)),
                None => task.carry_out_order(order).await,
            }
        });
        Box::pin(async { working.await.unwrap_or_else(|e| Err(refused(format!("it was not carried out: {e}")))) })
    }
}

impl Reporter {
    /// Who has this place, in one line: two copies in one place would be one copy.
    fn use_of(&self, place: &ReplicaPlace) -> Option<String> {
        let image_of = |place: &ReplicaPlace| match place {
            ReplicaPlace::Embedded { image, .. } => image.clone(),
            ReplicaPlace::Agent { .. } => None,
        };
        let wanted = image_of(place);
        self.volumes.iter().find_map(|task| {
            let same = task.snapshot().1.into_iter().find(|other| wanted.is_some() && image_of(other) == wanted)?;
            Some(format!("the image is that of the replica of volume {} at {}", task.name(), address_of(&same)))
        })
    }
}

fn refused(message: String) -> OrderRefused {
    OrderRefused { is_unknown: false, message, remedy: None }
}

impl From<CommandRefusal> for OrderRefused {
    fn from(refusal: CommandRefusal) -> OrderRefused {
        let is_unknown = matches!(refusal, CommandRefusal::NoReplica { .. });
        let remedy = match &refusal {
            CommandRefusal::NoReplica { .. } | CommandRefusal::HasReplica { .. } => "see `nbdcast status`",
            CommandRefusal::TooMany => "remove a replica first",
            CommandRefusal::NotServing => "see `nbdcast status` for what the volume waits for",
            CommandRefusal::NotBlocked => {
                "a start is reported as blocked when replicas did not answer for a while; see `nbdcast status`"
            }
            CommandRefusal::Answers { .. } => "name only those that are missing, as the refused start names them",
            CommandRefusal::Needed { .. } => {
                "bring the other members back, or add a replica and wait until it is a member"
            }
            CommandRefusal::InSync { .. } => {
                "it gets what it lacks as a member; --full has all of it copied anew, and one out of reach leaves the view \
                 after lag_ms_max and can be brought back then"
            }
            CommandRefusal::Busy => "try again in a moment",
            CommandRefusal::Scrubbing => {
                "see `nbdcast status` for how far it is; `nbdcast scrub VOLUME --stop` ends it"
            }
            CommandRefusal::NotScrubbing => "see `nbdcast status` for the result of the last scrub",
            CommandRefusal::Size { .. } => "give a greater size, a multiple of 4KiB up to 64TiB",
            CommandRefusal::Damaged { .. } => {
                "look after its disk first; `nbdcast replica replace` puts another in its place"
            }
            CommandRefusal::Unreachable { .. } => "bring it back, or wait until it has left the view",
        };
        OrderRefused { is_unknown, message: refusal.to_string(), remedy: Some(remedy.to_owned()) }
    }
}

impl From<FormatError> for OrderRefused {
    fn from(error: FormatError) -> OrderRefused {
        OrderRefused { is_unknown: false, message: error.to_string(), remedy: error.remedy() }
    }
}

impl VolumeTask {
    async fn carry_out_order(self: &Arc<Self>, order: Order) -> Result<String, OrderRefused> {
        match order {
            Order::AddReplica(replica) => self.add_replica(replica).await,
            Order::RemoveReplica { replica } => {
                self.command(Command::Remove { replica: name(&replica) })?;
                Ok(format!("replica {replica} leaves volume {}", self.name()))
            }
            Order::Resync { replica, full } => self.resync_replica(&replica, full).await,
            Order::Resize { size } => self.grow(size.bytes()).await,
            Order::Scrub { stop } => Ok(self.order_scrub(stop)?),
            Order::Activate { without } => {
                let replicas = without.iter().map(|replica| name(replica)).collect();
                self.command(Command::ActivateWithout { replicas })?;
                Ok(format!("volume {} starts without {}", self.name(), without.join(", ")))
            }
        }
    }

    /// The volume's identity, if it serves.
    fn serving(&self) -> Result<VolumeUuid, CommandRefusal> {
        let (snapshot, _) = self.snapshot();
        let serves = matches!(snapshot.state, VolumeState::Serving | VolumeState::Frozen);
        snapshot.uuid.filter(|_| serves).ok_or(CommandRefusal::NotServing)
    }

    async fn add_replica(&self, replica: ReplicaConfig) -> Result<String, OrderRefused> {
        let _alone = self.ordering.try_lock().map_err(|_| CommandRefusal::Busy)?;
        let uuid = self.serving()?;
        let (snapshot, places) = self.snapshot();
        if snapshot.peers.iter().any(|peer| peer.name.as_str() == replica.name) {
            return Err(CommandRefusal::HasReplica { replica: name(&replica.name) }.into());
        }
        if places.len() >= protocol::REPLICAS_MAX {
            return Err(CommandRefusal::TooMany.into());
        }
        self.agents.check(&replica).map_err(|value| {
            let remedy = Some(InvalidConfig::from(value.clone()).remedy());
            OrderRefused { is_unknown: false, message: format!("replica {}: {value}", replica.name), remedy }
        })?;
        let address = address_of(&replica.place);
        if places.iter().any(|place| address_of(place) == address) {
            return Err(refused(format!("volume {} has a replica at {address} already", self.name())));
        }
        // One that was removed a moment ago may still hold its directory.
        self.retired().await;
        let made = self.make_room(&snapshot.view, uuid, &replica).await?;
        let (link, failed) = Link::to(&replica, self.name(), &self.agents).await;
        if let Some(cause) = failed {
            let (message, remedy) = (format!("replica {}: {cause}", replica.name), cause.remedy());
            return Err(OrderRefused { is_unknown: false, message, remedy });
        }
        self.seat(name(&replica.name), replica.place, link)?;
        let how = if made { "formatted and added" } else { "added with what it holds" };
        Ok(format!("replica {} of volume {} is {how}; what it lacks is copied", replica.name, self.name()))
    }

    /// Formats the replica unless it is there; returns whether it was formatted. It will not count before it was copied
    /// to.
    async fn make_room(
        &self,
        view: &[ReplicaName],
        uuid: VolumeUuid,
        replica: &ReplicaConfig,
    ) -> Result<bool, OrderRefused> {
        let target = Target { volume: self.name(), replica, agents: &self.agents };
        match look_at(&target).await? {
            Found::Replica(found) | Found::Unserved(found) if found == uuid => return Ok(false),
            Found::Replica(found) => return Err(target.has_data(found).into()),
            Found::Nothing | Found::Unserved(_) => {}
        }
        let members = view.iter().cloned().chain([name(&replica.name)]).collect();
        let view = View::new(members).ok_or(CommandRefusal::TooMany)?;
        let (size_bytes, journal_bytes) = (self.size_bytes(), self.journal_bytes);
        format(&target, &Shape { uuid, size_bytes, journal_bytes, view, syncing: true }).await?;
        Ok(true)
    }

    /// Brings a replica back. If nothing is where it should be, it is made anew, unless it is a member.
    async fn resync_replica(&self, replica: &str, full: bool) -> Result<String, OrderRefused> {
        let _alone = self.ordering.try_lock().map_err(|_| CommandRefusal::Busy)?;
        let uuid = self.serving()?;
        let (snapshot, places) = self.snapshot();
        let is_member = snapshot.view.iter().any(|member| member.as_str() == replica);
        let seated = snapshot.peers.iter().zip(&places).find(|(peer, _)| peer.name.as_str() == replica);
        let mut made = false;
        if let Some((_, place)) = seated.filter(|(_, place)| !is_member && self.may_be_gone(place)) {
            let gone = ReplicaConfig { name: replica.to_owned(), place: place.clone() };
            made = self.make_room(&snapshot.view, uuid, &gone).await?;
            if made {
                self.reopen(place).await;
            }
        }
        self.command(Command::Resync { replica: name(replica), full })?;
        let how = if made { "was formatted anew and " } else { "" };
        let what = if full || made { "all of it" } else { "what it lacks" };
        Ok(format!("replica {replica} of volume {} {how}is brought back: {what} is copied", self.name()))
    }

    /// Whether it makes sense to look for the replica: the link has opened one in this process that is there.
    fn may_be_gone(&self, place: &ReplicaPlace) -> bool {
        match place {
            ReplicaPlace::Agent { .. } => true,
            ReplicaPlace::Embedded { path, .. } => !directory::holds_replica(&path.join(self.name())),
        }
    }

    /// Grows the volume, and waits until it has.
    async fn grow(&self, size_bytes: u64) -> Result<String, OrderRefused> {
        let mut ended = self.resized();
        ended.mark_unchanged();
        self.command(Command::Resize { size_bytes })?;
        let size = ByteSize::from_bytes(size_bytes);
        match tokio::time::timeout(RESIZE_MAX, ended.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(CommandRefusal::NotServing.into()),
            Err(_) => {
                let message = format!("the replicas of volume {} do not all have {size} yet", self.name());
                let remedy = Some("they go on; see `nbdcast status` and its events".to_owned());
                return Err(OrderRefused { is_unknown: false, message, remedy });
            }
        }
        match ended.borrow().clone() {
            Some(Err(reason)) => Err(refused(reason)),
            Some(Ok(_)) | None => Ok(format!("volume {} has {size}", self.name())),
        }
    }
}
