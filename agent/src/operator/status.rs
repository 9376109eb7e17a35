//! The state of the agent: its tunnels, QUIC, proofs of identity, policy and memory.

use std::fmt::Write as _;

use culvert_process::{
    kubernetes::Timestamp,
    operator::{
        proofs::{CertificateText, TokenText},
        table::{Table, bytes, escape, left, or_dash, seconds},
    },
    version::software,
};
use culvert_transport::budget::Held;
use culvert_wire::version::REVISION;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::answers::Operated;
use crate::{config::Transport, tunnels::ServerTunnel};

/// The state of an agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Status {
    /// Name of the agent.
    agent: String,
    /// Name and version of its software.
    software: String,
    /// Its revision of the protocol.
    revision: u16,
    /// Time since it started, in seconds.
    age_seconds: u64,
    /// Number of servers, as far as it knows.
    server_count: u32,
    /// Its tunnels.
    servers: Vec<Server>,
    /// Why QUIC is not in use.
    quic: Quic,
    /// Its proofs of identity.
    identity: Proofs,
    /// Its egress policy.
    egress: Egress,
    /// What it holds for its peers.
    memory: Memory,
}

/// One tunnel to a server.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Server {
    id: String,
    address: String,
    carrier: String,
    /// Why the tunnel has its carrier, as in the metrics.
    reason: String,
    /// `used`, `silent` or `retired`.
    state: String,
    age_seconds: u64,
    /// `None` where it is not measured.
    rtt_millis: Option<f64>,
    /// Share of the packets that were lost since the tunnel began, in percent; `None` over TCP.
    loss_percent: Option<f64>,
    /// Largest UDP payload of the path, in bytes; `None` over TCP.
    mtu: Option<u16>,
    streams: usize,
    /// Name and version of the server's software, if it says.
    software: Option<String>,
    revision: u16,
}

/// QUIC on the path to the servers.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Quic {
    /// Value of --transport.
    transport: String,
    /// Whether every tunnel in use is over QUIC.
    in_use: bool,
    /// The last failures, the newest first.
    failures: Vec<QuicFailure>,
    /// Time until QUIC is tried again, in seconds; `None` while it is not to be tried.
    next_try_seconds: Option<f64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct QuicFailure {
    reason: String,
    seconds_ago: u64,
}

