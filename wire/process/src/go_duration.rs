//! Durations in Go's notation (`1h0m0s`, `100ms`, `1.5h`), which Konnectivity's flags have.

use std::{fmt, str::FromStr, time::Duration};

/// A signed duration in nanoseconds, up to about 292 years, as in Go.
///
/// clap parses it through [`FromStr`]. Its text is that of Go's `Duration.String`, so either
/// program reads what the other prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GoDuration {
    nanos: i64,
}

/// A text is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseDurationError {
    /// Empty, or not of the form number-unit-number-unit….
    #[error("not a duration; write a number and a unit, such as 500ms, 10s, 1h30m or 0")]
    Malformed,
    /// A number without a unit after it.
    #[error("a unit is missing; write one of ns, us, ms, s, m, h after each number")]
    MissingUnit,
    /// A unit that Go does not know.
    #[error("{0:?} is not a unit of time; use ns, us, ms, s, m or h")]
    UnknownUnit(String),
    /// More than 64 bits of nanoseconds.
    #[error("longer than the 292 years a duration can hold")]
    TooLong,
}

const NANOSECOND: i128 = 1;
const MICROSECOND: i128 = 1_000 * NANOSECOND;
const MILLISECOND: i128 = 1_000 * MICROSECOND;
const SECOND: i128 = 1_000 * MILLISECOND;
const MINUTE: i128 = 60 * SECOND;
const HOUR: i128 = 60 * MINUTE;

impl GoDuration {
    /// A duration of `seconds`.
    pub const fn from_secs(seconds: u32) -> Self {
        Self { nanos: seconds as i64 * 1_000_000_000 }
    }

    /// Whether the duration is below zero, which Go allows and most flags do not.
    pub const fn is_negative(self) -> bool {
        self.nanos < 0
    }

    /// The duration as a [`Duration`]; `None` below zero.
    pub fn non_negative(self) -> Option<Duration> {
        u64::try_from(self.nanos).ok().map(Duration::from_nanos)
    }
}

impl TryFrom<Duration> for GoDuration {
    type Error = ParseDurationError;

    fn try_from(duration: Duration) -> Result<Self, Self::Error> {
        i64::try_from(duration.as_nanos())
            .map(|nanos| Self { nanos })
            .map_err(|_| ParseDurationError::TooLong)
    }
}

impl FromStr for GoDuration {
    type Err = ParseDurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (negative, mut rest) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        if rest == "0" {
            return Ok(Self::default());
        }
        if rest.is_empty() {
            return Err(ParseDurationError::Malformed);
        }
        let mut total: i128 = 0;
        while !rest.is_empty() {
            let (term, after) = take_term(rest)?;
            rest = after;
            total = total.checked_add(term).ok_or(ParseDurationError::TooLong)?;
        }
        let total = if negative { -total } else { total };
        let nanos = i64::try_from(total).map_err(|_| ParseDurationError::TooLong)?;
        Ok(Self { nanos })
    }
}

/// Nanoseconds of the first number-unit pair, and the text after it.
fn take_term(text: &str) -> Result<(i128, &str), ParseDurationError> {
    let (whole, rest) = take_digits(text);
    let (fraction, rest) = match rest.strip_prefix('.') {
        Some(rest) => take_digits(rest),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(ParseDurationError::Malformed);
    }
    let unit_end = rest.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(rest.len());
    let (unit, rest) = rest.split_at(unit_end);
    let unit = match unit {
        "" => return Err(ParseDurationError::MissingUnit),
        "ns" => NANOSECOND,
        "us" | "\u{b5}s" | "\u{3bc}s" => MICROSECOND, // the micro sign and the Greek mu
        "ms" => MILLISECOND,
        "s" => SECOND,
        "m" => MINUTE,
        "h" => HOUR,
        other => return Err(ParseDurationError::UnknownUnit(other.to_owned())),
    };
    let whole: i128 = match whole {
        "" => 0,
        digits => digits.parse().map_err(|_| ParseDurationError::TooLong)?,
    };
    let whole = whole.checked_mul(unit).ok_or(ParseDurationError::TooLong)?;
    let (mut part, mut scale) = (0_i64, 1_f64);
    for digit in fraction.bytes() {
        let longer = part.checked_mul(10).and_then(|p| p.checked_add(i64::from(digit - b'0')));
        let Some(longer) = longer else { break }; // digits too small to count
        part = longer;
        scale *= 10.0;
    }
    // In floating point, as in Go, where a third of an hour is exactly 20 minutes.
    let part = (part as f64 * (unit as f64 / scale)) as i128;
    let nanos = whole.checked_add(part).ok_or(ParseDurationError::TooLong)?;
    Ok((nanos, rest))
}

