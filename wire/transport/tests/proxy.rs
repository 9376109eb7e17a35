//! Tunnels over TCP through a proxy: the request, refusals and other faults, and that no byte is
//! lost and the proxy is not trusted.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod carriers;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use culvert_transport::{
    Carrier, ConnectError, ProxyFault, Settings, TransportFault, Tunnel, TunnelLost,
    tcp::{self, Proxies, Proxy, Route},
    tls::{KeyExchange, tunnel_client, tunnel_server},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

use carriers::{Authority, accept_tcp, within};

/// What a proxy does with a request.
#[derive(Clone, Debug)]
enum Conduct {
    /// Connects to this address, whatever the request names, if the request has the credentials.
    Carry { server: SocketAddr, credentials: Option<&'static str> },
    /// Answers this, and closes.
    Say(Vec<u8>),
    /// Answers this, and waits.
    Hang(Vec<u8>),
}

/// A proxy, and the requests that it received.
struct TestProxy {
    address: SocketAddr,
    requests: mpsc::UnboundedReceiver<String>,
    task: AbortOnDropHandle<()>,
}

impl TestProxy {
    async fn new(conduct: Conduct, tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, requests) = mpsc::unbounded_channel();
        let task = culvert_transport::task::owned(async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let conduct = conduct.clone();
                match tls.clone().map(TlsAcceptor::from) {
                    Some(acceptor) => {
                        let Ok(stream) = acceptor.accept(socket).await else { continue };
                        culvert_transport::test_util::detached(serve(
                            stream,
                            conduct,
                            sender.clone(),
                        ));
                    }
                    None => {
                        culvert_transport::test_util::detached(serve(
                            socket,
                            conduct,
                            sender.clone(),
                        ));
                    }
                }
            }
        });
        Self { address, requests, task }
    }

    async fn with_conduct(conduct: Conduct) -> Self {
        Self::new(conduct, None).await
    }

    /// The route through this proxy with these credentials, `user:password@` or nothing.
    fn route(&self, credentials: &str) -> Route {
        let url = format!("http://{credentials}{}", self.address);
        through(url.parse().unwrap())
    }
}

impl Drop for TestProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    mut socket: S,
    conduct: Conduct,
    requests: mpsc::UnboundedSender<String>,
) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    let _ = requests.send(head.clone());
    match conduct {
        Conduct::Carry { credentials: Some(credentials), .. } if !head.contains(credentials) => {
            let refusal = "HTTP/1.1 407 Proxy Authentication Required\r\n\
                Proxy-Authenticate: Basic realm=\"here\"\r\n\r\n";
            socket.write_all(refusal.as_bytes()).await.unwrap();
        }
        Conduct::Carry { server, .. } => {
            let mut server = TcpStream::connect(server).await.unwrap();
            socket.write_all(b"HTTP/1.1 200 OK\r\nVia: a proxy\r\n\r\n").await.unwrap();
            let _ = copy_bidirectional(&mut socket, &mut server).await;
        }
        Conduct::Say(answer) => {
            socket.write_all(&answer).await.unwrap();
            socket.shutdown().await.unwrap();
            // A socket that is closed with bytes unread sends a reset, which discards the answer.
            let _ = socket.read_to_end(&mut Vec::new()).await;
        }
        Conduct::Hang(answer) => {
            socket.write_all(&answer).await.unwrap();
            let _ = socket.read_to_end(&mut Vec::new()).await;
        }
    }
}

/// The route to a server with a name that only the proxy can resolve.
fn through(proxy: Proxy) -> Route {
    Route::Proxied { proxy: proxy.into(), host: "server.invalid".into(), port: 8132 }
}

/// A server, and what agents need to connect to it.
struct Server {
    authority: Authority,
    listener: TcpListener,
}

impl Server {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { authority: Authority::new(), listener }
    }

    /// A proxy's conduct that leads here.
    fn reached(&self, credentials: Option<&'static str>) -> Conduct {
        Conduct::Carry { server: self.listener.local_addr().unwrap(), credentials }
    }

    async fn accept(&self) -> Tunnel {
        let identity = self.authority.identity();
        let tls = tunnel_server(identity, None, KeyExchange::Hybrid).unwrap();
        let (socket, _) = self.listener.accept().await.unwrap();
        accept_tcp(socket, tls.into(), &Settings::default()).await
    }

    async fn connect(&self, route: &Route, settings: &Settings) -> Result<Tunnel, ConnectError> {
        let roots = self.authority.roots();
        let tls = tunnel_client(roots, None, KeyExchange::Hybrid).unwrap();
        tcp::connect(route, "127.0.0.1", tls.into(), settings).await.map(Tunnel::from)
    }

    /// Both ends of a tunnel over this route, the server's first.
    async fn pair(&self, route: &Route) -> (Tunnel, Tunnel) {
        let settings = Settings::default();
        let (server, agent) = tokio::join!(self.accept(), self.connect(route, &settings));
        (server, agent.unwrap())
    }
}

