//! A cluster's tunnel is upgraded one process at a time while kube-apiserver goes on dialing: in
//! every order, and beside what the same steps cost where Konnectivity replaces Konnectivity. Where there is no
//! Go to build Konnectivity's programs these say so and are skipped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use common::{
    mixed::{Daemon, Make, Site, touch, until},
    within,
};
use culvert_loadtest::{
    peer::Frontend,
    targets::{self, Target},
};
use nix::sys::signal::Signal;
use tokio::time::{interval, timeout};
use tokio_util::task::AbortOnDropHandle;

/// Time between two dials.
const DIAL_INTERVAL: Duration = Duration::from_millis(20);
/// After which a dial that has brought nothing has failed.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Dials that are seen before a step, and that have to work again behind it.
const SETTLED: usize = 50;

/// What happens to the dials of each step. While there is no server nobody counts.
#[derive(Debug, Default)]
struct Tally {
    steps: Vec<Step>,
    counting: bool,
    /// How often there was no server.
    pauses: usize,
}

#[derive(Clone, Debug)]
struct Step {
    name: String,
    dials: usize,
    failures: Vec<String>,
}

impl Tally {
    /// What a dial has to see again at its end to count: no server has come or gone meanwhile.
    fn era(&self) -> Option<usize> {
        self.counting.then_some(self.pauses)
    }

    /// Counts a dial for the step in which it ended.
    fn note(&mut self, began: Option<usize>, result: Result<(), String>) {
        if began.is_none() || began != self.era() {
            return;
        }
        let step = self.steps.last_mut().unwrap();
        step.dials += 1;
        if let Err(error) = result {
            step.failures.push(error);
        }
    }
}

/// Somebody who dials, steadily, whatever happens.
struct Dialing {
    tally: Arc<Mutex<Tally>>,
    _dialing: AbortOnDropHandle<()>,
    _target: Target,
}

impl Dialing {
    async fn start(socket: PathBuf) -> Self {
        let target = targets::echo().await.unwrap();
        let address = target.address();
        let tally = Arc::new(Mutex::new(Tally::default()));
        let counts = tally.clone();
        let dialing = tokio::spawn(async move {
            let mut ticks = interval(DIAL_INTERVAL);
            loop {
                ticks.tick().await;
                let began = counts.lock().unwrap().era();
                let (socket, counts) = (socket.clone(), counts.clone());
                tokio::spawn(async move {
                    let dial = touch(Frontend::Connect, &socket, address);
                    let result = match timeout(DIAL_TIMEOUT, dial).await {
                        Ok(result) => result.map_err(|error| error.to_string()),
                        Err(_) => Err("nothing happens".into()),
                    };
                    counts.lock().unwrap().note(began, result);
                });
            }
        });
        Self { tally, _dialing: AbortOnDropHandle::new(dialing), _target: target }
    }

    /// Counts for this step from now on.
    fn begin(&self, name: String) {
        let mut tally = self.tally.lock().unwrap();
        tally.steps.push(Step { name, dials: 0, failures: Vec::new() });
        tally.counting = true;
    }

    /// Counts nothing: there is no server.
    fn pause(&self) {
        let mut tally = self.tally.lock().unwrap();
        tally.counting = false;
        tally.pauses += 1;
    }

    /// Waits for so many more dials to work.
    async fn settle(&self) {
        let worked = || {
            let step = self.tally.lock().unwrap().steps.last().cloned().unwrap();
            step.dials - step.failures.len()
        };
        let before = worked();
        until("dials work", async || worked() >= before + SETTLED).await;
    }

    /// What happened, step by step.
    fn steps(&self) -> Vec<Step> {
        let steps = self.tally.lock().unwrap().steps.clone();
        for Step { name, dials, failures } in &steps {
            println!("{name}: {dials} dials, {} failed {failures:?}", failures.len());
        }
        steps
    }
}

/// One server and its agents while somebody dials.
struct Cluster {
    site: Site,
    agents: Vec<(Make, Daemon)>,
    started: usize,
    dialing: Dialing,
}

/// Which side is upgraded before the other.
#[derive(Clone, Copy, Debug)]
enum First {
    Agents,
    Server,
}

