//! The flags of servers and agents, for Culvert's and Konnectivity's alike: one list for every
//! process and every server or agent inside a process.

use std::{
    ffi::OsString,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use culvert_process::{cli::ProcessConfig, go_flags, invocation::Invocation};

use crate::{certificates::Certificates, frontend::Protocol};

/// More flags for an agent that looks for its servers often.
pub const SYNC_OFTEN: [&str; 3] =
    ["--sync-interval=100ms", "--sync-interval-cap=500ms", "--probe-interval=100ms"];

/// Ports of a server.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    /// Port for agents.
    pub tunnel: u16,
    /// Admin port.
    pub admin: u16,
    /// Health port.
    pub health: u16,
}

impl Ports {
    /// Culvert's default ports.
    pub const DEFAULT: Self = Self { tunnel: 8132, admin: 8133, health: 8134 };
}

/// A server with a frontend on a Unix socket.
#[derive(Clone, Copy, Debug)]
pub struct ServerFlags<'a> {
    /// Certificates of the server, and the CA of its agents.
    pub certificates: &'a Certificates,
    /// Path of the frontend's socket.
    pub socket: &'a Path,
    /// Protocol of the frontend.
    pub frontend: Protocol,
    /// Address for agents.
    pub address: IpAddr,
    /// Ports.
    pub ports: Ports,
    /// Name of the server.
    pub id: &'a str,
    /// Number of servers.
    pub count: u32,
}

impl ServerFlags<'_> {
    /// The flags as arguments.
    pub fn args(&self) -> Vec<String> {
        let pair = self.certificates.server();
        let mode = match self.frontend {
            Protocol::Grpc => "grpc",
            Protocol::Connect => "http-connect",
        };
        vec![
            path_flag("uds-name", self.socket),
            "--delete-existing-uds-file=true".into(),
            format!("--mode={mode}"),
            "--server-port=0".into(),
            path_flag("cluster-cert", &pair.certificate),
            path_flag("cluster-key", &pair.key),
            path_flag("cluster-ca-cert", &self.certificates.ca()),
            format!("--agent-bind-address={}", self.address),
            format!("--agent-port={}", self.ports.tunnel),
            format!("--admin-port={}", self.ports.admin),
            "--admin-bind-address=127.0.0.1".into(),
            format!("--health-port={}", self.ports.health),
            "--health-bind-address=127.0.0.1".into(),
            format!("--server-id={}", self.id),
            format!("--server-count={}", self.count),
        ]
    }
}

/// An agent.
#[derive(Clone, Copy, Debug)]
pub struct AgentFlags<'a> {
    /// The CA of its servers, and its own certificate.
    pub certificates: &'a Certificates,
    /// Whether it shows its certificate.
    pub shows_certificate: bool,
    /// Name of the agent; random when `None`.
    pub id: Option<&'a str>,
    /// Address of its servers.
    pub server: SocketAddr,
    /// Admin port.
    pub admin_port: u16,
    /// Health port.
    pub health_port: u16,
}

impl AgentFlags<'_> {
    /// The flags as arguments.
    pub fn args(&self) -> Vec<String> {
        let mut args = vec![
            path_flag("ca-cert", &self.certificates.ca()),
            format!("--proxy-server-host={}", self.server.ip()),
            format!("--proxy-server-port={}", self.server.port()),
            format!("--admin-server-port={}", self.admin_port),
            "--admin-bind-address=127.0.0.1".into(),
            format!("--health-server-port={}", self.health_port),
            "--health-server-host=127.0.0.1".into(),
        ];
        if self.shows_certificate {
            let pair = self.certificates.agent();
            args.push(path_flag("agent-cert", &pair.certificate));
            args.push(path_flag("agent-key", &pair.key));
        }
        args.extend(self.id.map(|id| format!("--agent-id={id}")));
        args
    }
}

/// Configuration of a Culvert server or agent with these arguments, without the program's name.
///
/// # Errors
/// When a flag is unknown or has a wrong value.
pub fn config<C: ProcessConfig>(
    args: impl IntoIterator<Item = impl Into<OsString>>,
) -> anyhow::Result<C> {
    let flags = go_flags::try_parse_from(named("culvert", args));
    let flags = flags.map_err(|exit| anyhow::anyhow!(exit.text))?;
    Ok(C::from_flags(flags, Invocation::Culvert)?)
}

/// The arguments behind the name of their program, as `main` gets them.
pub fn named(
    program: &str,
    args: impl IntoIterator<Item = impl Into<OsString>>,
) -> impl Iterator<Item = OsString> {
    std::iter::once(program.into()).chain(args.into_iter().map(Into::into))
}

fn path_flag(name: &str, path: &Path) -> String {
    format!("--{name}={}", path.display())
}
