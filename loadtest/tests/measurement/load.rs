//! Every kind of session against its target, without a tunnel.

use std::time::Duration;

use culvert_loadtest::{
    load::{Exchange, Kind, Plan, Sample, Workload, drive::drive, service::Service},
    targets::Target,
};
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc::unbounded_channel,
};

#[rstest]
#[tokio::test]
async fn a_session_does_what_its_kind_is_for(
    #[values(
        Kind::Echo,
        Kind::Download,
        Kind::Upload,
        Kind::Fetch,
        Kind::Send,
        Kind::Request,
        Kind::Exchange,
        Kind::ShortConnection,
        Kind::Tail,
        Kind::Dial,
        Kind::WriteClose,
        Kind::HalfClose,
        Kind::Abandon,
        Kind::Greeting,
        Kind::Stall,
        Kind::Idle
    )]
    kind: Kind,
) {
    const SECONDS: f64 = 1.0;
    let service = Service::start("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let target = (kind == Kind::Greeting).then(|| service.greeter().to_string());
    let name = format!("{kind:?}");
    let mut exchanges = Vec::new();
    if matches!(kind, Kind::Exchange | Kind::ShortConnection) {
        exchanges = [(300, 3000), (1500, 4000)].map(exchange).to_vec();
    }
    let workload =
        Workload { name, kind, target, sessions: 2, size: 100, interval_ms: 5.0, exchanges };
    let workloads = vec![workload];
    let plan = Plan { seconds: SECONDS, target: service.address().to_string(), workloads };
    let (sender, mut receiver) = unbounded_channel();
    drive(plan, None, sender).await;
    let mut samples = Vec::new();
    receiver.recv_many(&mut samples, usize::MAX).await;
    assert!(matches!(samples.first(), Some(Sample::Start(_))));
    assert!(matches!(samples.last(), Some(Sample::Done(_))));
    let errors: Vec<_> = samples.iter().filter(|s| matches!(s, Sample::Error(..))).collect();
    assert!(errors.is_empty(), "{errors:?}");
    let latencies = samples.iter().filter(|s| matches!(s, Sample::Latency(..))).count();
    let bytes: u64 =
        samples.iter().map(|s| if let Sample::Bytes(_, _, bytes) = s { *bytes } else { 0 }).sum();
    match kind {
        Kind::Exchange | Kind::ShortConnection => {
            assert!((40..=402).contains(&latencies), "{latencies}");
            // All bytes of every answer, and at the end a part of those that are not complete.
            let answers = latencies as u64 * 7000;
            assert!(bytes >= answers, "{bytes} bytes of {latencies} answers");
        }
        Kind::Download => assert!(bytes > 1_000_000, "{bytes}"),
        Kind::Upload => assert!(service.uploaded() > 1_000_000, "{}", service.uploaded()),
        Kind::Stall | Kind::Idle => assert_eq!(latencies, 0),
        // Two sessions, every 5 ms: 402 and never more; a tenth of that on a busy machine.
        _ => assert!((40..=402).contains(&latencies), "{latencies}"),
    }
    assert_eq!(service.short(), 0);
}

fn exchange((request, answer): (u64, u64)) -> Exchange {
    Exchange { request, answer }
}

/// The target answers each request half an interval late, so every other one is left out, and no
/// request waits for another.
#[tokio::test]
async fn an_exchange_that_comes_due_before_the_last_was_answered_is_left_out() {
    const INTERVAL_MS: u64 = 40;
    let target = Target::start(|mut socket| async move {
        assert_eq!(socket.read_u8().await?, b'X');
        let mut request = [0; 512];
        loop {
            socket.read_exact(&mut request).await?;
            let sizes = [&request[..8], &request[8..16]].map(|size| size[7]);
            assert_eq!((request[6], sizes), (2, [0, 100]));
            tokio::time::sleep(Duration::from_millis(INTERVAL_MS * 3 / 2)).await;
            socket.write_all(&[0; 100]).await?;
        }
    })
    .await
    .unwrap();
    let workload = Workload {
        name: "answers".into(),
        kind: Kind::Exchange,
        target: None,
        sessions: 1,
        size: 0,
        interval_ms: INTERVAL_MS as f64,
        exchanges: vec![exchange((512, 100))],
    };
    let plan =
        Plan { seconds: 1.0, target: target.address().to_string(), workloads: vec![workload] };
    let (sender, mut receiver) = unbounded_channel();
    drive(plan, None, sender).await;
    let mut samples = Vec::new();
    receiver.recv_many(&mut samples, usize::MAX).await;
    let answers = samples.iter().filter_map(|sample| match sample {
        Sample::Latency(_, due, took) => Some((*due, *took)),
        _ => None,
    });
    let answers: Vec<_> = answers.collect();
    assert!(answers.len() > 2, "{samples:?}");
    for pair in answers.windows(2) {
        let [(due, took), (next, _)] = [pair[0], pair[1]];
        // Timers fire up to a millisecond late.
        assert!(next - due >= 2 * INTERVAL_MS * 1000 - 2000, "{due} and {next}");
        assert!(took >= INTERVAL_MS * 1500, "{took}");
        assert!(next >= due + took, "{next} came due before {due} was answered");
    }
}
