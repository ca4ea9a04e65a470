//! How long members take to answer reads: a histogram of the last thousand or so, and the percentile that says which
//! answers are late. Knows nothing of members.

use std::time::Duration;

/// The first bucket ends here; with each octave four more begin.
const FIRST_US: u64 = 16;
const PER_OCTAVE: usize = 4;
const OCTAVES: usize = 20;
const BUCKETS: usize = OCTAVES * PER_OCTAVE;
/// With so many samples half of each bucket is forgotten.
const SAMPLES_MAX: u32 = 1024;
/// With fewer nothing is known.
const SAMPLES_MIN: u32 = 16;

/// The histogram.
#[derive(Debug)]
pub(super) struct ReadLatency {
    counts: [u32; BUCKETS],
    total: u32,
}

fn bucket_of(sample: Duration) -> usize {
    let us = u64::try_from(sample.as_micros()).unwrap_or(u64::MAX).clamp(FIRST_US, FIRST_US << OCTAVES);
    let octave = (us / FIRST_US).ilog2() as usize;
    let part = (us - (FIRST_US << octave)) * PER_OCTAVE as u64 / (FIRST_US << octave);
    (octave * PER_OCTAVE + part as usize).min(BUCKETS - 1)
}

/// Where a bucket ends.
fn end_of(bucket: usize) -> Duration {
    let (octave, part) = (bucket / PER_OCTAVE, bucket % PER_OCTAVE);
    Duration::from_micros((FIRST_US << octave) * (PER_OCTAVE + part + 1) as u64 / PER_OCTAVE as u64)
}

impl ReadLatency {
    pub(super) fn new() -> ReadLatency {
        ReadLatency { counts: [0; BUCKETS], total: 0 }
    }

    /// A member answered after so long, or was not waited for any longer.
    pub(super) fn note(&mut self, sample: Duration) {
        self.counts[bucket_of(sample)] += 1;
        self.total += 1;
        if self.total >= SAMPLES_MAX {
            self.counts.iter_mut().for_each(|count| *count /= 2);
            self.total = self.counts.iter().sum();
        }
    }

    /// 95 of 100 answers take no longer; a little more than that. `None` as long as too little is known.
    pub(super) fn p95(&self) -> Option<Duration> {
        if self.total < SAMPLES_MIN {
            return None;
        }
        let mut left = self.total * 95 / 100;
        let bucket = self.counts.iter().position(|count| {
            let is_here = *count > left;
            left = left.saturating_sub(*count);
            is_here
        });
        bucket.map(end_of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_and_hold_what_belongs_there() {
        let mut last = 0;
        for us in 0..2_000_000 {
            let sample = Duration::from_micros(us);
            let bucket = bucket_of(sample);
            assert!(bucket == last || bucket == last + 1, "{us} us is in bucket {bucket} after {last}");
            assert!(end_of(bucket) > sample || us < FIRST_US);
            last = bucket;
        }
        assert_eq!(bucket_of(Duration::MAX), BUCKETS - 1);
    }

    #[test]
    fn the_percentile_is_close_and_follows_what_is_measured() {
        let mut latency = ReadLatency::new();
        assert_eq!(latency.p95(), None);
        for us in 1..=1000 {
            latency.note(Duration::from_micros(us));
        }
        let p95 = latency.p95().unwrap().as_micros();
        assert!((900..1200).contains(&p95), "{p95} us");
        for _ in 0..10_000 {
            latency.note(Duration::from_millis(20));
        }
        assert!((20..25).contains(&latency.p95().unwrap().as_millis()));
        for _ in 0..10_000 {
            latency.note(Duration::from_micros(100));
        }
        assert!((100..130).contains(&latency.p95().unwrap().as_micros()));
    }
}
