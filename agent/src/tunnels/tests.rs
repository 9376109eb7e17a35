use culvert_transport::{
    Carrier, Settings,
    qmux::Peer,
    test_util::{Pair, Side},
};
use tokio::time::{Duration, timeout};

use super::*;

async fn pair(carrier: Carrier) -> Pair {
    let settings = Settings::default();
    Pair::without_idle_timeout(Peer::local(carrier), &settings, &settings).await.unwrap()
}

fn new(server: &str, pair: &Pair, rank: Rank) -> NewTunnel {
    NewTunnel {
        server_id: server.parse().unwrap(),
        tunnel: pair.agent.clone(),
        buffers: None,
        rank,
        reason: "first_choice",
        version: PeerVersion::default(),
        servers: Default::default(),
    }
}

#[tokio::test(start_paused = true)]
async fn as_many_servers_are_looked_for_as_any_server_names() {
    let tunnels = ServerTunnels::default();
    let entry = |id: &str| (id.to_owned(), "10.0.0.1:8132".to_owned());
    let three = crate::test_support::entries(&["a", "b", "c"].map(entry));
    let pair = pair(Carrier::Quic).await;
    let servers = KnownServers::accept(&three, None);
    let new = NewTunnel { servers, ..new("a", &pair, Rank::Quic) };
    let tunnel = added(tunnels.add(new, Instant::now()));
    tunnels.set_reported_count(1);
    assert_eq!(tunnels.count(), 3);
    // What the last server to be connected sent stays.
    tunnels.remove(&tunnel);
    assert_eq!((tunnels.count(), tunnels.connected()), (3, 0));
}

fn added(outcome: AddOutcome) -> Arc<ServerTunnel> {
    match outcome {
        AddOutcome::New(added) | AddOutcome::Replaced { added, .. } => added,
        AddOutcome::Duplicate => panic!("the tunnel was not added"),
    }
}

#[test]
fn carriers_are_ranked_by_how_little_streams_wait_for_each_other() {
    let ranks = [
        Rank::of(Carrier::Grpc, true),
        Rank::of(Carrier::Tcp, true),
        Rank::of(Carrier::Quic, false),
        Rank::of(Carrier::Quic, true),
    ];
    assert_eq!(ranks, [Rank::Grpc, Rank::Tcp, Rank::SmallQuic, Rank::Quic]);
    assert!(ranks.is_sorted());
    assert_eq!(ranks.map(Rank::is_quic), [false, false, true, true]);
}

