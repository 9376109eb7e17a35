//! One peer, once: the stage set, the load carried out, the events done, everything weighed.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use tokio::{
    runtime::Runtime,
    select,
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
    time::{Instant, interval, sleep_until},
};

use super::{collect::Collector, fleet, progress::Progress};
use crate::{
    certificates::Certificates,
    link::{self, Counters, Host, Link, LinkSettings, Udp},
    load::{Plan, Sample, Workload, drive::drive, service::Service},
    peer::{Daemon, Frontend, Peer, Programs, Stage, Started},
    report::{self, LinkUsage, Run, Usage},
    scenario::{Congestion, Event, Fleet, LinkEvent, Scenario},
    stock_client::StockClient,
};

/// Threads of the load and of the target: more than there are cores help nobody.
const WORKERS: usize = 2;
/// The load goes on for this long after the measured part, so that it does not end in it.
const MARGIN_SECONDS: f64 = 0.2;
/// How often progress is shown and what only the target counts is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// Everything that one run needs.
pub(super) struct Attempt<'a> {
    pub(super) scenario: &'a Scenario,
    pub(super) peer: Peer,
    pub(super) name: &'a str,
    pub(super) congestion: Congestion,
    pub(super) seed: u64,
    pub(super) programs: &'a Programs,
    pub(super) stock_client: Option<&'a StockClient>,
}

/// What lies between server and node.
enum Ground {
    Loopback(Arc<Host>),
    Link(Box<Link>),
}

