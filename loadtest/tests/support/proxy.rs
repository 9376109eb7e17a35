//! An HTTP proxy that forwards `CONNECT` requests.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

/// A proxy on loopback, stopped when dropped.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    /// The first line of each request.
    pub(crate) requests: mpsc::UnboundedReceiver<String>,
    _serving: AbortOnDropHandle<()>,
}

/// Starts a proxy that connects to this address whatever a request names, or answers each request
/// with this status.
pub(crate) async fn proxy(conduct: Result<SocketAddr, &'static str>) -> Proxy {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, requests) = mpsc::unbounded_channel();
    let serving = culvert_transport::task::owned(async move {
        let mut carried = JoinSet::new();
        while let Ok((client, _)) = listener.accept().await {
            carried.spawn(carry(client, conduct, sender.clone()));
        }
    });
    Proxy { address, requests, _serving: serving }
}

async fn carry(
    mut client: TcpStream,
    conduct: Result<SocketAddr, &'static str>,
    requests: mpsc::UnboundedSender<String>,
) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        // A client may give up.
        let Ok(byte) = client.read_u8().await else { return };
        head.push(byte);
    }
    let head = String::from_utf8(head).unwrap();
    let _ = requests.send(head.lines().next().unwrap_or_default().to_owned());
    let answer = match conduct {
        Ok(_) => "HTTP/1.1 200 OK\r\n\r\n".into(),
        Err(status) => format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n"),
    };
    client.write_all(answer.as_bytes()).await.unwrap();
    if let Ok(server) = conduct {
        let mut server = TcpStream::connect(server).await.unwrap();
        let _ = copy_bidirectional(&mut client, &mut server).await;
    }
}
