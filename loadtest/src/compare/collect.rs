//! Sums of the samples of one run.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;

use crate::{
    load::{Kind, Sample, Workload},
    report::{DistributionPoint, Latency, LatencyPoint, ThroughputPoint, WorkloadResult},
};

/// Length of a slice of time in the plots, in microseconds.
const SLICE: i64 = 250_000;
/// Shares of the distribution that are reported beside the even ones, for its tail.
const TAIL: [f64; 6] = [0.99, 0.995, 0.999, 0.9995, 0.9999, 1.0];

/// Adds up the samples of a run whose first part is not measured.
#[derive(Debug)]
pub(super) struct Collector {
    warmup: i64,
    end: i64,
    workloads: Vec<Tally>,
}

#[derive(Debug)]
struct Tally {
    workload: Workload,
    micros: Histogram<u64>,
    /// Waiting times of those without an answer at the end.
    overdue: Vec<u64>,
    bytes: u64,
    latency_slices: BTreeMap<i64, Vec<u64>>,
    byte_slices: BTreeMap<i64, u64>,
    errors: BTreeMap<String, u64>,
}

impl Collector {
    /// A collector for a run of these workloads, with the seconds before and in the measured part.
    pub(super) fn new(workloads: &[Workload], warmup: f64, seconds: f64) -> Self {
        let micros = |seconds: f64| (seconds * 1e6) as i64;
        let tally = |workload: &Workload| Tally {
            workload: workload.clone(),
            // Three digits, from a microsecond to an hour.
            micros: Histogram::new_with_max(3_600_000_000, 3).expect("the bounds are sound"),
            overdue: Vec::new(),
            bytes: 0,
            latency_slices: BTreeMap::new(),
            byte_slices: BTreeMap::new(),
            errors: BTreeMap::new(),
        };
        Self {
            warmup: micros(warmup),
            end: micros(warmup + seconds),
            workloads: workloads.iter().map(tally).collect(),
        }
    }

    /// Adds a sample. It belongs to the measured part when it ended there: a stall that began
    /// before counts.
    pub(super) fn take(&mut self, sample: &Sample) {
        match sample {
            Sample::Latency(workload, at, took) => self.latency(*workload, *at, *took, false),
            Sample::Overdue(workload, at, waited) => self.latency(*workload, *at, *waited, true),
            Sample::Bytes(workload, at, bytes) => self.bytes(*workload, *at, *bytes),
            Sample::Error(workload, at, text) => {
                let measured = self.is_measured(*at);
                if let Some(tally) = self.workloads.get_mut(*workload).filter(|_| measured) {
                    *tally.errors.entry(text.clone()).or_default() += 1;
                }
            }
            Sample::Start(_) | Sample::Ready(_) | Sample::Done(_) => {}
        }
    }

    /// Adds bytes that the target has counted.
    pub(super) fn uploaded(&mut self, at: u64, bytes: u64) {
        let upload = |tally: &Tally| tally.workload.kind.is_upload();
        if let Some(index) = self.workloads.iter().position(upload) {
            self.bytes(index, at, bytes);
        }
    }

    /// Adds messages that were incomplete at the target.
    pub(super) fn short(&mut self, count: u64) {
        let closes = |tally: &&mut Tally| tally.workload.kind == Kind::WriteClose;
        if let Some(tally) = self.workloads.iter_mut().find(closes).filter(|_| count > 0) {
            tally.errors.insert("what was written came short".into(), count);
        }
    }

    /// Adds checked uploads in which the target read other bytes than were written.
    pub(super) fn corrupt(&mut self, count: u64) {
        let checked = |tally: &&mut Tally| tally.workload.kind == Kind::CheckedUpload;
        if let Some(tally) = self.workloads.iter_mut().find(checked).filter(|_| count > 0) {
            tally.errors.insert("the target read other bytes than were written".into(), count);
        }
    }

    fn is_measured(&self, at: u64) -> bool {
        (self.warmup..=self.end).contains(&at.cast_signed())
    }

    fn latency(&mut self, workload: usize, at: u64, took: u64, overdue: bool) {
        let measured = self.is_measured(at + took);
        let (warmup, end) = (self.warmup, self.end);
        let (due, ended) = (at.cast_signed(), (at + took).cast_signed());
        let slice = (due - warmup).div_euclid(SLICE);
        let Some(tally) = self.workloads.get_mut(workload) else { return };
        if overdue {
            // Most are sent when the load ends, which is after the measured part; those of a
            // connection that was cut when it is.
            if ended >= warmup {
                tally.overdue.push(took);
            }
            return;
        }
        if due < end && ended > end {
            // It waited at the end of the measured part: a stall that ends just after it counts.
            tally.overdue.push((end - due).cast_unsigned());
        }
        tally.latency_slices.entry(slice).or_default().push(took);
        if measured {
            tally.micros.saturating_record(took);
        }
    }

