//! Samples of a run, on their way to the collector.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::mpsc::UnboundedSender;

use super::{Sample, service::unix_nanos};

/// Records the samples of a run.
#[derive(Debug)]
pub(super) struct Record {
    start: Instant,
    samples: UnboundedSender<Sample>,
    /// Bytes of each workload since its last sample.
    bytes: Vec<AtomicU64>,
}

impl Record {
    pub(super) fn start(workloads: usize, samples: UnboundedSender<Sample>) -> Arc<Self> {
        let bytes = (0..workloads).map(|_| AtomicU64::new(0)).collect();
        let record = Self { start: Instant::now(), samples, bytes };
        record.put(Sample::Start(unix_nanos()));
        Arc::new(record)
    }

    pub(super) fn put(&self, sample: Sample) {
        // The collector may have gone.
        let _ = self.samples.send(sample);
    }

    pub(super) fn now(&self) -> u64 {
        self.at(Instant::now())
    }

    fn at(&self, time: Instant) -> u64 {
        micros(time.saturating_duration_since(self.start))
    }

    pub(super) fn bytes(&self, workload: usize, bytes: usize) {
        self.bytes[workload].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Reports the bytes of every workload since the last report.
    pub(super) fn flush(&self) {
        for (workload, bytes) in self.bytes.iter().enumerate() {
            let bytes = bytes.swap(0, Ordering::Relaxed);
            if bytes > 0 {
                self.put(Sample::Bytes(workload, self.now(), bytes));
            }
        }
    }

    pub(super) fn latency(&self, workload: usize, due: Instant, took: Duration) {
        self.put(Sample::Latency(workload, self.at(due), micros(took)));
    }

    fn overdue(&self, workload: usize, due: Instant) {
        self.put(Sample::Overdue(workload, self.at(due), micros(due.elapsed())));
    }

    pub(super) fn error(&self, workload: usize, error: impl ToString) {
        self.put(Sample::Error(workload, self.now(), error.to_string()));
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Time that a session waits after a cut, until the first answer on its next connection. It is
/// overdue when it has not ended and this is dropped.
#[derive(Debug)]
pub(super) struct Gap {
    record: Arc<Record>,
    workload: usize,
    /// Begin, while there is a gap.
    since: Mutex<Option<Instant>>,
}

impl Gap {
    pub(super) fn new(record: &Arc<Record>, workload: usize) -> Arc<Self> {
        Arc::new(Self { record: Arc::clone(record), workload, since: Mutex::default() })
    }

    /// The session is cut. The oldest request without an answer goes on waiting.
    pub(super) fn begin(&self, pending: &Pending) {
        let mut since = self.since.lock();
        if since.is_none() {
            let oldest = pending.due.lock().pop_front();
            *since = Some(oldest.unwrap_or_else(Instant::now));
        }
    }

    /// The session has an answer.
    fn end(&self) {
        let since = self.since.lock().take();
        if let Some(since) = since {
            self.record.latency(self.workload, since, since.elapsed());
        }
    }
}

impl Drop for Gap {
    fn drop(&mut self) {
        if let Some(since) = self.since.get_mut().take() {
            self.record.overdue(self.workload, since);
        }
    }
}

/// Answers that one connection waits for, in order. Those left when it is dropped are overdue.
#[derive(Debug)]
pub(super) struct Pending {
    record: Arc<Record>,
    workload: usize,
    due: Mutex<VecDeque<Instant>>,
    /// Gap of the session, which ends with an answer.
    gap: Option<Arc<Gap>>,
}

impl Pending {
    pub(super) fn new(record: &Arc<Record>, workload: usize) -> Self {
        Self { record: Arc::clone(record), workload, due: Mutex::default(), gap: None }
    }

    /// Answers on the next connection of a session that may have been cut before.
    pub(super) fn of_session(gap: &Arc<Gap>) -> Self {
        let mut pending = Self::new(&gap.record, gap.workload);
        pending.gap = Some(Arc::clone(gap));
        pending
    }

    /// Adds an answer that is due from now on, or from an earlier time on.
    pub(super) fn push(&self, due: Instant) {
        self.due.lock().push_back(due);
    }

    /// The oldest was answered.
    pub(super) fn answered(&self) {
        if let Some(gap) = &self.gap {
            gap.end();
        }
        let due = self.due.lock().pop_front();
        if let Some(due) = due {
            self.record.latency(self.workload, due, due.elapsed());
        }
    }

    /// The oldest failed and counts as an error only.
    pub(super) fn failed(&self, error: impl ToString) {
        self.due.lock().pop_front();
        self.record.error(self.workload, error);
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        for due in self.due.get_mut().drain(..) {
            self.record.overdue(self.workload, due);
        }
    }
}
