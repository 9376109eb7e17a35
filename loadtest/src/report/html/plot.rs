//! Plots as SVG.

use std::fmt::Write as _;

use super::escape;
use crate::report::{
    looks::{Look, look},
    summary::figure,
};

/// Size of a plot and its margins, in SVG's units.
const WIDTH: f64 = 400.0;
const HEIGHT: f64 = 320.0;
/// Width of a picture of bars.
const BARS_WIDTH: f64 = 600.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 30.0;
/// Room for the axis and two rows of legend.
const BOTTOM: f64 = 92.0;

/// How values become positions, with the axis's title.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scale {
    /// Evenly, from zero or below.
    Linear(&'static str),
    /// Logarithmic.
    Log(&'static str),
    /// Shares from 0 to 1, where each further nine takes the same space.
    Nines(&'static str),
}

/// The points of one peer.
#[derive(Clone, Debug)]
pub(super) struct Series {
    peer: String,
    points: Vec<(f64, f64)>,
    faint: bool,
}

impl Series {
    pub(super) fn new(peer: &str, points: Vec<(f64, f64)>) -> Self {
        Self { peer: peer.into(), points, faint: false }
    }

    /// Whether the peer's name begins with this.
    pub(super) fn is_of(&self, group: &str) -> bool {
        self.peer.starts_with(group)
    }

    #[cfg(test)]
    pub(super) fn shares(&self) -> Vec<f64> {
        self.points.iter().map(|(_, share)| *share).collect()
    }

    pub(super) fn faint(peer: &str, points: Vec<(f64, f64)>) -> Self {
        Self { faint: true, ..Self::new(peer, points) }
    }
}

/// A plot of lines.
#[derive(Clone, Debug)]
pub(super) struct Plot {
    pub(super) title: String,
    pub(super) x: Scale,
    pub(super) y: Scale,
    pub(super) series: Vec<Series>,
    /// Events on the x axis.
    pub(super) events: Vec<(f64, String)>,
    /// Whether the x axis has seconds, of which those below zero are the warm-up.
    pub(super) is_over_time: bool,
    /// A value of the x axis that no peer can be better than, and its name.
    pub(super) x_bound: Option<(f64, String)>,
    /// The same of the y axis.
    pub(super) y_bound: Option<(f64, String)>,
}

/// The plot as SVG, with the peers of one group in colour and the others in grey.
pub(super) fn plot(plot: &Plot, group: &str) -> String {
    let points = || plot.series.iter().flat_map(|series| series.points.iter().copied());
    let bound = |bound: &Option<(f64, String)>| bound.as_ref().map(|(value, _)| *value);
    let (x_bound, y_bound) = (bound(&plot.x_bound), bound(&plot.y_bound));
    let x = Axis::new(plot.x, points().map(|(x, _)| x).chain(x_bound), LEFT, WIDTH - RIGHT);
    let y = Axis::new(plot.y, points().map(|(_, y)| y).chain(y_bound), HEIGHT - BOTTOM, TOP);
    let mut svg = frame(group, &plot.title, &x, &y);
    svg += &marks(plot, &x, &y);
    let path = |series: &Series| {
        let place = |(px, py): &(f64, f64)| format!("{:.1},{:.1}", x.place(*px), y.place(*py));
        series.points.iter().map(place).collect::<Vec<_>>().join(" ")
    };
    for series in plot.series.iter().filter(|series| !series.is_of(group) && !series.faint) {
        let _ = writeln!(svg, "<polyline class=\"line muted\" points=\"{}\"/>", path(series));
    }
    let mut peers: Vec<&str> = Vec::new();
    for series in plot.series.iter().filter(|series| series.is_of(group)) {
        let Look { colour, dash } = look(&series.peer);
        let class = if series.faint { "line faint" } else { "line" };
        let _ = writeln!(
            svg,
            "<polyline class=\"{class}\" stroke=\"{colour}\" stroke-dasharray=\"{dash}\" points=\"{}\"/>",
            path(series)
        );
        if !series.faint {
            peers.push(&series.peer);
        }
    }
    svg + &legend(&peers) + "</svg>\n"
}

/// The warm-up, the events and the bounds of a plot.
fn marks(plot: &Plot, x: &Axis, y: &Axis) -> String {
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    let mut svg = String::new();
    if plot.is_over_time && x.low < 0.0 {
        let width = x.place(0.0) - LEFT;
        let _ = writeln!(
            svg,
            "<rect class=\"warm-up\" x=\"{LEFT}\" y=\"{TOP}\" width=\"{width:.1}\" \
             height=\"{:.1}\"><title>warm-up, in no figure</title></rect>",
            bottom - TOP
        );
    }
    for (second, what) in &plot.events {
        let (at, what) = (x.place(*second), escape(what));
        let _ = writeln!(
            svg,
            "<line class=\"event\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom}\"/>\
             <text class=\"weak\" x=\"{:.1}\" y=\"{:.1}\">{what}</text>",
            at + 3.0,
            TOP + 10.0
        );
    }
    if let Some((value, name)) = &plot.x_bound {
        let (at, name) = (x.place(*value), escape(name));
        let _ = writeln!(
            svg,
            "<line class=\"bound\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom}\"/>\
             <text class=\"weak\" x=\"{:.1}\" y=\"{:.1}\">{name}</text>",
            at + 3.0,
            bottom - 5.0
        );
    }
    if let Some((value, name)) = &plot.y_bound {
        let (at, name) = (y.place(*value), escape(name));
        let _ = writeln!(
            svg,
            "<line class=\"bound\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text class=\"weak\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>",
            right - 3.0,
            at - 4.0
        );
    }
    svg
}

/// Bars, one per peer with a text behind its value; nothing if there are none.
pub(super) fn bars(title: &str, values: &[(String, f64, String)]) -> String {
    let largest = values.iter().map(|(_, value, _)| *value).fold(0.0, f64::max);
    if largest <= 0.0 {
        return String::new();
    }
    let height = TOP + 26.0 * values.len() as f64 + 8.0;
    let mut svg = open(title, title, BARS_WIDTH, height);
    for (index, (peer, value, label)) in values.iter().enumerate() {
        let top = TOP + 8.0 + 26.0 * index as f64;
        let length = (BARS_WIDTH - 430.0) * value / largest;
        let Look { colour, .. } = look(peer);
        let _ = writeln!(
            svg,
            "<text x=\"8\" y=\"{:.1}\">{}</text>\
             <rect x=\"205\" y=\"{top:.1}\" width=\"{length:.1}\" height=\"16\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{} \
             <tspan class=\"weak\">{}</tspan></text>",
            top + 12.0,
            escape(peer),
            211.0 + length,
            top + 12.0,
            figure(*value),
            escape(label)
        );
    }
    svg + "</svg>\n"
}

fn open(title: &str, label: &str, width: f64, height: f64) -> String {
    let (title, label) = (escape(title), escape(label));
    format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{label}\">\
         <text class=\"title\" x=\"8\" y=\"16\">{title}</text>\n"
    )
}

fn frame(group: &str, title: &str, x: &Axis, y: &Axis) -> String {
    let mut svg = open(group, &format!("{group}, {title}"), WIDTH, HEIGHT);
    let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    for (value, label) in y.ticks() {
        let at = y.place(value);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            LEFT - 6.0,
            at + 4.0
        );
    }
    for (value, label) in x.ticks() {
        let at = x.place(value);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom}\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
            bottom + 15.0
        );
    }
    let _ = writeln!(
        svg,
        "<text class=\"weak\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
         <text class=\"weak\" transform=\"translate(13 {:.1}) rotate(-90)\" \
         text-anchor=\"middle\">{}</text>",
        (LEFT + right) / 2.0,
        bottom + 31.0,
        x.scale.title(),
        (TOP + bottom) / 2.0,
        y.scale.title()
    );
    svg
}

