//! Who may be connected: clients that use an export, and strangers that are still in the handshake.
//!
//! Two pools, so that whoever connects and says nothing takes no client's place. A stranger more than there is room for
//! takes the place of another, of whichever address has most of them: an address that floods pushes out its own. Of these
//! it is the one that has been here longest: a handshake takes milliseconds, so that this is almost never a client at
//! work on it.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::AbortHandle;

use super::server::Shared;

/// All connections of a server.
#[derive(Debug, Default)]
pub(super) struct Admission(Mutex<Connections>);

#[derive(Debug, Default)]
struct Connections {
    /// Strangers by the order in which they came.
    strangers: BTreeMap<u64, Stranger>,
    clients: usize,
    /// Number of the next to come.
    next: u64,
}

#[derive(Debug)]
struct Stranger {
    origin: Origin,
    /// `None` for the moment in which its task is made.
    task: Option<AbortHandle>,
}

/// Whom a connection counts against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Origin {
    /// Whoever may open the Unix sockets.
    Local,
    /// An IPv4 address, or the first of an IPv6 network of 64 bits: its owner chooses among the addresses in it.
    Remote(IpAddr),
}

impl Origin {
    fn of(peer: Option<IpAddr>) -> Self {
        match peer.map(|address| address.to_canonical()) {
            None => Self::Local,
            Some(IpAddr::V4(address)) => Self::Remote(address.into()),
            Some(IpAddr::V6(address)) => {
                Self::Remote(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into())
            }
        }
    }
}

impl Connections {
    /// The stranger that has been here longest of the origin that has most of them.
    fn dispensable(&self) -> Option<u64> {
        let mut counts: HashMap<Origin, usize> = HashMap::new();
        for stranger in self.strangers.values() {
            *counts.entry(stranger.origin).or_default() += 1;
        }
        let most = counts.values().copied().max()?;
        self.strangers.iter().find(|(_, stranger)| counts[&stranger.origin] == most).map(|(number, _)| *number)
    }
}

/// One connection's place, as a stranger's first; given up when dropped.
#[derive(Debug)]
pub(super) struct Place {
    shared: Arc<Shared>,
    number: u64,
    is_client: bool,
}

impl Admission {
    /// Whether no further client would be let in.
    pub(super) fn is_full(&self, clients_max: usize) -> bool {
        self.lock().clients >= clients_max
    }

    /// Sends away the oldest stranger of the address that has most. False if there is none.
    pub(super) fn send_one_away(&self) -> bool {
        let mut connections = self.lock();
        let sent = connections.dispensable().and_then(|number| connections.strangers.remove(&number));
        drop(connections);
        sent.and_then(|stranger| stranger.task).inspect(AbortHandle::abort).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        // Nothing that can panic happens under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Lets a stranger in, who comes from `peer`, or by a Unix socket without one; `serve` starts the task that serves it.
    /// Whether another had to go for it.
    pub(super) fn take(shared: &Arc<Shared>, peer: Option<IpAddr>, serve: impl FnOnce(Place) -> AbortHandle) -> bool {
        let admission = &shared.admission;
        let mut connections = admission.lock();
        let number = connections.next;
        connections.next += 1;
        connections.strangers.insert(number, Stranger { origin: Origin::of(peer), task: None });
        // With the newcomer counted, which is never the one to go: there is an older one of its own origin or of another.
        let is_crowded = connections.strangers.len() > shared.limits.handshakes_max;
        drop(connections);
        if is_crowded {
            admission.send_one_away();
        }
        shared.counters.on_connection_opened();
        let task = serve(Place { shared: Arc::clone(shared), number, is_client: false });
        if let Some(stranger) = admission.lock().strangers.get_mut(&number) {
            stranger.task = Some(task);
        }
        is_crowded
    }

    /// The handshake is done: the stranger becomes a client. False if there are enough of them, or if it was sent away.
    pub(super) fn become_client(&mut self) -> bool {
        let mut connections = self.shared.admission.lock();
        if connections.clients >= self.shared.limits.connections_max {
            return false;
        }
        if connections.strangers.remove(&self.number).is_none() {
            return false;
        }
        connections.clients += 1;
        self.is_client = true;
        true
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connections = self.shared.admission.lock();
        if self.is_client {
            connections.clients -= 1;
        } else {
            connections.strangers.remove(&self.number);
        }
        drop(connections);
        self.shared.counters.on_connection_closed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(peer: &str) -> Origin {
        Origin::of(Some(peer.parse().unwrap()))
    }

    /// Who has to go of strangers from these origins, the oldest first.
    fn first_to_go(origins: &[Origin]) -> Option<u64> {
        let stranger = |&origin| Stranger { origin, task: None };
        let strangers = (0..).zip(origins.iter().map(stranger)).collect();
        Connections { strangers, ..Connections::default() }.dispensable()
    }

    #[test]
    fn who_has_most_loses_its_oldest() {
        let (one, other) = (origin("192.0.2.1"), origin("192.0.2.2"));
        assert_eq!(first_to_go(&[one, other, other, one, other]), Some(1));
        assert_eq!(first_to_go(&[one, Origin::Local, Origin::Local]), Some(1));
        assert_eq!(first_to_go(&[other, one, Origin::Local]), Some(0), "the oldest of all, where all have one");
        assert_eq!(first_to_go(&[]), None);
    }

    #[test]
    fn a_network_of_ipv6_is_one_origin_and_an_ipv4_address_is_one_however_it_is_written() {
        assert_eq!(origin("2001:db8::1"), origin("2001:db8::ffff:0:0:1"));
        assert_ne!(origin("2001:db8::1"), origin("2001:db8:0:1::1"));
        assert_eq!(origin("192.0.2.1"), origin("::ffff:192.0.2.1"));
        assert_ne!(origin("192.0.2.1"), origin("192.0.2.2"));
        assert_ne!(Origin::of(None), origin("127.0.0.1"));
    }
}
