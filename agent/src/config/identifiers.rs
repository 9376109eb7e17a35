//! `--agent-identifiers`: the targets that an agent announces it can reach, as a URL query.
//!
//! Accepts what Go's `url.ParseQuery` accepts. Konnectivity checks the keys alone. An address that
//! is not one would never match a target, so values are checked here as well.

use std::net::IpAddr;

use culvert_process::{faults::Faults, go_flags::parse_bool};
use culvert_wire::identifiers::{Identifier, Identifiers};
use percent_encoding::percent_decode_str;

const FLAG: &str = "agent-identifiers";

/// The identifiers in `text`, in order. What is wrong with them goes to `faults`.
pub(super) fn parse(text: &str, faults: &mut Faults) -> Identifiers {
    let mut identifiers = Vec::new();
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (Some(key), Some(value), false) = (decoded(key), decoded(value), pair.contains(';'))
        else {
            faults.add(FLAG, format!("{pair:?} is not part of a URL query"));
            continue;
        };
        check_value(&key, &value, faults);
        match Identifier::new(&key, &value) {
            Ok(identifier) => identifiers.push(identifier),
            Err(error) => faults.add(FLAG, format!("{pair:?} {error}")),
        }
    }
    Identifiers::try_from(identifiers).unwrap_or_else(|error| {
        faults.add(FLAG, error.to_string());
        Identifiers::default()
    })
}

fn check_value(key: &str, value: &str, faults: &mut Faults) {
    let address = value.parse::<IpAddr>();
    match (key, address) {
        ("ipv4", Ok(IpAddr::V4(_))) | ("ipv6", Ok(IpAddr::V6(_))) => {}
        // Common where a manifest has ipv4=$(HOST_IP) and the node has IPv6 only. Konnectivity
        // accepts it.
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

/// Whether `text` is an address with a prefix length. Bits behind the prefix are allowed, as in Go.
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

/// The text with `+` and `%XX` decoded; `None` when an escape is incomplete or the result is not
/// UTF-8, both of which [`percent_decode_str`] alone would accept.
fn decoded(text: &str) -> Option<String> {
    let is_escape = |rest: &str| {
        rest.as_bytes().first_chunk::<2>().is_some_and(|two| two.iter().all(u8::is_ascii_hexdigit))
    };
    if !text.split('%').skip(1).all(is_escape) {
        return None;
    }
    let spaced = text.replace('+', " ");
    let decoded = percent_decode_str(&spaced).decode_utf8().ok()?;
    Some(decoded.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The identifiers as pairs and the number of warnings, or the faults.
    fn parsed(text: &str) -> Result<(Vec<(String, String)>, usize), String> {
        let mut faults = Faults::new();
        let identifiers = parse(text, &mut faults);
        let warnings = faults.finish().map_err(|errors| errors.to_string())?;
        let pair = |identifier: &Identifier| {
            (identifier.key.as_str().to_owned(), identifier.value.as_str().to_owned())
        };
        Ok((identifiers.iter().map(pair).collect(), warnings.len()))
    }

    #[test]
    fn identifiers_are_decoded_and_in_order() {
        let (pairs, warnings) = parsed(
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
        assert_eq!(parsed("").unwrap().0, []);
    }

    #[test]
    fn an_address_of_the_other_family_causes_a_warning() {
        assert_eq!(parsed("ipv4=fd00::1").unwrap().1, 1);
        assert_eq!(parsed("ipv6=10.0.0.1").unwrap().1, 1);
    }

    #[test]
    fn identifiers_that_can_never_match_are_faults() {
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
            let refused = parsed(text).unwrap_err();
            assert!(refused.contains("--agent-identifiers: "), "{text}: {refused}");
        }
    }

    #[test]
    fn escapes_are_decoded_as_in_a_url_query() {
        for (text, value) in [
            ("host=a+b%2Bc", "a b+c"),
            ("host=%C3%A9", "é"),
            ("host=%c3%A9%20", "é "),
            ("host=a=b", "a=b"),
        ] {
            assert_eq!(parsed(text).unwrap().0, [("host".to_owned(), value.to_owned())], "{text}");
        }
        for text in ["host=%", "host=a%2", "host=%%41", "host=%+41", "host=%é", "%zz=a"] {
            let fault = parsed(text).unwrap_err();
            assert!(fault.contains("is not part of a URL query"), "{text}: {fault}");
        }
    }

    #[test]
    fn identifiers_that_do_not_fit_a_hello_are_faults() {
        let value = "x".repeat(256);
        assert!(parsed(&format!("host={value}")).unwrap_err().contains("--agent-identifiers: "));
        let fits: Vec<_> = (0..64).map(|number| format!("host=node-{number}")).collect();
        assert_eq!(parsed(&fits.join("&")).unwrap().0.len(), 64);
        let too_many = format!("{}&host=one-more", fits.join("&"));
        assert!(parsed(&too_many).unwrap_err().contains("--agent-identifiers: "));
    }
}