impl Attempt<'_> {
    /// Carries the run out. What keeps the peer from taking part is told in the run.
    pub(super) fn run(&self) -> anyhow::Result<Run> {
        let title = format!("{} {} seed {}", self.scenario.name, self.name, self.seed);
        let progress = Progress::start(title);
        let ground = Ground::new(self.scenario.link.as_ref(), self.seed)?;
        let [server, node] = ground.hosts();
        for host in [&server, &node] {
            if let Err(error) = host.set_congestion_control(&self.congestion.to_string()) {
                let why = format!("the kernel has no {} for this user", self.congestion);
                let run = self.failed(&anyhow::Error::from(error).context(why));
                progress.end(&summary(&run));
                return Ok(run);
            }
        }
        let (here, server_runtime, node_runtime) =
            (Runtime::new()?, server.runtime(WORKERS)?, node.runtime(WORKERS)?);
        let certificates = Arc::new(Certificates::generate()?);
        let stage = Stage {
            server,
            node,
            server_address: ground.addresses().0,
            server_runtime: server_runtime.handle().clone(),
            node_runtime: node_runtime.handle().clone(),
            certificates,
            server_flags: self.scenario.server_flags.clone(),
            programs: self.programs.clone(),
        };
        let result = match self.scenario.fleet {
            Some(fleet) => here.block_on(self.find_each_other(stage, fleet)),
            None => here.block_on(self.perform(&ground, &stage, &progress)),
        };
        for runtime in [server_runtime, node_runtime] {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
        let run = result.unwrap_or_else(|error| self.failed(&error));
        progress.end(&summary(&run));
        Ok(run)
    }

    /// A run without a load, on the server's host.
    async fn find_each_other(&self, stage: Stage, fleet: Fleet) -> anyhow::Result<Run> {
        let (peer, idle) = (self.peer, Duration::from_secs_f64(self.scenario.seconds));
        let runtime = stage.server_runtime.clone();
        let found = runtime.spawn(async move { fleet::run(peer, &stage, fleet, idle).await });
        Ok(Run { seconds: self.scenario.seconds, fleet: Some(found.await??), ..self.empty() })
    }

    async fn perform(
        &self,
        ground: &Ground,
        stage: &Stage,
        progress: &Progress,
    ) -> anyhow::Result<Run> {
        let started = self.peer.start(stage).await?;
        // A tunnel's agent is beside the target, whose address does not change with the node's.
        let beside = self.peer != Peer::Direct;
        let listen = if beside { Ipv4Addr::LOCALHOST.into() } else { ground.addresses().1 };
        let listen = (listen, 0).into();
        let service = stage.node_runtime.spawn(Service::start(listen)).await??;
        let plan = Plan {
            seconds: self.scenario.warmup_seconds + self.scenario.seconds + MARGIN_SECONDS,
            target: service.address().to_string(),
            workloads: self.workloads(ground, &service),
        };
        let idle = weigh(&started, Daemon::memory);
        let samples = self.load(stage, &started, plan).await?;
        let mut show = Show { attempt: self, ground, service, started, progress };
        show.run(samples, idle).await
    }

    /// The scenario's workloads, with addresses for the names of targets.
    fn workloads(&self, ground: &Ground, service: &Service) -> Vec<Workload> {
        let resolved = |workload: &Workload| {
            let target = workload.target.as_deref().map(|target| match target {
                "greeter" => service.greeter().to_string(),
                "nowhere" => ground.nowhere().to_string(),
                other => other.to_owned(),
            });
            Workload { target, ..workload.clone() }
        };
        self.scenario.workloads.iter().map(resolved).collect()
    }

    /// Starts the load through the peer's door; what happens to it.
    async fn load(
        &self,
        stage: &Stage,
        started: &Started,
        plan: Plan,
    ) -> anyhow::Result<UnboundedReceiver<Sample>> {
        let (sender, samples) = unbounded_channel();
        match (self.peer.frontend(), &started.socket) {
            (Some(Frontend::Grpc), Some(socket)) => {
                let client = self.stock_client.context("Go is not installed")?;
                let loadtest = &stage.programs.loadtest;
                client.load(loadtest, &stage.server, socket, &plan, sender).await?;
            }
            (_, socket) => drop(stage.server_runtime.spawn(drive(plan, socket.clone(), sender))),
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
    run.workloads.iter().map(of_workload).collect::<Vec<_>>().join(", ")
}

impl Ground {
    fn new(settings: Option<&LinkSettings>, seed: u64) -> anyhow::Result<Self> {
        Ok(match settings {
            Some(settings) => Self::Link(Box::new(Link::start(settings, seed)?)),
            None => Self::Loopback(Arc::new(Host::new()?)),
        })
    }

    fn hosts(&self) -> [Arc<Host>; 2] {
        match self {
            Self::Loopback(host) => [Arc::clone(host), Arc::clone(host)],
            Self::Link(link) => [Arc::clone(&link.server), Arc::clone(&link.node)],
        }
    }

    /// Where the server and where the target is.
    fn addresses(&self) -> (IpAddr, IpAddr) {
        match self {
            Self::Loopback(_) => (Ipv4Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()),
            Self::Link(_) => (link::SERVER.into(), link::NODE.into()),
        }
    }

    /// An address that nobody has and nobody answers for.
    fn nowhere(&self) -> SocketAddr {
        match self {
            // Loopback answers for everything; this network is routed nowhere.
            Self::Loopback(_) => (Ipv4Addr::new(10, 77, 0, 99), 9).into(),
            Self::Link(_) => (link::NOWHERE, 9).into(),
        }
    }

    fn counters(&self) -> Option<[Counters; 2]> {
        match self {
            Self::Loopback(_) => None,
            Self::Link(link) => Some(link.counters()),
        }
    }
}

/// A run that is under way.
struct Show<'a> {
    attempt: &'a Attempt<'a>,
    ground: &'a Ground,
    service: Service,
    started: Started,
    progress: &'a Progress,
}

/// What has been used up to a moment.
struct Spent {
    cpu: [Option<f64>; 2],
    counters: Option<[Counters; 2]>,
    short: u64,
}

/// What is due at a moment.
#[derive(Clone, Copy)]
enum Cue {
    Begin,
    Event(usize),
    End,
}

impl Show<'_> {
    async fn run(
        &mut self,
        mut samples: UnboundedReceiver<Sample>,
        idle: [Option<u64>; 2],
    ) -> anyhow::Result<Run> {
        let scenario = self.attempt.scenario;
        let started = samples.recv().await.context("the load did not start")?;
        anyhow::ensure!(matches!(started, Sample::Start(_)), "the load starts with {started:?}");
        let start = Instant::now();
        let mut cues = cues(scenario).into_iter().peekable();
        let mut collector =
            Collector::new(&scenario.workloads, scenario.warmup_seconds, scenario.seconds);
        let mut look = interval(LOOK_INTERVAL);
        let (mut begun, mut ended, mut uploaded, mut done) = (None, None, 0, false);
        let mut memory = [None; 2];
        let mut events = Vec::new();
        loop {
            let next = cues.peek().map(|(at, _)| start + *at);
            let cue = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            select! {
                biased;
                () = cue => match cues.next() {
                    Some((_, Cue::Begin)) => begun = Some(self.spent()),
                    Some((at, Cue::Event(index))) => {
                        let event = &scenario.events[index];
                        self.perform(event).await?;
                        let second = at.as_secs_f64() - scenario.warmup_seconds;
                        events.push(report::Event { second, what: event.to_string() });
                    }
                    Some((_, Cue::End)) | None => {
                        ended = Some(self.spent());
                        memory = weigh(&self.started, Daemon::memory);
                    }
                },
                sample = samples.recv() => match sample {
                    Some(Sample::Done(_)) => done = true,
                    Some(sample) => collector.take(&sample),
                    None => break,
                },
                _ = look.tick() => {
                    let now = self.service.uploaded();
                    collector.uploaded(micros(start.elapsed()), now - uploaded);
                    uploaded = now;
                    self.progress.show(&collector.glance());
                }
            }
        }
        anyhow::ensure!(done, "the load broke off");
        let (begun, ended) = begun.zip(ended).context("the load ended early")?;
        collector.short(self.service.short() - begun.short);
        let peak = weigh(&self.started, Daemon::peak_memory);
        let usage = |side: usize| {
            Some(Usage {
                cpu_seconds: ended.cpu[side]? - begun.cpu[side]?,
                peak_memory: peak[side]?,
                grown_memory: memory[side]?.cast_signed() - idle[side]?.cast_signed(),
            })
        };
        Ok(Run {
            peer: self.attempt.name.into(),
            seed: self.attempt.seed,
            seconds: scenario.seconds,
            workloads: collector.results(),
            server: usage(0),
            agent: usage(1),
            link: begun.counters.zip(ended.counters).map(|(begun, ended)| used(begun, ended)),
            payload_bytes: collector.payload(),
            events,
            fleet: None,
            failure: None,
        })
    }

    fn spent(&self) -> Spent {
        Spent {
            cpu: weigh(&self.started, Daemon::cpu_seconds),
            counters: self.ground.counters(),
            short: self.service.short(),
        }
    }

    async fn perform(&mut self, event: &Event) -> anyhow::Result<()> {
        if let Ground::Link(link) = self.ground {
            match event.link {
                Some(LinkEvent::Down) => link.down(),
                Some(LinkEvent::Up) => link.up(),
                Some(LinkEvent::DropUdp) => link.udp(Udp::Drop),
                Some(LinkEvent::RejectUdp) => link.udp(Udp::Reject),
                Some(LinkEvent::PassUdp) => link.udp(Udp::Pass),
                Some(LinkEvent::RebindNat) => link.rebind_nat(),
                Some(LinkEvent::ChangeAddress) => drop(link.change_node_address()?),
                None => {}
            }
            if let Some(mtu) = event.mtu {
                link.set_path_mtu(mtu, event.silent);
            }
            if let Some(each_way) = event.set {
                link.set(&LinkSettings { each_way, ..LinkSettings::default() });
            }
        }
        for (daemon, signal) in
            [(&mut self.started.server, event.server), (&mut self.started.agent, event.agent)]
        {
            if let (Some(daemon), Some(signal)) = (daemon, signal) {
                daemon.signal(signal).await?;
            }
        }
        Ok(())
    }
}

