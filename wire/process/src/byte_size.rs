//! Sizes in bytes with Kubernetes' binary suffixes (`2Mi`, `512Ki`), for flags.

use std::{fmt, str::FromStr};

/// A number of bytes: plain (`2097152`) or with `Ki`, `Mi`, `Gi`, each with or without a `B`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ByteSize(pub(crate) u64);

/// A text is not a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a size; write bytes as a whole number, or with Ki, Mi or Gi, such as 2Mi")]
pub(crate) struct ParseSizeError;

const SUFFIXES: [(&str, u64); 3] = [("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)];

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bare = text.strip_suffix('B').unwrap_or(text);
        let (digits, unit) = SUFFIXES
            .iter()
            .find_map(|(suffix, unit)| Some((bare.strip_suffix(suffix)?, *unit)))
            .unwrap_or((text, 1));
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(ParseSizeError);
        }
        let count: u64 = digits.parse().map_err(|_| ParseSizeError)?;
        count.checked_mul(unit).map(Self).ok_or(ParseSizeError)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (suffix, unit) in SUFFIXES {
            if self.0 >= unit && self.0.is_multiple_of(unit) {
                return write!(f, "{}{suffix}", self.0 / unit);
            }
        }
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_plain_bytes_and_suffixes() {
        for (text, bytes) in [
            ("0", 0),
            ("2097152", 2 << 20),
            ("2Mi", 2 << 20),
            ("2MiB", 2 << 20),
            ("512Ki", 512 << 10),
            ("1Gi", 1 << 30),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in [
            "",
            "Mi",
            "2M",
            "-1",
            "+1",
            "1.5Mi",
            "2 Mi",
            "7B",
            "99999999999999999999",
            "99999999999999Gi",
        ] {
            assert_eq!(text.parse::<ByteSize>(), Err(ParseSizeError), "{text}");
        }
    }

    #[test]
    fn prints_the_largest_whole_unit() {
        assert_eq!(ByteSize(2 << 20).to_string(), "2Mi");
        assert_eq!(ByteSize(1536).to_string(), "1536");
        assert_eq!(ByteSize(0).to_string(), "0");
    }
}
