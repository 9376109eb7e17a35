use std::net::SocketAddr;

use culvert_wire::CloseCode;
use tokio::{sync::mpsc, time::Instant};

use super::*;
use crate::{
    connector::quic_outcome::QuicFailure,
    test_support::{self, Call, Scripted, ServerEnd, Step, context},
    tunnels::{AddOutcome, NewTunnel, Suspicion},
};

const A: &str = "10.0.0.1:8132";
const B: &str = "10.0.0.2:8132";

fn options(order: CarrierOrder) -> AttemptOptions {
    AttemptOptions { order, large_packets: true, at_once: false }
}

fn welcome(millis: u64, carrier: Carrier) -> Step {
    Step::Welcome { millis, carrier, server: "server-0".into(), count: 1 }
}

fn by_name() -> Places {
    Places { addresses: Vec::new(), by_name: true }
}

/// The result of one attempt.
struct Run {
    attempted: Attempted,
    millis: u128,
    calls: Vec<(u128, Carrier, String)>,
    ends: mpsc::UnboundedReceiver<ServerEnd>,
}

async fn run(
    addresses: &[&str],
    options: AttemptOptions,
    script: impl Fn(&Call) -> Step + Send + Sync + 'static,
) -> Run {
    run_beside(&ServerTunnels::default(), addresses, options, script).await
}

/// The same, for an agent that has these tunnels.
async fn run_beside(
    tunnels: &ServerTunnels,
    addresses: &[&str],
    options: AttemptOptions,
    script: impl Fn(&Call) -> Step + Send + Sync + 'static,
) -> Run {
    let (scripted, ends) = Scripted::new(addresses, script);
    let places = by_name();
    let begun = Instant::now();
    let attempted = attempt(&*scripted, options, &places, tunnels, &context(None)).await;
    Run { attempted, millis: begun.elapsed().as_millis(), calls: scripted.calls(), ends }
}

impl Run {
    fn carrier(&self) -> Carrier {
        match self.attempted.result.as_ref().unwrap() {
            Found::Server(joined, _) => joined.tunnel().carrier(),
            Found::Duplicate(rank) => panic!("a duplicate of rank {rank:?}"),
        }
    }

    fn error(&self) -> &AttemptError {
        self.attempted.result.as_ref().unwrap_err()
    }
}

