//! The bytes in flight over all connections, as one shared semaphore.
//!
//! Every request is charged once, before its payload is read or its read is submitted, and gives the bytes back when
//! its reply has left. One charge covers a request whole and nothing is charged in parts, so requests cannot block
//! each other half-way: with a budget no smaller than the longest request, the first in line always gets through.

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
pub(super) struct Charge(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

/// The shared budget.
#[derive(Debug, Clone)]
pub(super) struct Budget(Arc<Semaphore>);

impl Budget {
    /// `inflight_bytes_max` must be at least [`charge_bytes_max`].
    pub(super) fn new(inflight_bytes_max: usize) -> Self {
        assert!(inflight_bytes_max >= charge_bytes_max());
        Self(Arc::new(Semaphore::new(inflight_bytes_max.min(Semaphore::MAX_PERMITS))))
    }

    /// Charges a request with `data_bytes` of payload or read data, if there is room now.
    pub(super) fn try_charge(&self, data_bytes: u32) -> Option<Charge> {
        let permits = data_bytes + REQUEST_OVERHEAD_BYTES;
        let permit = Arc::clone(&self.0).try_acquire_many_owned(permits);
        permit.ok().map(Charge)
    }

    /// Charges a request as soon as there is room; first come, first served. `None` cannot happen while the server
    /// lives: the semaphore is never closed.
    pub(super) async fn charge(&self, data_bytes: u32) -> Option<Charge> {
        let permits = data_bytes + REQUEST_OVERHEAD_BYTES;
        let permit = Arc::clone(&self.0).acquire_many_owned(permits).await;
        permit.ok().map(Charge)
    }
}