fn take_digits(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text.split_at(end)
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = i128::from(self.nanos).abs();
        if self.is_negative() {
            f.write_str("-")?;
        }
        let (hours, minutes) = (nanos / HOUR, nanos % HOUR / MINUTE);
        match nanos {
            0 => f.write_str("0s"),
            n if n < MICROSECOND => write!(f, "{n}ns"),
            n if n < MILLISECOND => write!(f, "{}\u{b5}s", Decimal(n, MICROSECOND)),
            n if n < SECOND => write!(f, "{}ms", Decimal(n, MILLISECOND)),
            n if n < MINUTE => write!(f, "{}s", Decimal(n, SECOND)),
            n if n < HOUR => write!(f, "{minutes}m{}s", Decimal(n % MINUTE, SECOND)),
            n => write!(f, "{hours}h{minutes}m{}s", Decimal(n % MINUTE, SECOND)),
        }
    }
}

/// A count of nanoseconds written in a unit, without trailing zeros.
struct Decimal(i128, i128);

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(nanos, unit) = *self;
        write!(f, "{}", nanos / unit)?;
        let mut rest = nanos % unit;
        if rest > 0 {
            f.write_str(".")?;
        }
        while rest > 0 {
            rest *= 10;
            write!(f, "{}", rest / unit)?;
            rest %= unit;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_go_parses() {
        const MS: i64 = 1_000_000;
        for (text, nanos) in [
            ("0", 0),
            ("+0", 0),
            ("-0", 0),
            ("0s", 0),
            ("5s", 5_000 * MS),
            ("+5s", 5_000 * MS),
            ("-5s", -5_000 * MS),
            ("100ms", 100 * MS),
            ("1h0m0s", 3_600_000 * MS),
            ("1.5h", 5_400_000 * MS),
            (".5s", 500 * MS),
            ("5.s", 5_000 * MS),
            ("1h15m30.918s", 4_530_918 * MS),
            ("12us", 12_000),
            ("12\u{b5}s", 12_000),
            ("12\u{3bc}s", 12_000),
            ("7ns", 7),
            ("1.9ns", 1),
            ("0.3333333333333333333h", 1_200_000 * MS),
            ("0.9223372036854775807s", 922_337_203),
            ("9223372036854775807ns", i64::MAX),
            ("-9223372036854775808ns", i64::MIN),
        ] {
            assert_eq!(text.parse(), Ok(GoDuration { nanos }), "{text}");
        }
    }

    #[test]
    fn refuses_what_go_refuses() {
        use ParseDurationError::*;
        for (text, error) in [
            ("", Malformed),
            ("-", Malformed),
            ("s", Malformed),
            (".s", Malformed),
            ("1s ", UnknownUnit("s ".into())),
            ("10", MissingUnit),
            ("1h5", MissingUnit),
            ("3d", UnknownUnit("d".into())),
            ("--5s", Malformed),
            ("9223372036854775808ns", TooLong),
            ("3000000h", TooLong),
            ("99999999999999999999999999999999999999999s", TooLong),
        ] {
            assert_eq!(text.parse::<GoDuration>(), Err(error), "{text}");
        }
    }

    #[test]
    fn prints_what_go_prints() {
        for (nanos, text) in [
            (0, "0s"),
            (1, "1ns"),
            (1_100, "1.1\u{b5}s"),
            (2_200_000, "2.2ms"),
            (100_000_000, "100ms"),
            (3_300_000_000, "3.3s"),
            (60_000_000_000, "1m0s"),
            (245_000_000_000, "4m5s"),
            (245_001_000_000, "4m5.001s"),
            (3_600_000_000_000, "1h0m0s"),
            (18_367_001_000_000, "5h6m7.001s"),
            (-1_500_000_000, "-1.5s"),
            (i64::MAX, "2562047h47m16.854775807s"),
            (i64::MIN, "-2562047h47m16.854775808s"),
        ] {
            assert_eq!(GoDuration { nanos }.to_string(), text);
            assert_eq!(text.parse(), Ok(GoDuration { nanos }), "{text} back again");
        }
    }

    proptest::proptest! {
        #[test]
        fn every_duration_can_be_printed_and_parsed_again(nanos: i64) {
            let duration = GoDuration { nanos };
            proptest::prop_assert_eq!(duration.to_string().parse(), Ok(duration));
        }

        #[test]
        fn parsing_never_panics(text in ".*") {
            let _ = text.parse::<GoDuration>();
        }
    }
}
