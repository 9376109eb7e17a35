//! The listener for kube-apiserver.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use culvert_process::faults::{CertificatePair, Faults};

use super::Flags;

/// Listener for kube-apiserver, and limits of its connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrontendConfig {
    /// Protocol.
    pub mode: Mode,
    /// Listener.
    pub listen: FrontendListen,
    /// Idle time after which a gRPC connection is pinged; zero never pings.
    pub keep_alive_interval: Duration,
    /// Time for a connection to complete its TLS handshake, and again to send its request's head.
    pub header_timeout: Duration,
    /// Maximum number of connections open at once.
    pub max_connections: u32,
}

/// Protocol that kube-apiserver speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// `ProxyService/Proxy`.
    Grpc,
    /// HTTP/1.1 `CONNECT`.
    HttpConnect,
}

/// Address of the frontend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrontendListen {
    /// A Unix socket, protected by its mode.
    Unix {
        /// Path of the socket.
        path: PathBuf,
        /// Whether a file already there is removed first.
        delete_existing: bool,
    },
    /// TCP with mutual TLS.
    Tcp {
        /// Address; `[::]` means every interface, both families.
        address: SocketAddr,
        /// Certificate that the server presents.
        certificate: CertificatePair,
        /// CA of the clients' certificates.
        client_ca: PathBuf,
    },
}

/// Checks the frontend's flags. `None` only along with a fault.
pub(super) fn check(flags: &Flags, faults: &mut Faults) -> Option<FrontendConfig> {
    let mode = match flags.mode.as_str() {
        "grpc" => Mode::Grpc,
        "http-connect" => Mode::HttpConnect,
        other => {
            faults.add("mode", format!("must be grpc or http-connect, got {other:?}"));
            Mode::Grpc
        }
    };
    let listen = if flags.uds_name.is_empty() {
        frontend_on_tcp(flags, faults)
    } else {
        Some(frontend_on_unix(flags, faults))
    };
    let keep_alive_interval =
        faults.duration("frontend-keepalive-time", flags.frontend_keepalive_time);
    let header_timeout =
        faults.positive_duration("frontend-header-timeout", flags.frontend_header_timeout);
    let max_connections =
        faults.count("max-frontend-connections", flags.max_frontend_connections, 1);
    Some(FrontendConfig {
        mode,
        listen: listen?,
        keep_alive_interval,
        header_timeout,
        max_connections,
    })
}

fn frontend_on_unix(flags: &Flags, faults: &mut Faults) -> FrontendListen {
    faults.require(
        flags.server_port == 0,
        "server-port",
        format!("must be 0 along with --uds-name, got {}", flags.server_port),
    );
    for (flag, path) in [
        ("server-cert", &flags.server_cert),
        ("server-key", &flags.server_key),
        ("server-ca-cert", &flags.server_ca_cert),
    ] {
        faults.require(path.is_empty(), flag, "must not be given along with --uds-name");
    }
    FrontendListen::Unix {
        path: PathBuf::from(&flags.uds_name),
        delete_existing: flags.delete_existing_uds_file,
    }
}

fn frontend_on_tcp(flags: &Flags, faults: &mut Faults) -> Option<FrontendListen> {
    let port = faults.registered_port("server-port", flags.server_port);
    let address = faults.bind_address("server-bind-address", &flags.server_bind_address, port);
    let certificate =
        faults.pair(("server-cert", &flags.server_cert), ("server-key", &flags.server_key));
    if flags.server_cert.is_empty() && flags.server_key.is_empty() {
        faults.add("server-cert", "must be given unless --uds-name is");
    }
    let client_ca = faults.authorities("server-ca-cert", &flags.server_ca_cert);
    faults.require(
        client_ca.is_some(),
        "server-ca-cert",
        "must be given unless --uds-name is: without it anyone could pose as kube-apiserver",
    );
    Some(FrontendListen::Tcp { address, certificate: certificate?, client_ca: client_ca? })
}
