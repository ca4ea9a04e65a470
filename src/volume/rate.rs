//! How fast a resync copies, and a scrub looks: as fast as the disks can while no client waits for anything, else so that
//! clients' requests that meet a burst of copies take little longer than those that do not, but never slower than a floor,
//! so that it ends.
//!
//! Copies go out in bursts with pauses between them. The pauses show what requests take without copies, now and on this
//! machine, so that nothing has to be known of either. Looks of a scrub, which has more time, go out one by one while clients
//! are at work, each after a rest.

use std::time::Duration;

use super::Time;

const ADJUST_EVERY: Duration = Duration::from_millis(250);
/// Clients that asked for nothing for so long are idle.
const IDLE_AFTER: Duration = Duration::from_millis(500);
const RATE_MAX: u64 = 4 << 30;
/// Bursts of so much time's worth, at most.
const BURST_TIME_MAX: Duration = Duration::from_millis(250);
/// While clients are at work a scrub rests after each look for so many times as long as that took.
const RESTS: u32 = 4;

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

/// The rate of one resync or scrub.
#[derive(Debug)]
pub(super) struct Rate {
    floor: u64,
    /// With so little to spend nothing begins.
    burst_bytes_min: u64,
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
    /// Of a scrub: while clients are at work there are no bursts, but single looks and rests.
    rests: Option<Rests>,
}

/// When a scrub looks while clients are at work.
#[derive(Clone, Copy, Debug)]
struct Rests {
    /// Since when a look is under way.
    looking_since: Option<Time>,
    /// When the last one was paid for, and its bytes.
    paid: (Time, u64),
    until: Time,
}

impl Rate {
    /// Of a resync, in bursts of so many bytes at least.
    pub(super) fn new(floor: u64, burst_bytes_min: u64, now: Time) -> Rate {
        let floor = floor.min(RATE_MAX);
        Rate {
            floor,
            bytes_per_second: floor,
            burst_bytes_min,
            tokens: burst_bytes_min,
            refilled_at: now,
            adjusted_at: now,
            quiet: None,
            busy: None,
            client_at: None,
            copying_until: Time::ZERO,
            bursting: false,
            rests: None,
        }
    }

    /// Of a scrub, in looks of so many bytes while clients are at work; until it is known better they are.
    pub(super) fn with_rests(floor: u64, look_bytes: u64, now: Time) -> Rate {
        let rests = Rests { looking_since: None, paid: (now, 0), until: now };
        Rate { client_at: Some(now), rests: Some(rests), ..Rate::new(floor, look_bytes, now) }
    }

    /// A client's request that was taken at `asked_at` was answered now.
    pub(super) fn client_answered(&mut self, asked_at: Time, now: Time) {
        self.client_at = Some(now);
        let took = now.saturating_sub(asked_at);
        let met_copies = asked_at <= self.copying_until;
        note(if met_copies { &mut self.busy } else { &mut self.quiet }, took);
    }

    /// Clients wait for answers, however long ago they asked.
    pub(super) fn clients_wait(&mut self, now: Time) {
        self.client_at = Some(now);
    }

