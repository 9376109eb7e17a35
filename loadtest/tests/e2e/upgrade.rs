//! The tunnel of a cluster is upgraded process by process while kube-apiserver goes on dialing: in
//! both orders, compared with the same steps from Konnectivity to Konnectivity.

use std::{path::PathBuf, sync::Arc, time::Duration};

use culvert_loadtest::{
    frontend::Protocol,
    process::{Process, Signal},
    targets::{self, Target},
};
use parking_lot::Mutex;
use rstest::rstest;
use tokio::time::{interval, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::support::{
    deployment::{
        Deployment,
        Implementation::{self, Culvert, Konnectivity},
        can_run, touch,
    },
    eventually, within,
};

/// Time between two dials.
const DIAL_INTERVAL: Duration = Duration::from_millis(20);
/// Time after which a dial counts as failed.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Dials that have to succeed before and after each step.
const SETTLED: usize = 50;

/// Outcomes of the dials of each step. While there is no server, dials are not counted.
#[derive(Debug, Default)]
struct Tally {
    steps: Vec<Step>,
    counting: bool,
    /// Number of times that there was no server.
    pauses: usize,
}

#[derive(Clone, Debug)]
struct Step {
    name: String,
    dials: usize,
    failures: Vec<String>,
}

impl Tally {
    /// Number that a dial has to find again at its end to be counted: no server came or went
    /// meanwhile.
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

/// A client that dials at a steady rate.
struct Dialer {
    tally: Arc<Mutex<Tally>>,
    _dialing: AbortOnDropHandle<()>,
    _target: Target,
}

impl Dialer {
    async fn start(socket: PathBuf) -> Self {
        let target = targets::echo().await.unwrap();
        let address = target.address();
        let tally = Arc::new(Mutex::new(Tally::default()));
        let counts = tally.clone();
        let dialing = culvert_transport::task::owned(async move {
            let mut ticks = interval(DIAL_INTERVAL);
            loop {
                ticks.tick().await;
                let began = counts.lock().era();
                let (socket, counts) = (socket.clone(), counts.clone());
                culvert_transport::test_util::detached(async move {
                    let dial = touch(Protocol::Connect, &socket, address);
                    let result = match timeout(DIAL_TIMEOUT, dial).await {
                        Ok(result) => result.map_err(|error| error.to_string()),
                        Err(_) => Err("no answer".into()),
                    };
                    counts.lock().note(began, result);
                });
            }
        });
        Self { tally, _dialing: dialing, _target: target }
    }

    /// Counts dials for this step from now on.
    fn begin(&self, name: String) {
        let mut tally = self.tally.lock();
        tally.steps.push(Step { name, dials: 0, failures: Vec::new() });
        tally.counting = true;
    }

    /// Stops counting, because there is no server.
    fn pause(&self) {
        let mut tally = self.tally.lock();
        tally.counting = false;
        tally.pauses += 1;
    }

    /// Waits for [`SETTLED`] more dials to succeed.
    async fn settle(&self) {
        let worked = || {
            let step = self.tally.lock().steps.last().cloned().unwrap();
            step.dials - step.failures.len()
        };
        let before = worked();
        eventually("dials work", async || worked() >= before + SETTLED).await;
    }

    /// The steps so far.
    fn steps(&self) -> Vec<Step> {
        let steps = self.tally.lock().steps.clone();
        for Step { name, dials, failures } in &steps {
            println!("{name}: {dials} dials, {} failed {failures:?}", failures.len());
        }
        steps
    }
}

/// One server and its agents while a client dials.
struct Cluster {
    deployment: Deployment,
    agents: Vec<(Implementation, Process)>,
    started: usize,
    dialer: Dialer,
}

/// Which side is upgraded before the other.
#[derive(Clone, Copy, Debug)]
enum First {
    Agents,
    Server,
}

impl Cluster {
    /// A server and two agents.
    async fn start(server: Implementation, agents: Implementation) -> Self {
        let deployment = Deployment::start(server, Protocol::Connect, &[]).await;
        let dialer = Dialer::start(deployment.socket()).await;
        let mut cluster = Self { deployment, agents: Vec::new(), started: 0, dialer };
        for _ in 0..2 {
            let agent = cluster.new_agent(agents).await;
            cluster.agents.push((agents, agent));
        }
        cluster.deployment.until_joined(2).await;
        cluster.dialer.begin(format!("{agents:?} agents at a {server:?} server"));
        cluster.dialer.settle().await;
        cluster
    }

    async fn new_agent(&mut self, implementation: Implementation) -> Process {
        self.started += 1;
        self.deployment.start_agent(implementation, &format!("agent-{}", self.started), &[]).await
    }

    /// Replaces the agents one by one: a new one is ready before the old one gets SIGTERM, and
    /// SIGKILL when it does not end.
    async fn replace_agents(&mut self, to: Implementation) {
        for _ in 0..2 {
            self.dialer.begin(format!("an agent becomes {to:?}"));
            let new = self.new_agent(to).await;
            self.deployment.until_joined(3).await;
            let (from, mut old) = self.agents.remove(0);
            self.agents.push((to, new));
            old.signal(Signal::Terminate).await.unwrap();
            match from {
                Culvert => assert!(old.ended().await.unwrap().success()),
                // It never ends, and drains from the server's next packet on.
                Konnectivity => {
                    self.dialer.settle().await;
                    old.kill().await.unwrap();
                }
            }
            self.deployment.until_joined(2).await;
            self.dialer.settle().await;
        }
    }

    /// Ends the old server before the new one starts: they share a port.
    async fn replace_server(&mut self, to: Implementation) {
        self.dialer.pause();
        self.deployment.server().signal(Signal::Terminate).await.unwrap();
        assert!(self.deployment.server().ended().await.unwrap().success());
        self.deployment.start_server(to, &[]).await;
        eventually("an agent has joined", async || self.deployment.ready_backends().await > 0.0)
            .await;
        self.dialer.begin(format!("the server has become {to:?}"));
        self.deployment.until_joined(2).await;
        self.dialer.settle().await;
    }

    /// Asserts that no dial failed.
    fn no_dial_failed(&self) {
        for step in self.dialer.steps() {
            assert_eq!(step.failures, [""; 0], "{}", step.name);
        }
    }
}

/// The steps in which server and agents of Konnectivity are replaced.
async fn upgrade(first: First, to: Implementation) -> Vec<Step> {
    println!("{first:?} first");
    let mut cluster = Cluster::start(Konnectivity, Konnectivity).await;
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
    cluster.dialer.steps()
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_fails_no_dial_that_konnectivity_would_not_fail(
    #[values(First::Server, First::Agents)] first: First,
) {
    if !can_run(&[Konnectivity]).await {
        return;
    }
    within(async {
        let konnectivity = upgrade(first, Konnectivity).await;
        let culvert = upgrade(first, Culvert).await;
        assert_eq!(culvert.len(), 4);
        assert_eq!(culvert.len(), konnectivity.len());
        for (culvert, konnectivity) in culvert.iter().zip(&konnectivity) {
            assert!(culvert.dials >= SETTLED, "{}: {} dials", culvert.name, culvert.dials);
            let (failed, allowed) = (culvert.failures.len(), konnectivity.failures.len());
            assert!(failed <= allowed, "{}: {failed} of {} dials", culvert.name, culvert.dials);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn culvert_agents_are_replaced_without_a_failed_dial() {
    within(async {
        let mut cluster = Cluster::start(Culvert, Culvert).await;
        cluster.replace_agents(Culvert).await;
        cluster.no_dial_failed();
    })
    .await;
}

/// By the same, and back to Konnectivity.
#[rstest]
#[case(Culvert, Culvert)]
#[case(Konnectivity, Culvert)]
#[case(Konnectivity, Konnectivity)]
#[tokio::test(flavor = "multi_thread")]
async fn a_culvert_server_is_replaced_without_a_failed_dial(
    #[case] agents: Implementation,
    #[case] to: Implementation,
) {
    if !can_run(&[agents, to]).await {
        return;
    }
    within(async {
        let mut cluster = Cluster::start(Culvert, agents).await;
        cluster.replace_server(to).await;
        cluster.no_dial_failed();
    })
    .await;
}