#[tokio::test(start_paused = true)]
async fn a_server_has_one_tunnel_in_use_which_a_better_one_replaces() {
    let tunnels = ServerTunnels::default();
    assert!(!tunnels.is_connected());
    let pair = pair(Carrier::Tcp).await;
    let now = Instant::now();
    let first = added(tunnels.add(new("a", &pair, Rank::Tcp), now));
    for rank in [Rank::Grpc, Rank::Tcp] {
        assert!(tunnels.is_duplicate(&first.server_id, rank));
        assert!(matches!(tunnels.add(new("a", &pair, rank), now), AddOutcome::Duplicate));
    }
    assert!(!tunnels.is_duplicate(&first.server_id, Rank::Quic));
    assert!(!tunnels.is_duplicate(&"b".parse().unwrap(), Rank::Tcp));
    assert!(matches!(tunnels.add(new("b", &pair, Rank::Tcp), now), AddOutcome::New(_)));
    let AddOutcome::Replaced { added, retired } = tunnels.add(new("a", &pair, Rank::Quic), now)
    else {
        panic!("QUIC does not replace TCP");
    };
    assert!(Arc::ptr_eq(&first, &retired) && first.is_retired() && !added.is_retired());
    first.retired().await;
    assert_eq!((tunnels.connected(), tunnels.retired()), (2, 1));
    tunnels.remove(&added);
    assert_eq!((tunnels.connected(), tunnels.retired()), (1, 1));
    let names: Vec<_> = tunnels.in_use().iter().map(|tunnel| tunnel.server_id.clone()).collect();
    assert_eq!(names, ["b".parse().unwrap()]);
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_whose_peer_is_suspect_is_replaced_by_any_other() {
    for suspicion in [Suspicion::Silent, Suspicion::Refused] {
        let tunnels = ServerTunnels::default();
        let pair = pair(Carrier::Quic).await;
        let first = added(tunnels.add(new("a", &pair, Rank::Quic), Instant::now()));
        tunnels.set_suspicion(&first, Some(suspicion));
        assert_eq!((first.suspicion(), first.state()), (Some(suspicion), "silent"));
        let outcome = tunnels.add(new("a", &pair, Rank::Tcp), Instant::now());
        assert!(matches!(outcome, AddOutcome::Replaced { .. }), "{outcome:?}");
        assert_eq!(first.state(), "retired");
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_no_longer_suspect_once_anything_arrives() {
    let tunnels = ServerTunnels::default();
    let pair = pair(Carrier::Quic).await;
    let tunnel = added(tunnels.add(new("a", &pair, Rank::Quic), Instant::now()));
    pair.line.silence(Side::Server);
    tunnels.set_suspicion(&tunnel, Some(Suspicion::Silent));
    assert!(tunnel.is_suspect());
    let (mut send, _recv) = pair.server.open().await.unwrap();
    send.write_chunk(bytes::Bytes::from_static(b"answer")).await.unwrap();
    pair.line.restore(Side::Server);
    let _stream = pair.agent.accept().await.unwrap();
    assert!(!tunnel.is_suspect());
    // Of a peer that the network reports as gone, what was in flight proves nothing.
    tunnels.set_suspicion(&tunnel, Some(Suspicion::Refused));
    send.write_chunk(bytes::Bytes::from_static(b"more")).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(tunnel.suspicion(), Some(Suspicion::Refused));
}

#[tokio::test(start_paused = true)]
async fn the_connector_is_notified_when_a_suspicion_begins_or_ends() {
    let tunnels = ServerTunnels::default();
    let pair = pair(Carrier::Quic).await;
    let tunnel = added(tunnels.add(new("a", &pair, Rank::Quic), Instant::now()));
    let notified = async || timeout(Duration::from_secs(1), tunnels.changed()).await.is_ok();
    for (suspicion, expected) in [
        (None, false),
        (Some(Suspicion::Silent), true),
        (Some(Suspicion::Silent), false),
        (Some(Suspicion::Refused), false),
        (None, true),
        (None, false),
    ] {
        tunnels.set_suspicion(&tunnel, suspicion);
        assert_eq!(notified().await, expected, "{suspicion:?}");
    }
    tunnels.set_lease_count(3);
    assert!(notified().await);
    tunnels.set_lease_count(3);
    assert!(!notified().await);
}

#[test]
fn servers_are_counted_by_their_reports_or_their_leases() {
    for (source, reported, leases, count) in [
        (CountSource::Leases, 0, 0, 0),
        (CountSource::Leases, 3, 0, 3),
        (CountSource::Leases, 3, 2, 2),
        (CountSource::Larger, 3, 2, 3),
        (CountSource::Larger, 3, 4, 4),
    ] {
        let tunnels = ServerTunnels::new(source);
        tunnels.set_reported_count(reported);
        tunnels.set_lease_count(leases);
        assert_eq!(tunnels.count(), count, "{source:?}, {reported}, {leases}");
    }
}

#[tokio::test(start_paused = true)]
async fn each_tunnel_has_a_line_in_the_readiness_answer() {
    let tunnels = ServerTunnels::default();
    let pair = pair(Carrier::Tcp).await;
    let tunnel = added(tunnels.add(new("a", &pair, Rank::Tcp), Instant::now()));
    tokio::time::advance(Duration::from_millis(2500)).await;
    assert_eq!(tunnels.describe(), ["[+]tunnel a: tcp for 2.5s (first_choice), used"]);
    tunnels.set_suspicion(&tunnel, Some(Suspicion::Refused));
    assert_eq!(tunnels.describe(), ["[-]tunnel a: tcp for 2.5s (first_choice), silent"]);
    added(tunnels.add(new("a", &pair, Rank::Quic), Instant::now()));
    assert_eq!(
        tunnels.describe(),
        [
            "[-]tunnel a: tcp for 2.5s (first_choice), retired",
            "[+]tunnel a: tcp for 0.0s (first_choice), used"
        ]
    );
}
