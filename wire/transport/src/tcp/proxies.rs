//! Which servers are reached through a proxy, as the environment says.
//!
//! The rules are those of Go (`golang.org/x/net/http/httpproxy`, for https), which every other
//! agent of a node goes by: HTTPS_PROXY or https_proxy is the proxy, and NO_PROXY or no_proxy lists
//! what is reached without it. One thing differs: an unusable proxy is a fault, and not no proxy.

use std::{net::IpAddr, path::PathBuf, sync::Arc};

use super::proxy::{InvalidProxy, Proxy};

/// The proxy of a process and whom it is not for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxies {
    proxy: Option<Arc<Proxy>>,
    exempt: Vec<Exempt>,
}

/// A variable of the environment names no usable proxy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable}: {fault}")]
pub struct InvalidVariable {
    /// The variable.
    pub variable: &'static str,
    /// What is wrong with it.
    pub fault: InvalidProxy,
}

impl Proxies {
    /// What the environment says, read through `variable`; empty variables count as absent.
    ///
    /// SSL_CERT_FILE, a PEM file, says who vouches for a proxy that is spoken to over TLS.
    ///
    /// # Errors
    /// When there is a proxy that cannot be used.
    pub fn from_env(
        variable: impl Fn(&'static str) -> Option<String>,
    ) -> Result<Self, InvalidVariable> {
        let first = |names: &[&'static str]| {
            let mut set = names.iter().map(|name| (*name, variable(name).unwrap_or_default()));
            set.find(|(_, value)| !value.is_empty())
        };
        let Some((name, url)) = first(&["HTTPS_PROXY", "https_proxy"]) else {
            return Ok(Self::default());
        };
        let mut proxy =
            url.parse::<Proxy>().map_err(|fault| InvalidVariable { variable: name, fault })?;
        if let Some((_, file)) = first(&["SSL_CERT_FILE"]) {
            proxy = proxy.with_authorities(PathBuf::from(file));
        }
        let exempt = first(&["NO_PROXY", "no_proxy"]).map_or_else(String::new, |(_, list)| list);
        let exempt = exempt.split(',').filter_map(Exempt::parse).collect();
        Ok(Self { proxy: Some(Arc::new(proxy)), exempt })
    }

    /// The proxy through which this server is reached; `None` when it is reached directly.
    ///
    /// This machine itself never is behind a proxy.
    pub fn proxy_for(&self, host: &str, port: u16) -> Option<Arc<Proxy>> {
        let proxy = self.proxy.as_ref()?;
        let host = host.trim().to_ascii_lowercase();
        let ip = host.parse::<IpAddr>().ok().map(|ip| ip.to_canonical());
        let here = host == "localhost" || ip.is_some_and(|ip| ip.is_loopback());
        let exempt = here || self.exempt.iter().any(|exempt| exempt.covers(&host, ip, port));
        (!exempt).then(|| proxy.clone())
    }
}

/// One entry of NO_PROXY. Ports are text, so that one that is no number matches nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Exempt {
    All,
    Network {
        address: IpAddr,
        prefix: u32,
    },
    Address {
        address: IpAddr,
        port: Option<String>,
    },
    /// A name, with its leading dot, and whether it stands for itself too.
    Name {
        suffix: String,
        itself: bool,
        port: Option<String>,
    },
}

impl Exempt {
    /// Reads an entry; one without a host means nothing.
    fn parse(entry: &str) -> Option<Self> {
        let entry = entry.trim().to_ascii_lowercase();
        if entry == "*" {
            return Some(Self::All);
        }
        if let Some(network) = parse_network(&entry) {
            return Some(network);
        }
        let (host, port) = match split_port(&entry) {
            Some((host, port)) => (host, Some(port).filter(|port| !port.is_empty())),
            None => (entry.as_str(), None),
        };
        let port = port.map(str::to_owned);
        if let Ok(address) = host.parse::<IpAddr>() {
            return Some(Self::Address { address: address.to_canonical(), port });
        }
        let name = host.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(host);
        match name.chars().next()? {
            '.' => Some(Self::Name { suffix: name.to_owned(), itself: false, port }),
            _ => Some(Self::Name { suffix: format!(".{name}"), itself: true, port }),
        }
    }