    /// Whether looks of a scrub are under way. When the last one has ended, a rest begins.
    pub(super) fn looking(&mut self, is_under_way: bool, now: Time) {
        if is_under_way {
            self.copying(now);
        }
        let floor = self.floor.max(1);
        let Some(rests) = &mut self.rests else { return };
        if is_under_way {
            rests.looking_since.get_or_insert(now);
        } else if let Some(since) = rests.looking_since.take() {
            let (paid_at, bytes) = rests.paid;
            let floor_allows = Duration::from_micros(bytes.saturating_mul(1_000_000) / floor);
            rests.until = (now + now.saturating_sub(since) * RESTS).min(paid_at + floor_allows);
        }
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

    /// Whether a copy or look of `bytes` may begin now; if so it is paid for.
    pub(super) fn take(&mut self, bytes: u64, now: Time) -> bool {
        self.adjust(now);
        let keeps_little = self.rests.is_some() && !self.is_idle(now);
        let passed = now.saturating_sub(self.refilled_at);
        let rate = u128::from(self.bytes_per_second.max(1));
        let earned = (rate * passed.as_nanos() / 1_000_000_000) as u64;
        let burst = self.bytes_per_second * BURST_TIME_MAX.as_millis() as u64 / 1000;
        let most = if keeps_little { self.burst_bytes_min } else { burst.max(self.burst_bytes_min) };
        if earned > 0 || keeps_little {
            self.tokens = self.tokens.saturating_add(earned).min(most);
        }
        // What is less than a byte counts the next time, however often this is asked.
        let paid_for = (u128::from(earned) * 1_000_000_000).div_ceil(rate) as u64;
        self.refilled_at = (self.refilled_at + Duration::from_nanos(paid_for)).min(now);
        let rests = keeps_little && self.rests.is_some_and(|rests| now < rests.until);
        if rests || (!self.bursting && self.tokens < self.burst_bytes_min) {
            return false;
        }
        self.bursting = self.tokens > bytes;
        let pays = self.bursting || self.tokens >= bytes;
        self.tokens = self.tokens.saturating_sub(if pays { bytes } else { 0 });
        if let Some(rests) = self.rests.as_mut().filter(|_| pays) {
            rests.paid = (now, bytes);
            rests.looking_since = Some(now);
        }
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
        let mut rate = Rate::new(8 * MIB, MIB, Time::ZERO);
        assert!(copied(&mut rate, Time::ZERO, 5, None) > 1000 * MIB);
    }

    #[test]
    fn clients_that_suffer_slow_it_down_to_the_floor_and_not_below() {
        let mut rate = Rate::new(8 * MIB, MIB, Time::ZERO);
        copied(&mut rate, Time::ZERO, 3, None);
        let suffering = Some((Duration::from_micros(300), Duration::from_micros(1500)));
        copied(&mut rate, ms(3000), 5, suffering);
        let bytes = copied(&mut rate, ms(8000), 10, suffering);
        assert!((60 * MIB..200 * MIB).contains(&bytes), "{} MiB in 10 s", bytes / MIB);
    }

    #[test]
    fn a_floor_above_what_any_disk_does_is_no_limit() {
        let mut rate = Rate::new(64 << 30, MIB, Time::ZERO);
        assert!(copied(&mut rate, Time::ZERO, 1, None) > 1000 * MIB);
    }

    #[test]
    fn clients_that_notice_nothing_do_not_slow_it_down() {
        let mut rate = Rate::new(8 * MIB, MIB, Time::ZERO);
        let content = Some((Duration::from_micros(300), Duration::from_micros(330)));
        let bytes = copied(&mut rate, Time::ZERO, 10, content);
        assert!(bytes > 160 * MIB, "{} MiB in 10 s", bytes / MIB);
    }

    #[test]
    fn a_low_floor_is_kept_however_often_it_is_asked() {
        let mut rate = Rate::new(MIB / 16, MIB / 4, Time::ZERO);
        let mut bytes = 0;
        for step in 0..20_000_000 / 29 {
            let now = Time::from_micros(step * 29);
            rate.clients_wait(now);
            bytes += if rate.take(MIB / 4, now) { MIB / 4 } else { 0 };
        }
        assert!(bytes >= MIB * 5 / 4, "{} KiB in 20 s", bytes / 1024);
    }

    const LOOK: u64 = MIB / 4;

    /// Looks one by one for so many ms while clients are at work; each look takes `took_ms`. When each began, ms.
    fn looked(rate: &mut Rate, from_ms: u64, for_ms: u64, took_ms: u64) -> Vec<u64> {
        let (mut begun, mut until_ms) = (Vec::new(), from_ms);
        for at in from_ms..from_ms + for_ms {
            rate.clients_wait(ms(at));
            rate.client_answered(ms(at), ms(at));
            rate.looking(at < until_ms, ms(at));
            if at >= until_ms && rate.take(LOOK, ms(at)) {
                assert!(!rate.take(LOOK, ms(at)), "a second look at once");
                begun.push(at);
                until_ms = at + took_ms;
                rate.looking(true, ms(at));
            }
        }
        begun
    }

    #[test]
    fn a_scrub_looks_once_at_a_time_while_clients_are_at_work_and_not_below_its_floor() {
        let mut rate = Rate::with_rests(4 * MIB, LOOK, Time::ZERO);
        assert!(!rate.is_idle(ms(400)), "nobody knows yet that there are no clients");
        let begun = looked(&mut rate, 0, 10_000, 1);
        assert!(begun.windows(2).all(|pair| pair[1] - pair[0] >= 5), "{begun:?}");
        assert!(begun.len() as u64 * LOOK >= 36 * MIB, "{} looks in 10 s", begun.len());
    }

    #[test]
    fn a_scrub_rests_four_times_as_long_as_a_look_took_unless_that_falls_under_its_floor() {
        let mut rate = Rate::with_rests(4 * MIB, LOOK, Time::ZERO);
        // What it may spend is no limit: nobody was there for long, and clients take no notice.
        for at in 0..3000 {
            rate.take(0, ms(at));
        }
        assert!(rate.is_idle(ms(3000)));
        let quick = looked(&mut rate, 3000, 500, 3);
        assert!(quick.windows(2).all(|pair| pair[1] - pair[0] == 15), "{quick:?}");
        let slow = looked(&mut rate, 3600, 500, 40);
        assert!(slow.windows(2).all(|pair| (62..=63).contains(&(pair[1] - pair[0]))), "{slow:?}");
    }

    #[test]
    fn what_a_scrub_may_spend_shrinks_to_one_look_when_clients_come_and_grows_when_they_go() {
        let mut rate = Rate::with_rests(64 * MIB, LOOK, Time::ZERO);
        for at in 0..3000 {
            rate.take(0, ms(at));
        }
        assert!(rate.take(LOOK, ms(3000)) && rate.take(LOOK, ms(3000)), "nobody is there");
        rate.clients_wait(ms(3000));
        assert!(rate.take(LOOK, ms(3000)));
        assert!(!rate.take(LOOK, ms(3000)), "somebody is");
    }

    #[test]
    fn clients_that_wait_long_for_an_answer_are_not_idle() {
        let mut rate = Rate::with_rests(4 * MIB, LOOK, Time::ZERO);
        for at in (0..5000).step_by(5) {
            rate.clients_wait(ms(at));
        }
        assert!(!rate.is_idle(ms(5400)));
        assert!(rate.is_idle(ms(5600)));
    }
}
