//! Conformance tests of others, as Go modules in `loadtest/conformance`: what Go demands of a
//! connection, over CONNECT, and what h2spec demands of a server of HTTP/2, of the gRPC frontend.

use std::path::PathBuf;

use culvert_loadtest::frontend::FrontendKind::{ConnectUnix, GrpcUnix};
use culvert_transport::task;
use rstest::rstest;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, UnixStream},
    process::Command,
    task::JoinSet,
};

use crate::support::{
    Carrier::{self, Quic, Tcp},
    konnectivity::{go, has_go},
    rig, within,
};

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_what_go_demands_of_one(#[values(Quic, Tcp)] carrier: Carrier) {
    if !has_go() {
        return;
    }
    within(async {
        let program = go("conformance", &["test", "-c"], "go-connections", &["."]);
        let rig = rig(ConnectUnix, carrier).start().await.unwrap();
        let mut tests = Command::new(program);
        tests.args(["-test.v", "-test.timeout=60s"]).env("CULVERT_UDS", rig.uds());
        let output = tests.kill_on_drop(true).output().await.unwrap();
        let log = String::from_utf8_lossy(&output.stdout);
        let passed = log.matches("    --- PASS: TestConnect/").count();
        assert!(output.status.success() && passed == 11, "{passed} passed\n{log}");
    })
    .await;
}

/// Tests of h2spec that the frontend does not pass, and need not: they expect an answer with a body,
/// or none before the request's body or beside many other requests, to a request that gRPC answers
/// at once by its path alone.
const NOT_FOR_GRPC: [&str; 5] = [
    "2: Sends a WINDOW_UPDATE frame on half-closed (remote) stream",
    "3: Sends a PRIORITY frame on half-closed (remote) stream",
    "1: Sends a HEADERS frame with the \"content-length\" header field which does not equal the DATA \
     frame payload length",
    "2: Sends a HEADERS frame with the \"content-length\" header field which does not equal the sum \
     of the multiple DATA frames payload length",
    "1: Sends HEADERS frames that causes their advertised concurrent stream limit to be exceeded",
];

/// Carries TCP connections to the frontend's Unix socket, which h2spec cannot reach.
async fn carry(listener: TcpListener, uds: PathBuf) {
    let mut connections = JoinSet::new();
    loop {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut unix = UnixStream::connect(&uds).await.unwrap();
        connections.spawn(async move { copy_bidirectional(&mut tcp, &mut unix).await });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_grpc_frontend_is_what_h2spec_demands_of_a_server() {
    if !has_go() {
        return;
    }
    within(async {
        let h2spec = "github.com/summerwind/h2spec/cmd/h2spec";
        let program = go("conformance", &["build"], "h2spec", &[h2spec]);
        let rig = rig(GrpcUnix, Quic).start().await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let _carrying = task::owned(carry(listener, rig.uds()));
        let mut tests = Command::new(program);
        tests.args(["--port", &port.to_string()]);
        let output = tests.kill_on_drop(true).output().await.unwrap();
        let log = String::from_utf8_lossy(&output.stdout);
        assert!(log.contains("145 tests, "), "{log}");
        let (_, failures) = log.split_once("\nFailures:").unwrap_or_default();
        let failed = failures.lines().filter_map(|line| line.trim_start().strip_prefix("× "));
        let failed: Vec<_> = failed.filter(|title| !NOT_FOR_GRPC.contains(title)).collect();
        assert!(failed.is_empty(), "{failed:?}\n{failures}");
    })
    .await;
}
