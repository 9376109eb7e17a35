//! `--agent-identifiers`: the targets that an agent announces it can reach, as a URL query.
//!
//! Accepts what Konnectivity accepts: Go's `url.ParseQuery` and known keys, with any values. A value
//! that no target can match, such as a variable that was not expanded, is left out with a warning,
//! because the agent can serve all other targets.

use std::net::IpAddr;

use culvert_process::{faults::Faults, go_flags::parse_bool};
use culvert_wire::identifiers::{Identifier, Identifiers, MAX_IDENTIFIERS};
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
        let flaw = match check_value(&key, &value) {
            Ok(flaw) => flaw,
            Err(fault) => {
                faults.add(FLAG, fault);
                continue;
            }
        };
        match (flaw, Identifier::new(&key, &value)) {
            (Some(Flaw::NeverMatches(reason)), _) => {
                faults.warn(FLAG, format!("{pair:?} is left out: {reason}"));
            }
            (_, Err(error)) => faults.warn(FLAG, format!("{pair:?} is left out: {error}")),
            (flaw, Ok(identifier)) => {
                if let Some(Flaw::Odd(reason)) = flaw {
                    faults.warn(FLAG, format!("{pair:?}: {reason}"));
                }
                identifiers.push(identifier);
            }
        }
    }
    if identifiers.len() > MAX_IDENTIFIERS {
        let left_out = identifiers.len() - MAX_IDENTIFIERS;
        faults.warn(
            FLAG,
            format!(
                "the last {left_out} are left out: an agent announces at most {MAX_IDENTIFIERS}"
            ),
        );
        identifiers.truncate(MAX_IDENTIFIERS);
    }
    Identifiers::try_from(identifiers).expect("no more than fit")
}

/// What is odd about a value that Konnectivity accepts.
enum Flaw {
    /// It is announced all the same.
    Odd(&'static str),
    /// No target can match it.
    NeverMatches(&'static str),
}

/// The flaw of a value, if it has one.
///
/// # Errors
/// When the key is unknown.
fn check_value(key: &str, value: &str) -> Result<Option<Flaw>, String> {
    let flaw = match (key, value.parse::<IpAddr>()) {
        ("ipv4", Ok(IpAddr::V4(_))) | ("ipv6", Ok(IpAddr::V6(_))) => None,
        // Common where a manifest has ipv4=$(HOST_IP) and the node has IPv6 only.
        ("ipv4" | "ipv6", Ok(_)) => Some(Flaw::Odd("it is an address of the other family")),
        // Targets are compared with the value whatever its key is.
        ("ipv4" | "ipv6", Err(_)) if is_host(value) => Some(Flaw::Odd("it is not an address")),
        ("ipv4" | "ipv6", Err(_)) => Some(Flaw::NeverMatches("it is not an address")),
        ("host", Ok(_)) => None,
        ("host", Err(_)) => {
            (!is_host(value)).then_some(Flaw::NeverMatches("it is not the name of a host"))
        }
        ("cidr", _) => (!is_network(value))
            .then_some(Flaw::NeverMatches("it is not a network such as 10.0.0.0/8")),
        // Announced, because the first value counts.
        ("default-route", _) => parse_bool(value)
            .is_err()
            .then_some(Flaw::Odd("it is neither true nor false and counts as false")),
        (key, _) => {
            return Err(format!("{key:?} is unknown; use ipv4, ipv6, host, cidr or default-route"));
        }
    };
    Ok(flaw)
}

/// Whether a target's host can be this text.
fn is_host(text: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || ".-_".contains(c);
    !text.is_empty() && text.chars().all(is_part)
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
        for text in ["ipv4=fd00::1", "ipv6=10.0.0.1", "ipv4=node-1.example"] {
            let (pairs, warnings) = parsed(text).unwrap();
            assert_eq!((pairs.len(), warnings), (1, 1), "{text}");
        }
    }

    #[test]
    fn identifiers_that_can_never_match_are_left_out_with_a_warning() {
        for text in [
            "ipv4",
            "ipv4=",
            "ipv4=$(HOST_IP)",
            "ipv4=${HOST_IP}",
            "ipv4=10.0.0.1,fd00::1",
            "ipv6=:::::",
            "ipv6=[fd00::1]",
            "host=",
            "host=node-1:10250",
            "cidr=10.0.0.0",
            "cidr=10.0.0.0/33",
            "cidr=10.0.0.0/+8",
            "cidr=fd00::/129",
        ] {
            let (pairs, warnings) = parsed(&format!("{text}&host=node-1")).unwrap();
            assert_eq!(pairs, [("host".to_owned(), "node-1".to_owned())], "{text}");
            assert_eq!(warnings, 1, "{text}");
        }
    }

    #[test]
    fn a_default_route_that_is_no_boolean_is_announced_and_counts_as_false() {
        let mut faults = Faults::new();
        let identifiers = parse("default-route=yes&default-route=true", &mut faults);
        assert_eq!(identifiers.len(), 2);
        assert!(!identifiers.is_default_route());
        assert_eq!(faults.finish().unwrap().len(), 1);
    }

    #[test]
    fn what_konnectivity_refuses_is_a_fault() {
        for text in [
            "uid=1",
            "zone=a",
            "IPv4=1.2.3.4",
            "=x",
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
        for (text, value) in
            [("host=a%2Db", "a-b"), ("host=%C3%A9", "é"), ("ipv6=fd00%3a%3A1", "fd00::1")]
        {
            assert_eq!(parsed(text).unwrap().0[0].1, value, "{text}");
        }
        assert_eq!(decoded("a+b%2Bc=d").unwrap(), "a b+c=d");
        for text in ["host=%", "host=a%2", "host=%%41", "host=%+41", "host=%é", "%zz=a"] {
            let fault = parsed(text).unwrap_err();
            assert!(fault.contains("is not part of a URL query"), "{text}: {fault}");
        }
    }

    #[test]
    fn identifiers_that_do_not_fit_a_hello_are_left_out_with_a_warning() {
        let value = "x".repeat(256);
        assert_eq!(parsed(&format!("host={value}")).unwrap(), (Vec::new(), 1));
        let hosts: Vec<_> = (0..66).map(|number| format!("host=node-{number}")).collect();
        assert_eq!(parsed(&hosts[..64].join("&")).unwrap().1, 0);
        let (pairs, warnings) = parsed(&hosts.join("&")).unwrap();
        assert_eq!((pairs.len(), warnings), (64, 1));
        assert_eq!(pairs[63].1, "node-63");
    }
}
