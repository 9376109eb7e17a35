//! What carries an agent's tunnels, as it says itself.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What carries a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Carrier {
    /// QUIC over UDP.
    Quic,
    /// QMux over TLS over TCP.
    Tcp,
    /// The one stream of a stock server.
    Grpc,
}

impl Carrier {
    const ALL: [Self; 3] = [Self::Quic, Self::Tcp, Self::Grpc];
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Quic => "quic",
            Self::Tcp => "tcp",
            Self::Grpc => "grpc",
        })
    }
}

impl FromStr for Carrier {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|carrier| carrier.to_string() == name).ok_or(())
    }
}

/// The carrier of an agent's newest tunnel: the one that takes new dials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serving {
    /// The carrier.
    pub carrier: Carrier,
    /// Why it was chosen, such as `udp_silent`, where the agent says so.
    pub reason: Option<String>,
}

impl Serving {
    /// As `/readyz?verbose` tells: `[+]tunnel server-0: tcp since 12.3s (udp_silent)`, a line for
    /// each tunnel. `None` where it names none.
    pub fn from_readiness(page: &str) -> Option<Self> {
        let tunnels = page.lines().filter_map(|line| line.strip_prefix("[+]tunnel "));
        let (_, newest) =
            tunnels.filter_map(tunnel).min_by(|(one, _), (two, _)| one.total_cmp(two))?;
        Some(newest)
    }

    /// As `/metrics` tells: tunnels are told in the order of their age. `None` where it names none.
    pub fn from_metrics(page: &str) -> Option<Self> {
        let mut tunnels =
            page.lines().filter(|line| line.starts_with("culvert_agent_tunnel_rtt_seconds{"));
        let (_, label) = tunnels.next_back()?.split_once("transport=\"")?;
        let carrier = label.split('"').next()?.parse().ok()?;
        Some(Self { carrier, reason: None })
    }
}

/// How many seconds ago a tunnel came, and what carries it.
fn tunnel(line: &str) -> Option<(f64, Serving)> {
    let (_, state) = line.rsplit_once(": ")?;
    let (carrier, since) = state.split_once(" since ")?;
    let (age, reason) = match since.split_once(" (") {
        Some((age, reason)) => (age, Some(reason.trim_end_matches(')').to_owned())),
        None => (since, None),
    };
    let age = age.strip_suffix('s')?.parse().ok()?;
    Some((age, Serving { carrier: carrier.parse().ok()?, reason }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serving(carrier: Carrier, reason: Option<&str>) -> Option<Serving> {
        Some(Serving { carrier, reason: reason.map(str::to_owned) })
    }

    #[test]
    fn the_newest_tunnel_of_a_readiness_page_serves() {
        let page = "[+]ping ok\n[+]server-connected ok\n\
                    [+]tunnel server-0: quic since 99.5s\n\
                    [+]tunnel server-0: tcp since 12.3s (udp_silent)\ncheck passed\n";
        assert_eq!(Serving::from_readiness(page), serving(Carrier::Tcp, Some("udp_silent")));
        let page = "[+]tunnel server-0: quic since 0.1s\n[+]tunnel server-0: tcp since 12.3s\n";
        assert_eq!(Serving::from_readiness(page), serving(Carrier::Quic, None));
        for page in ["[+]ping ok\n[+]server-connected ok\ncheck passed\n", "ok", ""] {
            assert_eq!(Serving::from_readiness(page), None);
        }
    }

    #[test]
    fn the_last_tunnel_of_the_metrics_serves() {
        let page = "# TYPE culvert_agent_tunnel_rtt_seconds gauge\n\
                    culvert_agent_tunnel_rtt_seconds{server_id=\"a\",transport=\"quic\"} 0.05\n\
                    culvert_agent_tunnel_rtt_seconds{server_id=\"a\",transport=\"tcp\"} 0.05\n\
                    culvert_agent_tunnel_cwnd_bytes{server_id=\"a\",transport=\"quic\"} 12000\n";
        assert_eq!(Serving::from_metrics(page), serving(Carrier::Tcp, None));
        assert_eq!(Serving::from_metrics("culvert_build_info{version=\"1\"} 1\n"), None);
    }
}
