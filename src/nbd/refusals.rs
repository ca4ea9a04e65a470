//! What is logged of the requests that one connection got refused: enough to find the fault in a client, too little to
//! fill a disk, however often the client connects again.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::log_gate::LogGate;
use super::request::{ExportRules, Fault, Refusal, RequestHeader};

/// So many are logged one by one.
const LOGGED_EACH: u64 = 10;
/// Then one line for so many.
const LOGGED_TOGETHER: u64 = 1000;

/// Counts the refused requests of one connection.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    count: u64,
}

impl Refusals {
    /// Logs a refusal if `log` lets it pass, or counts it for a later line.
    pub(super) fn note(&mut self, header: &RequestHeader, rules: ExportRules, refusal: Refusal, log: &LogGate) {
        if refusal.fault == Fault::Stopping {
            tracing::debug!(command = header.command, "NBD request refused: {}", refusal.fault);
            return;
        }
        if self.is_logged()
            && let Some(suppressed) = log.pass()
        {
            tracing::warn!(
                command = header.command,
                flags = header.flags,
                offset = header.offset,
                length = header.length,
                size = rules.size_bytes,
                error = ?refusal.error,
                refused = self.count,
                suppressed,
                "NBD request refused: {}",
                refusal.fault
            );
        }
    }

    /// Counts one more.
    fn is_logged(&mut self) -> bool {
        self.count += 1;
        self.count <= LOGGED_EACH || self.count.is_multiple_of(LOGGED_TOGETHER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_are_logged_each_then_one_for_many() {
        let mut refusals = Refusals::default();
        let logged: Vec<u64> = (1..=2500).filter(|_| refusals.is_logged()).collect();
        assert_eq!(logged, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1000, 2000]);
    }
}
