//! The last events of all volumes, kept for people: `/events` and `nbdcast top` show them. Nothing is decided by them.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::status::{EventSeverity, EventStatus};

/// Older ones are forgotten.
const EVENTS_MAX: usize = 1000;

/// The last events, oldest first.
#[derive(Default)]
pub(super) struct EventLog(Mutex<VecDeque<EventStatus>>);

impl EventLog {
    fn lock(&self) -> MutexGuard<'_, VecDeque<EventStatus>> {
        self.0.lock().expect("no thread panicked with the lock")
    }

    /// Notes an event of this moment.
    pub(super) fn note(&self, volume: &str, replica: Option<String>, severity: EventSeverity, text: String) {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time_ms = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
        let mut events = self.lock();
        if events.len() >= EVENTS_MAX {
            events.pop_front();
        }
        events.push_back(EventStatus { time_ms, volume: volume.to_owned(), replica, severity, text });
    }

    /// All that are kept.
    pub(super) fn all(&self) -> Vec<EventStatus> {
        self.lock().iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_events_are_forgotten_first() {
        let log = EventLog::default();
        for number in 0..EVENTS_MAX + 7 {
            log.note("vol0", None, EventSeverity::Info, number.to_string());
        }
        let events = log.all();
        assert_eq!(events.len(), EVENTS_MAX);
        assert_eq!((events[0].text.as_str(), events[EVENTS_MAX - 1].text.as_str()), ("7", "1006"));
    }
}