/// Everything that is due, in order.
fn cues(scenario: &Scenario) -> Vec<(Duration, Cue)> {
    let begin = scenario.warmup_seconds;
    let events = scenario.events.iter().enumerate();
    let events = events.map(|(index, event)| ((begin + event.at).max(0.0), Cue::Event(index)));
    let marks = [(begin, Cue::Begin), (begin + scenario.seconds, Cue::End)];
    let mut cues: Vec<_> = marks
        .into_iter()
        .chain(events)
        .map(|(at, cue)| (Duration::from_secs_f64(at), cue))
        .collect();
    // Stable: what happens at the beginning happens in the measured part.
    cues.sort_by_key(|(at, _)| *at);
    cues
}

/// A reading of server and agent, where they are.
fn weigh<T>(started: &Started, read: impl Fn(&Daemon) -> std::io::Result<T>) -> [Option<T>; 2] {
    [&started.server, &started.agent].map(|daemon| read(daemon.as_ref()?).ok())
}

fn used(begun: [Counters; 2], ended: [Counters; 2]) -> LinkUsage {
    let sum = |of: fn(&Counters) -> u64| {
        ended.iter().map(of).sum::<u64>() - begun.iter().map(of).sum::<u64>()
    };
    LinkUsage {
        packets: sum(|counters| counters.packets),
        bytes: sum(|counters| counters.bytes),
        lost: sum(|counters| counters.lost),
        dropped: sum(|counters| counters.dropped),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
