//! What an agent announces about itself, so that a strategy can choose it by target.

use serde::{Deserialize, Serialize};

use crate::bounded::{List, Text};

/// Maximum number of identifiers that one agent may announce.
pub const MAX_IDENTIFIERS: usize = 64;

/// One announced fact: a key such as `ipv4` and its value.
///
/// Keys known today are `ipv4`, `ipv6`, `host`, `cidr` and `default-route`; a server ignores those
/// it does not know, so that newer agents can announce more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identifier {
    /// The kind of fact.
    pub key: Text<32>,
    /// The fact itself, for example an address.
    pub value: Text<255>,
}

/// Everything one agent announces.
pub type Identifiers = List<Identifier, MAX_IDENTIFIERS>;

impl Identifiers {
    /// The identifiers that name a target host exactly: `ipv4`, `ipv6` and `host`.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        self.iter()
            .filter(|identifier| matches!(identifier.key.as_str(), "ipv4" | "ipv6" | "host"))
            .map(|identifier| identifier.value.as_str())
    }

    /// Whether the agent offers to reach targets that no agent has announced. The first
    /// `default-route` counts.
    pub fn is_default_route(&self) -> bool {
        let route = self.iter().find(|identifier| identifier.key.as_str() == "default-route");
        route.and_then(|identifier| parse_go_bool(&identifier.value)).unwrap_or(false)
    }
}

/// The boolean that Go's `strconv.ParseBool` reads from `text`; `None` if it reads none.
pub fn parse_go_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

impl Identifier {
    /// The fact with this key and value.
    ///
    /// # Errors
    /// When either is longer than its limit.
    pub fn new(key: &str, value: &str) -> Result<Self, crate::bounded::TooLong> {
        Ok(Self { key: key.try_into()?, value: value.try_into()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_addresses_and_names_and_nothing_else() {
        let announced = [
            ("ipv4", "10.0.0.1"),
            ("cidr", "10.0.0.0/8"),
            ("host", "node-1"),
            ("ipv6", "fd00::1"),
            ("later-addition", "x"),
            ("default-route", "true"),
        ];
        let identifiers: Vec<_> =
            announced.iter().map(|(key, value)| Identifier::new(key, value).unwrap()).collect();
        let identifiers = Identifiers::try_from(identifiers).unwrap();
        assert_eq!(identifiers.hosts().collect::<Vec<_>>(), ["10.0.0.1", "node-1", "fd00::1"]);
        assert!(identifiers.is_default_route());
    }

    #[test]
    fn a_default_route_is_what_go_takes_for_true() {
        let is_default_route = |values: &[&str]| {
            let identifiers: Vec<_> = values
                .iter()
                .map(|value| Identifier::new("default-route", value).unwrap())
                .collect();
            Identifiers::try_from(identifiers).unwrap().is_default_route()
        };
        for value in ["1", "t", "T", "true", "TRUE", "True"] {
            assert!(is_default_route(&[value]), "{value}");
        }
        for value in ["0", "f", "F", "false", "FALSE", "False", "yes", "tRUE", ""] {
            assert!(!is_default_route(&[value]), "{value}");
        }
        assert!(!is_default_route(&[]));
        assert!(!is_default_route(&["false", "true"]), "the first one counts");
    }

    #[test]
    fn booleans_are_read_as_go_reads_them() {
        assert_eq!(["T", "1", "F", "0"].map(parse_go_bool), [true, true, false, false].map(Some));
        assert_eq!(["yes", "", "tRUE"].map(parse_go_bool), [None; 3]);
    }

    #[test]
    fn keys_and_values_have_their_limits() {
        assert!(Identifier::new(&"k".repeat(32), &"v".repeat(255)).is_ok());
        assert!(Identifier::new(&"k".repeat(33), "v").is_err());
        assert!(Identifier::new("k", &"v".repeat(256)).is_err());
    }
}
