//! kube-apiserver's own client library against Culvert's server: the pinned Go module in
//! `loadtest/konnectivity-client`.

use std::time::Duration;

use crate::support::{
    Carrier::{self, Quic, Tcp},
    eventually,
    konnectivity::konnectivity,
    rig, within,
};
use culvert_loadtest::{
    frontend::FrontendKind::GrpcUnix,
    konnectivity_client::KonnectivityClient,
    rig::Running,
    targets::{self, Target},
};
use rstest::rstest;
use serde_json::Value;
use tokio::io::AsyncReadExt;

/// A rig, and the client library as a program.
struct Setup {
    client: &'static KonnectivityClient,
    rig: Running,
}

impl Setup {
    /// `None` when the tests that need Go are skipped.
    async fn start(carrier: Carrier) -> Option<Self> {
        let client = &konnectivity().await?.client;
        Some(Self { client, rig: rig(GrpcUnix, carrier).start().await.unwrap() })
    }

    async fn run(
        &self,
        command: &str,
        target: impl ToString,
        flags: &[&str],
    ) -> (Value, Option<i32>) {
        self.client.run(command, &self.rig.uds(), &target.to_string(), flags).await.unwrap()
    }
}

/// Maximum number of tries where the client library has a race of its own.
const TRIES: usize = 10;

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_client_echoes(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let Some(setup) = Setup::start(carrier).await else { return };
        let target = targets::echo().await.unwrap();
        let flags = ["--bytes", "20000000", "--chunk", "32768"];
        let (answer, code) = setup.run("echo", target.address(), &flags).await;
        assert_eq!(code, Some(0), "{answer}");
        assert_eq!(answer["sent_sha256"], answer["received_sha256"], "{answer}");
        assert_eq!(answer["bytes"], 20_000_000);
    })
    .await;
}

/// With Konnectivity's server the end of every one of these is lost.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_the_client_writes_before_it_closes_arrive(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let Some(setup) = Setup::start(carrier).await else { return };
        let (target, mut records) = targets::recorder("").await.unwrap();
        for bytes in ["1", "65536", "16777216"] {
            let flags = ["--bytes", bytes, "--chunk", "32768"];
            let (answer, code) = setup.run("upload", target.address(), &flags).await;
            assert_eq!(code, Some(0), "{answer}");
            assert_eq!(answer["close_error"], "", "{answer}");
            let record = records.recv().await.unwrap();
            assert_eq!(record.end, Ok(()));
            assert_eq!(record.bytes.len().to_string(), bytes);
        }
    })
    .await;
}

/// With Konnectivity's server a race in the client library loses every fourth of these.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_client_gets_the_banner_of_a_target_that_writes_first(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let Some(setup) = Setup::start(carrier).await else { return };
        let target = targets::banner("ready\n").await.unwrap();
        let flags = ["--count", "300", "--expect", "ready", "--timeout", "10s"];
        let (answer, code) = setup.run("banner", target.address(), &flags).await;
        assert_eq!(code, Some(0), "{answer}");
        assert_eq!(answer["right"], 300, "{answer}");
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_client_dials_concurrently_and_leaves_nothing(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let Some(setup) = Setup::start(carrier).await else { return };
        let target = targets::echo().await.unwrap();
        let flags = ["--count", "500", "--concurrency", "16", "--touch"];
        let (answer, code) = setup.run("dials", target.address(), &flags).await;
        assert_eq!(code, Some(0), "{answer}");
        assert_eq!(answer["ok"], 500, "{answer}");
        let rig = &setup.rig;
        eventually("no connection is left", async || {
            let calls = "konnectivity_network_proxy_server_grpc_connections";
            rig.server.established() == 0.0
                && rig.server.pending_dials() == 0.0
                && rig.server.metric(&format!("{calls}{{service_method=\"Proxy\"}}")) == 0.0
        })
        .await;
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_client_gets_the_reason_of_a_failed_dial(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let Some(setup) = Setup::start(carrier).await else { return };
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (answer, code) = setup.run("ping", closed, &["--count", "1"]).await;
        assert_eq!(code, Some(3), "{answer}");
        assert_eq!(answer["reason"], "endpoint", "{answer}");
        let error = answer["error"].as_str().unwrap();
        assert!(error.ends_with(&format!("dial tcp {closed}: connect: connection refused")));
    })
    .await;
}

/// `kubectl logs -f` of a busy container, ended by Ctrl-C. The client's own Close takes ten
/// seconds, because its library stops reading first. Other connections go on meanwhile.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn closing_a_busy_stream_delays_no_other(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let Some(setup) = Setup::start(carrier).await else { return };
        let busy = targets::source(u64::MAX).await.unwrap();
        let echo = targets::echo().await.unwrap();
        let closing = setup.run("slow-close", busy.address(), &["--bytes", "16000000"]);
        let flags = ["--count", "100", "--interval", "20ms", "--bytes", "64"];
        let typing = setup.run("ping", echo.address(), &flags);
        let ((closed, _), (typed, code)) = tokio::join!(closing, typing);
        println!("{closed} {typed}");
        assert_eq!(code, Some(0), "{typed}");
        // A key that waits for the Close waits for 10 s.
        let slowest = Duration::from_secs_f64(typed["max_ms"].as_f64().unwrap() / 1e3);
        assert!(slowest < Duration::from_secs(8), "{typed}");
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_client_gets_the_reason_of_a_cut_when_it_closes(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let Some(setup) = Setup::start(carrier).await else { return };
        let target = Target::start(|mut socket| async move {
            socket.read_u8().await?;
            targets::reset(socket);
            Ok(())
        });
        let target = target.await.unwrap();
        let flags = ["--timeout", "10s", "--request", "?"];
        for _ in 0..TRIES {
            let (answer, code) = setup.run("cut", target.address(), &flags).await;
            assert_eq!(code, Some(0), "{answer}");
            // The library ends every read with EOF; only Close returns the reason.
            assert_eq!(answer["bytes"], 0, "{answer}");
            let reason = answer["close_error"].as_str().unwrap();
            if reason.contains("peer_reset") {
                return;
            }
            // The library ends its tunnel behind the reason, and Close may see that first.
            assert!(reason.contains("tunnel closed"), "{answer}");
        }
        panic!("the client got no reason in {TRIES} tries");
    })
    .await;
}
