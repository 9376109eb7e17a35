//! The destination of a dial: a host and a port, checked where they enter the program.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::bounded::{Text, misleads};

/// Maximum length of a target's host name, in bytes (RFC 1035 §2.3.4 allows 253 visible ones).
pub const MAX_HOST_LEN: usize = 255;

/// A host (an IP address or a name, without brackets) and a TCP port.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "(String, u16)", into = "(String, u16)")]
pub struct Target {
    host: String,
    port: u16,
}

/// An address is not `host:port`; the text is the one that users know from Go's `net` package.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTarget {
    /// There is no colon before a port.
    #[error("address {0}: missing port in address")]
    MissingPort(Text<300>),
    /// A bare IPv6 address, or more than one colon outside brackets.
    #[error("address {0}: too many colons in address")]
    TooManyColons(Text<300>),
    /// A bracket opens and does not close, or closes without opening.
    #[error("address {0}: mismatched bracket in address")]
    MismatchedBracket(Text<300>),
    /// The port is not a number from 0 to 65535.
    #[error("address {0}: invalid port")]
    InvalidPort(Text<64>),
    /// The host has more than [`MAX_HOST_LEN`] bytes, or holds spaces or characters that are not
    /// shown as themselves.
    #[error("lookup {0}: no such host")]
    InvalidHost(Text<64>),
}

impl Target {
    /// The target with this host and port.
    ///
    /// # Errors
    /// When the host is longer than [`MAX_HOST_LEN`] or cannot be one.
    pub fn new(host: impl Into<String>, port: u16) -> Result<Self, InvalidTarget> {
        let host = host.into();
        let odd = |c: char| misleads(c) || c.is_whitespace();
        if host.len() > MAX_HOST_LEN || host.contains(odd) {
            return Err(InvalidTarget::InvalidHost(Text::truncated(host)));
        }
        Ok(Self { host, port })
    }

    /// The host as it was requested: an address or a name, without brackets.
    ///
    /// It may be empty, which means the node itself, as in Go.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The host when it is an IP address and needs no lookup.
    pub fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl TryFrom<(String, u16)> for Target {
    type Error = InvalidTarget;

    fn try_from((host, port): (String, u16)) -> Result<Self, InvalidTarget> {
        Self::new(host, port)
    }
}

impl From<Target> for (String, u16) {
    fn from(target: Target) -> Self {
        (target.host, target.port)
    }
}

impl FromStr for Target {
    type Err = InvalidTarget;

    /// Splits `host:port`, `[ipv6]:port` or `:port` by the rules of Go's `net.SplitHostPort`.
    fn from_str(address: &str) -> Result<Self, InvalidTarget> {
        let shown = || Text::truncated(address.to_owned());
        let (host, port) = split_host_port(address).map_err(|fault| match fault {
            SplitFault::MissingPort => InvalidTarget::MissingPort(shown()),
            SplitFault::TooManyColons => InvalidTarget::TooManyColons(shown()),
            SplitFault::MismatchedBracket => InvalidTarget::MismatchedBracket(shown()),
        })?;
        let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        match port.parse() {
            Ok(port) if digits => Self::new(host, port),
            _ => Err(InvalidTarget::InvalidPort(Text::truncated(port.to_owned()))),
        }
    }
}

/// Why an address could not be split into host and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SplitFault {
    /// There is no colon before a port.
    MissingPort,
    /// A bare IPv6 address, or more than one colon outside brackets.
    TooManyColons,
    /// A bracket opens and does not close, or closes without opening.
    MismatchedBracket,
}

/// Splits `host:port`, `[ipv6]:port` or `:port` by the rules of Go's `net.SplitHostPort`: the host
/// without brackets, and the text of the port, which may be anything.
///
/// # Errors
/// When the address has no port or its brackets or colons do not fit.
pub fn split_host_port(address: &str) -> Result<(&str, &str), SplitFault> {
    let (host, port) = if let Some(rest) = address.strip_prefix('[') {
        let (host, tail) = rest.split_once(']').ok_or(SplitFault::MismatchedBracket)?;
        (host, tail.strip_prefix(':').ok_or(SplitFault::MissingPort)?)
    } else {
        let (host, port) = address.rsplit_once(':').ok_or(SplitFault::MissingPort)?;
        if host.contains(':') {
            return Err(SplitFault::TooManyColons);
        }
        (host, port)
    };
    if host.contains(['[', ']']) || port.contains(['[', ']']) {
        return Err(SplitFault::MismatchedBracket);
    }
    Ok((host, port))
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_split_as_go_splits_it() {
        let ok = |address: &str, host: &str, port| {
            let target: Target = address.parse().unwrap();
            assert_eq!((target.host(), target.port()), (host, port), "{address}");
            assert_eq!(target.to_string(), address);
        };
        ok("10.0.0.9:10250", "10.0.0.9", 10250);
        ok("node-1:80", "node-1", 80);
        ok("[fd00::1]:443", "fd00::1", 443);
        ok("[fe80::1%eth0]:443", "fe80::1%eth0", 443);
        ok(":80", "", 80);
    }

    #[test]
    fn a_fault_has_the_text_that_go_gives_it() {
        let text = |address: &str| address.parse::<Target>().unwrap_err().to_string();
        assert_eq!(text("127.0.0.1"), "address 127.0.0.1: missing port in address");
        assert_eq!(text("::1"), "address ::1: too many colons in address");
        assert_eq!(text("[::1]"), "address [::1]: missing port in address");
        assert_eq!(text("[::1:80"), "address [::1:80: mismatched bracket in address");
        for address in ["a]b:80", "a[b:80", "host:8]0"] {
            let fault = format!("address {address}: mismatched bracket in address");
            assert_eq!(text(address), fault);
        }
        assert_eq!(text("host:70000"), "address 70000: invalid port");
        assert_eq!(text("host:"), "address : invalid port");
        assert_eq!(text("host:+1"), "address +1: invalid port");
        assert_eq!(text("a b:80"), "lookup a b: no such host");
        assert_eq!(text("a\u{202e}b\u{2028}:80"), "lookup a\\u{202e}b\\u{2028}: no such host");
        assert!(Target::new("x".repeat(256), 1).is_err());
        assert!(Target::new("x".repeat(255), 1).is_ok());
    }

    #[test]
    fn a_host_that_is_an_address_is_known_as_one() {
        let ip = |address: &str| address.parse::<Target>().unwrap().ip();
        assert_eq!(ip("10.0.0.9:1"), Some("10.0.0.9".parse().unwrap()));
        assert_eq!(ip("[fd00::1]:1"), Some("fd00::1".parse().unwrap()));
        assert_eq!(ip("node-1:1"), None);
        assert_eq!(format!("{:?}", Target::new("fd00::1", 1).unwrap()), "[fd00::1]:1");
    }

    #[test]
    fn a_fault_shows_a_bounded_part_of_the_address() {
        let long = format!("{}:x", "a".repeat(1000)).parse::<Target>().unwrap_err();
        assert_eq!(long.to_string(), "address x: invalid port");
        let long = "a".repeat(1000).parse::<Target>().unwrap_err();
        assert_eq!(long.to_string().len(), 300 + "address : missing port in address".len());
        let control = "a\u{7}b".parse::<Target>().unwrap_err();
        assert_eq!(control.to_string(), "address a\\u{7}b: missing port in address");
    }
}
