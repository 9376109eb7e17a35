//! A network whose lookups and connections are scripted, for tests in paused time.

use std::{collections::VecDeque, io, net::SocketAddr, time::Duration};

use nix::errno::Errno;
use parking_lot::Mutex;
use tokio::{net::TcpStream, sync::mpsc, time::sleep};

use super::network::TargetNetwork;
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

    /// Reports connections that are abandoned while they are being made.
    pub(super) fn report_abandoned(&mut self) -> mpsc::UnboundedReceiver<()> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.abandoned = sender;
        receiver
    }

    pub(super) async fn look_up(&self) -> Result<Vec<SocketAddr>, LookupError> {
        sleep(self.lookup_delay).await;
        self.lookup.clone().map_err(LookupError::Failed)
    }

    pub(super) async fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let step = self.steps.lock().pop_front();
        let step = step.unwrap_or_else(|| panic!("no step for a connection to {address}"));
        self.tried.lock().push(address);
        let report = scopeguard::guard(self.abandoned.clone(), |sender| {
            let _ = sender.send(());
        });
        sleep(step.delay).await;
        scopeguard::ScopeGuard::into_inner(report);
        step.result.map_err(|errno| io::Error::from_raw_os_error(errno as i32))?;
        echo()
    }
}

impl From<Scripted> for TargetNetwork {
    fn from(script: Scripted) -> Self {
        Self::Scripted(script)
    }
}

impl TargetNetwork {
    /// The addresses that a script's network was to connect to, in order.
    pub(super) fn tried(&self) -> Vec<String> {
        match self {
            Self::Scripted(script) => script.tried.lock().iter().map(ToString::to_string).collect(),
            Self::Host { .. } => panic!("the host's network has no script"),
        }
    }
}

/// A connection to a target that sends back what it receives. It is made without an await, which
/// could let paused time pass.
fn echo() -> io::Result<TcpStream> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let socket = std::net::TcpStream::connect(listener.local_addr()?)?;
    let (target, _) = listener.accept()?;
    let as_tokio = |socket: std::net::TcpStream| {
        socket.set_nonblocking(true)?;
        TcpStream::from_std(socket)
    };
    let mut target = as_tokio(target)?;
    culvert_transport::test_util::detached(async move {
        let (mut reader, mut writer) = target.split();
        // Fails where a test resets the connection.
        let _ = tokio::io::copy(&mut reader, &mut writer).await;
    });
    as_tokio(socket)
}
