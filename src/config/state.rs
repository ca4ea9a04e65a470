//! What the engine keeps for itself between two starts, and how often volumes are scrubbed. Touches no file.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

/// `[state]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct StateConfig {
    /// Directory for what is neither configuration nor data: how far scrubs are. Default: that of the service manager.
    pub directory: Option<PathBuf>,
}

/// How often a volume is scrubbed without being asked: `"30d"`, `"12h"`, or `"off"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScrubInterval(pub Option<Duration>);

/// Why a text is no interval.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not possible; write \"off\", or a number with d, h, min or s from \"10s\" to \"366d\"")]
pub struct ScrubIntervalError {
    text: String,
}

const SECONDS_OF: [(&str, u64); 4] = [("min", 60), ("d", 86_400), ("h", 3_600), ("s", 1)];
const SECONDS_MIN: u64 = 10;
const SECONDS_MAX: u64 = 366 * 86_400;

impl Default for ScrubInterval {
    fn default() -> ScrubInterval {
        ScrubInterval(Some(Duration::from_secs(30 * 86_400)))
    }
}

impl FromStr for ScrubInterval {
    type Err = ScrubIntervalError;

    fn from_str(text: &str) -> Result<ScrubInterval, ScrubIntervalError> {
        if text == "off" {
            return Ok(ScrubInterval(None));
        }
        let seconds = SECONDS_OF.iter().find_map(|(unit, seconds)| {
            let count: u64 = text.strip_suffix(unit)?.trim_end().parse().ok()?;
            count.checked_mul(*seconds)
        });
        let seconds = seconds.filter(|seconds| (SECONDS_MIN..=SECONDS_MAX).contains(seconds));
        let seconds = seconds.ok_or_else(|| ScrubIntervalError { text: text.to_owned() })?;
        Ok(ScrubInterval(Some(Duration::from_secs(seconds))))
    }
}

impl<'de> Deserialize<'de> for ScrubInterval {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<ScrubInterval, D::Error> {
        struct Text;
        impl serde::de::Visitor<'_> for Text {
            type Value = ScrubInterval;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an interval such as \"30d\", or \"off\"")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ScrubInterval, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_numbers_with_a_unit_or_off() {
        for (text, seconds) in [("30d", 2_592_000), ("12h", 43_200), ("90 min", 5400), ("10s", 10)] {
            assert_eq!(text.parse(), Ok(ScrubInterval(Some(Duration::from_secs(seconds)))), "{text}");
        }
        assert_eq!("off".parse(), Ok(ScrubInterval(None)));
        for text in ["", "7", "d", "-1d", "9s", "367d", "18446744073709551615d", "1w", "1.5d"] {
            assert!(text.parse::<ScrubInterval>().is_err(), "{text}");
        }
    }
}
