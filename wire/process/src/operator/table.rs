//! Lists for a terminal.

use std::fmt::Write as _;

use crate::kubernetes::Timestamp;

/// Columns of text with titles. What peers say is escaped, and the last column is not filled up.
#[derive(Debug)]
pub struct Table<const N: usize> {
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    /// A table without rows.
    pub fn new(titles: [&str; N]) -> Self {
        Self { rows: vec![titles.map(str::to_owned)] }
    }

    /// Adds a row.
    pub fn push(&mut self, row: [String; N]) {
        self.rows.push(row.map(|cell| escape(&cell)));
    }

    /// The table's lines.
    pub fn render(&self) -> String {
        let mut widths = [0; N];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(widths) {
                let _ = write!(line, "{cell:<width$}  ");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// The text with its control characters escaped.
pub fn escape(text: &str) -> String {
    text.escape_debug().to_string().replace("\\\"", "\"").replace("\\'", "'")
}

/// A time in one unit that people read.
pub fn seconds(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// The time that is left until a point of time in RFC 3339.
pub fn left(time: &str, now: Timestamp) -> String {
    let Ok(time) = time.parse::<Timestamp>() else { return time.into() };
    match time.as_second() - now.as_second() {
        left @ ..0 => format!("{} ago", seconds(left.unsigned_abs())),
        left => seconds(left.unsigned_abs()),
    }
}

/// A number of bytes with three digits at least, in binary units.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes}B");
    }
    #[expect(clippy::cast_precision_loss, reason = "one digit behind the point is shown")]
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1}{}", UNITS[unit])
}

/// The text, or a dash for none.
pub fn or_dash(text: Option<&str>) -> String {
    text.filter(|text| !text.is_empty()).unwrap_or("-").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_escaped() {
        let mut table = Table::new(["A", "LONGER"]);
        table.push(["wide cell".into(), "x\u{1b}[31m\n\"'".into()]);
        table.push(["ä".into(), "".into()]);
        assert_eq!(table.render(), "A          LONGER\nwide cell  x\\u{1b}[31m\\n\"'\nä\n");
    }

    #[test]
    fn the_time_that_is_left_has_one_unit() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        let left = |seconds: i64| {
            left(&Timestamp::from_second(1_000_000 + seconds).unwrap().to_string(), now)
        };
        for (seconds, text) in [(-5, "5s ago"), (0, "0s"), (120, "2m"), (200_000, "2d")] {
            assert_eq!(left(seconds), text);
        }
    }

    #[test]
    fn times_and_sizes_have_one_unit() {
        for (count, text) in
            [(0, "0s"), (119, "119s"), (120, "2m"), (7199, "119m"), (7200, "2h"), (200_000, "2d")]
        {
            assert_eq!(seconds(count), text);
        }
        for (count, text) in [
            (0, "0B"),
            (1023, "1023B"),
            (1024, "1.0KiB"),
            (1536 * 1024, "1.5MiB"),
            (u64::MAX, "16384.0PiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
        assert_eq!(
            (or_dash(None), or_dash(Some("")), or_dash(Some("a"))),
            ("-".into(), "-".into(), "a".into())
        );
    }
}
