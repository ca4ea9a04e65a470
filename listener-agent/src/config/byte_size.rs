//! A size in bytes as people write it: `"10GiB"`, `"4096"` or a plain integer.
//!
//! Owns parsing and printing only; what sizes are allowed where is decided by whoever reads them.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer, Visitor};

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

/// Units by their power of 1024, the greatest first, as `Display` wants them.
const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ByteSizeError {
    /// No whole number at the start.
    #[error("`{text}` is not a size; write a whole number of bytes, or one with KiB, MiB, GiB or TiB, such as 256MiB")]
    NotANumber {
        /// The text as given.
        text: String,
    },
    /// A number, followed by something that is no unit.
    #[error("`{text}` has the unknown unit `{unit}`; write KiB, MiB, GiB or TiB (powers of 1024)")]
    UnknownUnit {
        /// The text as given.
        text: String,
        /// What stands where the unit should be.
        unit: String,
    },
    /// More than 2^64 - 1 bytes.
    #[error("`{text}` is too large; the greatest size is 16777215TiB")]
    TooLarge {
        /// The text as given.
        text: String,
    },
}

impl ByteSize {
    /// A size of exactly `bytes` bytes.
    pub const fn from_bytes(bytes: u64) -> ByteSize {
        ByteSize(bytes)
    }

    /// A size of `kib` times 1024 bytes; fails to compile or panics if that overflows, so use it for constants.
    pub const fn kib(kib: u64) -> ByteSize {
        ByteSize(kib.strict_mul(1 << 10))
    }

    /// A size of `mib` times 1024^2 bytes; for constants, as `kib`.
    pub const fn mib(mib: u64) -> ByteSize {
        ByteSize(mib.strict_mul(1 << 20))
    }

    /// A size of `gib` times 1024^3 bytes; for constants, as `kib`.
    pub const fn gib(gib: u64) -> ByteSize {
        ByteSize(gib.strict_mul(1 << 30))
    }

    /// A size of `tib` times 1024^4 bytes; for constants, as `kib`.
    pub const fn tib(tib: u64) -> ByteSize {
        ByteSize(tib.strict_mul(1 << 40))
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// For people: one decimal in the greatest unit that leaves at least 1, such as `1.5 GiB` or `12 B`. Rounded.
    pub fn human(self) -> String {
        for (unit, shift) in UNITS {
            let scale = 1u64 << shift;
            if self.0 < scale {
                continue;
            }
            return if self.0.is_multiple_of(scale) {
                format!("{} {unit}", self.0 >> shift)
            } else {
                format!("{:.1} {unit}", self.0 as f64 / scale as f64)
            };
        }
        format!("{} B", self.0)
    }
}

impl fmt::Display for ByteSize {
    /// Exact: what is printed parses to the same size.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in UNITS {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl FromStr for ByteSize {
    type Err = ByteSizeError;

    fn from_str(text: &str) -> Result<ByteSize, ByteSizeError> {
        let trimmed = text.trim();
        let digits_end = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let (digits, unit) = trimmed.split_at(digits_end);
        let unit = unit.trim_start();
        if digits.is_empty() || unit.starts_with(['.', ',', '_']) {
            return Err(ByteSizeError::NotANumber { text: text.to_owned() });
        }
        let too_large = || ByteSizeError::TooLarge { text: text.to_owned() };
        let count: u64 = digits.parse().map_err(|_| too_large())?;
        if unit.is_empty() {
            return Ok(ByteSize(count));
        }
        let (_, shift) = UNITS
            .into_iter()
            .find(|(name, _)| *name == unit)
            .ok_or_else(|| ByteSizeError::UnknownUnit { text: text.to_owned(), unit: unit.to_owned() })?;
        count.checked_mul(1 << shift).map(ByteSize).ok_or_else(too_large)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ByteSize, D::Error> {
        deserializer.deserialize_any(ByteSizeVisitor)
    }
}

struct ByteSizeVisitor;

impl Visitor<'_> for ByteSizeVisitor {
    type Value = ByteSize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size such as \"256MiB\" or a whole number of bytes")
    }

    fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
        Ok(ByteSize(bytes))
    }

    fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
        u64::try_from(bytes).map(ByteSize).map_err(|_| E::invalid_value(de::Unexpected::Signed(bytes), &self))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
        text.parse().map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_every_unit() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64KiB", 65_536),
            ("256MiB", 268_435_456),
            ("10GiB", 10_737_418_240),
            (" 3 TiB ", 3 << 40),
            ("18446744073709551615", u64::MAX),
            ("16777215TiB", 16_777_215 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_printed_reads_back_as_the_same_size() {
        for bytes in [0, 1, 1023, 1024, 4096, 1 << 20, (1 << 30) + 1, u64::MAX] {
            let size = ByteSize::from_bytes(bytes);
            assert_eq!(size.to_string().parse(), Ok(size), "{size}");
        }
        assert_eq!(ByteSize::mib(576).to_string(), "576MiB");
        assert_eq!(ByteSize::from_bytes(1536 << 20).to_string(), "1536MiB");
    }

    #[test]
    fn a_bad_size_is_refused_with_the_units_to_use() {
        let message = |text: &str| text.parse::<ByteSize>().unwrap_err().to_string();
        assert_eq!(message("10GB"), "`10GB` has the unknown unit `GB`; write KiB, MiB, GiB or TiB (powers of 1024)");
        assert_eq!(message("16777216TiB"), "`16777216TiB` is too large; the greatest size is 16777215TiB");
        assert!(message("99999999999999999999").contains("too large"));
        for text in ["", "MiB", "-1", "1.5GiB"] {
            assert!(message(text).contains("is not a size"), "{text}");
        }
    }

    #[test]
    fn people_see_one_decimal() {
        assert_eq!(ByteSize::from_bytes(999).human(), "999 B");
        assert_eq!(ByteSize::gib(10).human(), "10 GiB");
        assert_eq!(ByteSize::from_bytes(1536).human(), "1.5 KiB");
    }
}
