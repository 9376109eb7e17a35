use std::collections::HashSet;

use bytes::Bytes;
use culvert_transport::{Carrier, test_util::Side};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::{
    test_support::{Call, Scripted, ServerEnd, Step, config, context},
    tunnels::Suspicion,
};

const ADDRESS: &str = "10.0.0.1:8132";

/// A connector that runs on a scripted network.
struct Running {
    scripted: Arc<Scripted>,
    ends: mpsc::UnboundedReceiver<ServerEnd>,
    tunnels: Arc<ServerTunnels>,
    metrics: Arc<AgentMetrics>,
    context: Arc<SessionContext>,
    task: AbortOnDropHandle<()>,
}

fn run(script: impl Fn(&Call) -> Step + Send + Sync + 'static) -> Running {
    run_with(None, script)
}

/// The same with this certificate.
fn run_with(
    certificate: Option<Current<Identity>>,
    script: impl Fn(&Call) -> Step + Send + Sync + 'static,
) -> Running {
    let (scripted, ends) = Scripted::new(&[ADDRESS], script);
    let tunnels = Arc::new(ServerTunnels::default());
    let metrics = Arc::new(AgentMetrics::new().unwrap());
    let context = Arc::new(context(None));
    let connector = Connector {
        certificate,
        connect: scripted.clone(),
        plan: Plan::new(&config(&[]), Instant::now()),
        direct: Direct::new(&config(&[]).sync),
        tunnels: tunnels.clone(),
        metrics: metrics.clone(),
    };
    let task = culvert_transport::task::owned(connector.run(context.clone()));
    Running { scripted, ends, tunnels, metrics, context, task }
}

fn welcome(carrier: Carrier, server: impl ToString, count: u32) -> Step {
    Step::Welcome { millis: 5, carrier, server: server.to_string(), count }
}

impl Running {
    /// Waits, in steps of the paused clock, until `condition` is true.
    async fn until(&self, condition: impl Fn(&Self) -> bool) {
        let wait = async {
            while !condition(self) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(3600), wait).await.expect("within an hour");
    }

    async fn until_connected(&self, count: u32) {
        self.until(|running| running.tunnels.connected() == count).await;
    }

    fn carriers(&self) -> Vec<Carrier> {
        self.tunnels.in_use().iter().map(|tunnel| tunnel.tunnel.carrier()).collect()
    }

    /// The reasons of QUIC's last failures, the newest first.
    fn quic_failures(&self) -> Vec<&'static str> {
        self.tunnels.quic().failures().map(|(_, reason)| *reason).collect()
    }

    /// The value of a counter, 0 before it was counted.
    fn metric(&self, name: &str) -> u64 {
        let text = self.metrics.render(&self.tunnels);
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.map_or(0, |value| value.trim().parse().unwrap())
    }
}

fn attempts(result: &str) -> String {
    format!("culvert_agent_connect_attempts_total{{result=\"{result}\"}}")
}

/// Whether the agent closed a tunnel with this code.
fn closed_with(lost: &TunnelLost, expected: CloseCode) -> bool {
    matches!(lost, TunnelLost::ClosedByPeer { code, .. } if *code == expected)
}

