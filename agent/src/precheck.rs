//! `culvert-agent precheck`: whether this agent would get a tunnel, step by step.

use std::time::Duration;

use culvert_process::precheck::{Report, access::Access, steps};
use culvert_transport::{Carrier, ConnectError, TunnelLost, tcp::Route};
use culvert_wire::CloseCode;
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;

use crate::{
    config::{Config, Transport},
    connector::{
        Candidate, CarrierError, CarrierFailures, CarrierOrder, Connect as _, Connected,
        NetworkConnect, Preference,
    },
    files::AgentFiles,
    metrics::AgentMetrics,
};

/// Maximum number of addresses that are tried.
const MAX_ADDRESSES: usize = 8;
/// Time for one handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time in which a server over TCP refuses the agent's certificate.
const JUDGEMENT_TIME: Duration = Duration::from_millis(200);
/// Time in which QUIC finds out what the path carries.
const MTU_TIME: Duration = Duration::from_secs(1);
/// UDP payload of a path below which its packets are small, in bytes.
const USUAL_MTU: u16 = 1400;

/// Makes all steps.
pub(crate) async fn check(config: Config, report: &mut Report) {
    steps::udp_buffers(report);
    if let Some(path) = &config.operator_socket {
        steps::socket_folder("--operator-socket", path, report);
    }
    steps::port("--health-server-port", config.health_address, false, report);
    steps::port("--admin-server-port", config.admin_address, false, report);
    let Ok(metrics) = AgentMetrics::new() else { return };
    let files = match AgentFiles::read(&config, metrics.inner()) {
        Ok(files) => files,
        Err(faults) => {
            let remedy = "mend the file; nothing that needs it was checked";
            return faults.iter().for_each(|fault| report.fail("files", fault, remedy));
        }
    };
    report.ok("files", "can be read");
    check_proofs(&files, report);
    steps::uses_of_certificates(&files.reloads, report);
    if let (Some(client), Some(leases)) = (&files.leases, &config.sync.leases) {
        Access::leases(&leases.namespace, &["list", "watch"], &[]).check(client, report).await;
    }
    let connect = NetworkConnect::new(&config, files, &metrics, TaskTracker::new());
    let order = match config.transport {
        Transport::Auto => CarrierOrder::QuicFirst,
        Transport::Quic => CarrierOrder::Quic,
        Transport::Tcp => CarrierOrder::Tcp,
    };
    let host = &config.servers.host;
    let candidates = match connect.resolve(order, &Preference::default()).await {
        Ok(candidates) => candidates,
        Err(error) => {
            let remedy = "check --proxy-server-host and the host's resolver";
            return report.fail("name resolution", format!("{host}: {error}"), remedy);
        }
    };
    let addresses: Vec<_> = candidates.iter().map(|found| found.address.to_string()).collect();
    report.ok("name resolution", format!("{host}: {}", addresses.join(", ")));
    check_proxy(&candidates, report);
    for candidate in candidates.iter().take(MAX_ADDRESSES) {
        check_address(&connect, candidate, config.transport, report).await;
    }
}

fn check_proofs(files: &AgentFiles, report: &mut Report) {
    match &files.identity {
        Some(identity) => {
            steps::certificate("certificate", identity.get().chain.first(), report);
        }
        None => report.skip("certificate", "no --agent-cert"),
    }
    match &files.token {
        Some(token) => steps::token(token.get().expose(), None, report),
        None => report.skip("token", "no --service-account-token-path"),
    }
    if files.identity.is_none() && files.token.is_none() {
        let remedy = "give --agent-cert or --service-account-token-path";
        report.warn("proof of identity", "neither a certificate nor a token", remedy);
    }
}

fn check_proxy(candidates: &[Candidate], report: &mut Report) {
    let is_proxied =
        candidates.iter().any(|found| matches!(found.address.tcp, Route::Proxied { .. }));
    match is_proxied {
        true => report.ok("HTTPS proxy", "TCP goes through the proxy of the environment"),
        false => report.skip("HTTPS proxy", "none for this address"),
    }
}

