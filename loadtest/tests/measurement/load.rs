//! Every kind of session against its target, without a tunnel.

use culvert_loadtest::load::{Kind, Plan, Sample, Workload, drive::drive, service::Service};
use rstest::rstest;
use tokio::sync::mpsc::unbounded_channel;

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
    let workload = Workload { name, kind, target, sessions: 2, size: 100, interval_ms: 5.0 };
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
        Kind::Download => assert!(bytes > 1_000_000, "{bytes}"),
        Kind::Upload => assert!(service.uploaded() > 1_000_000, "{}", service.uploaded()),
        Kind::Stall | Kind::Idle => assert_eq!(latencies, 0),
        // Two sessions, every 5 ms: 402 and never more; a tenth of that on a busy machine.
        _ => assert!((40..=402).contains(&latencies), "{latencies}"),
    }
    assert_eq!(service.short(), 0);
}