/// Sends more than all buffers on the path hold, and compares what arrives.
async fn carries(server: &Tunnel, agent: &Tunnel) {
    const LENGTH: usize = 4 << 20;
    let (mut send, _recv) = server.open().await.unwrap();
    let sending = async {
        for number in 0..LENGTH / (16 << 10) {
            let chunk = Bytes::from(vec![number as u8; 16 << 10]);
            send.write_chunk(chunk).await.unwrap();
        }
        send.finish();
        assert_eq!(send.stopped().await, Ok(None));
    };
    let reading = async {
        let (_send, mut recv) = agent.accept().await.unwrap();
        let (mut chunks, mut came) = ([const { Bytes::new() }; 8], 0);
        while let Some(count) = recv.read_chunks(&mut chunks).await.unwrap() {
            for byte in chunks[..count].iter().flatten() {
                assert_eq!(*byte, (came / (16 << 10)) as u8);
                came += 1;
            }
        }
        assert_eq!(came, LENGTH);
    };
    tokio::join!(sending, reading);
}

/// The error of an attempt through a proxy with this conduct.
async fn fault(conduct: Conduct, settings: &Settings) -> ConnectError {
    let proxy = TestProxy::with_conduct(conduct).await;
    let server = Server::new().await;
    let result = within(server.connect(&proxy.route("user:secret@"), settings)).await;
    let error = result.err().unwrap();
    assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
    error
}

fn proxy_fault(error: ConnectError) -> ProxyFault {
    match error {
        ConnectError::Proxy { fault, .. } => fault,
        error => panic!("{error:?}"),
    }
}

#[tokio::test]
async fn a_tunnel_goes_through_a_proxy_that_resolves_the_name() {
    within(async {
        let server = Server::new().await;
        let mut proxy = TestProxy::with_conduct(server.reached(None)).await;
        let (near, far) = server.pair(&proxy.route("")).await;
        carries(&near, &far).await;
        carries(&far, &near).await;
        assert_eq!(far.remote_address(), proxy.address);
        assert_eq!(far.carrier(), Carrier::Tcp);
        let request = proxy.requests.recv().await.unwrap();
        assert!(request.starts_with("CONNECT server.invalid:8132 HTTP/1.1\r\nHost: server.inv"));
        assert!(!request.contains("Authorization"), "{request}");
    })
    .await;
}

#[tokio::test]
async fn credentials_are_sent_to_the_proxy_and_appear_in_no_error() {
    within(async {
        let server = Server::new().await;
        let wanted = "Proxy-Authorization: Basic dXNlcjpzM2NyZXQ=\r\n";
        let proxy = TestProxy::with_conduct(server.reached(Some(wanted))).await;
        let (near, far) = server.pair(&proxy.route("user:s%33cret@")).await;
        carries(&near, &far).await;
        let error = server.connect(&proxy.route(""), &Settings::default()).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "proxy http://{}: it refuses: 407 Proxy Authentication Required",
                proxy.address
            )
        );
    })
    .await;
}

