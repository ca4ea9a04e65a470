//! The bytes in flight, over all connections and of each, as semaphores.
//!
//! Every request is charged once, before its payload is read or its read is submitted, and gives the bytes back when
//! its reply has left. Each connection has a few bytes of its own that nobody can take: clients that ask for much and
//! are slow to take it cannot stop those that ask for little. Beyond it, a connection's own share comes first, so that a
//! client that has used it up waits for itself and not in the way of others. One charge covers a request whole and nothing
//! is charged in parts, so requests cannot block each other half-way: with budgets no smaller than the longest request,
//! the first in line always gets through.
//!
//! Apart from all that, some memory is kept for reading ahead on connections whose next request has to wait. It is lent
//! if there is some and never waited for.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::constants::PAYLOAD_BYTES_MAX;

/// Charged for every request on top of its data: its header, place in queues, and reply.
const REQUEST_OVERHEAD_BYTES: u32 = 256;

/// The largest charge there is, in bytes.
pub(super) const fn charge_bytes_max() -> usize {
    (PAYLOAD_BYTES_MAX + REQUEST_OVERHEAD_BYTES) as usize
}

/// What a connection has of its own at most: enough for dozens of small requests.
const RESERVE_BYTES_MAX: usize = 256 << 10;
/// This part of the whole budget, at most, is set aside for that.
const RESERVED_PART: usize = 4;

/// What may be lent for reading ahead over all connections.
const READ_AHEAD_BYTES_MAX: usize = 128 << 20;

/// The bytes one request holds; given back when dropped.
#[derive(Debug)]
pub(super) struct Charge {
    #[expect(dead_code, reason = "held for its drop")]
    own: OwnedSemaphorePermit,
    /// `None` if they are of the connection's reserve.
    #[expect(dead_code, reason = "held for its drop")]
    total: Option<OwnedSemaphorePermit>,
}

/// The budget of all connections together.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    total: Arc<Semaphore>,
    read_ahead: Arc<Semaphore>,
    reserve_bytes: usize,
}

/// What one connection may use of it.
#[derive(Debug)]
pub(super) struct Share {
    reserve: Arc<Semaphore>,
    reserve_bytes: usize,
    own: Arc<Semaphore>,
    total: Arc<Semaphore>,
}

fn semaphore(bytes: usize) -> Arc<Semaphore> {
    assert!(bytes >= charge_bytes_max());
    Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS)))
}

impl Budget {
    /// For `connections_max` connections at a time, at least one. `inflight_bytes_max` must be at least
    /// [`charge_bytes_max`].
    pub(super) fn new(inflight_bytes_max: usize, connections_max: usize) -> Self {
        let reserve_bytes = (inflight_bytes_max / RESERVED_PART / connections_max).min(RESERVE_BYTES_MAX);
        let rest = inflight_bytes_max - reserve_bytes * connections_max;
        let read_ahead = Arc::new(Semaphore::new(READ_AHEAD_BYTES_MAX));
        Self { total: semaphore(rest.max(charge_bytes_max())), read_ahead, reserve_bytes }
    }

    /// For one more connection. `connection_bytes_max` must be at least [`charge_bytes_max`].
    pub(super) fn share(&self, connection_bytes_max: usize) -> Share {
        let reserve_bytes = self.reserve_bytes;
        Share {
            reserve: Arc::new(Semaphore::new(reserve_bytes)),
            reserve_bytes,
            own: semaphore(connection_bytes_max),
            total: Arc::clone(&self.total),
        }
    }

    /// For one more connection, which has borrowed nothing yet.
    pub(super) fn loan(&self) -> Loan {
        Loan { pool: Arc::clone(&self.read_ahead), borrowed: None }
    }
}

/// What one connection has borrowed for reading ahead.
#[derive(Debug)]
pub(super) struct Loan {
    pool: Arc<Semaphore>,
    borrowed: Option<OwnedSemaphorePermit>,
}

