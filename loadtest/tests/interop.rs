//! kube-apiserver's own client library against our server: the pinned Go module in
//! `loadtest/konnectivity-client`. Where there is no Go these say so and are skipped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::path::Path;

use common::within;
use culvert_loadtest::{
    frontend::Door,
    konnectivity_client::KonnectivityClient,
    rig::Running,
    targets::{self, Target},
};
use serde_json::Value;
use tokio::{io::AsyncReadExt, sync::OnceCell};

static CLIENT: OnceCell<Option<KonnectivityClient>> = OnceCell::const_new();

/// The Konnectivity client, built once; `None`, and a word about it, where there is no Go.
async fn client() -> Option<KonnectivityClient> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let client =
        CLIENT.get_or_init(|| async { KonnectivityClient::build(folder).await.unwrap() }).await;
    if client.is_none() {
        eprintln!("SKIPPED: Go is not installed, so the Konnectivity client cannot be built");
    }
    client.clone()
}

struct Konnectivity {
    client: KonnectivityClient,
    rig: Running,
}

impl Konnectivity {
    /// A rig whose tunnels are QUIC, and one whose are TCP; none without Go.
    async fn over_each_carrier() -> Vec<Self> {
        let mut all = Vec::new();
        for door in [Door::GrpcUnix, Door::GrpcUnixTunnelTcp] {
            if let Some(client) = client().await {
                all.push(Self { client, rig: door.rig().start().await.unwrap() });
            }
        }
        all
    }

    async fn run(&self, command: &str, target: &Target, flags: &[&str]) -> (Value, Option<i32>) {
        let address = target.address().to_string();
        self.client.run(command, &self.rig.uds(), &address, flags).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_konnectivity_client_echoes() {
    within(async {
        for konnectivity in Konnectivity::over_each_carrier().await {
            let target = targets::echo().await.unwrap();
            let flags = ["--bytes", "20000000", "--chunk", "32768"];
            let (answer, code) = konnectivity.run("echo", &target, &flags).await;
            assert_eq!(code, Some(0), "{answer}");
            assert_eq!(answer["sent_sha256"], answer["received_sha256"], "{answer}");
            assert_eq!(answer["bytes"], 20_000_000);
        }
    })
    .await;
}

/// Konnectivity loses the tail of every one of these.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_konnectivity_client_writes_before_it_closes_arrives() {
    within(async {
        for konnectivity in Konnectivity::over_each_carrier().await {
            let (target, mut records) = targets::recorder("").await.unwrap();
            for bytes in ["1", "65536", "16777216"] {
                let flags = ["--bytes", bytes, "--chunk", "32768"];
                let (answer, code) = konnectivity.run("upload", &target, &flags).await;
                assert_eq!(code, Some(0), "{answer}");
                assert_eq!(answer["close_error"], "", "{answer}");
                let record = records.recv().await.unwrap();
                assert_eq!(record.end, Ok(()));
                assert_eq!(record.bytes.len().to_string(), bytes);
            }
        }
    })
    .await;
}

/// Konnectivity loses every fourth of these to a race in the client library.
#[tokio::test(flavor = "multi_thread")]
async fn the_konnectivity_client_gets_the_banner_of_a_target_that_speaks_first() {
    within(async {
        for konnectivity in Konnectivity::over_each_carrier().await {
            let target = targets::banner("ready\n").await.unwrap();
            let flags = ["--count", "300", "--expect", "ready", "--timeout", "10s"];
            let (answer, code) = konnectivity.run("banner", &target, &flags).await;
            assert_eq!(code, Some(0), "{answer}");
            assert_eq!(answer["right"], 300, "{answer}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_konnectivity_client_dials_at_once_and_leaves_nothing() {
    within(async {
        for konnectivity in Konnectivity::over_each_carrier().await {
            let target = targets::echo().await.unwrap();
            let flags = ["--count", "500", "--concurrency", "16", "--touch"];
            let (answer, code) = konnectivity.run("dials", &target, &flags).await;
            assert_eq!(code, Some(0), "{answer}");
            assert_eq!(answer["ok"], 500, "{answer}");
            let rig = &konnectivity.rig;
            common::eventually("no connection is left", || {
                let scrape = rig.server.metrics.render(&rig.server.backends);
                let prefix = "konnectivity_network_proxy_server_";
                common::metric(&scrape, &format!("{prefix}established_connections")) < 0.5
                    && common::metric(&scrape, &format!("{prefix}pending_backend_dials")) < 0.5
                    && common::metric(
                        &scrape,
                        &format!("{prefix}grpc_connections{{service_method=\"Proxy\"}}"),
                    ) < 0.5
            })
            .await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_konnectivity_client_is_told_why_a_dial_failed() {
    within(async {
        for konnectivity in Konnectivity::over_each_carrier().await {
            let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let uds = konnectivity.rig.uds();
            let (answer, code) = konnectivity
                .client
                .run("ping", &uds, &closed.to_string(), &["--count", "1"])
                .await
                .unwrap();
            assert_eq!(code, Some(3), "{answer}");
            assert_eq!(answer["reason"], "endpoint", "{answer}");
            let error = answer["error"].as_str().unwrap();
            assert!(error.ends_with(&format!("dial tcp {closed}: connect: connection refused")));
        }
    })
    .await;
}

/// `kubectl logs -f` of a busy container, ended by Ctrl-C. The client's own Close takes ten
/// seconds, because its library stops reading first; nobody else may notice.
#[tokio::test(flavor = "multi_thread")]
async fn closing_a_busy_stream_of_the_konnectivity_client_delays_nobody() {
    within(async {
        for konnectivity in Konnectivity::over_each_carrier().await {
            let busy = targets::source(u64::MAX).await.unwrap();
            let echo = targets::echo().await.unwrap();
            let closing = konnectivity.run("slow-close", &busy, &["--bytes", "16000000"]);
            let flags = ["--count", "100", "--interval", "20ms", "--bytes", "64"];
            let typing = konnectivity.run("ping", &echo, &flags);
            let ((closed, _), (typed, code)) = tokio::join!(closing, typing);
            println!("{closed} {typed}");
            assert_eq!(code, Some(0), "{typed}");
            assert!(typed["max_ms"].as_f64().unwrap() < 2000.0, "{typed}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_konnectivity_client_is_told_of_a_cut_when_it_closes() {
    within(async {
        for konnectivity in Konnectivity::over_each_carrier().await {
            let target = Target::start(|mut socket| async move {
                socket.read_u8().await?;
                targets::reset(socket);
                Ok(())
            });
            let target = target.await.unwrap();
            let (answer, code) =
                konnectivity.run("cut", &target, &["--timeout", "10s", "--request", "?"]).await;
            assert_eq!(code, Some(0), "{answer}");
            // The library ends every read with EOF; only Close can tell.
            assert_eq!(answer["bytes"], 0, "{answer}");
            assert!(answer["close_error"].as_str().unwrap().contains("peer_reset"), "{answer}");
        }
    })
    .await;
}