fn legend(peers: &[&str]) -> String {
    let mut svg = String::new();
    for (index, peer) in peers.iter().enumerate() {
        let Look { colour, dash } = look(peer);
        let left = 8.0 + (index % 2) as f64 * 195.0;
        let top = HEIGHT - 44.0 + (index / 2) as f64 * 16.0;
        let _ = writeln!(
            svg,
            "<line class=\"line\" stroke=\"{colour}\" stroke-dasharray=\"{dash}\" x1=\"{left}\" \
             x2=\"{:.1}\" y1=\"{top}\" y2=\"{top}\"/><text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            left + 26.0,
            left + 32.0,
            top + 4.0,
            escape(peer)
        );
    }
    svg
}

/// A scale with its range of values and its range of positions.
#[derive(Clone, Copy, Debug)]
struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    fn new(scale: Scale, values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let values = values.filter(|value| value.is_finite());
        let (low, high) = values
            .fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
        let (low, high) = if low > high { (0.0, 1.0) } else { (low, high) };
        let (low, high) = match scale {
            Scale::Linear(_) => (low.min(0.0).floor(), if high > low { high } else { low + 1.0 }),
            Scale::Log(_) => {
                let low = low.max(0.01);
                (nice_below(low), nice_above(high.max(low * 1.5)))
            }
            Scale::Nines(_) => (0.0, high.clamp(0.9, 0.9999)),
        };
        Self { scale, low, high, from, to }
    }

    fn place(&self, value: f64) -> f64 {
        let value = value.clamp(self.low, self.high);
        let (low, high) = (self.scale.measure(self.low), self.scale.measure(self.high));
        let share = (self.scale.measure(value) - low) / (high - low);
        self.from + (self.to - self.from) * share
    }

    fn ticks(&self) -> Vec<(f64, String)> {
        match self.scale {
            Scale::Linear(_) => {
                let step = nice_step((self.high - self.low) / 6.0);
                let first = (self.low / step).ceil() as i64;
                let last = (self.high / step).floor() as i64;
                (first..=last).map(|n| n as f64 * step).map(|tick| (tick, plain(tick))).collect()
            }
            Scale::Log(_) => {
                let decades = (self.high / self.low).log10();
                let digits: &[f64] = match decades {
                    few if few < 0.7 => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
                    some if some < 3.0 => &[1.0, 2.0, 5.0],
                    _ => &[1.0],
                };
                let first = self.low.log10().floor() as i32;
                let last = self.high.log10().ceil() as i32;
                (first..=last)
                    .flat_map(|power| digits.iter().map(move |digit| digit * 10_f64.powi(power)))
                    .filter(|tick| (self.low * 0.999..=self.high * 1.001).contains(tick))
                    .map(|tick| (tick, plain(tick)))
                    .collect()
            }
            Scale::Nines(_) => [0.0_f64, 0.5, 0.9, 0.99, 0.999, 0.9999]
                .into_iter()
                .filter(|share| *share <= self.high)
                .map(|share| (share, plain((share * 1e6).round() / 1e4)))
                .collect(),
        }
    }
}

