use tokio::{sync::mpsc, task::JoinSet};

use super::{scripted::ScriptedResolver, *};
use crate::{metrics::AgentMetrics, tunnels::ServerTunnels};

const A: &str = "10.0.0.1:0";
const B: &str = "10.0.0.2:0";

/// Lookups by a scripted resolver.
struct Rig {
    lookups: Arc<Lookups>,
    resolver: ScriptedResolver,
    begun: mpsc::UnboundedReceiver<String>,
    metrics: AgentMetrics,
}

fn rig(running: usize, waiting: usize) -> Rig {
    let metrics = AgentMetrics::new().unwrap();
    let (resolver, begun) = ScriptedResolver::new(&[A]);
    let limits = Limits { running, waiting };
    let lookups = Lookups::new(resolver.clone(), limits, metrics.target_lookups.clone());
    Rig { lookups: Arc::new(lookups), resolver, begun, metrics }
}

impl Rig {
    /// Starts a task that looks `host` up, and lets it run until it waits.
    async fn ask(&self, host: &str, tasks: &mut JoinSet<Answer>) {
        let (lookups, host) = (self.lookups.clone(), host.to_owned());
        tasks.spawn(async move { lookups.look_up(&host).await });
        tokio::task::yield_now().await;
    }

    /// The value of a metric about lookups of targets.
    fn metric(&self, name: &str, labels: &str) -> u64 {
        let text = self.metrics.render(&ServerTunnels::default());
        let name = format!("culvert_agent_lookups_{name}{{purpose=\"target\"{labels}}}");
        let line = text.lines().find_map(|line| line.strip_prefix(&name));
        line.unwrap_or_else(|| panic!("no {name}")).trim().parse().unwrap()
    }

    fn results(&self) -> [u64; 3] {
        ["found", "failed", "refused"]
            .map(|result| self.metric("total", &format!(",result=\"{result}\"")))
    }
}

fn addresses(addresses: &[&str]) -> Answer {
    Ok(addresses.iter().map(|address| address.parse().unwrap()).collect())
}

#[tokio::test]
async fn all_that_ask_for_a_name_meanwhile_share_one_lookup() {
    let mut rig = rig(4, 4);
    let mut tasks = JoinSet::new();
    for _ in 0..50 {
        rig.ask("hang", &mut tasks).await;
    }
    assert_eq!(rig.begun.recv().await.unwrap(), "hang");
    assert_eq!(rig.metric("pending", ""), 1);
    rig.resolver.release();
    while let Some(answer) = tasks.join_next().await {
        assert_eq!(answer.unwrap(), addresses(&[A]));
    }
    rig.begun.try_recv().unwrap_err();
    assert_eq!((rig.metric("pending", ""), rig.results()), (0, [1, 0, 0]));
}

#[tokio::test]
async fn answers_and_failures_are_not_kept() {
    let rig = rig(1, 1);
    assert_eq!(rig.lookups.look_up("a").await, addresses(&[A]));
    rig.resolver.set(Err("no such host"));
    let failed = LookupError::Failed("no such host".into());
    assert_eq!(rig.lookups.look_up("a").await, Err(failed));
    rig.resolver.set(Ok(&[B, A]));
    assert_eq!(rig.lookups.look_up("a").await, addresses(&[B, A]));
    assert_eq!(rig.results(), [2, 1, 0]);
}

#[tokio::test]
async fn an_address_that_the_resolver_gives_twice_is_used_once() {
    let rig = rig(1, 1);
    rig.resolver.set(Ok(&[B, A, B, B, A]));
    assert_eq!(rig.lookups.look_up("a").await, addresses(&[B, A]));
}

#[tokio::test]
async fn a_lookup_goes_on_when_no_caller_waits_and_later_ones_share_it() {
    let mut rig = rig(1, 1);
    let mut tasks = JoinSet::new();
    rig.ask("hang", &mut tasks).await;
    rig.begun.recv().await.unwrap();
    tasks.shutdown().await;
    rig.ask("hang", &mut tasks).await;
    rig.resolver.release();
    assert_eq!(tasks.join_next().await.unwrap().unwrap(), addresses(&[A]));
    rig.begun.try_recv().unwrap_err();
}

