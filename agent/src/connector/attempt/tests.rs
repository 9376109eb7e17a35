use culvert_wire::CloseCode;
use tokio::{sync::mpsc, time::Instant};

use super::*;
use crate::test_support::{Call, Scripted, ServerEnd, Step, context};

const A: &str = "10.0.0.1:8132";
const B: &str = "10.0.0.2:8132";

fn options(order: CarrierOrder) -> AttemptOptions {
    AttemptOptions { order, large_packets: true, at_once: false }
}

fn welcome(millis: u64, carrier: Carrier) -> Step {
    Step::Welcome { millis, carrier, server: "server-0".into(), count: 1 }
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
    let (scripted, ends) = Scripted::new(addresses, script);
    let begun = Instant::now();
    let attempted = attempt(&*scripted, options, None, &context(None)).await;
    Run { attempted, millis: begun.elapsed().as_millis(), calls: scripted.calls(), ends }
}

impl Run {
    fn carrier(&self) -> Carrier {
        self.attempted.result.as_ref().unwrap().tunnel().carrier()
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
        attempt(&*scripted, options, None, &context(None)).await.result.unwrap();
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
    assert_eq!(times, [0, 300, 10_000, 10_300]);
    assert_eq!(run.millis, 20_000, "each handshake has ten seconds");
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
    let context = context(None);
    let attempt = attempt(&*scripted, options(CarrierOrder::QuicFirst), None, &context);
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