    /// Whether the entry stands for this host and port; names never stand for addresses.
    fn covers(&self, host: &str, ip: Option<IpAddr>, port: u16) -> bool {
        let is_port = |wanted: &Option<String>| {
            wanted.as_ref().is_none_or(|wanted| *wanted == port.to_string())
        };
        match (self, ip) {
            (Self::All, _) => true,
            (Self::Network { address, prefix }, Some(ip)) => contains(*address, *prefix, ip),
            (Self::Address { address, port }, Some(ip)) => *address == ip && is_port(port),
            (Self::Name { suffix, itself, port }, None) => {
                let is_name = host.ends_with(suffix) || *itself && host == &suffix[1..];
                is_name && is_port(port)
            }
            _ => false,
        }
    }
}

/// An address and the length of its prefix.
fn parse_network(entry: &str) -> Option<Exempt> {
    let (address, prefix) = entry.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let digits = prefix.bytes().all(|byte| byte.is_ascii_digit());
    let prefix = prefix.parse().ok().filter(|prefix| digits && *prefix <= bits(address).1)?;
    Some(Exempt::Network { address, prefix })
}

/// Whether an address has the first bits of another.
fn contains(network: IpAddr, prefix: u32, ip: IpAddr) -> bool {
    let ((network, length), (ip, ip_length)) = (bits(network), bits(ip));
    // All bits differ in what comes after the prefix, which is everything for a prefix of none.
    length == ip_length && (network ^ ip).checked_shr(length - prefix).unwrap_or(0) == 0
}

/// An address as a number, and how many bits it has.
fn bits(ip: IpAddr) -> (u128, u32) {
    match ip {
        IpAddr::V4(ip) => (ip.to_bits().into(), 32),
        IpAddr::V6(ip) => (ip.to_bits(), 128),
    }
}

