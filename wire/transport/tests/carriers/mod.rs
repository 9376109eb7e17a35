//! Tunnels over each carrier, with real TLS on loopback.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{sync::Arc, time::Duration};

use culvert_transport::{
    Carrier, Settings, Tunnel,
    qmux::{Role, establish},
    quic::{self, Listener, ResetKey},
    tcp::{self, Route},
    tls::{Current, Identity, KeyExchange, authorities, tunnel_client, tunnel_server},
};
use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::RootCertStore;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// Makes a test over QUIC and one over TCP of each of these functions, which fail when they hang.
#[allow(unused_macros, reason = "each test binary uses its own part")]
macro_rules! on_each_carrier {
    ($($test:ident),+ $(,)?) => {
        $(
            mod $test {
                #[tokio::test]
                async fn quic() {
                    $crate::carriers::within(super::$test(culvert_transport::Carrier::Quic)).await;
                }

                #[tokio::test]
                async fn tcp() {
                    $crate::carriers::within(super::$test(culvert_transport::Carrier::Tcp)).await;
                }
            }
        )+
    };
}
#[allow(unused_imports, reason = "each test binary uses its own part")]
pub(crate) use on_each_carrier;

/// Runs a test over each carrier, and fails it when it hangs.
pub(crate) async fn each(test: impl AsyncFn(Carrier)) {
    for carrier in [Carrier::Quic, Carrier::Tcp] {
        println!("over {carrier}");
        within(test(carrier)).await;
    }
}

pub(crate) async fn within<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), test).await.expect("the test hangs")
}

/// Who vouches for both ends.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(crate) fn identity(&self) -> Identity {
        let params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Identity {
            chain: vec![certificate.der().clone()],
            key: key.serialize_der().try_into().unwrap(),
        }
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    pub(crate) fn roots(&self) -> Arc<RootCertStore> {
        authorities(&[self.0.der().clone()]).unwrap()
    }
}

/// Both ends of one tunnel.
pub(crate) struct Pair {
    pub(crate) server: Tunnel,
    pub(crate) agent: Tunnel,
    _listener: Option<Listener>,
}

impl Pair {
    pub(crate) async fn new(carrier: Carrier) -> Self {
        Self::with(carrier, &Settings::default()).await
    }

    pub(crate) async fn with(carrier: Carrier, settings: &Settings) -> Self {
        let authority = Authority::new();
        let (kx, roots) = (KeyExchange::Hybrid, authority.roots());
        let server_tls = tunnel_server(authority.identity(), Some(roots.clone()), kx).unwrap();
        let client_tls = tunnel_client(roots, Some(authority.identity()), kx).unwrap();
        let address = "127.0.0.1:0".parse().unwrap();
        match carrier {
            Carrier::Quic => {
                let key = Current::fixed(ResetKey::derive(b"secret", "server"));
                let tls = server_tls.into();
                let listener = Listener::bind(address, tls, settings, Some(key)).unwrap();
                let remote = listener.local_addr().unwrap();
                let accept = async { listener.accept().await.unwrap().complete().await.unwrap() };
                let health = Arc::default();
                let connect =
                    quic::connect(remote, "127.0.0.1", client_tls.into(), settings, &health);
                let (server, agent) = tokio::join!(accept, connect);
                Self {
                    server: server.into(),
                    agent: agent.unwrap().0.into(),
                    _listener: Some(listener),
                }
            }
            Carrier::Tcp | Carrier::Grpc => {
                let listener = TcpListener::bind(address).await.unwrap();
                let way = Route::Direct(listener.local_addr().unwrap());
                let accept = async {
                    let (socket, _) = listener.accept().await.unwrap();
                    accept_tcp(socket, server_tls.into(), settings).await
                };
                let connect = tcp::connect(&way, "127.0.0.1", client_tls.into(), settings);
                let (server, agent) = tokio::join!(accept, connect);
                Self { server, agent: agent.unwrap().into(), _listener: None }
            }
        }
    }
}

/// The server's end of a tunnel over TCP.
pub(crate) async fn accept_tcp(
    socket: TcpStream,
    tls: Arc<rustls::ServerConfig>,
    settings: &Settings,
) -> Tunnel {
    let stream = TlsAcceptor::from(tls).accept(socket).await.unwrap();
    let peer = tcp::accepted(&stream, Carrier::Tcp, settings).unwrap();
    establish(stream, Role::Server, peer, settings).await.unwrap().into()
}
