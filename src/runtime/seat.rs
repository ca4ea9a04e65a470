//! A replica's seat in its volume, and the link that sits there. What a link tells its volume goes through the seat: once
//! the replica is removed, its number may go to another, and whatever the old link still says is not heard.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use listener_agent::directory::DirectoryError;
use protocol::{ReplicaName, ToAgent, ToEngine};
use tokio::time::Instant;
use tracing::warn;

use super::dial::Agents;
use super::embedded::EmbeddedLink;
use super::front::Token;
use super::link::AgentLink;
use super::volume_task::VolumeTask;
use crate::config::{ReplicaConfig, ReplicaPlace};
use crate::volume::{PeerId, Time, Volume};

/// What a replica in this process needs beyond its deadline to be closed, if it keeps it.
const CLOSE_GRACE: Duration = Duration::from_millis(100);

/// Where a link speaks for its replica.
pub(super) struct Seat {
    volume: Weak<VolumeTask>,
    peer: PeerId,
    vacated: AtomicBool,
}

impl Seat {
    /// Tells the volume something, unless the seat is vacated or the volume gone: then it is false.
    fn tell(&self, tell: impl FnOnce(&mut Volume<Token>, Time, PeerId)) -> bool {
        let Some(volume) = self.volume.upgrade() else { return false };
        let mut heard = false;
        volume.drive(|volume, now| {
            heard = !self.is_vacated();
            if heard {
                tell(volume, now, self.peer);
            }
        });
        heard
    }

    /// Whether the replica was removed. True for good only with the volume locked.
    fn is_vacated(&self) -> bool {
        self.vacated.load(Ordering::Relaxed)
    }

    /// A connection was made. False if nobody wants it any more; so for the others.
    pub(super) fn connected(&self) -> bool {
        self.tell(|volume, now, peer| volume.peer_connected(now, peer))
    }

    /// The connection is gone, or could not be made.
    pub(super) fn disconnected(&self, reason: String) -> bool {
        self.tell(|volume, now, peer| volume.peer_disconnected(now, peer, reason))
    }

    /// What the replica says. The bytes of reads are compared with their checksums here, before the volume is locked.
    pub(super) fn received(&self, messages: impl IntoIterator<Item = ToEngine>) -> bool {
        let messages: Vec<ToEngine> = messages.into_iter().map(ToEngine::checked).collect();
        self.tell(|volume, now, peer| {
            for message in messages {
                volume.peer_message(now, peer, message);
            }
        })
    }

    /// What the volume has for the replica; `None` if nobody speaks for it any more.
    pub(super) fn take_outbox(&self, bytes_max: u64) -> Option<Outgoing> {
        let task = self.volume.upgrade()?;
        task.peek(|volume| {
            let now = task.now();
            let outgoing = || match volume.outbox_due(now, self.peer) {
                None => Outgoing::Nothing,
                Some(due) if due <= now => Outgoing::Messages(volume.take_outbox(now, self.peer, bytes_max)),
                Some(due) => Outgoing::Later(due - now),
            };
            (!self.is_vacated()).then(outgoing)
        })
    }
}

/// What a volume has for a replica.
pub(super) enum Outgoing {
    Nothing,
    /// At least one, in order.
    Messages(Vec<ToAgent>),
    /// After this time, with what comes until then.
    Later(Duration),
}

/// How a replica is reached.
pub(super) enum Link {
    Agent(AgentLink),
    Embedded(EmbeddedLink),
}

impl Link {
    /// A link to `replica`; with it comes why a replica in this process cannot be opened. It goes on trying.
    pub(super) async fn to(replica: &ReplicaConfig, volume: &str, agents: &Agents) -> (Link, Option<DirectoryError>) {
        let name = replica.name.as_str();
        match &replica.place {
            ReplicaPlace::Agent { address, certificate } => {
                let way = agents.way_to(address, certificate.as_deref().unwrap_or(name));
                (Link::Agent(AgentLink::new(way)), None)
            }
            ReplicaPlace::Embedded { path, .. } => {
                match EmbeddedLink::open(&Path::new(path).join(volume), volume, name).await {
                    Ok(link) => (Link::Embedded(link), None),
                    Err((link, cause)) => (Link::Embedded(link), Some(cause)),
                }
            }
        }
    }
}

/// A link in its seat.
pub(super) struct Slot {
    pub(super) place: ReplicaPlace,
    link: Link,
    seat: Arc<Seat>,
}

/// The slots of a volume's replicas by [`PeerId`]; `None` where one was removed.
pub(super) type Slots = Arc<[Option<Arc<Slot>>]>;

impl Slot {
    pub(super) fn new(volume: Weak<VolumeTask>, peer: PeerId, place: ReplicaPlace, link: Link) -> Arc<Slot> {
        Arc::new(Slot { place, link, seat: Arc::new(Seat { volume, peer, vacated: AtomicBool::new(false) }) })
    }

    /// Begins to connect.
    pub(super) fn start(&self) {
        match &self.link {
            Link::Agent(link) => link.start(self.seat.clone()),
            Link::Embedded(link) => link.start(self.seat.clone()),
        }
    }

    /// Ends what the link has to say. Call it with the volume locked.
    pub(super) fn vacate(&self) {
        self.seat.vacated.store(true, Ordering::Relaxed);
    }

    /// The volume has something for the replica.
    pub(super) fn wake(&self) {
        match &self.link {
            Link::Agent(link) => link.wake(),
            Link::Embedded(link) => link.pump(),
        }
    }

    /// The volume has something for the replica that need not go at once.
    pub(super) fn wake_later(&self) {
        match &self.link {
            Link::Agent(link) => link.wake_later(),
            Link::Embedded(link) => link.wake_later(),
        }
    }

    /// The volume wants the connection closed, and a new one.
    pub(super) fn disconnect(&self) {
        match &self.link {
            Link::Agent(link) => link.disconnect(),
            Link::Embedded(link) => link.disconnect(),
        }
    }

    /// The replica was made anew: a link in this process goes over to the new files.
    pub(super) async fn reopen(&self) {
        match &self.link {
            Link::Agent(_) => {}
            Link::Embedded(link) => link.reopen().await,
        }
    }

    /// Ends the link and marks a replica in this process clean; returns whether it is. The replica's lock is given up by
    /// then, unless its disk hangs.
    pub(super) async fn close(&self, deadline: Instant) -> bool {
        match &self.link {
            Link::Agent(link) => {
                link.finish(deadline).await;
                true
            }
            Link::Embedded(link) => {
                let closed = tokio::time::timeout_at(deadline + CLOSE_GRACE, link.close(deadline.into_std())).await;
                matches!(closed, Ok(Ok(true)))
            }
        }
    }

    /// As [`Slot::close`], for a replica that was removed.
    pub(super) async fn retire(&self, volume: &str, deadline: Instant) {
        if !self.close(deadline).await {
            warn!("volume {volume}: the removed replica at {} could not be marked clean", address_of(&self.place));
        }
    }
}

/// How people know a place.
pub(super) fn address_of(place: &ReplicaPlace) -> String {
    match place {
        ReplicaPlace::Agent { address, .. } => address.to_string(),
        ReplicaPlace::Embedded { path, .. } => path.display().to_string(),
    }
}

/// What a name that the configuration or an order gave is to the volume.
pub(super) fn name(text: &str) -> ReplicaName {
    text.parse().expect("names are checked with the configuration, and with orders")
}
