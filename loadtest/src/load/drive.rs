//! Carries out a plan through HTTP CONNECT, or without a tunnel.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Semaphore, mpsc::UnboundedSender},
    task::JoinSet,
    time::{Instant, interval, sleep, timeout_at},
};

use super::{
    Kind, Plan, Sample, Workload,
    record::{Gap, Record},
    session::{self, Route, Session},
};

/// Maximum number of pending dials of a workload whose sessions stay.
const DIALS_AT_ONCE: usize = 64;
/// Time after which a session that broke dials again.
const RETRY_DELAY: Duration = Duration::from_millis(100);
/// Interval at which bytes are reported.
const FLUSH_INTERVAL: Duration = Duration::from_millis(100);

/// Carries out `plan` through the CONNECT socket, or directly when there is none, and sends its
/// samples. Every session has ended when this completes.
///
/// # Cancel safety
/// Dropping the future aborts every session.
pub async fn drive(plan: Plan, socket: Option<PathBuf>, samples: UnboundedSender<Sample>) {
    let record = Record::start(plan.workloads.len(), samples);
    let end = Instant::now() + Duration::from_secs_f64(plan.seconds);
    let staying = plan.workloads.iter().filter(|workload| workload.kind.stays());
    let missing = staying.map(|workload| workload.sessions as usize).sum();
    let missing = Arc::new(AtomicUsize::new(missing));
    let mut sessions = JoinSet::new();
    for (index, workload) in plan.workloads.into_iter().enumerate() {
        let target = workload.target.clone().unwrap_or_else(|| plan.target.clone());
        let route = Arc::new(Route { socket: socket.clone(), target });
        let workload = Arc::new(workload);
        let dials = Arc::new(Semaphore::new(DIALS_AT_ONCE));
        for number in 0..workload.sessions {
            let session = Session {
                route: Arc::clone(&route),
                record: Arc::clone(&record),
                workload: Arc::clone(&workload),
                index,
                phase: f64::from(number) / f64::from(workload.sessions),
            };
            let (missing, dials) = (Arc::clone(&missing), Arc::clone(&dials));
            sessions.spawn(async move {
                if session.workload.kind.stays() {
                    stay(&session, &missing, &dials).await;
                } else {
                    session::repeat(&session).await;
                }
            });
        }
    }
    if missing.load(Ordering::Relaxed) == 0 {
        record.put(Sample::Ready(record.now()));
    }
    let mut flush = interval(FLUSH_INTERVAL);
    let _ = timeout_at(end, async {
        loop {
            flush.tick().await;
            record.flush();
        }
    })
    .await;
    sessions.shutdown().await;
    record.flush();
    record.put(Sample::Done(record.now()));
}

/// Repeats a session until the run ends.
async fn stay(session: &Session, missing: &AtomicUsize, dials: &Semaphore) {
    let (mut first, gap) = (true, Gap::new(&session.record, session.index));
    loop {
        let dialed = {
            let _permit = dials.acquire().await;
            session.begin().await
        };
        if std::mem::take(&mut first) && missing.fetch_sub(1, Ordering::Relaxed) == 1 {
            session.record.put(Sample::Ready(session.record.now()));
        }
        let error = match dialed {
            Ok(connection) => session::run(session, &gap, connection).await,
            Err(error) => error,
        };
        session.record.error(session.index, error);
        sleep(RETRY_DELAY).await;
    }
}

impl Kind {
    /// Whether a session of this kind times the answers to its requests on one connection.
    pub(super) fn asks(self) -> bool {
        matches!(self, Self::Echo | Self::Request | Self::Exchange)
    }

    /// Whether the target reads what a session of this kind writes, and counts it.
    pub(crate) fn is_upload(self) -> bool {
        matches!(self, Self::Upload | Self::CheckedUpload)
    }

    /// Whether a session of this kind is one connection from the run's start to its end.
    pub fn stays(self) -> bool {
        matches!(
            self,
            Self::Echo
                | Self::Download
                | Self::Upload
                | Self::CheckedDownload
                | Self::CheckedUpload
                | Self::Request
                | Self::Exchange
                | Self::Tail
                | Self::Stall
                | Self::Idle
        )
    }
}

impl Workload {
    /// Time between two messages of a session.
    pub(super) fn interval(&self) -> Duration {
        Duration::from_secs_f64(self.interval_ms / 1000.0)
    }
}