    fn bytes(&mut self, workload: usize, at: u64, bytes: u64) {
        let measured = self.is_measured(at);
        let slice = (at.cast_signed() - self.warmup).div_euclid(SLICE);
        let Some(tally) = self.workloads.get_mut(workload) else { return };
        *tally.byte_slices.entry(slice).or_default() += bytes;
        if measured {
            tally.bytes += bytes;
        }
    }

    /// Payload bytes that arrived in the measured part, both ways.
    pub(super) fn payload(&self) -> u64 {
        let payload = |tally: &Tally| {
            let answers = tally.micros.len();
            let sent = match tally.workload.kind {
                Kind::Echo => 2 * answers * tally.workload.size.max(8),
                Kind::Exchange | Kind::ShortConnection => {
                    let sent = tally.workload.exchanges.iter().map(|exchange| exchange.request);
                    answers * sent.sum::<u64>()
                }
                Kind::Send | Kind::WriteClose | Kind::HalfClose | Kind::Dial => {
                    answers * tally.workload.size
                }
                _ => 0,
            };
            sent + tally.bytes
        };
        self.workloads.iter().map(payload).sum()
    }

    /// The latest slices in one line.
    pub(super) fn glance(&self) -> String {
        let mut parts = Vec::new();
        for tally in &self.workloads {
            if let Some((_, micros)) = tally.latency_slices.iter().next_back() {
                let mut micros = micros.clone();
                micros.sort_unstable();
                let p50 = micros[micros.len() / 2] as f64 / 1000.0;
                parts.push(format!("{} {p50:.1} ms", tally.workload.name));
            } else if let Some((_, bytes)) = tally.byte_slices.iter().rev().nth(1) {
                parts.push(format!("{} {:.1} Mbit/s", tally.workload.name, mbit(*bytes, SLICE)));
            }
        }
        parts.join(", ")
    }

    /// Results of each workload.
    pub(super) fn results(&self) -> Vec<WorkloadResult> {
        self.workloads.iter().map(|tally| tally.result(self.end - self.warmup)).collect()
    }
}

impl Tally {
    fn result(&self, measured: i64) -> WorkloadResult {
        let answers = self.micros.len();
        let bulk = self.workload.kind.is_bulk();
        let point = |(slice, bytes): (&i64, &u64)| ThroughputPoint {
            second: second(*slice),
            mbit: mbit(*bytes, SLICE),
        };
        let timed = self.workload.kind.is_timed();
        WorkloadResult {
            name: self.workload.name.clone(),
            kind: self.workload.kind,
            latency: timed.then(|| self.latency()),
            mbit_per_second: bulk.then(|| mbit(self.bytes, measured)),
            throughput: if bulk {
                self.byte_slices.iter().map(point).collect()
            } else {
                Vec::new()
            },
            per_second: timed.then(|| answers as f64 / (measured as f64 / 1e6)),
            errors: self.errors.clone(),
        }
    }

    fn latency(&self) -> Latency {
        let millis = |micros: u64| micros as f64 / 1000.0;
        // A recent request is not late: only one that has waited longer than most.
        let usual = self.micros.value_at_quantile(0.5);
        let overdue: Vec<_> = self.overdue.iter().filter(|waited| **waited > usual).collect();
        let mut micros = self.micros.clone();
        overdue.iter().for_each(|waited| micros.saturating_record(**waited));
        let at = |share: f64| millis(micros.value_at_quantile(share));
        let shares = (0..99).map(|percent| f64::from(percent) / 100.0).chain(TAIL);
        let over_time = self.latency_slices.iter().map(|(slice, micros)| {
            let mut micros = micros.clone();
            micros.sort_unstable();
            LatencyPoint {
                second: second(*slice),
                p50: millis(micros[micros.len() / 2]),
                max: millis(micros[micros.len() - 1]),
            }
        });
        Latency {
            count: micros.len(),
            overdue: overdue.len() as u64,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: millis(micros.max()),
            distribution: shares.map(|share| DistributionPoint { ms: at(share), share }).collect(),
            over_time: over_time.collect(),
        }
    }
}

impl Kind {
    /// Whether its answers are timed.
    fn is_timed(self) -> bool {
        !matches!(
            self,
            Self::Download
                | Self::Upload
                | Self::CheckedDownload
                | Self::CheckedUpload
                | Self::Stall
                | Self::Idle
        )
    }

