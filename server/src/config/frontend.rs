//! The listener for kube-apiserver.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use culvert_process::{
    faults::{CertificatePair, Faults},
    go_flags::parse_list,
    kubernetes::KubernetesConfig,
};
use culvert_transport::tls::certificates;
use rustls::pki_types::CertificateDer;

use super::Flags;

/// Listener for kube-apiserver, and limits of its connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrontendConfig {
    /// Protocol.
    pub mode: Mode,
    /// Listener.
    pub listen: FrontendListen,
    /// Names of which a client's certificate must have one, over TCP; empty for any.
    pub client_names: Vec<String>,
    /// Idle time after which a gRPC connection is pinged; zero never pings.
    pub keep_alive_interval: Duration,
    /// Time for a connection to complete its TLS handshake, and again to send its request's head or
    /// its first packet.
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

impl Mode {
    /// Memory that a frontend's connection without bytes costs beside a socket, in bytes. A gRPC
    /// connection has its streams' state, and no buffer.
    pub(crate) fn connection_cost(self) -> u64 {
        match self {
            Self::Grpc => 12 * 1024,
            Self::HttpConnect => 0,
        }
    }
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
    let client_names = client_names(flags, faults);
    let keep_alive_interval =
        faults.duration("frontend-keepalive-time", flags.frontend_keepalive_time);
    let header_timeout =
        faults.positive_duration("frontend-header-timeout", flags.frontend_header_timeout);
    let max_connections =
        faults.count("max-frontend-connections", flags.max_frontend_connections, 1);
    Some(FrontendConfig {
        mode,
        listen: listen?,
        client_names,
        keep_alive_interval,
        header_timeout,
        max_connections,
    })
}

/// The names that clients may have.
fn client_names(flags: &Flags, faults: &mut Faults) -> Vec<String> {
    let flag = "server-client-names";
    let names = parse_list(&flags.server_client_names);
    let is_blank = !flags.server_client_names.is_empty() && names.is_empty();
    faults.require(
        !is_blank,
        flag,
        "names no client; omit it to accept every certificate of the CA",
    );
    if !flags.uds_name.is_empty() && !names.is_empty() {
        faults.warn(flag, "has no effect along with --uds-name");
    }
    names
}

/// Warns where certificates that were made for others than kube-apiserver can connect.
pub(super) fn warn_of_shared_authorities(
    flags: &Flags,
    kubernetes: &KubernetesConfig,
    faults: &mut Faults,
) {
    if flags.server_ca_cert.is_empty() || !flags.server_client_names.is_empty() {
        return;
    }
    let read = |path: &str| certificates(Path::new(path)).unwrap_or_default();
    let ours = read(&flags.server_ca_cert);
    let shared = |others: &[CertificateDer<'_>]| others.iter().any(|other| ours.contains(other));
    let agents = !flags.cluster_ca_cert.is_empty() && shared(&read(&flags.cluster_ca_cert));
    let others = match agents {
        true => "agents (--cluster-ca-cert)",
        false if shared(&kubernetes.cluster_authorities()) => {
            "kubelets and users (the cluster's CA)"
        }
        false => return,
    };
    let text = "its CA also signs certificates of";
    let remedy = "each of them can connect to every target; name kube-apiserver's certificate with \
                  --server-client-names";
    faults.warn("server-ca-cert", format!("{text} {others}: {remedy}"));
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