async fn check_address(
    connect: &NetworkConnect,
    candidate: &Candidate,
    transport: Transport,
    report: &mut Report,
) {
    let address = &candidate.address;
    let mut reached = Vec::new();
    for (carrier, name) in [(Carrier::Quic, "UDP (QUIC)"), (Carrier::Tcp, "TCP (TLS)")] {
        let step = format!("{name} to {address}");
        let is_wanted = match carrier {
            Carrier::Quic => transport != Transport::Tcp,
            _ => transport != Transport::Quic,
        };
        if !is_wanted || (carrier == Carrier::Quic && address.quic.is_none()) {
            report.skip(step, "not a carrier of this agent");
            continue;
        }
        let tls = match connect.read_tls().await {
            Ok(tls) => tls,
            Err(error) => return report.fail(step, error, "mend the certificate or the CA"),
        };
        let begun = Instant::now();
        let handshake = connect.connect(carrier, address, &tls, true);
        let error = match timeout(HANDSHAKE_TIMEOUT, handshake).await {
            Ok(Ok(connected)) => match refusal(&connected).await {
                None => {
                    let millis = begun.elapsed().as_millis();
                    let carrier = connected.tunnel.carrier();
                    report.ok(&step, format!("a handshake over {carrier} took {millis} ms"));
                    check_tunnel(&connected, &step, reached.is_empty(), report);
                    connected.tunnel.close(CloseCode::DONE, "a precheck");
                    connected.tunnel.flushed(Duration::from_secs(1)).await;
                    reached.push(carrier);
                    continue;
                }
                Some(lost) => CarrierError::Join(lost.into()),
            },
            Ok(Err(error)) => error,
            Err(_) => CarrierError::TimedOut(HANDSHAKE_TIMEOUT),
        };
        let is_of_tls = error.is_of_tls();
        let remedy = match &error {
            _ if is_of_tls => "",
            CarrierError::Connect(ConnectError::Proxy { .. }) => {
                "check HTTPS_PROXY, or add the servers to NO_PROXY"
            }
            CarrierError::Connect(ConnectError::Refused) => {
                "is a server running there, and is --proxy-server-port its --agent-port?"
            }
            _ => "check firewalls and load balancers, --ca-cert and --server-name",
        };
        let detail = match is_of_tls {
            // With the flag to change.
            true => CarrierFailures(vec![(carrier, error)]).to_string(),
            false => error.to_string(),
        };
        // With --transport=auto one carrier is enough.
        match (carrier, transport) {
            (_, Transport::Auto)
                if is_of_tls && (carrier == Carrier::Quic || !reached.is_empty()) =>
            {
                report.warn(step, detail, "");
            }
            (Carrier::Quic, Transport::Auto) => {
                report.warn(
                    step,
                    detail,
                    "let UDP pass to this port; without it, TCP is used if that passes",
                );
            }
            (_, Transport::Auto) if !reached.is_empty() => {
                report.warn(step, detail, "let TCP pass to this port, for when UDP does not");
            }
            _ => report.fail(step, detail, remedy),
        }
    }
}

/// Why the server closes the tunnel at once, if it does. With TLS 1.3 the handshake of this side is
/// over before the server judges its certificate. Waits until QUIC has found out what the path carries.
async fn refusal(connected: &Connected) -> Option<TunnelLost> {
    let limit = match connected.tunnel.carrier() {
        Carrier::Quic => MTU_TIME,
        _ => JUDGEMENT_TIME,
    };
    timeout(limit, connected.tunnel.closed()).await.ok()
}

/// What a tunnel shows: the server's certificate, and what the path carries.
fn check_tunnel(connected: &Connected, step: &str, is_first: bool, report: &mut Report) {
    if is_first && let Some(chain) = connected.tunnel.peer_certificates() {
        steps::certificate("certificate of the server", chain.first(), report);
    }
    if connected.tunnel.carrier() != Carrier::Quic {
        return;
    }
    let stats = connected.tunnel.stats();
    let step = step.replace("UDP (QUIC)", "path MTU");
    let detail = format!("{} bytes of UDP payload, RTT {:.1?}", stats.mtu, stats.rtt);
    match stats.mtu < USUAL_MTU {
        true => report.warn(step, detail, "large packets do not pass; transfers cost more packets"),
        false => report.ok(step, detail),
    }
    if let Some(buffers) = connected.buffers.filter(|buffers| buffers.is_small()) {
        let detail = format!("receive {}, send {}", buffers.receive, buffers.send);
        let remedy = "raise net.core.rmem_max and net.core.wmem_max to 8 MiB";
        report.warn("UDP buffers of the socket", detail, remedy);
    }
}
