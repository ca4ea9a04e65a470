//! The bytes in flight, over all connections and of each, as semaphores.
//!
//! Every request is charged once, before its payload is read or its read is submitted, and gives the bytes back when
//! its reply has left. A connection's own share comes first, so that a client that has used it up waits for itself and
//! not in the way of others. One charge covers a request whole and nothing is charged in parts, so requests cannot block
//! each other half-way: with budgets no smaller than the longest request, the first in line always gets through.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::constants::PAYLOAD_BYTES_MAX;

/// Charged for every request on top of its data: its header, place in queues, and reply.
const REQUEST_OVERHEAD_BYTES: u32 = 256;

/// The largest charge there is, in bytes.
pub(super) const fn charge_bytes_max() -> usize {
    (PAYLOAD_BYTES_MAX + REQUEST_OVERHEAD_BYTES) as usize
}

/// The bytes one request holds; given back when dropped.
#[derive(Debug)]
pub(super) struct Charge {
    #[expect(dead_code, reason = "held for its drop")]
    own: OwnedSemaphorePermit,
    #[expect(dead_code, reason = "held for its drop")]
    total: OwnedSemaphorePermit,
}

/// The budget of all connections together.
#[derive(Debug, Clone)]
pub(super) struct Budget(Arc<Semaphore>);

/// What one connection may use of it.
#[derive(Debug)]
pub(super) struct Share {
    own: Arc<Semaphore>,
    total: Arc<Semaphore>,
}

fn semaphore(bytes: usize) -> Arc<Semaphore> {
    assert!(bytes >= charge_bytes_max());
    Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS)))
}

impl Budget {
    /// `inflight_bytes_max` must be at least [`charge_bytes_max`].
    pub(super) fn new(inflight_bytes_max: usize) -> Self {
        Self(semaphore(inflight_bytes_max))
    }

    /// For one more connection. `connection_bytes_max` must be at least [`charge_bytes_max`].
    pub(super) fn share(&self, connection_bytes_max: usize) -> Share {
        Share { own: semaphore(connection_bytes_max), total: Arc::clone(&self.0) }
    }
}

impl Share {
    /// Charges a request with `data_bytes` of payload or read data, if there is room now.
    pub(super) fn try_charge(&self, data_bytes: u32) -> Option<Charge> {
        let permits = data_bytes + REQUEST_OVERHEAD_BYTES;
        let own = Arc::clone(&self.own).try_acquire_many_owned(permits).ok()?;
        let total = Arc::clone(&self.total).try_acquire_many_owned(permits).ok()?;
        Some(Charge { own, total })
    }

    /// Charges a request as soon as there is room; first come, first served. `None` cannot happen while the server
    /// lives: the semaphores are never closed.
    pub(super) async fn charge(&self, data_bytes: u32) -> Option<Charge> {
        let permits = data_bytes + REQUEST_OVERHEAD_BYTES;
        let own = Arc::clone(&self.own).acquire_many_owned(permits).await.ok()?;
        let total = Arc::clone(&self.total).acquire_many_owned(permits).await.ok()?;
        Some(Charge { own, total })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: u32 = PAYLOAD_BYTES_MAX;

    #[test]
    fn a_client_that_has_used_up_its_share_leaves_the_rest_to_others() {
        let budget = Budget::new(3 * charge_bytes_max());
        let (greedy, modest) = (budget.share(2 * charge_bytes_max()), budget.share(2 * charge_bytes_max()));
        let held: Vec<_> = std::iter::from_fn(|| greedy.try_charge(LONGEST)).collect();
        assert_eq!(held.len(), 2);
        let charge = modest.try_charge(LONGEST).expect("room for another client");
        assert!(modest.try_charge(0).is_none(), "more than the total");
        drop(charge);
        assert!(modest.try_charge(0).is_some());
    }

    #[test]
    fn what_does_not_fit_the_total_costs_nothing_of_the_share() {
        let budget = Budget::new(charge_bytes_max());
        let (one, other) = (budget.share(charge_bytes_max()), budget.share(charge_bytes_max()));
        let held = one.try_charge(LONGEST);
        assert!(other.try_charge(LONGEST).is_none());
        drop(held);
        assert!(other.try_charge(LONGEST).is_some());
    }
}
