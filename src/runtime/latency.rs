//! How long requests took: one histogram for reads, one for changes, forgotten step by step so that status shows the
//! present.

use std::sync::Mutex;
use std::time::Duration;

use hdrhistogram::Histogram;

/// Samples after which the older half of the memory is forgotten.
const WINDOW_SAMPLES: u64 = 50_000;
const LATENCY_US_MAX: u64 = 600_000_000;

/// Percentiles of one kind of request, us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Percentiles {
    pub(super) p50: u64,
    pub(super) p99: u64,
}

#[derive(Debug)]
struct Window {
    current: Histogram<u32>,
    previous: Histogram<u32>,
}

/// A histogram that several threads add to.
#[derive(Debug)]
pub(super) struct Latency(Mutex<Window>);

fn histogram() -> Histogram<u32> {
    Histogram::new_with_bounds(1, LATENCY_US_MAX, 2).expect("the bounds are sound")
}

impl Latency {
    pub(super) fn new() -> Latency {
        Latency(Mutex::new(Window { current: histogram(), previous: histogram() }))
    }

    pub(super) fn record(&self, took: Duration) {
        let mut window = self.0.lock().expect("no thread panicked with the lock");
        window.current.saturating_record(u64::try_from(took.as_micros()).unwrap_or(LATENCY_US_MAX));
        if window.current.len() >= WINDOW_SAMPLES {
            let window = &mut *window;
            std::mem::swap(&mut window.current, &mut window.previous);
            window.current.reset();
        }
    }

    pub(super) fn percentiles(&self) -> Percentiles {
        let window = self.0.lock().expect("no thread panicked with the lock");
        let mut all = window.previous.clone();
        // Both histograms have the same bounds.
        if all.is_empty() && window.current.is_empty() || all.add(&window.current).is_err() {
            return Percentiles::default();
        }
        Percentiles { p50: all.value_at_quantile(0.5), p99: all.value_at_quantile(0.99) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_what_was_recorded_lately() {
        let latency = Latency::new();
        assert_eq!(latency.percentiles(), Percentiles::default());
        for us in 1..=1000 {
            latency.record(Duration::from_micros(us));
        }
        let p = latency.percentiles();
        assert!((495..=510).contains(&p.p50) && (985..=1000).contains(&p.p99), "{p:?}");
        for _ in 0..2 * WINDOW_SAMPLES {
            latency.record(Duration::from_micros(7));
        }
        assert_eq!(latency.percentiles(), Percentiles { p50: 7, p99: 7 });
    }
}
