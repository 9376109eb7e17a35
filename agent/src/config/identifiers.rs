//! `--agent-identifiers`: what an agent announces it can reach, as a URL query.
//!
//! Reads what Go's `url.ParseQuery` reads. Konnectivity checks the keys alone; a value that is no address
//! would match no target ever, so values are checked here as well.

use std::net::IpAddr;

use culvert_process::{faults::Faults, go_flags::parse_bool};

const FLAG: &str = "agent-identifiers";

/// The pairs of `text`, decoded, in order; what is wrong with them goes to `faults`.
pub(super) fn check(text: &str, faults: &mut Faults) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match (decoded(key), decoded(value)) {
            (Some(key), Some(value)) if !pair.contains(';') => {
                check_value(&key, &value, faults);
                pairs.push((key, value));
            }
            _ => faults.add(FLAG, format!("{pair:?} is not part of a URL query")),
        }
    }
    pairs
}

fn check_value(key: &str, value: &str, faults: &mut Faults) {
    let address = value.parse::<IpAddr>();
    match (key, address) {
        ("ipv4", Ok(IpAddr::V4(_))) | ("ipv6", Ok(IpAddr::V6(_))) => {}
        // Common where a manifest says ipv4=$(HOST_IP) and the node has IPv6 only; Konnectivity takes it.
        ("ipv4" | "ipv6", Ok(_)) => {
            faults.warn(FLAG, format!("{key}={value} is an address of the other family"));
        }
        ("ipv4" | "ipv6", Err(_)) => {
            faults.add(FLAG, format!("{key}={value} is not an address"));
        }
        ("cidr", _) => {
            let reason = format!("cidr={value} is not a network such as 10.0.0.0/8");
            faults.require(is_network(value), FLAG, reason);
        }
        ("host", _) => faults.require(!value.is_empty(), FLAG, "host= names no host"),
        ("default-route", _) => {
            let reason = format!("default-route={value} is neither true nor false");
            faults.require(parse_bool(value).is_ok(), FLAG, reason);
        }
        (key, _) => {
            let reason = format!("{key:?} is unknown; use ipv4, ipv6, host, cidr or default-route");
            faults.add(FLAG, reason);
        }
    }
}

/// Bits behind the mask are allowed, as in Go.
fn is_network(text: &str) -> bool {
    let Some((address, length)) = text.split_once('/') else {
        return false;
    };
    let most = match address.parse() {
        Ok(IpAddr::V4(_)) => 32,
        Ok(IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    let digits = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
    digits && length.parse::<u8>().is_ok_and(|length| length <= most)
}

/// `+` and `%XX` undone; `None` when that cannot be, or gives no UTF-8.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
                digit(rest.next()?)? << 4 | digit(rest.next()?)?
            }
            plain => plain,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<(Vec<(String, String)>, usize), String> {
        let mut faults = Faults::new();
        let pairs = check(text, &mut faults);
        let warnings = faults.finish().map_err(|errors| errors.to_string())?;
        Ok((pairs, warnings.len()))
    }

    #[test]
    fn pairs_come_decoded_and_in_order() {
        let (pairs, warnings) = checked(
            "host=localhost&host=node1.example.com&cidr=127.0.0.1/16&ipv4=1.2.3.4&&\
             ipv6=fd00%3A%3a1&cidr=fd00::%2F8&default%2droute=true",
        )
        .unwrap();
        let pairs: Vec<_> = pairs.iter().map(|(key, value)| (&key[..], &value[..])).collect();
        let expected = [
            ("host", "localhost"),
            ("host", "node1.example.com"),
            ("cidr", "127.0.0.1/16"),
            ("ipv4", "1.2.3.4"),
            ("ipv6", "fd00::1"),
            ("cidr", "fd00::/8"),
            ("default-route", "true"),
        ];
        assert_eq!(pairs, expected);
        assert_eq!(warnings, 0);
        assert_eq!(checked("").unwrap().0, []);
    }

    #[test]
    fn an_address_of_the_other_family_is_only_warned_of() {
        assert_eq!(checked("ipv4=fd00::1").unwrap().1, 1);
        assert_eq!(checked("ipv6=10.0.0.1").unwrap().1, 1);
    }

    #[test]
    fn what_could_never_match_is_refused() {
        for text in [
            "uid=1",
            "IPv4=1.2.3.4",
            "=x",
            "ipv4",
            "ipv4=",
            "ipv4=1.2.3",
            "ipv4=$(HOST_IP)",
            "ipv6=:::::",
            "host=",
            "cidr=10.0.0.0",
            "cidr=10.0.0.0/33",
            "cidr=10.0.0.0/+8",
            "cidr=fd00::/129",
            "default-route=maybe",
            "host=a%2",
            "host=a%zz",
            "host=%ff",
            "host=a;host=b",
        ] {
            let refused = checked(text).unwrap_err();
            assert!(refused.contains("--agent-identifiers: "), "{text}: {refused}");
        }
    }
}
