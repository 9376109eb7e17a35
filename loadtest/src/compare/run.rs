//! One run of one peer: hosts, processes, load, events, measurements.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{
    runtime::Runtime,
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
};

use super::{
    fleet,
    measurement::{Measurement, read_both},
    network::Network,
    progress::Progress,
    watch::Watch,
};
use crate::{
    certificates::Certificates,
    frontend::Protocol,
    konnectivity_client::KonnectivityClient,
    load::{Plan, Sample, Workload, drive::drive, service::Service},
    peer::{Peer, Programs, Started, Topology},
    process::Process,
    report::{self, Run},
    scenario::{Congestion, Fleet, Scenario},
};

/// Threads of the load and of the target, each.
const WORKERS: usize = 2;
/// Time that the load goes on after the measured part, so that it does not end in it.
const MARGIN_SECONDS: f64 = 0.2;

/// Everything that one run needs.
pub(super) struct Attempt<'a> {
    pub(super) scenario: &'a Scenario,
    pub(super) peer: Peer,
    pub(super) name: &'a str,
    pub(super) congestion: Congestion,
    pub(super) seed: u64,
    pub(super) programs: &'a Programs,
    pub(super) konnectivity_client: Option<&'a KonnectivityClient>,
    /// Which run of how many it is, for the progress.
    pub(super) place: String,
}

impl Attempt<'_> {
    /// Runs the peer. When it cannot take part, the run says why.
    pub(super) fn run(&self) -> anyhow::Result<Run> {
        let (place, scenario) = (&self.place, &self.scenario.name);
        let title = format!("{place} {scenario} {} seed {}", self.name, self.seed);
        let progress = Progress::start(title);
        let network = Network::new(self.scenario.link.as_ref(), self.seed)?;
        let [server, node] = network.hosts();
        for host in [&server, &node] {
            if let Err(error) = host.set_congestion_control(&self.congestion.to_string()) {
                let why = format!("the kernel has no {} for this user", self.congestion);
                let run = self.failed(&anyhow::Error::from(error).context(why));
                progress.end(&summary(&run));
                return Ok(run);
            }
        }
        for event in self.scenario.from_the_start() {
            network.apply(event)?;
        }
        let (here, server_runtime, node_runtime) =
            (Runtime::new()?, server.runtime(WORKERS)?, node.runtime(WORKERS)?);
        let certificates = Arc::new(Certificates::generate()?);
        let topology = Topology {
            server,
            node,
            server_address: network.addresses().0,
            server_runtime: server_runtime.handle().clone(),
            node_runtime: node_runtime.handle().clone(),
            certificates,
            server_flags: self.scenario.server_flags.clone(),
            agent_flags: self.scenario.agent_flags.clone(),
            programs: self.programs.clone(),
        };
        let result = match self.scenario.fleet {
            Some(fleet) => here.block_on(self.find_each_other(topology, fleet)),
            None => here.block_on(self.measure(&network, &topology, &progress)),
        };
        for runtime in [server_runtime, node_runtime] {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
        let run = result.unwrap_or_else(|error| self.failed(&error));
        progress.end(&summary(&run));
        Ok(run)
    }

    /// Runs a fleet, which has no load, on the server's host.
    async fn find_each_other(&self, topology: Topology, fleet: Fleet) -> anyhow::Result<Run> {
        let (peer, idle) = (self.peer, Duration::from_secs_f64(self.scenario.seconds));
        let runtime = topology.server_runtime.clone();
        let found = runtime.spawn(async move { fleet::run(peer, &topology, fleet, idle).await });
        Ok(Run { seconds: self.scenario.seconds, fleet: Some(found.await??), ..self.empty() })
    }

    async fn measure(
        &self,
        network: &Network,
        topology: &Topology,
        progress: &Progress,
    ) -> anyhow::Result<Run> {
        let started = self.peer.start(topology).await?;
        let watched = self.peer.is_culvert() && self.scenario.tries_the_carrier();
        let watch = watched.then(|| Watch::start(&topology.node_runtime));
        // An agent dials loopback, whose address does not change with the node's.
        let beside = self.peer != Peer::Direct;
        let listen = if beside { Ipv4Addr::LOCALHOST.into() } else { network.addresses().1 };
        let listen = (listen, 0).into();
        let service = topology.node_runtime.spawn(Service::start(listen)).await??;
        let plan = Plan {
            seconds: self.scenario.warmup_seconds + self.scenario.seconds + MARGIN_SECONDS,
            target: service.address().to_string(),
            workloads: self.workloads(network, &service),
        };
        let idle = read_both(&started, Process::memory);
        let samples = self.load(topology, &started, plan).await?;
        let (scenario, name, seed) = (self.scenario, self.name, self.seed);
        let mut measurement =
            Measurement { scenario, name, seed, network, service, started, watch, progress };
        measurement.run(samples, idle).await
    }

    /// The scenario's workloads, with addresses for the names of targets.
    fn workloads(&self, network: &Network, service: &Service) -> Vec<Workload> {
        let resolved = |workload: &Workload| {
            let target = workload.target.as_deref().map(|target| match target {
                "greeter" => service.greeter().to_string(),
                "nowhere" => network.nowhere().to_string(),
                other => other.to_owned(),
            });
            Workload { target, ..workload.clone() }
        };
        self.scenario.workloads.iter().map(resolved).collect()
    }

    /// Starts the load through the peer's frontend; its samples.
    async fn load(
        &self,
        topology: &Topology,
        started: &Started,
        plan: Plan,
    ) -> anyhow::Result<UnboundedReceiver<Sample>> {
        let (sender, samples) = unbounded_channel();
        match (self.peer.frontend(), &started.socket) {
            (Some(Protocol::Grpc), Some(socket)) => {
                let client = self.konnectivity_client.context("Go is not installed")?;
                let loadtest = &topology.programs.loadtest;
                client.load(loadtest, &topology.server, socket, &plan, sender).await?;
            }
            (_, socket) => drop(topology.server_runtime.spawn(drive(plan, socket.clone(), sender))),
        }
        Ok(samples)
    }

    fn failed(&self, error: &anyhow::Error) -> Run {
        Run { failure: Some(format!("{error:#}")), ..self.empty() }
    }

    fn empty(&self) -> Run {
        Run {
            peer: self.name.into(),
            seed: self.seed,
            seconds: 0.0,
            workloads: Vec::new(),
            server: None,
            agent: None,
            link: None,
            payload_bytes: 0,
            events: Vec::new(),
            ready_seconds: None,
            carriers: Vec::new(),
            fleet: None,
            failure: None,
        }
    }
}

