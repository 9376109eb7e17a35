//! The proxy that the environment names, and the servers that are reached without it.
//!
//! The rules are those of Go (`golang.org/x/net/http/httpproxy`, for https), which other agents of
//! a node follow: HTTPS_PROXY or https_proxy is the proxy, NO_PROXY or no_proxy lists what is
//! reached without it. One thing differs: a proxy that cannot be used is an error, and is not
//! ignored.

use std::{net::IpAddr, path::PathBuf, sync::Arc};

use culvert_wire::target::split_host_port;
use ipnet::IpNet;
use rustls::RootCertStore;

use super::proxy::{InvalidProxy, Proxy};
use crate::tls::Current;

/// The proxy of a process, and the servers that it is not used for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxies {
    proxy: Option<Arc<Proxy>>,
    exempt: Vec<Exempt>,
}

/// A variable of the environment names a proxy that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable}: {fault}")]
pub struct InvalidVariable {
    /// The variable.
    pub variable: &'static str,
    /// What is wrong with it.
    pub fault: InvalidProxy,
    exempt: Vec<Exempt>,
}

impl InvalidVariable {
    /// Whether the proxy would be used for a server.
    pub fn applies_to(&self, host: &str, port: u16) -> bool {
        !is_exempt(&self.exempt, host, port)
    }
}