    /// Whether its throughput is reported.
    fn is_bulk(self) -> bool {
        let download =
            matches!(self, Self::Download | Self::CheckedDownload | Self::Fetch | Self::Stall);
        download || self.is_upload()
    }
}

fn second(slice: i64) -> f64 {
    (slice * SLICE) as f64 / 1e6
}

fn mbit(bytes: u64, micros: i64) -> f64 {
    bytes as f64 * 8.0 / micros as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collector(kind: Kind) -> Collector {
        let workload = Workload {
            name: "w".into(),
            kind,
            target: None,
            sessions: 1,
            size: 64,
            interval_ms: 1.0,
            exchanges: Vec::new(),
        };
        Collector::new(&[workload], 1.0, 2.0)
    }

    #[test]
    fn what_ends_during_the_warm_up_does_not_count_and_what_outlasts_it_does() {
        let mut collector = collector(Kind::Echo);
        collector.take(&Sample::Latency(0, 500_000, 1_000));
        collector.take(&Sample::Latency(0, 500_000, 700_000));
        collector.take(&Sample::Latency(0, 2_000_000, 50_000));
        collector.take(&Sample::Overdue(0, 2_000_000, 1_000_000));
        collector.take(&Sample::Overdue(0, 2_990_000, 10_000));
        collector.take(&Sample::Latency(0, 2_990_000, 50_000));
        let result = &collector.results()[0];
        let latency = result.latency.as_ref().unwrap();
        assert_eq!((latency.count, latency.overdue), (3, 1));
        // Still on its way.
        assert!(latency.p50 > 50.0);
        assert!((latency.max - 1000.0).abs() < 1.0, "{}", latency.max);
        assert_eq!(result.per_second, Some(1.0));
        assert_eq!(
            latency.over_time.iter().map(|point| point.second).collect::<Vec<_>>(),
            [-0.5, 1.0, 1.75]
        );
        assert_eq!(collector.payload(), 2 * 2 * 64);
    }

    #[test]
    fn a_stall_that_the_end_of_the_measured_part_cuts_off_counts_until_then() {
        let mut collector = collector(Kind::Echo);
        collector.take(&Sample::Latency(0, 1_500_000, 1_000));
        collector.take(&Sample::Latency(0, 1_000_000, 2_100_000));
        let latency = collector.results()[0].latency.clone().unwrap();
        assert_eq!((latency.count, latency.overdue), (2, 1));
        assert!((latency.max - 2000.0).abs() < 2.0, "{}", latency.max);
    }

    #[test]
    fn what_a_cut_leaves_without_an_answer_counts_unless_it_was_during_the_warm_up() {
        let mut collector = collector(Kind::Echo);
        collector.take(&Sample::Latency(0, 1_500_000, 1_000));
        collector.take(&Sample::Overdue(0, 100_000, 800_000));
        assert_eq!(collector.results()[0].latency.as_ref().unwrap().overdue, 0);
        collector.take(&Sample::Overdue(0, 500_000, 700_000));
        let latency = collector.results()[0].latency.clone().unwrap();
        assert_eq!(latency.overdue, 1);
        assert!((latency.max - 700.0).abs() < 1.0, "{}", latency.max);
    }

    #[test]
    fn bytes_that_the_target_read_and_that_differ_are_errors_of_the_checked_upload() {
        let mut collector = collector(Kind::CheckedUpload);
        collector.corrupt(0);
        assert!(collector.results()[0].errors.is_empty());
        collector.uploaded(1_500_000, 1_000_000);
        collector.corrupt(2);
        let result = &collector.results()[0];
        assert_eq!(result.errors.values().collect::<Vec<_>>(), [&2]);
        assert_eq!(result.mbit_per_second, Some(4.0));
        assert!(result.latency.is_none());
    }

    #[test]
    fn throughput_is_that_of_the_measured_part() {
        let mut collector = collector(Kind::Download);
        collector.take(&Sample::Bytes(0, 900_000, 1_000_000));
        collector.take(&Sample::Bytes(0, 1_100_000, 1_000_000));
        let result = &collector.results()[0];
        assert_eq!(result.mbit_per_second, Some(4.0));
        assert_eq!(result.throughput.len(), 2);
        assert!(result.latency.is_none());
    }

    #[test]
    fn errors_are_counted_by_what_they_say() {
        let mut collector = collector(Kind::Dial);
        for at in [100, 1_500_000, 1_600_000] {
            collector.take(&Sample::Error(0, at, "refused".into()));
        }
        assert_eq!(collector.results()[0].errors["refused"], 2);
    }
}
