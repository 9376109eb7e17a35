//! Scripted servers within this process, for tests in paused time.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use clap::Parser as _;
use culvert_process::{
    cli::ProcessConfig as _,
    invocation::Invocation,
    operator::streams::{LiveStreams, Side},
};
use culvert_transport::{
    Carrier, ConnectError, Settings, Tunnel,
    budget::MemoryBudget,
    control::ControlStream,
    qmux::Peer,
    tcp::Route,
    test_util::{Line, Pair},
    tls::{Current, TlsError},
};
use culvert_wire::{
    InstanceId,
    bounded::{List, Text},
    control::{ControlMessage, Hello, Secret, ServerEntry, ServerList, Welcome},
    extension::Extensions,
    identifiers::Identifiers,
    version::{Features, REVISION},
};
use parking_lot::Mutex;
use rcgen::{CertificateParams, KeyPair};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, Flags},
    connector::{
        Candidate, CarrierError, CarrierOrder, Connect, Connected, Preference, ResolveError,
        ServerAddress,
    },
    egress::{Egress, Gate, policy::Policy},
    metrics::AgentMetrics,
    tunnels::{session::SessionContext, sessions::Sessions},
};

/// The configuration of `args`, with a CA file that could be used when it was checked.
pub(crate) fn config(args: &[&str]) -> Config {
    let file = tempfile::NamedTempFile::new().unwrap();
    let ca = CertificateParams::default().self_signed(&KeyPair::generate().unwrap()).unwrap();
    std::fs::write(&file, ca.pem()).unwrap();
    let ca = format!("--ca-cert={}", file.path().display());
    let args = ["culvert-agent", &ca].into_iter().chain(args.iter().copied());
    Config::from_flags(Flags::try_parse_from(args).unwrap(), Invocation::from_argv0(None)).unwrap()
}

/// The context of an agent called `node-1`, which drains for 20 s and has this token.
pub(crate) fn context(token: Option<&str>) -> SessionContext {
    let metrics = Arc::new(AgentMetrics::new().unwrap());
    SessionContext {
        egress: Egress::new(
            Gate::open(Policy::default()),
            Duration::from_secs(5),
            metrics,
            LiveStreams::new(Side::Agent),
        ),
        agent_id: "node-1".parse().unwrap(),
        instance: InstanceId([7; 16]),
        identifiers: Identifiers::default(),
        token: token.map(|token| Current::fixed(Secret::new(token).unwrap())),
        max_streams: 1000,
        memory: MemoryBudget::new(0),
        hedge_rate: 0,
        keep_alive_interval: None,
        sessions: Sessions::new(Duration::from_secs(30), Arc::default()),
        drain_timeout: Duration::from_secs(20),
        uses_proxy: false,
        draining: CancellationToken::new(),
    }
}

/// The server's end of a tunnel.
#[derive(Debug)]
pub(crate) struct ServerEnd {
    pub(crate) tunnel: Tunnel,
    pub(crate) line: Line,
}

/// The agent's and the server's end of a new tunnel.
pub(crate) async fn connect(carrier: Carrier) -> (Connected, ServerEnd) {
    connect_to(carrier, &Settings::default()).await
}

/// The same with these settings of the server.
pub(crate) async fn connect_to(carrier: Carrier, server: &Settings) -> (Connected, ServerEnd) {
    connect_peer(Peer::local(carrier), server).await
}

/// The same, where both ends have the other one at `address`.
pub(crate) async fn connect_at(carrier: Carrier, address: SocketAddr) -> (Connected, ServerEnd) {
    connect_peer(Peer { address, ..Peer::local(carrier) }, &Settings::default()).await
}

async fn connect_peer(peer: Peer, server: &Settings) -> (Connected, ServerEnd) {
    let pair = Pair::without_idle_timeout(peer, &Settings::default(), server).await.unwrap();
    let Pair { agent, server, line } = pair;
    (Connected { tunnel: agent, buffers: None }, ServerEnd { tunnel: server, line })
}

impl ServerEnd {
    /// The control stream and the agent's hello on it.
    pub(crate) async fn hello(&self) -> (ControlStream, Hello) {
        let mut control =
            ControlStream::new(self.tunnel.clone(), self.tunnel.accept().await.unwrap());
        let ControlMessage::Hello(hello) = control.next().await.unwrap() else {
            panic!("the agent began with another message than hello");
        };
        (control, *hello)
    }
}

/// The welcome of `server`, which knows of `count` servers.
pub(crate) fn welcome(server: &str, count: u32) -> ControlMessage {
    ControlMessage::Welcome(Box::new(Welcome {
        revision: REVISION,
        features: Features::default(),
        server_id: server.parse().unwrap(),
        server_count: count,
        servers: List::default(),
        max_streams: 100,
        extensions: Extensions::default(),
    }))
}

/// The welcome of `server`, which knows this set of servers: ids and addresses.
fn welcome_with(server: &str, set: &[(String, String)]) -> ControlMessage {
    let ControlMessage::Welcome(mut welcome) = welcome(server, 1) else { unreachable!() };
    welcome.features = Features::supported();
    (welcome.server_count, welcome.servers) = (u32::try_from(set.len()).unwrap(), entries(set));
    ControlMessage::Welcome(welcome)
}

