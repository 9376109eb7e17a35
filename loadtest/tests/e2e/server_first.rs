//! Targets that write before they are written to.

use culvert_konnectivity::packet::Payload;
use culvert_loadtest::{
    frontend::{
        FrontendKind::{self, ConnectTls, ConnectUnix, GrpcTls, GrpcUnix},
        connect::ESTABLISHED,
        proxy,
    },
    targets,
};
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::support::{
    Carrier::{self, Quic, Tcp},
    rig, within,
};

const BANNER: &str = "SSH-2.0-target ready\r\n";

/// Konnectivity writes the banner before the 200 in one of twelve dials.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_200_is_out_alone_before_the_banner_in_300_dials(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(ConnectUnix, carrier).start().await.unwrap();
        let target = targets::banner(BANNER).await.unwrap();
        for dial in 0..300 {
            let mut socket = UnixStream::connect(rig.uds()).await.unwrap();
            let request = format!("CONNECT {} HTTP/1.1\r\n\r\n", target.address());
            socket.write_all(request.as_bytes()).await.unwrap();
            let mut answer = vec![0; ESTABLISHED.len()];
            socket.read_exact(&mut answer).await.unwrap();
            assert_eq!(String::from_utf8_lossy(&answer), ESTABLISHED, "dial {dial}");
            let mut banner = vec![0; BANNER.len()];
            socket.read_exact(&mut banner).await.unwrap();
            assert_eq!(String::from_utf8_lossy(&banner), BANNER, "dial {dial}");
        }
    })
    .await;
}

/// Konnectivity's client loses DATA that arrives before it has registered the connection of the
/// DIAL_RSP. The delay itself is tested in virtual time where it is implemented.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_first_data_of_a_target_follows_the_dial_response(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(GrpcUnix, carrier).start().await.unwrap();
        let target = targets::banner(BANNER).await.unwrap();
        let address = target.address().to_string();

        // The client sends nothing, and the banner comes all the same.
        let client = proxy::Client::connect(UnixStream::connect(rig.uds()).await.unwrap());
        let client = client.await.unwrap();
        let mut stream = client.proxy().await.unwrap();
        stream.send(proxy::dial_request(1, &address)).await.unwrap();
        let Some(Payload::DialResponse(response)) = stream.next().await.unwrap().unwrap().payload
        else {
            panic!("the first packet is not DIAL_RSP")
        };
        let banner = stream.next().await.unwrap().unwrap();
        assert!(matches!(banner.payload, Some(Payload::Data(data)) if data.data == BANNER));

        stream.send(proxy::data(response.connect_id, "x")).await.unwrap();
        let echoed = stream.next().await.unwrap().unwrap();
        assert!(matches!(echoed.payload, Some(Payload::Data(data)) if data.data == "x"));
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_banner_arrives(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier).start().await.unwrap();
        let target = targets::banner(BANNER).await.unwrap();
        for _ in 0..20 {
            let mut frontend = rig.dial(target.address()).await.unwrap();
            let banner = frontend.read_count(BANNER.len()).await.unwrap();
            assert_eq!(String::from_utf8_lossy(&banner), BANNER);
            frontend.close().await.unwrap();
        }
    })
    .await;
}
