//! Targets that speak before they are spoken to.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use culvert_konnectivity::packet::Payload;
use culvert_loadtest::{
    frontend::{Door, connect::ESTABLISHED, proxy},
    targets,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use common::within;

const BANNER: &str = "SSH-2.0-target ready\r\n";

/// Konnectivity writes the banner before the 200 in one of twelve dials.
#[tokio::test(flavor = "multi_thread")]
async fn the_200_is_out_alone_before_the_banner_in_300_dials() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let rig = door.rig().start().await.unwrap();
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
}

/// The Konnectivity client loses DATA that overtakes its own bookkeeping of the DIAL_RSP.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_data_of_a_target_waits_for_the_clients_registration() {
    for door in Door::GRPC_UNIX {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let target = targets::banner(BANNER).await.unwrap();
            let address = target.address().to_string();

            // Silent client: the banner comes after the delay.
            let client = proxy::Client::connect(UnixStream::connect(rig.uds()).await.unwrap());
            let client = client.await.unwrap();
            let mut stream = client.proxy().await.unwrap();
            stream.send(proxy::dial_request(1, &address)).await.unwrap();
            let Some(Payload::DialResponse(response)) =
                stream.next().await.unwrap().unwrap().payload
            else {
                panic!("no DIAL_RSP first")
            };
            let answered = std::time::Instant::now();
            let banner = stream.next().await.unwrap().unwrap();
            let waited = answered.elapsed();
            assert!(matches!(banner.payload, Some(Payload::Data(data)) if data.data == BANNER));
            assert!(waited.as_millis() >= 10, "the banner came after {waited:?}");

            // A client that speaks is ready, and its own first byte releases the banner.
            stream.send(proxy::data(response.connect_id, "x")).await.unwrap();
            let echoed = stream.next().await.unwrap().unwrap();
            assert!(matches!(echoed.payload, Some(Payload::Data(data)) if data.data == "x"));
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_door_delivers_the_banner() {
    for door in Door::ALL {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let target = targets::banner(BANNER).await.unwrap();
            for _ in 0..20 {
                let mut frontend = door.dial(&rig, target.address()).await.unwrap();
                let banner = frontend.read_count(BANNER.len()).await.unwrap();
                assert_eq!(String::from_utf8_lossy(&banner), BANNER, "{door:?}");
                frontend.close().await.unwrap();
            }
        })
        .await;
    }
}
