//! A network whose lookups and connections are scripted, for tests in paused time.

use std::{collections::VecDeque, io, net::SocketAddr, time::Duration};

use bytes::Bytes;
use culvert_transport::splice::{Abort, Local, LocalFault, LocalRead, LocalWrite};
use nix::errno::Errno;
use parking_lot::Mutex;
use tokio::{sync::mpsc, time::sleep};

use super::network::{LocalOf, TargetNetwork};
use crate::lookups::LookupError;

/// One scripted connection.
#[derive(Debug)]
pub(super) struct Step {
    delay: Duration,
    result: Result<(), Errno>,
}

impl Step {
    /// A connection whose result comes after `millis` milliseconds.
    pub(super) fn after(millis: u64) -> Self {
        Self { delay: Duration::from_millis(millis), result: Ok(()) }
    }

    pub(super) fn connects(self) -> Self {
        Self { result: Ok(()), ..self }
    }

    pub(super) fn fails(self, errno: Errno) -> Self {
        Self { result: Err(errno), ..self }
    }
}

/// A network that answers from a script. Its targets send back what they receive.
#[derive(Debug)]
pub(super) struct Scripted {
    lookup: Result<Vec<SocketAddr>, String>,
    lookup_delay: Duration,
    steps: Mutex<VecDeque<Step>>,
    tried: Mutex<Vec<SocketAddr>>,
    /// Notified when a connection that was begun is abandoned.
    abandoned: mpsc::UnboundedSender<()>,
}

impl Scripted {
    fn new(lookup: Result<Vec<SocketAddr>, String>) -> Self {
        Self {
            lookup,
            lookup_delay: Duration::ZERO,
            steps: Mutex::default(),
            tried: Mutex::default(),
            abandoned: mpsc::unbounded_channel().0,
        }
    }

    /// Every name has these addresses.
    pub(super) fn resolving(addresses: &[&str]) -> Self {
        Self::new(Ok(addresses.iter().map(|address| address.parse().unwrap()).collect()))
    }

    /// No name has an address, for this reason.
    pub(super) fn unresolvable(reason: &str) -> Self {
        Self::new(Err(reason.to_owned()))
    }

    /// Lookups take `millis` milliseconds.
    pub(super) fn lookup_takes(self, millis: u64) -> Self {
        Self { lookup_delay: Duration::from_millis(millis), ..self }
    }

    /// The next connection follows `step`.
    pub(super) fn connects(self, step: Step) -> Self {
        self.steps.lock().push_back(step);
        self
    }

    /// The addresses that were connected to, in order.
    pub(super) fn tried(&self) -> Vec<String> {
        self.tried.lock().iter().map(SocketAddr::to_string).collect()
    }

    /// Reports connections that are abandoned while they are being made.
    pub(super) fn report_abandoned(&mut self) -> mpsc::UnboundedReceiver<()> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.abandoned = sender;
        receiver
    }
}

impl TargetNetwork for Scripted {
    type Reader = EchoReader;
    type Writer = EchoWriter;
    type Abort = NoAbort;

    async fn look_up(&self, _host: &str, _port: u16) -> Result<Vec<SocketAddr>, LookupError> {
        sleep(self.lookup_delay).await;
        self.lookup.clone().map_err(LookupError::Failed)
    }

    async fn connect(&self, address: SocketAddr) -> io::Result<LocalOf<Self>> {
        let step = self.steps.lock().pop_front();
        let step = step.unwrap_or_else(|| panic!("no step for a connection to {address}"));
        self.tried.lock().push(address);
        let report = scopeguard::guard(self.abandoned.clone(), |sender| {
            let _ = sender.send(());
        });
        sleep(step.delay).await;
        scopeguard::ScopeGuard::into_inner(report);
        step.result.map_err(|errno| io::Error::from_raw_os_error(errno as i32))?;
        let (sender, receiver) = mpsc::unbounded_channel();
        Ok(Local::new(EchoReader(receiver), EchoWriter(Some(sender)), NoAbort))
    }
}

#[derive(Debug)]
pub(super) struct EchoReader(mpsc::UnboundedReceiver<Bytes>);

impl LocalRead for EchoReader {
    async fn read(&mut self) -> Result<Option<Bytes>, LocalFault> {
        Ok(self.0.recv().await)
    }
}

#[derive(Debug)]
pub(super) struct EchoWriter(Option<mpsc::UnboundedSender<Bytes>>);

impl LocalWrite for EchoWriter {
    async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), LocalFault> {
        for chunk in chunks {
            self.0.as_ref().unwrap().send(chunk.clone()).map_err(io::Error::other)?;
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), LocalFault> {
        self.0 = None;
        Ok(())
    }
}

#[derive(Debug)]
pub(super) struct NoAbort;

impl Abort for NoAbort {
    fn abort(&self) {}
}