impl Scale {
    fn title(self) -> &'static str {
        match self {
            Self::Linear(title) | Self::Log(title) | Self::Nines(title) => title,
        }
    }

    fn measure(self, value: f64) -> f64 {
        match self {
            Self::Linear(_) => value,
            Self::Log(_) => value.log10(),
            Self::Nines(_) => -(1.0 - value).log10(),
        }
    }
}

/// The last of 1, 2 and 5 times a power of ten that is not above the value.
fn nice_below(value: f64) -> f64 {
    let power = 10_f64.powf(value.log10().floor());
    let below = [5.0, 2.0, 1.0].map(|digit| digit * power);
    below.into_iter().find(|nice| *nice <= value * 1.001).unwrap_or(power)
}

/// The first of 1, 2 and 5 times a power of ten that is not below the value.
fn nice_above(value: f64) -> f64 {
    nice_step(value * 0.999)
}

/// The next of 1, 2 and 5 times a power of ten.
fn nice_step(step: f64) -> f64 {
    let power = 10_f64.powf(step.log10().floor());
    let digits = [1.0, 2.0, 5.0, 10.0];
    digits.map(|digit| digit * power).into_iter().find(|nice| *nice >= step).unwrap_or(power)
}

fn plain(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_run_from_one_end_to_the_other() {
        for scale in [Scale::Linear(""), Scale::Log(""), Scale::Nines("")] {
            let axis = Axis::new(scale, [0.5, 0.99].into_iter(), 100.0, 0.0);
            assert_eq!(axis.place(axis.low), 100.0, "{scale:?}");
            assert_eq!(axis.place(axis.high), 0.0, "{scale:?}");
            let middle = axis.place(0.7);
            assert!(middle > 0.0 && middle < 100.0, "{scale:?}: {middle}");
        }
    }

    #[test]
    fn a_further_nine_takes_as_much_room_as_the_last() {
        let axis = Axis::new(Scale::Nines(""), std::iter::once(1.0), 0.0, 100.0);
        let room = |low, high| axis.place(high) - axis.place(low);
        assert!((room(0.9, 0.99) - room(0.99, 0.999)).abs() < 1e-6);
    }

    #[test]
    fn ticks_are_few_and_round() {
        let labels = |scale, low: f64, high: f64| {
            let axis = Axis::new(scale, [low, high].into_iter(), 0.0, 100.0);
            axis.ticks().into_iter().map(|(_, label)| label).collect::<Vec<_>>()
        };
        assert_eq!(labels(Scale::Linear(""), -3.0, 15.0), ["0", "5", "10", "15"]);
        assert_eq!(
            labels(Scale::Log(""), 45.0, 2100.0),
            ["20", "50", "100", "200", "500", "1000", "2000", "5000"]
        );
        assert_eq!(labels(Scale::Nines(""), 0.0, 0.99), ["0", "50", "90", "99"]);
        assert_eq!(labels(Scale::Nines(""), 0.0, 1.0), ["0", "50", "90", "99", "99.9", "99.99"]);
        assert!(!labels(Scale::Linear(""), 0.0, 0.0).is_empty());
    }
}
