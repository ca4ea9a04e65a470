//! How long an engine may still count on a replica's promise.
//!
//! An engine answers reads only while enough members confirmed its epoch within the lease, counted from when it *sent*
//! the ping. The replica counts from when the ping *arrived*, which is later, so that what it reports as remaining is
//! never too short. Both use their own clock and only differences.

use std::time::Duration;

use protocol::message::EngineId;

use super::Time;

/// What a replica knows of the engines that count on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leases {
    engine: EngineId,
    heard: Time,
    lease: Duration,
    /// Until then an engine before the present one may count on its promise.
    earlier_until: Time,
}

impl Leases {
    /// A replica that was opened at `now`. Whoever counted on it before may have been heard until just then.
    pub(super) fn at_open(engine: EngineId, lease: Duration, now: Time) -> Leases {
        let earlier_until = if lease.is_zero() { Time::ZERO } else { now + lease };
        Leases { engine, heard: now, lease, earlier_until }
    }

    pub(super) fn promise(&mut self, engine: EngineId, lease: Duration, now: Time) {
        if engine != self.engine {
            self.earlier_until = self.earlier_until.max(self.heard + self.lease);
        }
        (self.engine, self.heard, self.lease) = (engine, now, lease);
    }

    pub(super) fn confirm(&mut self, now: Time) {
        self.heard = now;
    }

    /// The present engine left in good order.
    pub(super) fn release(&mut self) {
        self.lease = Duration::ZERO;
    }

    /// How long ago another engine than `asking` was heard, if that one still counts on the replica, ms.
    pub(super) fn other_ms_ago(&self, asking: EngineId, now: Time) -> Option<u64> {
        let age = now.saturating_sub(self.heard);
        (self.engine != asking && age < self.lease).then_some(age.as_millis() as u64)
    }

    /// How long an engine before the present one may still count on the replica, ms; never too little.
    pub(super) fn remaining_ms(&self, now: Time) -> u32 {
        self.earlier_until.saturating_sub(now).as_micros().div_ceil(1000) as u32
    }
}
