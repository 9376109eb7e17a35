//! One peer: its hosts and link, its processes and its load.

use std::{
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio::{
    runtime::Runtime,
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
    task::AbortHandle,
};

use super::view::View;
use crate::{
    certificates::Certificates,
    demo::Options,
    link::{self, Link, LinkSettings, Udp},
    load::{Kind, Plan, Sample, Workload, drive::drive, service::Service},
    peer::{Peer, Programs, Started, Topology},
    scenario::Congestion,
};

/// Threads of the load and of the target, each.
const WORKERS: usize = 2;
/// Duration of a load that lasts until the operator ends it, in seconds.
const A_DAY: f64 = 86_400.0;

/// Hosts of a peer and the link between them.
pub(super) struct Hosts {
    peer: Peer,
    name: String,
    link: Link,
    runtimes: [Runtime; 2],
    topology: Topology,
}

impl Hosts {
    /// Makes hosts whose TCP has this congestion control.
    ///
    /// # Errors
    /// When the process may not, or the kernel has no such congestion control.
    pub(super) fn new(
        peer: Peer,
        congestion: Congestion,
        settings: &LinkSettings,
        programs: &Programs,
    ) -> anyhow::Result<Self> {
        let link = Link::start(settings, 1)?;
        for host in [&link.server, &link.node] {
            let set = host.set_congestion_control(&congestion.to_string());
            // Culvert's tunnel is no TCP; another peer would not be what its name says.
            if !peer.is_culvert() {
                set.with_context(|| format!("the kernel has no {congestion} for this user"))?;
            }
        }
        let runtimes = [link.server.runtime(WORKERS)?, link.node.runtime(WORKERS)?];
        let topology = Topology {
            server: Arc::clone(&link.server),
            node: Arc::clone(&link.node),
            server_address: link::SERVER.into(),
            server_runtime: runtimes[0].handle().clone(),
            node_runtime: runtimes[1].handle().clone(),
            certificates: Arc::new(Certificates::generate()?),
            server_flags: Vec::new(),
            agent_flags: Vec::new(),
            programs: programs.clone(),
        };
        let name = match peer {
            Peer::Culvert(_) => "Culvert".to_owned(),
            Peer::Konnectivity(_) => format!("Konnectivity, {congestion}"),
            Peer::Direct => format!("plain TCP, {congestion}"),
        };
        Ok(Self { peer, name, link, runtimes, topology })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Ends what runs on the hosts.
    pub(super) fn end(self) {
        for runtime in self.runtimes {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }
}

/// A peer that runs.
pub(super) struct Lane<'a> {
    hosts: &'a Hosts,
    started: Started,
    _service: Service,
    samples: UnboundedReceiver<Sample>,
    load: AbortHandle,
    view: View,
}

impl<'a> Lane<'a> {
    /// Starts server, agent, target and load.
    ///
    /// # Errors
    /// When one of them does not start.
    pub(super) async fn start(hosts: &'a Hosts, options: &Options) -> anyhow::Result<Self> {
        let topology = &hosts.topology;
        let started = hosts.peer.start(topology).await?;
        // An agent dials loopback; without one the target is across the link.
        let beside = hosts.peer != Peer::Direct;
        let listen = if beside { Ipv4Addr::LOCALHOST } else { link::NODE };
        let listening = Service::start((listen, 0).into());
        let service = topology.node_runtime.spawn(listening).await??;
        let seconds = if options.hold { A_DAY } else { options.seconds as f64 + 60.0 };
        let target = service.address().to_string();
        let plan = Plan { seconds, target, workloads: workloads() };
        let (sender, samples) = unbounded_channel();
        let load = topology.server_runtime.spawn(drive(plan, started.socket.clone(), sender));
        let view = View::new(Instant::now());
        Ok(Self { hosts, started, _service: service, samples, load: load.abort_handle(), view })
    }

    /// Takes the samples that have come since the last call.
    pub(super) fn take(&mut self) {
        let now = Instant::now();
        while let Ok(sample) = self.samples.try_recv() {
            self.view.take(&sample, now);
        }
    }

    /// The line of the table.
    pub(super) fn row(&self) -> Vec<String> {
        let cells = self.view.cells(Instant::now());
        std::iter::once(self.hosts.name.clone()).chain(cells).collect()
    }

    /// Kills the agent and starts it again, if there is one.
    pub(super) async fn restart_agent(&mut self) {
        if let Some(agent) = &mut self.started.agent {
            // One that does not start shows in the table.
            let _ = agent.restart().await;
        }
    }

    /// Drops UDP on the link, or lets it pass.
    pub(super) fn block_udp(&self, is_blocked: bool) {
        self.hosts.link.udp(if is_blocked { Udp::Drop } else { Udp::Pass });
    }

    /// Changes the link.
    pub(super) fn set(&self, settings: &LinkSettings) {
        self.hosts.link.set(settings);
    }

    /// Takes the link down, or up again.
    pub(super) fn cut(&self, is_down: bool) {
        if is_down { self.hosts.link.down() } else { self.hosts.link.up() }
    }
}

impl Drop for Lane<'_> {
    fn drop(&mut self) {
        self.load.abort();
    }
}

/// Shells beside a download, in the order of the view's indices.
fn workloads() -> Vec<Workload> {
    let workload = |name: &str, kind, sessions, size, interval_ms| Workload {
        name: name.into(),
        kind,
        target: None,
        sessions,
        size,
        interval_ms,
        exchanges: Vec::new(),
    };
    vec![
        workload("keystrokes", Kind::Echo, 5, 64, 50.0),
        workload("download", Kind::Download, 1, 0, 0.0),
    ]
}