impl Proxies {
    /// Reads the environment through `variable`. Empty variables count as absent.
    ///
    /// SSL_CERT_FILE names a PEM file with the CA certificates for a proxy that is reached over
    /// TLS.
    ///
    /// # Errors
    /// When the environment names a proxy that cannot be used.
    pub fn from_env(
        variable: impl Fn(&'static str) -> Option<String>,
    ) -> Result<Self, InvalidVariable> {
        let Some(Named { variable: name, url, exempt }) = Named::in_env(&variable) else {
            return Ok(Self::default());
        };
        let mut proxy = match url.parse::<Proxy>() {
            Ok(proxy) => proxy,
            Err(fault) => return Err(InvalidVariable { variable: name, fault, exempt }),
        };
        if let Some((_, file)) = first_of(&["SSL_CERT_FILE"], &variable) {
            proxy = proxy.with_authorities(PathBuf::from(file));
        }
        Ok(Self { proxy: Some(Arc::new(proxy)), exempt })
    }

    /// The PEM file with the CA certificates for the proxy, if it is reached over TLS and there is
    /// one.
    pub fn authorities(&self) -> Option<PathBuf> {
        self.proxy.as_ref()?.authorities()
    }

    /// Uses these CA certificates for the proxy, which the caller keeps up to date, instead of
    /// reading their file for each handshake.
    #[must_use]
    pub fn with_kept_authorities(self, kept: Current<RootCertStore>) -> Self {
        let with = |proxy: Arc<Proxy>| Arc::new((*proxy).clone().with_kept_authorities(kept));
        Self { proxy: self.proxy.map(with), ..self }
    }

    /// The proxy for a server; `None` when the server is reached directly, as this host always is.
    pub fn proxy_for(&self, host: &str, port: u16) -> Option<Arc<Proxy>> {
        self.proxy.clone().filter(|_| !is_exempt(&self.exempt, host, port))
    }
}

/// What the environment says of proxies.
struct Named {
    variable: &'static str,
    url: String,
    exempt: Vec<Exempt>,
}

impl Named {
    fn in_env(variable: &impl Fn(&'static str) -> Option<String>) -> Option<Self> {
        let (name, url) = first_of(&["HTTPS_PROXY", "https_proxy"], variable)?;
        let exempt = first_of(&["NO_PROXY", "no_proxy"], variable);
        let exempt = exempt.map_or_else(String::new, |(_, list)| list);
        let exempt = exempt.split(',').filter_map(Exempt::parse).collect();
        Some(Self { variable: name, url, exempt })
    }
}

/// The first of these variables that is not empty, and its value.
fn first_of(
    names: &[&'static str],
    variable: &impl Fn(&'static str) -> Option<String>,
) -> Option<(&'static str, String)> {
    let mut set = names.iter().map(|name| (*name, variable(name).unwrap_or_default()));
    set.find(|(_, value)| !value.is_empty())
}

/// The proxy that the environment names for a server, of any scheme and with its credentials, for a
/// caller that has a client of its own; `None` when the server is reached directly.
pub fn proxy_url(
    variable: impl Fn(&'static str) -> Option<String>,
    host: &str,
    port: u16,
) -> Option<String> {
    let Named { url, exempt, .. } = Named::in_env(&variable)?;
    (!is_exempt(&exempt, host, port)).then_some(url)
}

/// Whether a server is reached directly.
fn is_exempt(exempt: &[Exempt], host: &str, port: u16) -> bool {
    let host = host.trim().to_ascii_lowercase();
    let ip = host.parse::<IpAddr>().ok().map(|ip| ip.to_canonical());
    let is_local = host == "localhost" || ip.is_some_and(|ip| ip.is_loopback());
    is_local || exempt.iter().any(|exempt| exempt.covers(&host, ip, port))
}

/// One entry of NO_PROXY. Ports are text, so that one that is not a number matches none.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Exempt {
    All,
    Network(IpNet),
    Address {
        address: IpAddr,
        port: Option<String>,
    },
    Name {
        /// The name with a leading dot.
        suffix: String,
        /// Whether the entry covers the name itself, and not only names below it.
        itself: bool,
        port: Option<String>,
    },
}

impl Exempt {
    /// Reads an entry; `None` if it has no host, which covers nothing.
    fn parse(entry: &str) -> Option<Self> {
        let entry = entry.trim().to_ascii_lowercase();
        if entry == "*" {
            return Some(Self::All);
        }
        if let Ok(network) = entry.parse() {
            return Some(Self::Network(network));
        }
        let (host, port) = match split_host_port(&entry) {
            Ok((host, port)) => (host, Some(port).filter(|port| !port.is_empty())),
            Err(_) => (entry.as_str(), None),
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

    /// Whether the entry covers this host and port. Names never cover addresses.
    fn covers(&self, host: &str, ip: Option<IpAddr>, port: u16) -> bool {
        let is_port = |wanted: &Option<String>| {
            wanted.as_ref().is_none_or(|wanted| *wanted == port.to_string())
        };
        match (self, ip) {
            (Self::All, _) => true,
            (Self::Network(network), Some(ip)) => network.contains(&ip),
            (Self::Address { address, port }, Some(ip)) => *address == ip && is_port(port),
            (Self::Name { suffix, itself, port }, None) => {
                let is_name = host.ends_with(suffix) || *itself && host == &suffix[1..];
                is_name && is_port(port)
            }
            _ => false,
        }
    }
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

    /// The proxy of a server that NO_PROXY does not name.
    fn found(variables: &[(&str, &str)]) -> Option<String> {
        let proxies = proxies(variables).unwrap();
        proxies.proxy_for("server.example", 8132).map(|proxy| proxy.to_string())
    }

    #[test]
    fn upper_case_variables_come_first_and_only_those_for_https_count() {
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
    fn the_fault_of_a_proxy_names_its_variable() {
        let fault = proxies(&[("https_proxy", "socks5://user:secret@proxy:1080")]).unwrap_err();
        assert_eq!(
            fault.to_string(),
            "https_proxy: a proxy of the scheme socks5 is not supported; \
             use an http:// or https:// one"
        );
    }

    #[test]
    fn a_proxy_that_cannot_be_used_applies_to_no_exempt_server() {
        let socks = ("HTTPS_PROXY", "socks5://proxy:1080");
        let fault = proxies(&[socks, ("NO_PROXY", "10.0.0.0/8,.example.com")]).unwrap_err();
        for host in ["10.1.2.3", "a.example.com", "localhost", "127.0.0.1", "::1"] {
            assert!(!fault.applies_to(host, 8132), "{host}");
        }
        for host in ["192.0.2.1", "example.org"] {
            assert!(fault.applies_to(host, 8132), "{host}");
        }
        let fault = proxies(&[socks, ("NO_PROXY", "*")]).unwrap_err();
        assert!(!fault.applies_to("192.0.2.1", 8132));
    }

    /// The cases of `TestUseProxy`, `TestAllNoProxy` and `TestInvalidNoProxy` in
    /// `golang.org/x/net/http/httpproxy/proxy_test.go`.
    #[test]
    fn the_test_cases_of_go_hold() {
        let list = "foobar.com, .barbaz.net, *.wildcard.io, 192.168.1.1, 192.168.1.2:81, \
                    192.168.1.3:80, 10.0.0.0/30, 2001:db8::52:0:1, [2001:db8::52:0:2]:443, \
                    [2001:db8::52:0:3]:80, 2002:db8:a::45/64";
        let proxied_with = |list: &str, host: &str| {
            let proxies = proxies(&[("HTTPS_PROXY", "proxy:1"), ("NO_PROXY", list)]).unwrap();
            proxies.proxy_for(host, 80).is_some()
        };
        let loopback = ["localhost", "127.0.0.1", "127.0.0.2", "::1"];
        let covered = [
            "192.168.1.1",
            "192.168.1.3",
            "10.0.0.2",
            "2001:db8::52:0:1",
            "2001:db8::52:0:3",
            "2002:db8:a::123",
            "www.barbaz.net",
            "foobar.com",
            "www.foobar.com",
            "nested.wildcard.io",
        ];
        for host in loopback.into_iter().chain(covered) {
            assert!(!proxied_with(list, host), "{host}");
        }
        for host in [
            "::2",
            "192.168.1.2",
            "192.168.1.4",
            "2001:db8::52:0:2",
            "fe80::424b:c8be:1643:a1b6",
            "barbaz.net",
            "foofoobar.com",
            "baz.com",
            "localhost.net",
            "local.localhost",
            "barbarbaz.net",
            "wildcard.io",
            "awildcard.io",
        ] {
            assert!(proxied_with(list, host), "{host}");
            assert!(!proxied_with("*", host), "{host}");
        }
        assert!(proxied_with(":1", "example.com"));
    }

    #[test]
    fn no_proxy_covers_what_it_covers_in_go() {
        // NO_PROXY, servers that are reached directly, and servers that are not.
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
    fn without_a_proxy_servers_are_reached_directly() {
        let proxies = Proxies::default();
        assert_eq!(proxies.proxy_for("server.example", 8132), None);
    }
}