#[tokio::test(start_paused = true)]
async fn every_server_behind_one_address_is_found() {
    // The address leads to three servers in turn, and to the same one twice in a row.
    let running = run(|call| welcome(Carrier::Quic, format!("server-{}", call.number / 2 % 3), 3));
    running.until_connected(3).await;
    let names: HashSet<_> =
        running.tunnels.in_use().iter().map(|tunnel| tunnel.server_id.to_string()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
    // Then there are no further attempts.
    let calls = running.scripted.calls().len();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(running.scripted.calls().len(), calls);
    assert_eq!(running.metric(&attempts("ok")), calls as u64);
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_tunnel_is_closed_and_the_first_one_stays() {
    let mut running = run(|_| welcome(Carrier::Quic, "server-0", 2));
    let first = running.ends.recv().await.unwrap();
    let second = running.ends.recv().await.unwrap();
    let lost = second.tunnel.closed().await;
    assert!(closed_with(&lost, CloseCode::DONE), "{lost}");
    assert_eq!(running.tunnels.connected(), 1);
    assert!(timeout(Duration::from_secs(60), first.tunnel.closed()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_lost_server_is_looked_for_after_a_delay() {
    let mut running = run(|_| welcome(Carrier::Quic, "server-0", 1));
    running.until_connected(1).await;
    let lost_at = Instant::now();
    running.ends.recv().await.unwrap().tunnel.close(CloseCode::SHUTDOWN, "restart");
    running.until_connected(0).await;
    running.until_connected(1).await;
    let elapsed = lost_at.elapsed();
    let delay = Duration::from_millis(500)..Duration::from_millis(1100);
    assert!(delay.contains(&elapsed), "{elapsed:?}");
    assert_eq!(running.metric("culvert_agent_tunnels_lost_total{reason=\"shutdown\"}"), 1);
}

#[tokio::test(start_paused = true)]
async fn attempts_that_fail_are_repeated_with_growing_delays() {
    let running = run(|call| match call.number {
        // Each of the first attempts tries both carriers.
        0..10 => Step::Refuse { millis: 0 },
        _ => welcome(call.carrier, "server-0", 1),
    });
    running.until_connected(1).await;
    assert_eq!(running.metric(&attempts("connect_failed")), 5);
    let times: Vec<_> = running.scripted.calls().iter().map(|(millis, ..)| *millis).collect();
    let starts: Vec<_> = times.chunks(2).map(|pair| pair[0]).collect();
    for (delay, longest) in
        starts.windows(2).map(|pair| pair[1] - pair[0]).zip([1000, 1500, 2250, 3375, 5063])
    {
        assert!((longest / 2 - 2..=longest + 2).contains(&delay), "{starts:?}");
    }
}

/// Has the server of the first tunnel, which carries a dial, fall silent; the server's end, and the
/// time until the tunnel is replaced.
async fn replaced_when_silent(running: &mut Running) -> (ServerEnd, Duration) {
    running.until_connected(1).await;
    let end = running.ends.recv().await.unwrap();
    let (mut send, _recv) = end.tunnel.open().await.unwrap();
    send.write_chunk(Bytes::from_static(&[0x10])).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let silent_at = Instant::now();
    end.line.silence(Side::Server);
    running.until(|running| running.tunnels.retired() == 1).await;
    (end, silent_at.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_whose_server_falls_silent_is_replaced_while_it_stays() {
    let mut running = run(|call| welcome(call.carrier, "server-0", 1));
    let (_end, elapsed) = replaced_when_silent(&mut running).await;
    assert!(elapsed < Duration::from_secs(4), "{elapsed:?}");
    assert_eq!(running.tunnels.connected(), 1);
    // The tunnel was young, so TCP went first.
    assert_eq!(running.carriers(), [Carrier::Tcp]);
    assert!(!running.scripted.last_call().large_packets);
    // No handshake over QUIC has failed, and yet the operator can see why QUIC is not in use.
    assert_eq!(running.quic_failures(), ["quic_silent"]);
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_over_tcp_whose_server_falls_silent_is_replaced() {
    let mut running = run(|call| match call.carrier {
        Carrier::Quic => Step::Refuse { millis: 0 },
        _ => welcome(call.carrier, "server-0", 1),
    });
    let (_end, elapsed) = replaced_when_silent(&mut running).await;
    assert!(elapsed < Duration::from_secs(5), "{elapsed:?}");
    assert_eq!(running.carriers(), [Carrier::Tcp]);
    assert!(running.scripted.last_call().large_packets, "QUIC has not fallen silent");
    assert_eq!(running.quic_failures().last(), Some(&"quic_refused"));
    assert!(!running.quic_failures().contains(&"quic_silent"), "{:?}", running.quic_failures());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_answers_again_ends_the_attempt_to_replace_its_tunnel() {
    let mut running = run(|call| match call.number {
        0 => welcome(Carrier::Quic, "server-0", 1),
        _ => Step::Hang,
    });
    running.until_connected(1).await;
    let _end = running.ends.recv().await.unwrap();
    let tunnel = running.tunnels.in_use().remove(0);
    running.tunnels.set_suspicion(&tunnel, Some(Suspicion::Refused));
    running.until(|running| running.scripted.calls().len() == 3).await;
    running.tunnels.set_suspicion(&tunnel, None);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(running.scripted.calls().len(), 3, "both carriers were tried once");
    assert_eq!(running.metric(&attempts("connect_failed")), 0, "the attempt was abandoned");
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_moves_to_quic_once_quic_works() {
    let mut running = run(|call| match (call.carrier, call.millis) {
        (Carrier::Quic, 0..60_000) => Step::Refuse { millis: 0 },
        (carrier, _) => welcome(carrier, "server-0", 1),
    });
    running.until_connected(1).await;
    assert_eq!(running.carriers(), [Carrier::Tcp]);
    let old = running.ends.recv().await.unwrap();
    running.until(|running| running.carriers() == [Carrier::Quic]).await;
    let lost = old.tunnel.closed().await;
    assert!(closed_with(&lost, CloseCode::SUPERSEDED), "{lost}");
    let switched = "culvert_agent_transport_switches_total\
                    {from=\"tcp\",to=\"quic\",reason=\"quic_works\"}";
    assert_eq!(running.metric(switched), 1);
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_every_tunnel_and_the_connector() {
    let mut running = run(|call| welcome(Carrier::Quic, format!("server-{}", call.number % 3), 3));
    running.until_connected(3).await;
    running.context.draining.cancel();
    (&mut running.task).await.unwrap();
    assert_eq!(running.tunnels.connected(), 0);
    for _ in 0..3 {
        let lost = running.ends.recv().await.unwrap().tunnel.closed().await;
        assert!(closed_with(&lost, CloseCode::DONE), "{lost}");
    }
    assert_eq!(running.metric("culvert_agent_tunnels_lost_total{reason=\"done\"}"), 3);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_panics_has_failed_and_another_one_follows_after_a_delay() {
    let running = run(|call| match call.number {
        0 => Step::Panic,
        _ => welcome(Carrier::Quic, "server-0", 1),
    });
    running.until_connected(1).await;
    assert_eq!(running.metric(&attempts("panicked")), 1);
    let (millis, ..) = running.scripted.calls()[1];
    assert!((500..=1001).contains(&millis), "{millis}");
}

#[tokio::test(start_paused = true)]
async fn a_session_that_panics_is_counted_and_its_server_looked_for_after_a_delay() {
    let (scripted, _ends) = Scripted::new(&[ADDRESS], |_| Step::Hang);
    let mut connector = Connector {
        certificate: None,
        connect: scripted,
        plan: Plan::new(&config(&[]), Instant::now()),
        direct: Direct::new(&config(&[]).sync),
        tunnels: Arc::default(),
        metrics: Arc::new(AgentMetrics::new().unwrap()),
    };
    let mut sessions = Sessions::new();
    sessions.spawn(async { panic!("scripted") });
    let ended = sessions.join_next().await.unwrap();
    connector.on_session_end(ended);
    let (goal, at) = connector.plan.next(&connector.snapshot(), None, Instant::now()).unwrap();
    assert_eq!(goal, Goal::Find);
    assert!(at >= Instant::now() + Duration::from_millis(500));
    let scrape = connector.metrics.render(&connector.tunnels);
    assert!(scrape.contains("culvert_agent_tunnels_lost_total{reason=\"panicked\"} 1"), "{scrape}");
}

#[test]
fn the_reason_for_a_carrier_is_a_label() {
    let refused = QuicOutcome::Failed(QuicFailure::Refused);
    for (goal, order, quic, rank, label) in [
        (Goal::Find, CarrierOrder::QuicFirst, refused, Rank::Tcp, "quic_refused"),
        (Goal::Probe, CarrierOrder::Quic, QuicOutcome::Worked, Rank::Quic, "quic_works"),
        (
            Goal::Replace,
            CarrierOrder::QuicFirst,
            QuicOutcome::Worked,
            Rank::SmallQuic,
            "quic_silent",
        ),
        (Goal::Find, CarrierOrder::TcpFirst, QuicOutcome::Unknown, Rank::Tcp, "quic_failed_before"),
        (Goal::Find, CarrierOrder::TcpFirst, QuicOutcome::Worked, Rank::Quic, "first_choice"),
        (Goal::Find, CarrierOrder::QuicFirst, QuicOutcome::Worked, Rank::Quic, "first_choice"),
        (Goal::Find, CarrierOrder::Quic, QuicOutcome::Worked, Rank::Quic, "only_choice"),
        (Goal::Find, CarrierOrder::Tcp, QuicOutcome::Unknown, Rank::Tcp, "only_choice"),
    ] {
        assert_eq!(reason(goal, Some(Rank::Quic), order, quic, rank), label);
    }
    let (order, quic) = (CarrierOrder::TcpFirst, QuicOutcome::Unknown);
    assert_eq!(reason(Goal::Replace, Some(Rank::Tcp), order, quic, Rank::Tcp), "tcp_silent");
}

/// A rate sees no first event of a counter that did not exist before.
#[test]
fn every_reason_for_a_carrier_is_one_of_the_usual_switches() {
    use crate::metrics::USUAL_SWITCHES;
    use std::collections::BTreeSet;
    let failures = [QuicFailure::Refused, QuicFailure::Silent, QuicFailure::Rejected];
    let outcomes = failures.map(QuicOutcome::Failed);
    let ranks = [Rank::Grpc, Rank::Tcp, Rank::SmallQuic, Rank::Quic];
    let mut reasons = BTreeSet::new();
    for goal in [Goal::Find, Goal::Probe, Goal::Replace, Goal::Renew] {
        for order in
            [CarrierOrder::Quic, CarrierOrder::Tcp, CarrierOrder::QuicFirst, CarrierOrder::TcpFirst]
        {
            for quic in outcomes.into_iter().chain([QuicOutcome::Unknown, QuicOutcome::Worked]) {
                for (suspect, rank) in ranks.iter().flat_map(|one| ranks.map(|two| (*one, two))) {
                    reasons.insert(reason(goal, Some(suspect), order, quic, rank));
                }
            }
        }
    }
    let usual: BTreeSet<_> = USUAL_SWITCHES.iter().flat_map(|(.., reasons)| *reasons).collect();
    assert_eq!(reasons.iter().collect::<BTreeSet<_>>(), usual);
}

#[tokio::test(start_paused = true)]
async fn a_new_certificate_leads_to_a_new_tunnel_and_the_old_one_keeps_its_streams() {
    let identity = || {
        let pair = rcgen::generate_simple_self_signed(["agent".into()]).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(pair.signing_key.serialize_der());
        Identity { chain: vec![pair.cert.into()], key: key.unwrap() }
    };
    let (replace, certificate) = Current::replaceable(identity());
    let mut running = run_with(Some(certificate), |_| welcome(Carrier::Quic, "server-0", 1));
    let old = running.ends.recv().await.unwrap();
    running.until_connected(1).await;
    let stream = old.tunnel.open().await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    let begun = Instant::now();
    replace.with(identity());
    let new = running.ends.recv().await.unwrap();
    assert!(begun.elapsed() <= Duration::from_secs(31), "{:?}", begun.elapsed());
    running.until(|running| running.tunnels.retired() == 1).await;
    assert_eq!(running.tunnels.connected(), 1);
    let used = running.tunnels.in_use()[0].reason;
    assert_eq!(used, "renewed");
    drop(stream);
    let lost = old.tunnel.closed().await;
    assert!(closed_with(&lost, CloseCode::SUPERSEDED), "{lost}");
    // It is made anew once.
    assert!(timeout(Duration::from_secs(600), new.tunnel.closed()).await.is_err());
}

/// The address of a server of the set.
fn own_address(number: usize) -> String {
    format!("10.1.0.{number}:8132")
}

/// The set of servers with these numbers.
fn set(numbers: impl IntoIterator<Item = usize>) -> Vec<(String, String)> {
    numbers.into_iter().map(|number| (format!("server-{number}"), own_address(number))).collect()
}

/// The number of the server whose own address was called.
fn dialed(call: &Call) -> Option<usize> {
    (1..100).find(|number| call.address == own_address(*number))
}

/// A server of the set, at its own address or, by turns, at the address of all.
fn member(call: &Call, numbers: impl IntoIterator<Item = usize>) -> Step {
    let set = set(numbers);
    let number = dialed(call).unwrap_or(1 + call.number % set.len());
    Step::Member { server: format!("server-{number}"), set }
}

fn direct(result: &str) -> String {
    format!("culvert_agent_direct_dials_total{{result=\"{result}\"}}")
}

#[tokio::test(start_paused = true)]
async fn all_servers_of_the_set_are_dialed_at_their_own_addresses_at_once() {
    let running = run(|call| member(call, 1..=20));
    running.until_connected(20).await;
    let calls = running.scripted.calls();
    assert!(calls.last().unwrap().0 < 100, "{calls:?}");
    let by_name = calls.iter().filter(|(_, _, address)| address == ADDRESS).count();
    assert_eq!((by_name, calls.len()), (1, 20));
    assert_eq!(running.metric(&direct("ok")), 19);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(running.scripted.calls().len(), 20);
}

#[tokio::test(start_paused = true)]
async fn servers_that_are_lost_together_come_back_together() {
    let mut running = run(|call| match (dialed(call), call.millis) {
        // The servers start again after a moment.
        (_, 10_000..11_000) => Step::Refuse { millis: 0 },
        _ => member(call, 1..=20),
    });
    running.until_connected(20).await;
    tokio::time::sleep(Duration::from_millis(9_900)).await;
    for _ in 0..20 {
        running.ends.recv().await.unwrap().tunnel.close(CloseCode::SHUTDOWN, "restart");
    }
    running.until_connected(0).await;
    running.until_connected(20).await;
    let (back, ..) = *running.scripted.calls().last().unwrap();
    assert!(back < 13_000, "{back}");
}

#[tokio::test(start_paused = true)]
async fn the_loss_of_one_server_shows_within_two_seconds_that_another_is_silent() {
    let mut running = run(|call| member(call, 1..=2));
    running.until_connected(2).await;
    let crashed = running.ends.recv().await.unwrap();
    let silent = running.ends.recv().await.unwrap();
    silent.line.silence(Side::Server);
    tokio::time::sleep(Duration::from_secs(60)).await;
    // These tunnels have no keep-alive, and nothing else is sent.
    assert_eq!((running.tunnels.connected(), running.tunnels.retired()), (2, 0));
    let crashed_at = Instant::now();
    crashed.line.cut();
    running.until(|running| running.tunnels.retired() == 1).await;
    let elapsed = crashed_at.elapsed();
    assert!(elapsed < Duration::from_secs(2), "{elapsed:?}");
}

#[tokio::test(start_paused = true)]
async fn servers_that_cannot_be_reached_directly_are_looked_for_at_the_address_of_all() {
    for step in [Step::Refuse { millis: 0 }, Step::Hang] {
        let running = run(move |call| match dialed(call) {
            Some(_) => step.clone(),
            None => member(call, 1..=5),
        });
        running.until_connected(5).await;
        let (connected, ..) = *running.scripted.calls().last().unwrap();
        assert!(connected < 3_000, "{connected}");
        assert_eq!(running.metric(&direct("ok")), 0);
        // Attempts that hang end by themselves, and others do not follow.
        tokio::time::sleep(Duration::from_secs(60)).await;
        let calls = running.scripted.calls().len();
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(running.scripted.calls().len(), calls);
    }
}

#[tokio::test(start_paused = true)]
async fn an_address_that_leads_to_another_server_is_dialed_less_and_less_often() {
    let running = run(|_| Step::Member { server: "server-1".into(), set: set([1, 2]) });
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(running.metric(&direct("other_server")) >= 8);
    let calls = running.scripted.calls();
    let times: Vec<_> = calls.iter().filter(|(_, _, address)| address != ADDRESS).collect();
    let last: Vec<_> = times.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
    assert!(*last.last().unwrap() > 4_500, "{last:?}");
}

#[tokio::test(start_paused = true)]
async fn a_changed_set_is_followed_within_seconds() {
    let mut running = run(|call| member(call, if dialed(call) == Some(3) { 1..=3 } else { 1..=2 }));
    running.until_connected(2).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let end = running.ends.recv().await.unwrap();
    let send = async |numbers: std::ops::RangeInclusive<usize>| {
        let tunnel = running.tunnels.in_use().remove(0);
        let servers = crate::test_support::entries(&set(numbers.clone()));
        let servers = running.context.accept_servers(&servers, &tunnel.tunnel);
        running.tunnels.set_servers(&tunnel, servers, u32::try_from(numbers.count()).unwrap());
    };
    let begun = Instant::now();
    send(1..=3).await;
    running.until_connected(3).await;
    assert!(begun.elapsed() <= Duration::from_millis(1100), "{:?}", begun.elapsed());
    assert_eq!(running.metric("culvert_agent_set_servers{address=\"known\"}"), 3);
    drop(end);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_left_the_set_is_not_dialed_any_more() {
    let mut running = run(|call| member(call, 1..=2));
    running.until_connected(2).await;
    let ends = [running.ends.recv().await.unwrap(), running.ends.recv().await.unwrap()];
    for tunnel in running.tunnels.in_use() {
        let servers = crate::test_support::entries(&set([1]));
        let servers = running.context.accept_servers(&servers, &tunnel.tunnel);
        running.tunnels.set_servers(&tunnel, servers, 1);
    }
    let calls = running.scripted.calls().len();
    ends[1].tunnel.close(CloseCode::SHUTDOWN, "scaled down");
    running.until_connected(1).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(running.scripted.calls().len(), calls);
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_is_replaced_at_its_own_address() {
    let mut running = run(|call| match (dialed(call), call.number) {
        (None, 0) => member(call, [1]),
        // The address of all leads to another server.
        (None, _) => Step::Member { server: "server-7".into(), set: set([1]) },
        _ => member(call, [1]),
    });
    let (_end, elapsed) = replaced_when_silent(&mut running).await;
    assert!(elapsed < Duration::from_secs(4), "{elapsed:?}");
    assert_eq!(running.scripted.last_call().address, own_address(1));
}
