//! A network and a range of ports, as operators write them.

use std::{fmt, net::IpAddr, ops::RangeInclusive, str::FromStr};

use ipnet::IpNet;

const SYNTAX: &str = "write an address or a network, and a port or a range of ports behind a colon \
                      if it has some, such as 10.0.0.0/8, 10.0.0.7:443 or [fd00::/8]:1-1023";

/// Some addresses and ports: `10.0.0.0/8`, `10.0.0.7:443` or `[fd00::/8]:1-1023`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct AddressRule {
    network: IpNet,
    /// First and last port; `None` stands for all.
    ports: Option<(u16, u16)>,
}

/// A text is no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} {reason}")]
pub struct InvalidRule {
    text: String,
    reason: String,
}

impl AddressRule {
    /// Whether the address, which is not IPv4-mapped, and the port are among these.
    pub(super) fn matches(&self, address: IpAddr, port: u16) -> bool {
        let ports = self.ports.map_or(0..=u16::MAX, |(first, last)| first..=last);
        self.network.contains(&address) && ports.contains(&port)
    }

    /// The rules in a text that is separated by commas, and what is wrong with the others.
    pub(crate) fn parse_list(text: &str) -> (Vec<Self>, Vec<InvalidRule>) {
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        let (mut rules, mut faults) = (Vec::new(), Vec::new());
        for item in items {
            match item.parse() {
                Ok(rule) => rules.push(rule),
                Err(fault) => faults.push(fault),
            }
        }
        (rules, faults)
    }
}

impl FromStr for AddressRule {
    type Err = InvalidRule;

    fn from_str(text: &str) -> Result<Self, InvalidRule> {
        parse(text).map_err(|reason| InvalidRule { text: text.into(), reason })
    }
}

fn parse(text: &str) -> Result<AddressRule, String> {
    let (network, ports) = split(text).ok_or_else(|| format!("is no rule: {SYNTAX}"))?;
    let address = network.parse::<IpAddr>().map(IpNet::from);
    let network = address.or_else(|_| network.parse::<IpNet>());
    let network = network.map_err(|_| format!("is no rule: {SYNTAX}"))?;
    if network.trunc() != network {
        return Err(format!("has bits set behind its prefix; write {}", network.trunc()));
    }
    if let IpNet::V6(v6) = network
        && let Some(v4) = v6.addr().to_ipv4_mapped()
        && v6.prefix_len() >= 96
    {
        let length = v6.prefix_len() - 96;
        return Err(format!(
            "is IPv4, whose addresses are decided on as IPv4: write {v4}/{length}"
        ));
    }
    let ports = ports.map(parse_ports).transpose()?;
    Ok(AddressRule { network, ports: ports.map(|ports| (*ports.start(), *ports.end())) })
}

/// The text of the network and that of the ports.
fn split(text: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (network, tail) = rest.split_once(']')?;
        return match tail {
            "" => Some((network, None)),
            tail => Some((network, Some(tail.strip_prefix(':')?))),
        };
    }
    match text.split_once(':') {
        Some((network, ports)) if !ports.contains(':') => Some((network, Some(ports))),
        // IPv6 without brackets, and so without ports.
        _ => Some((text, None)),
    }
}

fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (parse_port(first), parse_port(last)) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        _ => Err("has no port or range of ports behind its colon: write 443 or 1-1023".into()),
    }
}

fn parse_port(text: &str) -> Option<u16> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| is_number && *port > 0)
}

/// As it is written.
impl fmt::Display for AddressRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let network = match self.network.prefix_len() == self.network.max_prefix_len() {
            true => self.network.addr().to_string(),
            false => self.network.to_string(),
        };
        match self.ports {
            None => f.write_str(&network),
            Some(_) if self.network.addr().is_ipv6() => write!(f, "[{network}]"),
            Some(_) => f.write_str(&network),
        }?;
        match self.ports {
            None => Ok(()),
            Some((first, last)) if first == last => write!(f, ":{first}"),
            Some((first, last)) => write!(f, ":{first}-{last}"),
        }
    }
}

impl fmt::Debug for AddressRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_shown_as_it_is_written() {
        for text in [
            "10.0.0.0/8",
            "10.0.0.7",
            "10.0.0.7:443",
            "0.0.0.0/0:1-1023",
            "fd00::/8",
            "fd00::7",
            "[fd00::/8]:443",
            "[fd00::7]:1-65535",
        ] {
            assert_eq!(text.parse::<AddressRule>().unwrap().to_string(), text);
        }
        let same = |a: &str, b: &str| {
            assert_eq!(a.parse::<AddressRule>().unwrap(), b.parse().unwrap(), "{a} {b}");
        };
        same("10.0.0.7/32", "10.0.0.7");
        same("[fd00::7]", "fd00::7/128");
        same("10.0.0.7:80-80", "10.0.0.7:80");
    }

    #[test]
    fn what_is_no_rule_is_refused_with_what_would_be() {
        for (text, reason) in [
            ("", "is no rule"),
            ("node-1", "is no rule"),
            ("10.0.0.0/33", "is no rule"),
            ("10.0.0.0/+8", "is no rule"),
            ("[fd00::1", "is no rule"),
            ("[fd00::1]443", "is no rule"),
            ("10.0.0.1/8", "has bits set behind its prefix; write 10.0.0.0/8"),
            ("fd00::1/8", "has bits set behind its prefix; write fd00::/8"),
            ("::ffff:10.0.0.0/104", "write 10.0.0.0/8"),
            ("10.0.0.1:", "has no port"),
            ("10.0.0.1:0", "has no port"),
            ("10.0.0.1:+1", "has no port"),
            ("10.0.0.1:https", "has no port"),
            ("10.0.0.1:65536", "has no port"),
            ("10.0.0.1:2-1", "has no port"),
            ("10.0.0.1:1-2-3", "has no port"),
        ] {
            let fault = text.parse::<AddressRule>().unwrap_err().to_string();
            assert!(fault.starts_with(&format!("{text:?} ")), "{fault}");
            assert!(fault.contains(reason), "{fault}");
        }
    }

    #[test]
    fn a_list_is_read_to_its_end_whatever_is_wrong_in_it() {
        let (rules, faults) = AddressRule::parse_list("10.0.0.0/8, x,[fd00::/8]:80,[fd01::/16],y");
        assert_eq!(format!("{rules:?}"), "[10.0.0.0/8, [fd00::/8]:80, fd01::/16]");
        assert_eq!(faults.len(), 2);
        assert_eq!(AddressRule::parse_list(""), (vec![], vec![]));
    }
}