#[tokio::test]
async fn lookups_wait_in_order_and_too_many_are_refused() {
    let mut rig = rig(1, 2);
    let mut tasks = JoinSet::new();
    rig.ask("hang-1", &mut tasks).await;
    assert_eq!(rig.begun.recv().await.unwrap(), "hang-1");
    rig.ask("b", &mut tasks).await;
    rig.ask("c", &mut tasks).await;
    assert_eq!(rig.lookups.look_up("d").await, Err(LookupError::Busy));
    // A name that is looked up already takes nothing.
    rig.ask("hang-1", &mut tasks).await;
    assert_eq!((rig.metric("pending", ""), rig.results()), (3, [0, 0, 1]));
    rig.resolver.release();
    while let Some(answer) = tasks.join_next().await {
        assert_eq!(answer.unwrap(), addresses(&[A]));
    }
    let order = [rig.begun.recv().await, rig.begun.recv().await].map(Option::unwrap);
    assert_eq!(order, ["b", "c"]);
    assert_eq!(rig.lookups.look_up("d").await, addresses(&[A]));
}

#[tokio::test]
async fn a_lookup_that_waits_and_that_no_caller_wants_makes_room_for_another() {
    let mut rig = rig(1, 1);
    let (mut kept, mut given_up) = (JoinSet::new(), JoinSet::new());
    rig.ask("hang", &mut kept).await;
    rig.begun.recv().await.unwrap();
    rig.ask("b", &mut given_up).await;
    given_up.shutdown().await;
    rig.ask("c", &mut kept).await;
    rig.ask("c", &mut given_up).await;
    given_up.shutdown().await;
    rig.resolver.release();
    while let Some(answer) = kept.join_next().await {
        assert_eq!(answer.unwrap(), addresses(&[A]));
    }
    assert_eq!(rig.begun.recv().await.unwrap(), "c");
    rig.begun.try_recv().unwrap_err();
    assert_eq!(rig.metric("pending", ""), 0);
}

#[tokio::test]
async fn a_lookup_that_panics_fails_and_the_next_one_works() {
    let rig = rig(1, 1);
    let panicked = LookupError::Internal("the lookup panicked");
    assert_eq!(rig.lookups.look_up("panic").await, Err(panicked));
    assert_eq!(rig.lookups.look_up("a").await, addresses(&[A]));
}

#[tokio::test]
async fn threads_end_when_no_lookup_waits() {
    let rig = rig(4, 4);
    rig.lookups.look_up("a").await.unwrap();
    while rig.lookups.shared.state.lock().threads > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(rig.lookups.look_up("a").await, addresses(&[A]));
}

#[tokio::test]
async fn a_name_has_a_limited_number_of_addresses() {
    let rig = rig(1, 1);
    let found: Vec<_> =
        (0..=MAX_ADDRESSES).map(|n| format!("10.0.{}.{}:0", n / 256, n % 256)).collect();
    rig.resolver.set(Ok(&found.iter().map(String::as_str).collect::<Vec<_>>()));
    assert_eq!(rig.lookups.look_up("a").await.unwrap().len(), MAX_ADDRESSES);
}

/// Set in the process that has no descriptors.
const CHILD: &str = "CULVERT_TEST_WITHOUT_DESCRIPTORS";

#[test]
fn a_lookup_without_a_descriptor_is_no_unknown_name() {
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "lookups::tests::child_without_descriptors"]).env(CHILD, "1");
    let ended = child.output().unwrap();
    let text = String::from_utf8_lossy(&ended.stdout);
    assert!(ended.status.success() && text.contains("1 passed"), "{text}");
}

/// The process of the test above; nothing otherwise.
#[test]
fn child_without_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 0, hard).unwrap();
    let failed = SystemResolver.resolve("localhost");
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    assert!(is_shortage(&failed.unwrap_err()));
}
