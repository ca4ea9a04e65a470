//! How many lines about connections may be logged: whoever can connect must not be able to fill the log.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines at once.
const BURST: u32 = 20;
/// For each of these that passes, one more line.
const REFILL: Duration = Duration::from_secs(1);

/// Lets some lines pass and counts the rest.
#[derive(Debug)]
pub(super) struct LogGate(Mutex<State>);

#[derive(Debug)]
struct State {
    lines: u32,
    refilled: Instant,
    suppressed: u64,
}

impl LogGate {
    pub(super) fn new() -> Self {
        Self(Mutex::new(State { lines: BURST, refilled: Instant::now(), suppressed: 0 }))
    }

    /// Whether a line may be logged now, and then how many were not since the last.
    pub(super) fn pass(&self) -> Option<u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pass(Instant::now())
    }
}

impl State {
    fn pass(&mut self, now: Instant) -> Option<u64> {
        let elapsed = now.saturating_duration_since(self.refilled);
        let refills = u32::try_from(elapsed.as_nanos() / REFILL.as_nanos()).unwrap_or(u32::MAX);
        if refills > 0 {
            self.lines = self.lines.saturating_add(refills).min(BURST);
            self.refilled = now;
        }
        if self.lines == 0 {
            self.suppressed += 1;
            return None;
        }
        self.lines -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted_instead_of_logged() {
        let start = Instant::now();
        let mut state = State { lines: BURST, refilled: start, suppressed: 0 };
        let passed = (0..1000).filter(|_| state.pass(start).is_some()).count();
        assert_eq!(passed, BURST as usize);
        assert_eq!(state.pass(start + REFILL), Some(1000 - u64::from(BURST)));
        assert_eq!(state.pass(start + REFILL), None);
    }

    #[test]
    fn quiet_times_save_up_no_more_than_one_burst() {
        let start = Instant::now();
        let mut state = State { lines: 0, refilled: start, suppressed: 0 };
        let later = start + Duration::from_secs(86_400);
        assert_eq!((0..100).filter(|_| state.pass(later).is_some()).count(), BURST as usize);
    }
}
