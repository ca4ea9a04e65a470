//! Whether this process has stood still: stopped, swapped out, or on a machine that slept.
//!
//! Clients go on meanwhile. One that waited for too long has hung up and asked elsewhere, and its socket may hold so much
//! that the end of the connection lies behind it, still in the client's machine. Who asks here learns that what he
//! knows of a connection is older than the last standstill.
//!
//! Owns two moments and compares them; somebody must call [`Pulse::beat`] every [`BEAT_INTERVAL`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// How often the pulse must beat.
pub(super) const BEAT_INTERVAL: Duration = Duration::from_millis(100);

/// A longer pause between two beats is a standstill. Clients that ask elsewhere wait at least twice as long before: the
/// kernel's client, for one, knows whole seconds only.
const STANDSTILL: Duration = Duration::from_millis(500);

/// A moment, since the machine was started; goes on while the machine sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(Duration);

impl Moment {
    /// Now.
    pub(super) fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        Self(Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0)))
    }

    fn from_nanos(nanos: u64) -> Self {
        Self(Duration::from_nanos(nanos))
    }

    fn as_nanos(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Shared by all connections.
#[derive(Debug)]
pub(super) struct Pulse {
    last_beat: AtomicU64,
    /// End of the last standstill that a beat found.
    last_standstill: AtomicU64,
}

impl Pulse {
    pub(super) fn new(now: Moment) -> Self {
        Self { last_beat: AtomicU64::new(now.as_nanos()), last_standstill: AtomicU64::new(0) }
    }

    /// One beat. By one caller at a time.
    pub(super) fn beat(&self, now: Moment) {
        if self.is_overdue(now) {
            self.last_standstill.store(now.as_nanos(), Ordering::Relaxed);
        }
        // Whoever sees this beat sees the standstill before it.
        self.last_beat.store(now.as_nanos(), Ordering::Release);
    }

    /// Whether there was a standstill after `since`, or one has just ended.
    pub(super) fn stood_still_since(&self, since: Moment, now: Moment) -> bool {
        self.is_overdue(now) || Moment::from_nanos(self.last_standstill.load(Ordering::Relaxed)) > since
    }

    fn is_overdue(&self, now: Moment) -> bool {
        let last_beat = Moment::from_nanos(self.last_beat.load(Ordering::Acquire));
        now.0.saturating_sub(last_beat.0) > STANDSTILL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Moment {
        Moment(Duration::from_millis(millis))
    }

    #[test]
    fn a_standstill_is_known_before_and_after_the_first_beat_that_follows_it() {
        let pulse = Pulse::new(at(1000));
        pulse.beat(at(1100));
        assert!(!pulse.stood_still_since(at(0), at(1100)));
        assert!(!pulse.stood_still_since(at(0), at(1600)));
        assert!(pulse.stood_still_since(at(1100), at(1601)));
        pulse.beat(at(9000));
        assert!(pulse.stood_still_since(at(1100), at(9000)));
        assert!(pulse.stood_still_since(at(8999), at(9400)), "whatever was learned before it ended counts for nothing");
        assert!(!pulse.stood_still_since(at(9000), at(9400)));
        pulse.beat(at(9100));
        assert!(!pulse.stood_still_since(at(9000), at(9200)), "a beat in time forgets nothing and adds nothing");
        assert!(pulse.stood_still_since(at(1100), at(9200)));
    }
}
