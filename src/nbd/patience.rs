//! How long a client that takes its replies slowly, or sends slowly, is waited for. Knows no clock and no socket.

use std::time::Duration;

/// Slower than this, a client holds memory that others wait for longer than it is worth.
pub(super) const BYTES_PER_SECOND_MIN: u64 = 256 << 10;

/// Time that a client may still make the server wait: spent by waiting, earned by taking bytes, or by sending them.
///
/// Never more than it was at the start, so that a client that was fast for hours is not waited for any longer than
/// another.
#[derive(Debug)]
pub(super) struct Patience {
    left: Duration,
    max: Duration,
}

impl Patience {
    pub(super) fn new(max: Duration) -> Self {
        Self { left: max, max }
    }

    /// How long the next wait may take.
    pub(super) fn left(&self) -> Duration {
        self.left
    }

    pub(super) fn on_waited(&mut self, waited: Duration) {
        self.left = self.left.saturating_sub(waited);
    }

    pub(super) fn on_taken(&mut self, bytes: usize) {
        let earned = Duration::from_micros((bytes as u64).saturating_mul(1_000_000) / BYTES_PER_SECOND_MIN);
        self.left = self.left.saturating_add(earned).min(self.max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_secs(30);

    /// Seconds for which a client is waited for that takes so many bytes every so many seconds; none if for ever.
    fn endures(bytes: usize, every: Duration) -> Option<u64> {
        let mut patience = Patience::new(MAX);
        let mut waited = Duration::ZERO;
        while waited < Duration::from_secs(3600) {
            if every >= patience.left() {
                return Some((waited + patience.left()).as_secs());
            }
            patience.on_waited(every);
            patience.on_taken(bytes);
            waited += every;
        }
        None
    }

    #[test]
    fn a_byte_now_and_then_buys_no_time() {
        assert_eq!(endures(1, Duration::from_secs(29)), Some(30));
        assert_eq!(endures(1, Duration::from_millis(10)), Some(30));
    }

    #[test]
    fn a_client_at_the_least_rate_is_waited_for_however_long_it_takes() {
        assert_eq!(endures(256 << 10, Duration::from_secs(1)), None);
        assert_eq!(endures(5 << 20, Duration::from_secs(20)), None);
    }

    #[test]
    fn half_of_the_least_rate_is_given_twice_the_time() {
        assert_eq!(endures(128 << 10, Duration::from_secs(1)), Some(59));
    }

    #[test]
    fn speed_in_the_past_saves_up_no_time() {
        let mut patience = Patience::new(MAX);
        patience.on_taken(1 << 40);
        assert_eq!(patience.left(), MAX);
    }
}
