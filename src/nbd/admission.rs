//! Who may be connected: clients that use an export, and strangers that are still in the handshake.
//!
//! Two pools, so that whoever connects and says nothing takes no client's place. A stranger more than there is room for
//! takes the place of the one that has been here longest: a handshake takes milliseconds, so that this is almost never a
//! client at work on it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::AbortHandle;

use super::server::Shared;

/// All connections of a server.
#[derive(Debug, Default)]
pub(super) struct Admission(Mutex<Connections>);

#[derive(Debug, Default)]
struct Connections {
    /// Strangers by the order in which they came; without a handle for the moment in which one's task is made.
    strangers: BTreeMap<u64, Option<AbortHandle>>,
    clients: usize,
    /// Number of the next to come.
    next: u64,
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

    /// Sends away the stranger that has been here longest. False if there is none.
    pub(super) fn send_oldest_away(&self) -> bool {
        let oldest = self.lock().strangers.pop_first();
        let task = oldest.and_then(|(_, task)| task);
        task.inspect(AbortHandle::abort).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        // Nothing that can panic happens under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Lets a stranger in; `serve` starts the task that serves it. Whether another had to go for it.
    pub(super) fn take(shared: &Arc<Shared>, serve: impl FnOnce(Place) -> AbortHandle) -> bool {
        let admission = &shared.admission;
        let is_crowded = admission.lock().strangers.len() >= shared.limits.handshakes_max;
        if is_crowded {
            admission.send_oldest_away();
        }
        let mut connections = admission.lock();
        let number = connections.next;
        connections.next += 1;
        connections.strangers.insert(number, None);
        drop(connections);
        shared.counters.on_connection_opened();
        let task = serve(Place { shared: Arc::clone(shared), number, is_client: false });
        if let Some(stranger) = admission.lock().strangers.get_mut(&number) {
            *stranger = Some(task);
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