#[tokio::test]
async fn the_proxy_may_be_reached_over_tls() {
    within(async {
        let (server, vouching) = (Server::new().await, Authority::new());
        let tls = rustls::ServerConfig::builder_with_provider(KeyExchange::Hybrid.provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth();
        let identity = vouching.identity();
        let tls = tls.with_single_cert(identity.chain, identity.key).unwrap();
        let proxy = TestProxy::new(server.reached(None), Some(tls.into())).await;
        let url = format!("https://{}", proxy.address);

        let directory = tempfile::tempdir().unwrap();
        let file = |name, authority: &Authority| {
            let path = directory.path().join(name);
            std::fs::write(&path, authority.pem()).unwrap();
            path
        };
        let route = |file: PathBuf| {
            let proxies = Proxies::from_env(|name| match name {
                "HTTPS_PROXY" => Some(url.clone()),
                "SSL_CERT_FILE" => Some(file.to_str().unwrap().to_owned()),
                _ => None,
            })
            .unwrap();
            let proxy = proxies.proxy_for("server.invalid", 8132).unwrap();
            Route::Proxied { proxy, host: "server.invalid".into(), port: 8132 }
        };
        let (near, far) = server.pair(&route(file("vouching", &vouching))).await;
        carries(&near, &far).await;
        carries(&far, &near).await;

        // The CA of servers is not trusted for proxies.
        let other = route(file("other", &server.authority));
        let fault = proxy_fault(server.connect(&other, &Settings::default()).await.unwrap_err());
        assert!(matches!(&fault, ProxyFault::Tls(why) if why.contains("certificate")), "{fault}");
    })
    .await;
}

#[tokio::test]
async fn each_fault_of_a_proxy_is_reported_as_such() {
    let settings = Settings::default();
    let say = |answer: &[u8]| Conduct::Say(answer.to_vec());
    let refused = |status, reason: &str| ProxyFault::Refused { status, reason: reason.into() };
    let long = [b"HTTP/1.1 200 OK\r\nX: ".to_vec(), vec![b'y'; 8 << 10]].concat();
    for (conduct, expected) in [
        (say(b"HTTP/1.1 407 Who are you\r\n\r\n"), refused(407, "Who are you")),
        (say(b"HTTP/1.1 403 Forbidden\r\n\r\n<html>no</html>"), refused(403, "Forbidden")),
        (say(b"HTTP/1.1 503 Try\tlater\r\n\r\n"), refused(503, "Trylater")),
        (say(b"HTTP/1.1 503 Try \x1b[31mlater\r\n\r\n"), ProxyFault::Malformed),
        (say(b"\x16\x03\x03\x00\x02\x02\x28"), ProxyFault::Malformed),
        (say(b""), ProxyFault::Closed),
        (say(b"HTTP/1.1 200 OK\r\n"), ProxyFault::Closed),
        (say(&long), ProxyFault::LongHead),
        (Conduct::Hang(long.clone()), ProxyFault::LongHead),
    ] {
        let shown = format!("{conduct:?}");
        assert_eq!(proxy_fault(fault(conduct, &settings).await), expected, "{shown}");
    }
}

#[tokio::test]
async fn a_proxy_that_hangs_is_given_up_after_the_idle_timeout() {
    let idle_timeout = Duration::from_millis(200);
    let settings = Settings { idle_timeout, ..Settings::default() };
    for answer in ["", "HTTP/1.1 200 OK\r\n"] {
        let error = fault(Conduct::Hang(answer.into()), &settings).await;
        assert_eq!(proxy_fault(error), ProxyFault::TimedOut, "{answer:?}");
    }
    // The proxy has answered, and the peer behind it does not.
    let error = fault(Conduct::Hang("HTTP/1.1 200 OK\r\n\r\n".into()), &settings).await;
    assert!(matches!(error, ConnectError::Handshake(TunnelLost::TimedOut)), "{error:?}");
}

#[tokio::test]
async fn bytes_in_the_segment_of_the_answer_are_the_servers() {
    // The alert "handshake failure" in the segment of the answer.
    let answer = b"HTTP/1.1 200 OK\r\n\r\n\x15\x03\x03\x00\x02\x02\x28".to_vec();
    let error = fault(Conduct::Say(answer), &Settings::default()).await;
    let ConnectError::Handshake(TunnelLost::Transport(fault)) = error else { panic!("{error:?}") };
    assert!(matches!(fault, TransportFault::TlsAlert { alert: 40, .. }), "{fault:?}");
}

#[tokio::test]
async fn a_proxy_that_impersonates_the_server_is_refused() {
    within(async {
        let (server, other) = (Server::new().await, Server::new().await);
        let proxy = TestProxy::with_conduct(other.reached(None)).await;
        let accept = culvert_transport::task::owned(async move {
            let identity = other.authority.identity();
            let tls = tunnel_server(identity, None, KeyExchange::Hybrid).unwrap();
            let (socket, _) = other.listener.accept().await.unwrap();
            TlsAcceptor::from(Arc::new(tls)).accept(socket).await.is_err()
        });
        let error = server.connect(&proxy.route(""), &Settings::default()).await.unwrap_err();
        assert!(matches!(&error, ConnectError::Handshake(_)), "{error:?}");
        assert!(error.to_string().contains("certificate"), "{error}");
        assert!(accept.await.unwrap());
    })
    .await;
}

#[tokio::test]
async fn a_proxy_that_cannot_be_reached_is_not_reported_as_the_server() {
    within(async {
        let server = Server::new().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let route = through(url.parse().unwrap());
        let error = server.connect(&route, &Settings::default()).await.unwrap_err();
        assert!(error.to_string().contains("Connection refused"), "{error}");
        assert!(matches!(proxy_fault(error), ProxyFault::Unreachable(_)));
    })
    .await;
}