impl Cluster {
    /// A server and two agents.
    async fn start(server: Make, agents: Make) -> Option<Self> {
        let site = Site::start(server, Frontend::Connect, &[]).await?;
        let dialing = Dialing::start(site.socket()).await;
        let mut cluster = Self { site, agents: Vec::new(), started: 0, dialing };
        for _ in 0..2 {
            let agent = cluster.new_agent(agents).await;
            cluster.agents.push((agents, agent));
        }
        cluster.site.until_joined(2).await;
        cluster.dialing.begin(format!("{agents:?} agents at a {server:?} server"));
        cluster.dialing.settle().await;
        Some(cluster)
    }

    async fn new_agent(&mut self, make: Make) -> Daemon {
        self.started += 1;
        self.site.start_agent(make, &format!("agent-{}", self.started), &[]).await
    }

    /// One by one: a new pod is ready before the old one is told to go, and killed when it does not.
    async fn replace_agents(&mut self, make: Make) {
        for _ in 0..2 {
            self.dialing.begin(format!("an agent becomes {make:?}"));
            let new = self.new_agent(make).await;
            self.site.until_joined(3).await;
            let (old_make, mut old) = self.agents.remove(0);
            self.agents.push((make, new));
            old.signal(Signal::SIGTERM);
            match old_make {
                Make::Culvert => assert!(old.ended().await.success()),
                // It never ends, and drains as soon as it hears from the server.
                Make::Konnectivity => {
                    self.dialing.settle().await;
                    old.kill().await;
                }
            }
            self.site.until_joined(2).await;
            self.dialing.settle().await;
        }
    }

    /// The old one is gone before the new one comes: they share a port.
    async fn replace_server(&mut self, make: Make) {
        self.dialing.pause();
        self.site.server.signal(Signal::SIGTERM);
        assert!(self.site.server.ended().await.success());
        self.site.start_server(make, &[]).await;
        until("an agent has come", async || self.site.ready_backends().await > 0.0).await;
        self.dialing.begin(format!("the server has become {make:?}"));
        self.site.until_joined(2).await;
        self.dialing.settle().await;
    }

    fn dropped_nothing(&self) {
        for step in self.dialing.steps() {
            assert_eq!(step.failures, [""; 0], "{}", step.name);
        }
    }
}

/// What happens while everything that is Konnectivity becomes this.
async fn upgrade(first: First, to: Make) -> Option<Vec<Step>> {
    println!("{first:?} first");
    let mut cluster = Cluster::start(Make::Konnectivity, Make::Konnectivity).await?;
    match first {
        First::Agents => {
            cluster.replace_agents(to).await;
            cluster.replace_server(to).await;
        }
        First::Server => {
            cluster.replace_server(to).await;
            cluster.replace_agents(to).await;
        }
    }
    Some(cluster.dialing.steps())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_drops_no_dial_that_konnectivity_would_not_drop() {
    for first in [First::Server, First::Agents] {
        within(async {
            let Some(konnectivity) = upgrade(first, Make::Konnectivity).await else { return };
            let Some(ours) = upgrade(first, Make::Culvert).await else { return };
            for (ours, konnectivity) in ours.iter().zip(&konnectivity) {
                let (lost, allowed) = (ours.failures.len(), konnectivity.failures.len());
                assert!(lost <= allowed, "{}: {lost} of {} dials", ours.name, ours.dials);
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_of_ours_are_replaced_without_a_dial_dropped() {
    within(async {
        let Some(mut cluster) = Cluster::start(Make::Culvert, Make::Culvert).await else { return };
        cluster.replace_agents(Make::Culvert).await;
        cluster.dropped_nothing();
    })
    .await;
}

/// The same server again, and the way back.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_ours_is_replaced_without_a_dial_dropped() {
    let steps = [
        (Make::Culvert, Make::Culvert),
        (Make::Konnectivity, Make::Culvert),
        (Make::Konnectivity, Make::Konnectivity),
    ];
    for (agents, becomes) in steps {
        within(async {
            let Some(mut cluster) = Cluster::start(Make::Culvert, agents).await else { return };
            cluster.replace_server(becomes).await;
            cluster.dropped_nothing();
        })
        .await;
    }
}
