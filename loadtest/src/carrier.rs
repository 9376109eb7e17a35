//! The carrier of an agent's tunnels, as its readiness page reports it.

pub use culvert_transport::Carrier;

/// The carrier of an agent's newest tunnel: the one that takes new dials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serving {
    /// The carrier.
    pub carrier: Carrier,
    /// Reason for the choice, such as `quic_silent`.
    pub reason: String,
}

impl Serving {
    /// From `/readyz?verbose`: `[+]tunnel server-0: tcp for 12.3s (quic_silent), used`, a line for
    /// each tunnel; those that take no dials begin with a minus. `None` when none takes dials.
    pub fn from_readiness(page: &str) -> Option<Self> {
        let tunnels = page.lines().filter_map(|line| line.strip_prefix("[+]tunnel "));
        let (_, newest) =
            tunnels.filter_map(tunnel).min_by(|(one, _), (two, _)| one.total_cmp(two))?;
        Some(newest)
    }
}

/// Age of a tunnel in seconds, and its carrier.
fn tunnel(line: &str) -> Option<(f64, Serving)> {
    let (_, state) = line.rsplit_once(": ")?;
    let (carrier, state) = state.split_once(" for ")?;
    let (age, reason) = state.split_once("s (")?;
    let (reason, _) = reason.split_once(')')?;
    Some((age.parse().ok()?, Serving { carrier: carrier.parse().ok()?, reason: reason.to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serving(carrier: Carrier, reason: &str) -> Option<Serving> {
        Some(Serving { carrier, reason: reason.to_owned() })
    }

    #[test]
    fn the_newest_tunnel_of_a_readiness_page_serves() {
        let page = "[+]ping ok\n[+]server-connected ok\n\
                    [-]tunnel server-0: quic for 0.1s (first_choice), retired\n\
                    [+]tunnel server-0: quic for 99.5s (first_choice), used\n\
                    [+]tunnel server-1: tcp for 12.3s (quic_silent), used\ncheck passed\n";
        assert_eq!(Serving::from_readiness(page), serving(Carrier::Tcp, "quic_silent"));
        for page in ["[+]ping ok\n[+]server-connected ok\ncheck passed\n", "ok", ""] {
            assert_eq!(Serving::from_readiness(page), None);
        }
    }
}
