//! The measured part of a run: samples of the load, events, and readings before and after.

use std::time::Duration;

use anyhow::Context as _;
use tokio::{
    select,
    sync::mpsc::UnboundedReceiver,
    time::{Instant, interval, sleep_until},
};

use super::{
    collect::Collector,
    network::Network,
    progress::Progress,
    watch::{Sighting, Watch, switch},
};
use crate::{
    link::Counters,
    load::{Sample, service::Service},
    peer::Started,
    process::Process,
    report::{self, LinkUsage, Run, Usage},
    scenario::{Event, Scenario, When},
};

/// Interval at which progress is shown and the target's own counters are read.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// The load of one run while it goes on, and everything that is measured.
pub(super) struct Measurement<'a> {
    pub(super) scenario: &'a Scenario,
    /// Name of the peer.
    pub(super) name: &'a str,
    pub(super) seed: u64,
    pub(super) network: &'a Network,
    pub(super) service: Service,
    pub(super) started: Started,
    pub(super) watch: Option<Watch>,
    pub(super) progress: &'a Progress,
}

/// Readings of all counters at one moment.
struct Readings {
    cpu: [Option<f64>; 2],
    counters: Option<[Counters; 2]>,
    short: u64,
    corrupt: u64,
}

/// A step of the schedule.
#[derive(Clone, Copy)]
enum Step {
    Begin,
    Event(usize),
    End,
}

impl Measurement<'_> {
    /// Takes samples and carries out the scenario's events until the load ends.
    pub(super) async fn run(
        &mut self,
        mut samples: UnboundedReceiver<Sample>,
        idle: [Option<u64>; 2],
    ) -> anyhow::Result<Run> {
        let scenario = self.scenario;
        let started = samples.recv().await.context("the load did not start")?;
        anyhow::ensure!(matches!(started, Sample::Start(_)), "the load starts with {started:?}");
        let start = Instant::now();
        let mut steps = steps(scenario).into_iter().peekable();
        let mut collector =
            Collector::new(&scenario.workloads, scenario.warmup_seconds, scenario.seconds);
        let mut look = interval(LOOK_INTERVAL);
        let (mut begun, mut ended, mut uploaded, mut done) = (None, None, 0, false);
        let mut memory = [None; 2];
        let from_the_start = scenario.from_the_start();
        let mut events: Vec<_> = from_the_start
            .map(|event| (start, event_report(event, -scenario.warmup_seconds)))
            .collect();
        loop {
            let next = steps.peek().map(|(at, _)| start + *at);
            let step = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            select! {
                biased;
                () = step => match steps.next() {
                    Some((_, Step::Begin)) => begun = Some(self.readings()),
                    Some((at, Step::Event(index))) => {
                        let event = &scenario.events[index];
                        let second = at.as_secs_f64() - scenario.warmup_seconds;
                        events.push((Instant::now(), event_report(event, second)));
                        self.apply(event).await?;
                    }
                    Some((_, Step::End)) | None => {
                        ended = Some(self.readings());
                        memory = read_both(&self.started, Process::memory);
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
        collector.corrupt(self.service.corrupt() - begun.corrupt);
        let peak = read_both(&self.started, Process::peak_memory);
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
            peer: self.name.into(),
            seed: self.seed,
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

    fn readings(&self) -> Readings {
        Readings {
            cpu: read_both(&self.started, Process::cpu_seconds),
            counters: self.network.counters(),
            short: self.service.short(),
            corrupt: self.service.corrupt(),
        }
    }

    async fn apply(&mut self, event: &Event) -> anyhow::Result<()> {
        self.network.apply(event)?;
        for (process, signal) in
            [(&mut self.started.server, event.server), (&mut self.started.agent, event.agent)]
        {
            if let (Some(process), Some(signal)) = (process, signal) {
                process.signal(signal).await?;
            }
        }
        Ok(())
    }
}

/// The steps of a run with their times since its start, in order.
fn steps(scenario: &Scenario) -> Vec<(Duration, Step)> {
    let begin = scenario.warmup_seconds;
    let events = scenario.events.iter().enumerate();
    let events = events.filter_map(|(index, event)| match event.at {
        When::Start => None,
        When::Second(second) => Some(((begin + second).max(0.0), Step::Event(index))),
    });
    let marks = [(begin, Step::Begin), (begin + scenario.seconds, Step::End)];
    let mut steps: Vec<_> = marks
        .into_iter()
        .chain(events)
        .map(|(at, step)| (Duration::from_secs_f64(at), step))
        .collect();
    // Stable: what happens at the beginning happens in the measured part.
    steps.sort_by_key(|(at, _)| *at);
    steps
}

/// An event for the report, without the change of carrier that may follow it.
fn event_report(event: &Event, second: f64) -> report::Event {
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

/// Seconds from the first to the second; negative when the second is earlier.
fn seconds_between(one: Instant, two: Instant) -> f64 {
    two.saturating_duration_since(one).as_secs_f64()
        - one.saturating_duration_since(two).as_secs_f64()
}

/// A reading of the server and the agent, where they are processes.
pub(super) fn read_both<T>(
    started: &Started,
    read: impl Fn(&Process) -> std::io::Result<T>,
) -> [Option<T>; 2] {
    [&started.server, &started.agent].map(|process| read(process.as_ref()?).ok())
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