#[tokio::test(start_paused = true)]
async fn quic_that_answers_within_its_head_start_is_tried_alone() {
    let run = run(&[A], options(CarrierOrder::QuicFirst), |_| welcome(299, Carrier::Quic)).await;
    assert_eq!((run.carrier(), run.millis), (Carrier::Quic, 299));
    assert_eq!(run.attempted.quic, QuicOutcome::Worked);
    assert_eq!(run.calls, [(0, Carrier::Quic, A.to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn tcp_starts_after_the_head_start_and_wins_over_silent_quic() {
    let run = run(&[A], options(CarrierOrder::QuicFirst), |call| match call.carrier {
        Carrier::Quic => Step::Hang,
        _ => welcome(50, Carrier::Tcp),
    })
    .await;
    assert_eq!((run.carrier(), run.millis), (Carrier::Tcp, 350));
    assert_eq!(run.attempted.quic, QuicOutcome::Failed(QuicFailure::Silent));
    assert_eq!(run.calls[1].0, 300);
}

#[tokio::test(start_paused = true)]
async fn tcp_starts_at_once_when_quic_is_refused() {
    let run = run(&[A], options(CarrierOrder::QuicFirst), |call| match call.carrier {
        Carrier::Quic => Step::Refuse { millis: 10 },
        _ => welcome(50, Carrier::Tcp),
    })
    .await;
    assert_eq!((run.carrier(), run.millis), (Carrier::Tcp, 60));
    assert_eq!(run.attempted.quic, QuicOutcome::Failed(QuicFailure::Refused));
}

#[tokio::test(start_paused = true)]
async fn a_konnectivity_server_is_reached_over_grpc() {
    let run = run(&[A], options(CarrierOrder::QuicFirst), |call| match call.carrier {
        Carrier::Quic => Step::Refuse { millis: 1 },
        _ => welcome(1, Carrier::Grpc),
    })
    .await;
    assert_eq!(run.carrier(), Carrier::Grpc);
    assert_eq!(run.attempted.quic, QuicOutcome::Failed(QuicFailure::Refused));
}

#[tokio::test(start_paused = true)]
async fn quic_that_overtakes_tcp_works() {
    let run = run(&[A], options(CarrierOrder::TcpFirst), |call| match call.carrier {
        Carrier::Tcp => welcome(1000, Carrier::Tcp),
        _ => welcome(50, Carrier::Quic),
    })
    .await;
    assert_eq!((run.carrier(), run.millis), (Carrier::Quic, 350));
    assert_eq!(run.attempted.quic, QuicOutcome::Worked);
}

#[tokio::test(start_paused = true)]
async fn tcp_that_wins_its_race_shows_nothing_about_quic() {
    for order in [CarrierOrder::TcpFirst, CarrierOrder::Tcp] {
        let run = run(&[A], options(order), |call| match call.carrier {
            Carrier::Tcp => welcome(400, Carrier::Tcp),
            _ => Step::Refuse { millis: 0 },
        })
        .await;
        assert_eq!((run.carrier(), run.millis), (Carrier::Tcp, 400));
        assert_eq!(run.attempted.quic, QuicOutcome::Unknown, "{order:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_head_start_both_carriers_start_together() {
    let options = AttemptOptions { at_once: true, ..options(CarrierOrder::QuicFirst) };
    let run = run(&[A], options, |call| match call.carrier {
        Carrier::Quic => Step::Hang,
        _ => welcome(50, Carrier::Tcp),
    })
    .await;
    assert_eq!((run.carrier(), run.millis), (Carrier::Tcp, 50));
}

#[tokio::test(start_paused = true)]
async fn the_size_of_packets_is_an_option() {
    for large_packets in [true, false] {
        let (scripted, _ends) = Scripted::new(&[A], |_| welcome(0, Carrier::Quic));
        let options = AttemptOptions { large_packets, ..options(CarrierOrder::Quic) };
        let tunnels = ServerTunnels::default();
        attempt(&*scripted, options, &by_name(), &tunnels, &context(None)).await.result.unwrap();
        assert_eq!(scripted.last_call().large_packets, large_packets);
    }
}

#[tokio::test(start_paused = true)]
async fn each_address_is_tried_and_the_last_ones_errors_are_reported() {
    let run = run(&[A, B], options(CarrierOrder::QuicFirst), |call| match call.carrier {
        Carrier::Quic => Step::Hang,
        _ => Step::Refuse { millis: 20 },
    })
    .await;
    let times: Vec<_> = run.calls.iter().map(|(millis, ..)| *millis).collect();
    assert_eq!(times, [0, 250, 300, 550]);
    assert_eq!(run.millis, 10_250, "each handshake has ten seconds");
    assert_eq!(
        run.error().to_string(),
        format!("{B}: over quic: nothing within 10s; over tcp: connection refused")
    );
    assert_eq!(run.error().label(), "connect_failed");
    assert_eq!(run.attempted.quic, QuicOutcome::Unknown, "the server may be down");
}

#[tokio::test(start_paused = true)]
async fn the_first_address_whose_server_welcomes_the_agent_is_used() {
    let run = run(&[A, B], options(CarrierOrder::Quic), |call| match call.address.as_str() {
        A => Step::Refuse { millis: 5 },
        _ => welcome(5, Carrier::Quic),
    })
    .await;
    assert_eq!((run.carrier(), run.millis), (Carrier::Quic, 10));
    assert_eq!(run.attempted.quic, QuicOutcome::Worked);
}

#[tokio::test(start_paused = true)]
async fn a_dead_address_costs_one_delay() {
    let run = run(&[A, B], options(CarrierOrder::QuicFirst), |call| match call.address.as_str() {
        A => Step::Hang,
        _ => welcome(5, Carrier::Quic),
    })
    .await;
    assert_eq!((run.carrier(), run.millis), (Carrier::Quic, 255));
    assert_eq!(run.attempted.quic, QuicOutcome::Worked);
    let tried = [(0, Carrier::Quic, A.to_owned()), (250, Carrier::Quic, B.to_owned())];
    assert_eq!(run.calls, tried);
}

#[tokio::test(start_paused = true)]
async fn without_udp_a_dead_address_costs_one_delay_and_the_head_start() {
    let run = run(&[A, B], options(CarrierOrder::QuicFirst), |call| {
        match (call.address.as_str(), call.carrier) {
            (A, _) | (_, Carrier::Quic) => Step::Hang,
            _ => welcome(5, Carrier::Tcp),
        }
    })
    .await;
    assert_eq!((run.carrier(), run.millis), (Carrier::Tcp, 555));
    assert_eq!(run.attempted.quic, QuicOutcome::Failed(QuicFailure::Silent));
}

#[tokio::test(start_paused = true)]
async fn after_a_server_that_refuses_the_agent_the_other_addresses_are_tried() {
    let script = |call: &Call| match call.address.as_str() {
        A => Step::Connect { millis: 5, carrier: Carrier::Quic },
        _ => welcome(5, Carrier::Quic),
    };
    // A is connected first, and B is the one that answers hello.
    let reached = run(&[A, B], options(CarrierOrder::Quic), script).await;
    assert_eq!((reached.carrier(), reached.millis), (Carrier::Quic, 10_010));
    // A server that answered and gave no welcome is reported, whichever fails last.
    let refused = run(&[A, B], options(CarrierOrder::Quic), |call| match call.address.as_str() {
        A => Step::Connect { millis: 5, carrier: Carrier::Quic },
        _ => Step::Refuse { millis: 5 },
    })
    .await;
    assert_eq!(refused.error().to_string(), format!("{A}: over quic: nothing within 10s"));
}

/// The tunnels of an agent that is connected to `server` at an address over `carrier`.
async fn connected_to(server: &str, address: &str, carrier: Carrier) -> (ServerTunnels, ServerEnd) {
    let tunnels = ServerTunnels::default();
    let (connected, end) = test_support::connect_at(carrier, address.parse().unwrap()).await;
    let new = NewTunnel {
        server_id: server.parse().unwrap(),
        tunnel: connected.tunnel,
        buffers: None,
        rank: Rank::of(carrier, true),
        reason: "first_choice",
        version: crate::tunnels::PeerVersion::default(),
        servers: Default::default(),
    };
    assert!(matches!(tunnels.add(new, Instant::now()), AddOutcome::New(_)));
    (tunnels, end)
}

fn welcome_of(server: &str, millis: u64, carrier: Carrier) -> Step {
    Step::Welcome { millis, carrier, server: server.into(), count: 2 }
}

#[tokio::test(start_paused = true)]
async fn a_distant_server_is_found_beside_one_that_is_connected() {
    let (tunnels, _end) = connected_to("near", B, Carrier::Quic).await;
    let script = |call: &Call| match call.address.as_str() {
        A => welcome_of("far", 800, Carrier::Quic),
        _ => welcome_of("near", 5, Carrier::Quic),
    };
    for addresses in [[A, B], [B, A]] {
        let mut run = run_beside(&tunnels, &addresses, options(CarrierOrder::Quic), script).await;
        let Ok(Found::Server(joined, _)) = &run.attempted.result else { panic!("a duplicate") };
        assert_eq!(joined.welcome.server_id.as_str(), "far");
        // The duplicate was closed before.
        let near = run.ends.recv().await.unwrap();
        let lost = near.tunnel.closed().await;
        assert!(lost.to_string().contains("duplicate"), "{lost}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_address_delays_the_next_draw_by_two_seconds_at_most() {
    let (tunnels, _end) = connected_to("near", "10.0.0.9:8132", Carrier::Quic).await;
    let run = run_beside(&tunnels, &[A, B], options(CarrierOrder::Quic), |call| {
        match call.address.as_str() {
            A => welcome_of("near", 5, Carrier::Quic),
            _ => Step::Hang,
        }
    })
    .await;
    assert!(matches!(run.attempted.result, Ok(Found::Duplicate(Rank::Quic))));
    assert_eq!((run.millis, run.attempted.quic), (2005, QuicOutcome::Worked));
}

#[tokio::test(start_paused = true)]
async fn a_server_without_a_welcome_delays_the_next_draw_by_two_seconds_at_most() {
    let (tunnels, _end) = connected_to("near", "10.0.0.9:8132", Carrier::Quic).await;
    let run = run_beside(&tunnels, &[A, B], options(CarrierOrder::Quic), |call| {
        match call.address.as_str() {
            A => welcome_of("near", 5, Carrier::Quic),
            _ => Step::Connect { millis: 300, carrier: Carrier::Quic },
        }
    })
    .await;
    assert!(matches!(run.attempted.result, Ok(Found::Duplicate(Rank::Quic))));
    assert_eq!(run.millis, 2005);
}

#[tokio::test(start_paused = true)]
async fn after_a_duplicate_no_other_address_with_a_tunnel_is_tried() {
    let (tunnels, _end) = connected_to("near", B, Carrier::Quic).await;
    let run = run_beside(&tunnels, &[A, B], options(CarrierOrder::Quic), |_| {
        welcome_of("near", 5, Carrier::Quic)
    })
    .await;
    assert!(matches!(run.attempted.result, Ok(Found::Duplicate(Rank::Quic))));
    assert_eq!((run.millis, run.calls.len()), (5, 1));
}

#[tokio::test(start_paused = true)]
async fn a_suspect_tunnels_address_comes_first_and_those_with_a_good_one_last() {
    let (tunnels, _end) = connected_to("near", A, Carrier::Tcp).await;
    let address: SocketAddr = A.parse().unwrap();
    let preference = |order| {
        let Preference { first, last } = preference(&tunnels, options(order));
        (first, last)
    };
    // A tunnel over TCP may be replaced by one over QUIC.
    assert_eq!(preference(CarrierOrder::QuicFirst), (None, vec![]));
    assert_eq!(preference(CarrierOrder::TcpFirst), (None, vec![address]));
    tunnels.set_suspicion(&tunnels.in_use()[0], Some(Suspicion::Refused));
    assert_eq!(preference(CarrierOrder::TcpFirst), (Some(address), vec![]));
}

#[tokio::test(start_paused = true)]
async fn quic_alone_that_fails_has_failed() {
    let run = run(&[A], options(CarrierOrder::Quic), |_| Step::Refuse { millis: 5 }).await;
    assert_eq!(run.error().to_string(), format!("{A}: over quic: connection refused"));
    assert_eq!(run.attempted.quic, QuicOutcome::Failed(QuicFailure::Refused));
    assert_eq!(run.calls.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_refused_agent_is_reported_and_not_asked_about_over_another_carrier() {
    let (scripted, mut ends) =
        Scripted::new(&[A], |call| Step::Connect { millis: 0, carrier: call.carrier });
    let refuse = async {
        let end = ends.recv().await.unwrap();
        let (_control, _) = end.hello().await;
        end.tunnel.close(CloseCode::UNAUTHENTICATED, "no token");
        end.tunnel.closed().await;
    };
    let (context, tunnels) = (context(None), ServerTunnels::default());
    let (options, places) = (options(CarrierOrder::QuicFirst), by_name());
    let attempt = attempt(&*scripted, options, &places, &tunnels, &context);
    let (attempted, ()) = tokio::join!(attempt, refuse);
    let error = attempted.result.unwrap_err();
    assert_eq!(error.label(), "join_failed");
    assert_eq!(
        error.to_string(),
        format!("{A}: over quic: closed by the peer: unauthenticated: no token")
    );
    assert_eq!(attempted.quic, QuicOutcome::Unknown);
    assert_eq!(scripted.calls().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_server_without_a_welcome_has_ten_seconds() {
    for (carrier, quic) in [
        (Carrier::Quic, QuicOutcome::Failed(QuicFailure::Silent)),
        (Carrier::Tcp, QuicOutcome::Failed(QuicFailure::Refused)),
    ] {
        let mut run = run(&[A], options(CarrierOrder::QuicFirst), move |call| {
            if call.carrier == carrier {
                Step::Connect { millis: 0, carrier }
            } else {
                Step::Refuse { millis: 0 }
            }
        })
        .await;
        assert_eq!(run.millis, 10_000);
        assert_eq!(run.error().to_string(), format!("{A}: over {carrier}: nothing within 10s"));
        assert_eq!(run.attempted.quic, quic);
        // The abandoned tunnel is closed.
        run.ends.recv().await.unwrap().tunnel.closed().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_name_without_an_address_is_reported() {
    let run = run(&[], options(CarrierOrder::QuicFirst), |_| Step::Hang).await;
    assert_eq!(run.error().to_string(), "cannot resolve servers: no such host");
    assert_eq!(run.error().label(), "unresolvable");
    assert_eq!(run.attempted.quic, QuicOutcome::Unknown);
}
