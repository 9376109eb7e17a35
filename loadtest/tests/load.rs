//! Every kind of session against the target that it is made for, without a tunnel between.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use culvert_loadtest::load::{Kind, Plan, Sample, Workload, drive::drive, service::Service};
use tokio::sync::mpsc::unbounded_channel;

#[tokio::test]
async fn every_kind_of_session_does_what_it_is_for() {
    let kinds = [
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
        Kind::Idle,
    ];
    for kind in kinds {
        let service = Service::start("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let target = (kind == Kind::Greeting).then(|| service.greeter().to_string());
        let name = format!("{kind:?}");
        let workload = Workload { name, kind, target, sessions: 2, size: 100, interval_ms: 5.0 };
        let workloads = vec![workload];
        let plan = Plan { seconds: 0.3, target: service.address().to_string(), workloads };
        let (sender, mut receiver) = unbounded_channel();
        drive(plan, None, sender).await;
        let mut samples = Vec::new();
        receiver.recv_many(&mut samples, usize::MAX).await;
        assert!(matches!(samples.first(), Some(Sample::Start(_))), "{kind:?}");
        assert!(matches!(samples.last(), Some(Sample::Done(_))), "{kind:?}");
        let errors: Vec<_> = samples.iter().filter(|s| matches!(s, Sample::Error(..))).collect();
        assert!(errors.is_empty(), "{kind:?}: {errors:?}");
        let latencies = samples.iter().filter(|s| matches!(s, Sample::Latency(..))).count();
        let bytes: u64 = samples
            .iter()
            .map(|s| if let Sample::Bytes(_, _, bytes) = s { *bytes } else { 0 })
            .sum();
        match kind {
            Kind::Download => assert!(bytes > 1_000_000, "{bytes}"),
            Kind::Upload => assert!(service.uploaded() > 1_000_000, "{}", service.uploaded()),
            Kind::Stall | Kind::Idle => assert_eq!(latencies, 0),
            // Two sessions, every 5 ms.
            _ => assert!((40..=122).contains(&latencies), "{kind:?}: {latencies}"),
        }
        assert_eq!(service.short(), 0, "{kind:?}");
    }
}
