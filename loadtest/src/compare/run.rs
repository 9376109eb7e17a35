//! One peer, once: the stage set, the load carried out, the events done, everything weighed.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{
    runtime::Runtime,
    select,
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
    time::{Instant, interval, sleep_until},
};

use super::{
    collect::Collector,
    fleet,
    ground::Ground,
    progress::Progress,
    watch::{Sighting, Watch, switch},
};
use crate::{
    certificates::Certificates,
    konnectivity_client::KonnectivityClient,
    link::Counters,
    load::{Plan, Sample, Workload, drive::drive, service::Service},
    peer::{Daemon, Frontend, Peer, Programs, Stage, Started},
    report::{self, LinkUsage, Run, Usage},
    scenario::{Congestion, Event, Fleet, Scenario, When},
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
    pub(super) konnectivity_client: Option<&'a KonnectivityClient>,
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
        for event in self.scenario.from_the_start() {
            ground.undergo(event)?;
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
            agent_flags: self.scenario.agent_flags.clone(),
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
        let watched = self.peer.is_culvert() && self.scenario.tries_the_carrier();
        let watch = watched.then(|| Watch::start(&stage.node_runtime));
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
        let mut show = Show { attempt: self, ground, service, started, watch, progress };
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
                let client = self.konnectivity_client.context("Go is not installed")?;
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

/// A run that is under way.
struct Show<'a> {
    attempt: &'a Attempt<'a>,
    ground: &'a Ground,
    service: Service,
    started: Started,
    watch: Option<Watch>,
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
        let from_the_start = scenario.from_the_start();
        let mut events: Vec<_> =
            from_the_start.map(|event| (start, told(event, -scenario.warmup_seconds))).collect();
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
                        let second = at.as_secs_f64() - scenario.warmup_seconds;
                        events.push((Instant::now(), told(event, second)));
                        self.perform(event).await?;
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
        let seen = self.watch.as_ref().map(Watch::seen).unwrap_or_default();
        let second = |at: Instant| seconds_between(start, at) - scenario.warmup_seconds;
        Ok(Run {
            peer: self.attempt.name.into(),
            seed: self.attempt.seed,
            seconds: scenario.seconds,
            workloads: collector.results(),
            server: usage(0),
            agent: usage(1),
            link: begun.counters.zip(ended.counters).map(|(begun, ended)| used(begun, ended)),
            payload_bytes: collector.payload(),
            events: with_switches(events, &seen),
            ready_seconds: self.started.ready.map(|ready| ready.as_secs_f64()),
            carriers: seen.iter().map(|sighting| carried(sighting, second(sighting.at))).collect(),
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
        self.ground.undergo(event)?;
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
    let events = events.filter_map(|(index, event)| match event.at {
        When::Start => None,
        When::Second(second) => Some(((begin + second).max(0.0), Cue::Event(index))),
    });
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

/// An event as reports tell it, before it is known what it leads to.
fn told(event: &Event, second: f64) -> report::Event {
    let (what, switches_to) = (event.to_string(), event.switches_to);
    report::Event { second, what, switches_to, switch: None }
}

/// The events with the change of carrier that came after each and before the next.
fn with_switches(events: Vec<(Instant, report::Event)>, seen: &[Sighting]) -> Vec<report::Event> {
    let moments: Vec<_> = events.iter().map(|(at, _)| *at).collect();
    let with_switch = |(index, (at, event)): (usize, (Instant, report::Event))| {
        let next = moments.get(index + 1).copied().unwrap_or_else(Instant::now);
        let switch = switch(seen, at, next).map(|sighting| report::Switch {
            to: sighting.serving.carrier,
            seconds: seconds_between(at, sighting.at),
        });
        report::Event { switch, ..event }
    };
    events.into_iter().enumerate().map(with_switch).collect()
}

fn carried(sighting: &Sighting, second: f64) -> report::Carried {
    let (carrier, reason) = (sighting.serving.carrier, sighting.serving.reason.clone());
    report::Carried { second, carrier, reason }
}

/// Negative if the second is the earlier one.
fn seconds_between(one: Instant, two: Instant) -> f64 {
    two.saturating_duration_since(one).as_secs_f64()
        - one.saturating_duration_since(two).as_secs_f64()
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
