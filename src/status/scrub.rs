//! Scrubs in the status report: their JSON, and one line for people. Knows no clock.

use serde::{Deserialize, Serialize};

use super::table::{duration, human};

/// The scrubs of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// Whether one is under way.
    pub state: ScrubState,
    /// What it waits for; null if it does not.
    pub waits_for: Option<String>,
    /// Bytes that it is done with.
    pub done_bytes: u64,
    /// Bytes in all; 0 if none is under way.
    pub total_bytes: u64,
    /// Recent rate.
    pub bytes_per_second: u64,
    /// Time to go at this rate; null while the rate is unknown or zero.
    pub eta_seconds: Option<u64>,
    /// What it found so far.
    pub found: ScrubCounts,
    /// The last one that ended; null if none has.
    pub last: Option<ScrubResult>,
    /// When the next one is due, in milliseconds since 1970-01-01 UTC; null if one is under way or none is planned.
    pub next_ms: Option<u64>,
}

/// Whether a scrub is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScrubState {
    /// None is.
    #[default]
    Idle,
    /// One is.
    Running,
    /// One is, and waits.
    Waiting,
}

/// What a scrub found. Blocks are counted once for each replica whose copy is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ScrubCounts {
    /// Copies that did not match their checksum or could not be read.
    pub bad_blocks: u64,
    /// Copies that matched their checksum and differed from the majority; blocks, where there was none.
    pub differing_blocks: u64,
    /// Of all these, in order now.
    pub repaired_blocks: u64,
    /// Not in order; blocks, where no copy could be believed.
    pub unrepaired_blocks: u64,
    /// Bytes that some member did not look at.
    pub incomplete_bytes: u64,
}

/// How a scrub ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubResult {
    /// When it began, in milliseconds since 1970-01-01 UTC.
    pub began_ms: u64,
    /// When it ended, likewise.
    pub ended_ms: u64,
    /// Whether it came to the end of the volume; else it was stopped.
    pub is_finished: bool,
    /// Bytes that it was done with.
    pub done_bytes: u64,
    /// What it found in these.
    pub counts: ScrubCounts,
}

impl ScrubCounts {
    /// In words.
    pub fn describe(&self) -> String {
        if *self == ScrubCounts::default() {
            return "all in order".to_owned();
        }
        let ScrubCounts { bad_blocks, differing_blocks, repaired_blocks, unrepaired_blocks, incomplete_bytes } = self;
        let mut text = format!(
            "{bad_blocks} bad blocks, {differing_blocks} differing, {repaired_blocks} repaired, {unrepaired_blocks} not repaired"
        );
        if *incomplete_bytes > 0 {
            text.push_str(&format!(", {} not compared with all replicas", human(*incomplete_bytes)));
        }
        text
    }
}

impl ScrubStatus {
    /// How far the one under way is.
    pub fn progress(&self) -> String {
        let percent = (u128::from(self.done_bytes) * 100).checked_div(u128::from(self.total_bytes));
        // Of a volume that does not serve yet the size is not known.
        let mut text = percent.map_or_else(
            || format!("{} looked at", human(self.done_bytes)),
            |percent| format!("{percent} % of {}", human(self.total_bytes)),
        );
        if let Some(waits_for) = &self.waits_for {
            text.push_str(&format!(", waits: {waits_for}"));
        } else {
            text.push_str(&format!(", {}/s", human(self.bytes_per_second)));
            let to_go = self.eta_seconds.map(|seconds| format!(", {} to go", duration(seconds)));
            text.push_str(&to_go.unwrap_or_default());
        }
        format!("{text}; so far {}", self.found.describe())
    }

    /// One line: the one under way, or the last one and the next.
    pub(super) fn line(&self) -> String {
        match self.state {
            ScrubState::Running | ScrubState::Waiting => format!("scrub {}", self.progress()),
            ScrubState::Idle => {
                let last = self.last.map_or("none yet".to_owned(), |last| {
                    let (when, found) = (utc(last.ended_ms), last.counts.describe());
                    if last.is_finished {
                        format!("finished {when}, {found}")
                    } else {
                        format!("stopped {when}, of {} looked at: {found}", human(last.done_bytes))
                    }
                });
                let next = self.next_ms.map(|ms| format!("; next {}", utc(ms))).unwrap_or_default();
                format!("scrub: {last}{next}")
            }
        }
    }
}

/// A time in UTC, to the minute.
fn utc(ms: u64) -> String {
    let (days, minutes) = (ms / 86_400_000, ms / 60_000 % 1440);
    // From the first of March of the year 0 on, each 400 years have 146097 days, and leap days are at the end of a year.
    let day = days + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let (day, month) = (of_year - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}Z", minutes / 60, minutes % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_in_utc() {
        for (ms, text) in [
            (0, "1970-01-01 00:00Z"),
            (951_782_340_000, "2000-02-28 23:59Z"),
            (951_782_400_000, "2000-02-29 00:00Z"),
            (1_709_251_200_000, "2024-03-01 00:00Z"),
            (4_102_444_740_000, "2099-12-31 23:59Z"),
        ] {
            assert_eq!(utc(ms), text);
        }
    }

    #[test]
    fn people_see_how_far_it_is_or_how_it_ended() {
        let running = ScrubStatus {
            state: ScrubState::Running,
            done_bytes: 1 << 29,
            total_bytes: 1 << 31,
            bytes_per_second: 100 << 20,
            eta_seconds: Some(75),
            found: ScrubCounts { bad_blocks: 3, repaired_blocks: 2, ..ScrubCounts::default() },
            ..ScrubStatus::default()
        };
        let so_far = "so far 3 bad blocks, 0 differing, 2 repaired, 0 not repaired";
        assert_eq!(running.line(), format!("scrub 25 % of 2 GiB, 100 MiB/s, 1 min 15 s to go; {so_far}"));
        let waits_for = Some("replica c is being brought back".to_owned());
        let waiting = ScrubStatus { state: ScrubState::Waiting, waits_for, ..running };
        assert!(waiting.line().starts_with("scrub 25 % of 2 GiB, waits: replica c is being brought back; so far"));
        assert_eq!(ScrubStatus::default().line(), "scrub: none yet");
        let counts = ScrubCounts { unrepaired_blocks: 1, incomplete_bytes: 4096, ..ScrubCounts::default() };
        let last = Some(ScrubResult { began_ms: 0, ended_ms: 60_000, is_finished: false, done_bytes: 4 << 20, counts });
        let idle = ScrubStatus { last, next_ms: Some(86_400_000), ..ScrubStatus::default() };
        let found = "0 bad blocks, 0 differing, 0 repaired, 1 not repaired, 4 KiB not compared with all replicas";
        assert_eq!(
            idle.line(),
            format!("scrub: stopped 1970-01-01 00:01Z, of 4 MiB looked at: {found}; next 1970-01-02 00:00Z")
        );
    }
}