/// Proofs of identity; `None` for those that the agent does not have.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Proofs {
    certificate: Option<String>,
    certificate_expires: Option<String>,
    token_subject: Option<String>,
    token_expires: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Egress {
    /// `built-in rules`, and `flags` or a file beside them.
    source: String,
    exempt: usize,
    deny: usize,
    allow: usize,
    /// Whether denials are only counted and logged.
    audit: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Memory {
    held_bytes: u64,
    limit_bytes: Option<u64>,
}

pub(super) fn status(operated: &Operated) -> Status {
    let tunnels = operated.tunnels.all();
    let by_tunnel = operated.streams.by_tunnel();
    let server = |tunnel: &ServerTunnel| {
        let streams = by_tunnel.get(&tunnel.tunnel.key()).copied().unwrap_or_default();
        Server::of(tunnel, streams)
    };
    let policy = operated.policy.get();
    Status {
        agent: operated.agent_id.to_string(),
        software: software("culvert-agent"),
        revision: REVISION,
        age_seconds: operated.since.elapsed().as_secs(),
        server_count: operated.tunnels.count(),
        servers: tunnels.iter().map(|tunnel| server(tunnel)).collect(),
        quic: quic(operated),
        identity: proofs(operated),
        egress: Egress {
            source: operated.policy_source.clone(),
            exempt: policy.exempt.len(),
            deny: policy.deny.len(),
            allow: policy.allow.len(),
            audit: operated.audit,
        },
        memory: Memory {
            held_bytes: Held::ALL.into_iter().map(|kind| operated.memory.held(kind)).sum(),
            limit_bytes: operated.memory.limit(),
        },
    }
}

impl Status {
    /// Number of servers with a tunnel that no other one has replaced.
    fn connected(&self) -> usize {
        self.servers.iter().filter(|server| server.state != "retired").count()
    }
}

impl Server {
    #[expect(clippy::cast_precision_loss, reason = "a share of packets needs no more digits")]
    fn of(tunnel: &ServerTunnel, streams: usize) -> Self {
        let stats = tunnel.tunnel.stats();
        let is_quic = tunnel.rank.is_quic();
        let loss = 100.0 * stats.lost_packets as f64 / stats.sent_packets.max(1) as f64;
        Self {
            id: tunnel.server_id.to_string(),
            address: tunnel.tunnel.remote_address().to_string(),
            carrier: tunnel.tunnel.carrier().to_string(),
            reason: tunnel.reason.to_owned(),
            state: tunnel.state().to_owned(),
            age_seconds: tunnel.since.elapsed().as_secs(),
            rtt_millis: (!stats.rtt.is_zero()).then_some(stats.rtt.as_secs_f64() * 1000.0),
            loss_percent: is_quic.then_some(loss),
            mtu: is_quic.then_some(stats.mtu),
            streams,
            software: tunnel.version.software.as_ref().map(ToString::to_string),
            revision: tunnel.version.revision,
        }
    }
}

fn quic(operated: &Operated) -> Quic {
    let now = Instant::now();
    let in_use = operated.tunnels.in_use();
    let notes = operated.tunnels.quic().clone();
    let failure = |(at, reason): &(Instant, &'static str)| QuicFailure {
        reason: (*reason).to_owned(),
        seconds_ago: now.saturating_duration_since(*at).as_secs(),
    };
    let transport = match operated.transport {
        Transport::Auto => "auto",
        Transport::Quic => "quic",
        Transport::Tcp => "tcp",
    };
    Quic {
        transport: transport.to_owned(),
        in_use: !in_use.is_empty() && in_use.iter().all(|tunnel| tunnel.rank.is_quic()),
        failures: notes.failures().map(failure).collect(),
        next_try_seconds: notes.next_try.map(|at| at.saturating_duration_since(now).as_secs_f64()),
    }
}

fn proofs(operated: &Operated) -> Proofs {
    let certificate = operated.certificate.as_ref().and_then(|certificate| {
        let identity = certificate.get();
        CertificateText::of(identity.chain.first()?)
    });
    let token = operated.token.as_ref().and_then(|token| TokenText::of(token.get().expose()));
    Proofs {
        certificate_expires: certificate.as_ref().map(|found| found.not_after.to_string()),
        certificate: certificate.map(|found| found.subject),
        token_expires: token.as_ref().and_then(|found| Some(found.expires?.to_string())),
        token_subject: token.and_then(|found| found.subject),
    }
}

/// The state as text for a terminal.
pub(super) fn render(status: &Status, now: Timestamp) -> String {
    let Status { agent, software, revision, .. } = status;
    let mut table = Table::new([
        "SERVER", "ADDRESS", "CARRIER", "STATE", "SINCE", "RTT", "LOSS", "MTU", "STREAMS",
        "SOFTWARE",
    ]);
    for server in &status.servers {
        let number = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        table.push([
            server.id.clone(),
            server.address.clone(),
            server.carrier.clone(),
            server.state.clone(),
            seconds(server.age_seconds),
            number(server.rtt_millis.map(|rtt| format!("{rtt:.1}ms"))),
            number(server.loss_percent.map(|loss| format!("{loss:.2}%"))),
            number(server.mtu.map(|mtu| mtu.to_string())),
            server.streams.to_string(),
            or_dash(server.software.as_deref()),
        ]);
    }
    let mut text = format!(
        "agent    {}, {}, protocol revision {revision}, for {}\n",
        escape(agent),
        escape(software),
        seconds(status.age_seconds)
    );
    let _ = writeln!(text, "servers  {} of {}", status.connected(), status.server_count);
    let _ = writeln!(text, "quic     {}", status.quic.describe());
    let _ = writeln!(text, "identity {}", status.identity.describe(now));
    let _ = writeln!(text, "egress   {}", status.egress.describe());
    let limit = status.memory.limit_bytes.map_or_else(|| "no limit".into(), bytes);
    let _ = writeln!(text, "memory   {} held, limit {limit}", bytes(status.memory.held_bytes));
    text + "\n" + &table.render()
}

impl Quic {
    fn describe(&self) -> String {
        if self.transport == "tcp" {
            return "not in use: --transport=tcp".into();
        }
        let failures: Vec<_> = self
            .failures
            .iter()
            .map(|failure| format!("{} {} ago", failure.reason, seconds(failure.seconds_ago)))
            .collect();
        let failures = match failures.is_empty() {
            true => "no failure".into(),
            false => failures.join(", "),
        };
        match (self.in_use, self.next_try_seconds) {
            (true, _) => format!("in use; {failures}"),
            (false, Some(next)) => format!("not in use; {failures}; next try in {next:.0}s"),
            (false, None) => format!("not in use; {failures}"),
        }
    }
}

impl Proofs {
    fn describe(&self, now: Timestamp) -> String {
        let proof = |kind: &str, name: &Option<String>, expires: &Option<String>| {
            let name = escape(name.as_deref()?);
            let expires = expires.as_deref().map_or_else(|| "never".into(), |at| left(at, now));
            Some(format!("{kind} {name}, expires in {expires}"))
        };
        let proofs = [
            proof("certificate", &self.certificate, &self.certificate_expires),
            proof("token", &self.token_subject, &self.token_expires),
        ];
        or_dash(Some(&proofs.into_iter().flatten().collect::<Vec<_>>().join("; ")))
    }
}

impl Egress {
    fn describe(&self) -> String {
        let Self { source, exempt, deny, allow, audit } = self;
        let audit = if *audit { ", audit only" } else { "" };
        format!(
            "{source}: {exempt} exempt, {deny} deny, {allow} allow{audit}",
            source = escape(source)
        )
    }
}