impl Loan {
    /// Borrows so many more bytes, if nobody else has them.
    pub(super) fn try_borrow(&mut self, bytes: usize) -> bool {
        let Ok(bytes) = u32::try_from(bytes) else { return false };
        let Ok(more) = Arc::clone(&self.pool).try_acquire_many_owned(bytes) else { return false };
        match &mut self.borrowed {
            Some(borrowed) => borrowed.merge(more),
            None => self.borrowed = Some(more),
        }
        true
    }

    /// Gives everything back.
    pub(super) fn pay_back(&mut self) {
        self.borrowed = None;
    }
}

impl Share {
    /// Charges a request with `data_bytes` of payload or read data, if there is room now.
    pub(super) fn try_charge(&self, data_bytes: u32) -> Option<Charge> {
        let permits = data_bytes + REQUEST_OVERHEAD_BYTES;
        if let Ok(own) = Arc::clone(&self.reserve).try_acquire_many_owned(permits) {
            return Some(Charge { own, total: None });
        }
        let own = Arc::clone(&self.own).try_acquire_many_owned(permits).ok()?;
        let total = Arc::clone(&self.total).try_acquire_many_owned(permits).ok()?;
        Some(Charge { own, total: Some(total) })
    }

    /// Charges a request as soon as there is room; first come, first served. `None` cannot happen while the server
    /// lives: the semaphores are never closed.
    pub(super) async fn charge(&self, data_bytes: u32) -> Option<Charge> {
        let permits = data_bytes + REQUEST_OVERHEAD_BYTES;
        let reserved = async {
            let own = Arc::clone(&self.reserve).acquire_many_owned(permits).await.ok()?;
            Some(Charge { own, total: None })
        };
        let shared = async {
            let own = Arc::clone(&self.own).acquire_many_owned(permits).await.ok()?;
            let total = Arc::clone(&self.total).acquire_many_owned(permits).await.ok()?;
            Some(Charge { own, total: Some(total) })
        };
        // More than the whole reserve would wait for ever.
        let fits_reserve = permits as usize <= self.reserve_bytes;
        tokio::select! {
            charge = reserved, if fits_reserve => charge,
            charge = shared => charge,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: u32 = PAYLOAD_BYTES_MAX;

    #[test]
    fn a_client_that_has_used_up_its_share_leaves_the_rest_to_others() {
        let budget = Budget::new(3 * charge_bytes_max(), usize::MAX);
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
        let budget = Budget::new(charge_bytes_max(), usize::MAX);
        let (one, other) = (budget.share(charge_bytes_max()), budget.share(charge_bytes_max()));
        let held = one.try_charge(LONGEST);
        assert!(other.try_charge(LONGEST).is_none());
        drop(held);
        assert!(other.try_charge(LONGEST).is_some());
    }

    #[tokio::test]
    async fn small_requests_get_through_beside_any_number_of_greedy_clients() {
        let budget = Budget::new(4 * charge_bytes_max(), 100);
        let greedy: Vec<_> = (0..10).map(|_| budget.share(2 * charge_bytes_max())).collect();
        let held: Vec<_> = greedy.iter().filter_map(|greedy| greedy.try_charge(LONGEST)).collect();
        assert!(held.len() >= 2 && budget.share(2 * charge_bytes_max()).try_charge(LONGEST).is_none());
        let modest = budget.share(2 * charge_bytes_max());
        let first: Vec<_> = std::iter::from_fn(|| modest.try_charge(16 << 10)).collect();
        assert!(first.len() >= 10);
        let mut next = std::pin::pin!(modest.charge(16 << 10));
        assert!(at_once(next.as_mut()).await.is_none(), "the reserve is used up");
        drop(first);
        assert!(at_once(next).await.flatten().is_some(), "and is its own again");
    }

    /// What a future gives at once.
    async fn at_once<F: Future>(future: std::pin::Pin<&mut F>) -> Option<F::Output> {
        let mut future = future;
        std::future::poll_fn(|cx| {
            std::task::Poll::Ready(match future.as_mut().poll(cx) {
                std::task::Poll::Ready(output) => Some(output),
                std::task::Poll::Pending => None,
            })
        })
        .await
    }
}