fn summary(run: &Run) -> String {
    if let Some(failure) = &run.failure {
        return format!("failed: {failure}");
    }
    if let Some(fleet) = &run.fleet {
        let seconds = |after: Option<f64>| {
            after.map_or_else(|| "never".into(), |after| format!("{after:.1} s"))
        };
        let (joined, back) = (seconds(fleet.joined_seconds), seconds(fleet.rejoined_seconds));
        return format!("all joined after {joined}, all back after {back}");
    }
    let of_workload = |result: &report::WorkloadResult| {
        let mut text = result.name.clone();
        if let Some(latency) = result.latency.as_ref().filter(|latency| latency.count > 0) {
            text += &format!(" {:.2}/{:.2} ms", latency.p50, latency.p99);
        }
        if let Some(mbit) = result.mbit_per_second {
            text += &format!(" {mbit:.1} Mbit/s");
        }
        let errors: u64 = result.errors.values().sum();
        if errors > 0 {
            text += &format!(" {errors} errors");
        }
        text
    };
    let of_event = |event: &report::Event| {
        let switch = event.switch.as_ref()?;
        Some(format!("{} {:.2} s after {}", switch.to, switch.seconds, event.what))
    };
    let workloads = run.workloads.iter().map(of_workload);
    workloads.chain(run.events.iter().filter_map(of_event)).collect::<Vec<_>>().join(", ")
}
