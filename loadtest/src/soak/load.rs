//! The mixed load: workers that dial, transfer and check, until they are dropped.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedRwLockWriteGuard, RwLock},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::{
    report::Counts,
    stage::Route,
    target::{ARRIVED, Kind, Request},
    windows::{MayFail, Windows},
};
use crate::{
    frontend::{Connection, Protocol, connect::ConnectError},
    link,
};

/// Workers on each route.
const WORKERS: usize = 3;
/// Time for one operation: longer than a dial may wait in any process.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest pause of a worker between two operations, in milliseconds.
const MAX_PAUSE: u64 = 100;
/// Largest transfer, in bytes.
const MAX_SIZE: u32 = 300_000;
/// Maximum number of failures that are kept with their text.
const MAX_FAILURES: usize = 50;
/// A port that nothing listens on.
const CLOSED_PORT: u16 = 1;

/// Outcomes of the load so far.
#[derive(Debug)]
pub(super) struct Tally {
    start: Instant,
    /// Disturbance of the phase that goes on.
    phase: Mutex<String>,
    counts: Mutex<BTreeMap<String, Counts>>,
    failures: Mutex<Vec<String>>,
    failed: Mutex<u64>,
}

impl Tally {
    pub(super) fn new() -> Self {
        Self {
            start: Instant::now(),
            phase: Mutex::default(),
            counts: Mutex::default(),
            failures: Mutex::default(),
            failed: Mutex::default(),
        }
    }

    /// Begins a phase; outcomes are counted for it from now on.
    pub(super) fn phase(&self, name: String) {
        self.counts.lock().entry(name.clone()).or_default().phases += 1;
        *self.phase.lock() = name;
    }

    /// Seconds since the start.
    pub(super) fn second(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// Records a failure that no disturbance explains.
    pub(super) fn fail(&self, what: &str) {
        *self.failed.lock() += 1;
        let mut failures = self.failures.lock();
        if failures.len() < MAX_FAILURES {
            let (second, phase) = (self.second(), self.phase.lock().clone());
            let what = what.split_whitespace().collect::<Vec<_>>().join(" ");
            let line = format!("{second:.1} s ({phase}): {what}");
            eprintln!("soak: {line}");
            failures.push(line);
        }
    }

    fn count(&self, of: impl FnOnce(&mut Counts)) {
        let phase = self.phase.lock().clone();
        of(self.counts.lock().entry(phase).or_default());
    }

    /// Counts by phase, the first failures, and the number of all failures.
    pub(super) fn results(&self) -> (BTreeMap<String, Counts>, Vec<String>, u64) {
        (self.counts.lock().clone(), self.failures.lock().clone(), *self.failed.lock())
    }
}

/// The running load. It stops when dropped.
#[derive(Debug)]
pub(super) struct Load {
    /// Held for reading by every operation.
    gate: Arc<RwLock<()>>,
    _workers: JoinSet<()>,
}

impl Load {
    /// Starts workers on every route, with random operations from this seed.
    pub(super) fn start(
        routes: &[Route],
        target_port: u16,
        seed: u64,
        windows: &Arc<Windows>,
        tally: &Arc<Tally>,
    ) -> Self {
        let (gate, mut workers) = (Arc::new(RwLock::new(())), JoinSet::new());
        let mut seeds = fastrand::Rng::with_seed(seed);
        for route in routes.iter().flat_map(|route| std::iter::repeat_n(route, WORKERS)) {
            let worker = Worker {
                route: route.clone(),
                target_port,
                random: seeds.fork(),
                gate: Arc::clone(&gate),
                windows: Arc::clone(windows),
                tally: Arc::clone(tally),
            };
            workers.spawn(worker.run());
        }
        Self { gate, _workers: workers }
    }

    /// Lets the operations under way end, and begins no others until the result is dropped.
    pub(super) async fn pause(&self) -> OwnedRwLockWriteGuard<()> {
        Arc::clone(&self.gate).write_owned().await
    }
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// There was no connection.
    #[error("dial failed: {0}")]
    Dial(String),
    /// The connection broke.
    #[error("cut: {0}")]
    Cut(#[from] io::Error),
    /// Other bytes arrived than were sent, or a dial succeeded that must not.
    #[error("wrong: {0}")]
    Wrong(String),
    /// Neither ended in time.
    #[error("not within {OPERATION_TIMEOUT:?}")]
    Hung,
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    /// A whole transfer.
    Transfer(Kind),
    /// A download whose client is gone before its end.
    ClientReset,
    /// A dial of a port that nothing listens on.
    ClosedPort,
    /// A dial of an address that does not answer, given up by the client.
    AbortedDial,
}

impl Operation {
    const ALL: [Self; 8] = [
        Self::Transfer(Kind::Echo),
        Self::Transfer(Kind::Download),
        Self::Transfer(Kind::Upload),
        Self::Transfer(Kind::HalfClose),
        Self::Transfer(Kind::Reset),
        Self::ClientReset,
        Self::ClosedPort,
        Self::AbortedDial,
    ];
}

struct Worker {
    route: Route,
    target_port: u16,
    random: fastrand::Rng,
    gate: Arc<RwLock<()>>,
    windows: Arc<Windows>,
    tally: Arc<Tally>,
}

impl Worker {
    async fn run(mut self) {
        loop {
            let gate = Arc::clone(&self.gate);
            let open = gate.read().await;
            let index = self.random.usize(..Operation::ALL.len());
            let operation = Operation::ALL[index];
            let begun = Instant::now();
            let result = timeout(OPERATION_TIMEOUT, self.carry_out(operation)).await;
            self.record(operation, begun, result.unwrap_or(Err(Failure::Hung)));
            drop(open);
            sleep(Duration::from_millis(self.random.u64(..MAX_PAUSE))).await;
        }
    }

