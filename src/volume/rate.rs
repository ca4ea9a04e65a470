//! How fast a resync copies: as fast as the disks can while no client waits for anything, else so that clients' requests
//! that meet a burst of copies take little longer than those that do not, but never slower than a floor, so that it ends.
//!
//! Copies go out in bursts with pauses between them. The pauses show what requests take without copies, now and on this
//! machine, so that nothing has to be known of either.

use std::time::Duration;

use super::Time;

/// With so little to spend nothing begins: many small bursts would leave no pause.
const BURST_BYTES_MIN: u64 = 1 << 20;
const ADJUST_EVERY: Duration = Duration::from_millis(250);
/// Clients that asked for nothing for so long are idle.
const IDLE_AFTER: Duration = Duration::from_millis(500);
const RATE_MAX: u64 = 4 << 30;
/// Bursts of so much time's worth, at most.
const BURST_TIME_MAX: Duration = Duration::from_millis(250);

/// Mean and deviation, smoothed as TCP does it.
#[derive(Clone, Copy, Debug)]
struct Typical {
    mean: Duration,
    deviation: Duration,
}

fn note(typical: &mut Option<Typical>, sample: Duration) {
    *typical = Some(match *typical {
        None => Typical { mean: sample, deviation: sample / 2 },
        Some(t) => Typical {
            mean: t.mean * 15 / 16 + sample / 16,
            deviation: t.deviation * 15 / 16 + t.mean.abs_diff(sample) / 16,
        },
    });
}

/// The rate of one resync.
#[derive(Debug)]
pub(super) struct Rate {
    floor: u64,
    bytes_per_second: u64,
    tokens: u64,
    refilled_at: Time,
    adjusted_at: Time,
    /// What requests take that met no copy, and those that did.
    quiet: Option<Typical>,
    busy: Option<Typical>,
    client_at: Option<Time>,
    copying_until: Time,
    /// A burst has begun and tokens are left.
    bursting: bool,
}

impl Rate {
    pub(super) fn new(floor: u64, now: Time) -> Rate {
        let floor = floor.min(RATE_MAX);
        Rate {
            floor,
            bytes_per_second: floor,
            tokens: BURST_BYTES_MIN,
            refilled_at: now,
            adjusted_at: now,
            quiet: None,
            busy: None,
            client_at: None,
            copying_until: Time::ZERO,
            bursting: false,
        }
    }

    /// A client's request that was taken at `asked_at` was answered now.
    pub(super) fn client_answered(&mut self, asked_at: Time, now: Time) {
        self.client_at = Some(now);
        let took = now.saturating_sub(asked_at);
        let met_copies = asked_at <= self.copying_until;
        note(if met_copies { &mut self.busy } else { &mut self.quiet }, took);
    }

    /// Copies are under way.
    pub(super) fn copying(&mut self, now: Time) {
        self.copying_until = now;
    }

    /// Whether clients have asked for nothing lately.
    pub(super) fn is_idle(&self, now: Time) -> bool {
        self.client_at.is_none_or(|at| now.saturating_sub(at) > IDLE_AFTER)
    }

    fn adjust(&mut self, now: Time) {
        if now.saturating_sub(self.adjusted_at) < ADJUST_EVERY {
            return;
        }
        self.adjusted_at = now;
        let high = |t: Typical| t.mean + t.deviation * 2;
        self.bytes_per_second = if self.is_idle(now) {
            self.bytes_per_second * 2
        } else {
            match (self.quiet, self.busy) {
                (Some(quiet), Some(busy)) if high(busy) > high(quiet) * 3 / 2 => self.bytes_per_second * 5 / 8,
                (Some(_), _) => self.bytes_per_second * 9 / 8,
                (None, _) => self.bytes_per_second / 2,
            }
        }
        .clamp(self.floor, RATE_MAX);
    }

    /// Whether a copy of `bytes` may begin now; if so it is paid for.
    pub(super) fn take(&mut self, bytes: u64, now: Time) -> bool {
        self.adjust(now);
        let passed = now.saturating_sub(self.refilled_at);
        let earned = (u128::from(self.bytes_per_second) * passed.as_micros() / 1_000_000) as u64;
        if earned > 0 {
            let most = (self.bytes_per_second * BURST_TIME_MAX.as_millis() as u64 / 1000).max(BURST_BYTES_MIN);
            self.tokens = (self.tokens + earned).min(most);
            self.refilled_at = now;
        }
        if !self.bursting && self.tokens < BURST_BYTES_MIN {
            return false;
        }
        self.bursting = self.tokens > bytes;
        let pays = self.bursting || self.tokens >= bytes;
        self.tokens = self.tokens.saturating_sub(if pays { bytes } else { 0 });
        pays
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ms(count: u64) -> Time {
        Time::from_millis(count)
    }

    /// Copies for `seconds` while a client asks every 2 ms; requests take `quiet`, or `busy` while copies are under way.
    fn copied(rate: &mut Rate, from: Time, seconds: u64, client: Option<(Duration, Duration)>) -> u64 {
        let (mut bytes, mut copying_until) = (0, Time::ZERO);
        for step in 0..seconds * 500 {
            let now = from + ms(step * 2);
            while rate.take(MIB / 4, now) {
                bytes += MIB / 4;
                copying_until = now + ms(40);
            }
            if now < copying_until {
                rate.copying(now);
            }
            if let Some((quiet, busy)) = client {
                rate.client_answered(now.saturating_sub(if now < copying_until { busy } else { quiet }), now);
            }
        }
        bytes
    }

    #[test]
    fn without_clients_it_grows_without_end() {
        let mut rate = Rate::new(8 * MIB, Time::ZERO);
        assert!(copied(&mut rate, Time::ZERO, 5, None) > 1000 * MIB);
    }

    #[test]
    fn clients_that_suffer_slow_it_down_to_the_floor_and_not_below() {
        let mut rate = Rate::new(8 * MIB, Time::ZERO);
        copied(&mut rate, Time::ZERO, 3, None);
        let suffering = Some((Duration::from_micros(300), Duration::from_micros(1500)));
        copied(&mut rate, ms(3000), 5, suffering);
        let bytes = copied(&mut rate, ms(8000), 10, suffering);
        assert!((60 * MIB..200 * MIB).contains(&bytes), "{} MiB in 10 s", bytes / MIB);
    }

    #[test]
    fn a_floor_above_what_any_disk_does_is_no_limit() {
        let mut rate = Rate::new(64 << 30, Time::ZERO);
        assert!(copied(&mut rate, Time::ZERO, 1, None) > 1000 * MIB);
    }

    #[test]
    fn clients_that_notice_nothing_do_not_slow_it_down() {
        let mut rate = Rate::new(8 * MIB, Time::ZERO);
        let content = Some((Duration::from_micros(300), Duration::from_micros(330)));
        let bytes = copied(&mut rate, Time::ZERO, 10, content);
        assert!(bytes > 160 * MIB, "{} MiB in 10 s", bytes / MIB);
    }
}