/// Servers with these ids and addresses, as they are sent.
pub(crate) fn entries(set: &[(String, String)]) -> ServerList {
    let entry = |(id, address): &(String, String)| ServerEntry {
        id: id.parse().unwrap(),
        address: Text::truncated(address.clone()),
    };
    set.iter().map(entry).collect::<Vec<_>>().try_into().unwrap()
}

/// What happens when an attempt connects.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// The handshake succeeds after `millis`; the peer sends no welcome.
    Connect { millis: u64, carrier: Carrier },
    /// The handshake succeeds after `millis`, and the server welcomes the agent.
    Welcome { millis: u64, carrier: Carrier, server: String, count: u32 },
    /// The same over QUIC, and the server sends this set of servers: ids and addresses.
    Member { server: String, set: Vec<(String, String)> },
    /// The handshake is refused after `millis`.
    Refuse { millis: u64 },
    /// There is no answer.
    Hang,
    /// The attempt panics.
    Panic,
}

/// One call of [`Connect::connect`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    /// Number of the call, from 0.
    pub(crate) number: usize,
    /// Milliseconds since the script began.
    pub(crate) millis: u128,
    pub(crate) carrier: Carrier,
    pub(crate) address: String,
    pub(crate) large_packets: bool,
}

type Script = Box<dyn Fn(&Call) -> Step + Send + Sync>;

/// A network whose servers follow a script.
pub(crate) struct Scripted {
    script: Script,
    addresses: Vec<SocketAddr>,
    begun: Instant,
    calls: Mutex<Vec<Call>>,
    count: AtomicUsize,
    ends: mpsc::UnboundedSender<ServerEnd>,
}

impl std::fmt::Debug for Scripted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scripted").finish_non_exhaustive()
    }
}

impl Scripted {
    /// A network of these addresses, and the server's end of each tunnel on it.
    pub(crate) fn new(
        addresses: &[&str],
        script: impl Fn(&Call) -> Step + Send + Sync + 'static,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<ServerEnd>) {
        let (ends, received) = mpsc::unbounded_channel();
        let scripted = Self {
            script: Box::new(script),
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            begun: Instant::now(),
            calls: Mutex::default(),
            count: AtomicUsize::new(0),
            ends,
        };
        (Arc::new(scripted), received)
    }

    /// The calls so far: time in milliseconds, carrier, and address.
    pub(crate) fn calls(&self) -> Vec<(u128, Carrier, String)> {
        let shown = |call: &Call| (call.millis, call.carrier, call.address.clone());
        self.calls.lock().iter().map(shown).collect()
    }

    /// The last call.
    pub(crate) fn last_call(&self) -> Call {
        self.calls.lock().last().cloned().unwrap()
    }

    async fn tunnel(
        &self,
        millis: u64,
        carrier: Carrier,
        answer: Option<ControlMessage>,
    ) -> Connected {
        sleep(Duration::from_millis(millis)).await;
        let (connected, end) = connect(carrier).await;
        if let Some(answer) = answer {
            let end = ServerEnd { tunnel: end.tunnel.clone(), line: end.line.clone() };
            culvert_transport::test_util::detached(async move {
                let (mut control, _) = end.hello().await;
                control.send(&answer).await.unwrap();
                while control.next().await.is_ok() {}
            });
        }
        let _ = self.ends.send(end);
        connected
    }
}

impl Connect for Scripted {
    type Tls = ();

    async fn read_tls(&self) -> Result<(), TlsError> {
        Ok(())
    }

    async fn resolve(
        &self,
        order: CarrierOrder,
        preference: &Preference,
    ) -> Result<Vec<Candidate>, ResolveError> {
        if self.addresses.is_empty() {
            return Err(ResolveError { host: "servers".into(), reason: "no such host".into() });
        }
        let candidate = |address: &SocketAddr| {
            let is_last = preference.last.contains(address);
            let address = ServerAddress { quic: Some(*address), tcp: Route::Direct(*address) };
            Candidate { address, order, is_last }
        };
        Ok(self.addresses.iter().map(candidate).collect())
    }

    fn direct(&self, addresses: &[SocketAddr], order: CarrierOrder) -> Vec<Candidate> {
        let candidate = |address: &SocketAddr| {
            let address = ServerAddress { quic: Some(*address), tcp: Route::Direct(*address) };
            Candidate { address, order, is_last: false }
        };
        addresses.iter().map(candidate).collect()
    }

    async fn connect(
        &self,
        carrier: Carrier,
        address: &ServerAddress,
        (): &(),
        large_packets: bool,
    ) -> Result<Connected, CarrierError> {
        let call = Call {
            number: self.count.fetch_add(1, Ordering::Relaxed),
            millis: self.begun.elapsed().as_millis(),
            carrier,
            address: address.to_string(),
            large_packets,
        };
        self.calls.lock().push(call.clone());
        match (self.script)(&call) {
            Step::Connect { millis, carrier } => Ok(self.tunnel(millis, carrier, None).await),
            Step::Welcome { millis, carrier, server, count } => {
                Ok(self.tunnel(millis, carrier, Some(welcome(&server, count))).await)
            }
            Step::Member { server, set } => {
                let answer = Some(welcome_with(&server, &set));
                Ok(self.tunnel(5, Carrier::Quic, answer).await)
            }
            Step::Refuse { millis } => {
                sleep(Duration::from_millis(millis)).await;
                Err(ConnectError::Refused.into())
            }
            Step::Hang => std::future::pending().await,
            Step::Panic => panic!("scripted"),
        }
    }
}