    fn record(&self, operation: Operation, begun: Instant, result: Result<(), Failure>) {
        let failure = match result {
            Ok(()) => return self.tally.count(|counts| counts.ok += 1),
            Err(failure) => failure,
        };
        let explained = |what| self.windows.explain(self.route.id, what, begun);
        let explained = match &failure {
            Failure::Dial(_) => {
                self.tally.count(|counts| counts.dials_failed += 1);
                explained(MayFail::Dials)
            }
            Failure::Cut(_) => {
                self.tally.count(|counts| counts.cut += 1);
                explained(MayFail::Streams)
            }
            Failure::Wrong(_) => false,
            Failure::Hung => explained(MayFail::Dials),
        };
        if !explained {
            let (route, took) = (self.route.name, begun.elapsed());
            self.tally.fail(&format!("{operation:?} on {route}: {failure} after {took:.1?}"));
        }
    }

    async fn dial(&self, port: u16) -> Result<Connection, ConnectError> {
        let target = format!("{}:{port}", self.route.host);
        Connection::dial_unix(self.route.protocol, &self.route.socket, target).await
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        self.dial(self.target_port).await.map_err(|error| Failure::Dial(error.to_string()))
    }

    async fn carry_out(&mut self, operation: Operation) -> Result<(), Failure> {
        let (size, seed) = (self.random.u32(1..MAX_SIZE), self.random.u64(..));
        let request = |kind| Request { kind, size, seed };
        match operation {
            // gRPC cannot end one direction.
            Operation::Transfer(Kind::HalfClose) if self.route.protocol == Protocol::Grpc => {
                self.transfer(request(Kind::Upload)).await
            }
            Operation::Transfer(kind) => self.transfer(request(kind)).await,
            Operation::ClientReset => {
                let mut connection = self.connect().await?;
                connection.write(&request(Kind::Download).encode()).await?;
                connection.read(&mut Vec::new()).await?;
                connection.abort();
                Ok(())
            }
            Operation::ClosedPort => match self.dial(CLOSED_PORT).await {
                Err(ConnectError::Refused(refused)) if refused.answer.contains("refused") => Ok(()),
                Err(error) if self.route.protocol == Protocol::Connect => {
                    Err(Failure::Dial(error.to_string()))
                }
                Err(_) => Ok(()),
                Ok(_) => Err(Failure::Wrong("a port that is closed accepted".into())),
            },
            Operation::AbortedDial => {
                let target = (link::NOWHERE, CLOSED_PORT);
                let target = format!("{}:{}", target.0, target.1);
                let (protocol, socket) = (self.route.protocol, &self.route.socket);
                let patience = Duration::from_millis(self.random.u64(..MAX_PAUSE));
                let _ = timeout(patience, Connection::dial_unix(protocol, socket, target)).await;
                Ok(())
            }
        }
    }

    async fn transfer(&self, request: Request) -> Result<(), Failure> {
        let mut connection = self.connect().await?;
        connection.write(&request.encode()).await?;
        let bytes = request.bytes();
        match request.kind {
            Kind::Echo => {
                for chunk in bytes.chunks(16_384) {
                    connection.write(chunk).await?;
                    check(&connection.read_count(chunk.len()).await?, chunk)?;
                }
            }
            Kind::Download => {
                check(&connection.read_count(bytes.len()).await?, &bytes)?;
                check(&connection.read_to_end().await?, &[])?;
            }
            Kind::Upload => {
                connection.write(&bytes).await?;
                check(&connection.read_count(1).await?, &[ARRIVED])?;
            }
            Kind::HalfClose => {
                connection.write(&bytes).await?;
                connection.finish().await?;
                check(&connection.read_to_end().await?, &[ARRIVED])?;
            }
            Kind::Reset => {
                // How a reset looks depends on the frontend; it must end the connection.
                let _ = connection.write(&bytes).await;
                let _ = connection.read_to_end().await;
                return Ok(());
            }
        }
        // The target may have ended first.
        let _ = connection.close().await;
        Ok(())
    }
}

/// Fewer bytes than expected are a stream that was cut; others are an error of their own.
fn check(bytes: &[u8], expected: &[u8]) -> Result<(), Failure> {
    if bytes == expected {
        return Ok(());
    }
    if expected.starts_with(bytes) {
        let (count, expected) = (bytes.len(), expected.len());
        return Err(io::Error::other(format!("ended after {count} bytes of {expected}")).into());
    }
    Err(Failure::Wrong(format!("{} bytes differ from the {} sent", bytes.len(), expected.len())))
}