/// Host and port of `host:port`, by the rules of Go's `net.SplitHostPort`.
fn split_port(address: &str) -> Option<(&str, &str)> {
    let (host, port) = match address.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (host, rest.strip_prefix(':')?)
        }
        None => address.rsplit_once(':').filter(|(host, _)| !host.contains(':'))?,
    };
    let odd = |text: &str| text.contains(['[', ']']);
    (!odd(host) && !odd(port) && !port.contains(':')).then_some((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(variables: &[(&str, &str)]) -> Result<Proxies, InvalidVariable> {
        Proxies::from_env(|name| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    /// The proxy of a server that nothing is said of.
    fn found(variables: &[(&str, &str)]) -> Option<String> {
        let proxies = proxies(variables).unwrap();
        proxies.proxy_for("server.example", 8132).map(|proxy| proxy.to_string())
    }

    #[test]
    fn the_proxy_is_that_of_https_and_upper_case_goes_first() {
        let (upper, lower) = (("HTTPS_PROXY", "upper:1"), ("https_proxy", "lower:2"));
        assert_eq!(found(&[upper, lower]).unwrap(), "http://upper:1");
        assert_eq!(found(&[lower]).unwrap(), "http://lower:2");
        assert_eq!(found(&[("HTTPS_PROXY", ""), lower]).unwrap(), "http://lower:2");
        assert_eq!(found(&[]), None);
        assert_eq!(found(&[("HTTP_PROXY", "other:3"), ("ALL_PROXY", "other:4")]), None);
        assert_eq!(found(&[upper, ("NO_PROXY", "*"), ("no_proxy", "x")]), None);
        assert_eq!(found(&[upper, ("no_proxy", "server.example")]), None);
    }

    #[test]
    fn a_proxy_that_cannot_be_used_is_told_with_its_variable() {
        let fault = proxies(&[("https_proxy", "socks5://user:secret@proxy:1080")]).unwrap_err();
        assert_eq!(
            fault.to_string(),
            "https_proxy: a proxy of the scheme socks5 is not supported; \
             use an http:// or https:// one"
        );
    }

    #[test]
    fn what_needs_no_proxy_is_as_in_go() {
        // NO_PROXY; what is reached directly; what is not.
        type Case = (&'static str, &'static [(&'static str, u16)], &'static [(&'static str, u16)]);
        let cases: &[Case] = &[
            (
                "",
                &[("localhost", 1), ("127.0.0.1", 1), ("127.9.9.9", 1), ("::1", 1)],
                &[("x.localhost", 1), ("10.0.0.1", 1), ("::2", 1), ("server", 1)],
            ),
            ("*", &[("anything", 1), ("10.0.0.1", 1), ("fd00::1", 1)], &[]),
            ("a, * ,b", &[("anything", 1)], &[]),
            (
                "foo.com",
                &[("foo.com", 1), ("bar.foo.com", 2), ("FOO.com", 3)],
                &[("foo.com.org", 1), ("xfoo.com", 1), ("com", 1)],
            ),
            (".foo.com", &[("bar.foo.com", 1), ("a.b.foo.com", 1)], &[("foo.com", 1)]),
            ("*.foo.com", &[("bar.foo.com", 1)], &[("foo.com", 1), ("xfoo.com", 1)]),
            (
                "foo.com:8132",
                &[("foo.com", 8132), ("bar.foo.com", 8132)],
                &[("foo.com", 443), ("foo.com", 81)],
            ),
            (".foo.com:80", &[("a.foo.com", 80)], &[("a.foo.com", 8080), ("foo.com", 80)]),
            ("foo.com:", &[("foo.com", 1)], &[]),
            ("foo.com:http,foo.com:080", &[], &[("foo.com", 80)]),
            (" Foo.Com , bar ", &[("foo.com", 1), ("bar", 1), ("x.bar", 1)], &[("barn", 1)]),
            ("10.0.0.1", &[("10.0.0.1", 1), ("::ffff:10.0.0.1", 1)], &[("10.0.0.11", 1)]),
            ("10.0.0.1:80", &[("10.0.0.1", 80)], &[("10.0.0.1", 81)]),
            ("fd00::1", &[("fd00::1", 1), ("fd00:0::1", 1)], &[("fd00::2", 1)]),
            ("[fd00::1]:80", &[("fd00::1", 80)], &[("fd00::1", 81)]),
            ("[fd00::1]", &[], &[("fd00::1", 80)]),
            (
                "10.1.2.3/8,192.168.4.0/22",
                &[("10.255.0.1", 1), ("192.168.7.255", 1)],
                &[("11.0.0.1", 1), ("192.168.8.0", 1), ("10.example", 1)],
            ),
            ("0.0.0.0/0", &[("10.0.0.1", 1)], &[("fd00::1", 1), ("server", 1)]),
            ("fd00::/8", &[("fdff::1", 1)], &[("fe00::1", 1), ("10.0.0.1", 1)]),
            ("::/0", &[("fd00::1", 1)], &[("10.0.0.1", 1)]),
            ("10.0.0.0/33,10.0.0.0/+8,10.0.0/8,/8", &[], &[("10.0.0.1", 1)]),
            (",:80,,.,[", &[], &[("server", 80), ("10.0.0.1", 80)]),
        ];
        for (list, direct, proxied) in cases {
            let proxies = proxies(&[("HTTPS_PROXY", "proxy:1"), ("NO_PROXY", list)]).unwrap();
            for (hosts, expected) in [(direct, false), (proxied, true)] {
                for (host, port) in *hosts {
                    let found = proxies.proxy_for(host, *port).is_some();
                    assert_eq!(found, expected, "{list:?} and {host} port {port}");
                }
            }
        }
    }

    #[test]
    fn no_proxy_is_needed_by_nobody() {
        let proxies = Proxies::default();
        assert_eq!(proxies.proxy_for("server.example", 8132), None);
    }
}
