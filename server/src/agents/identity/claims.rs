//! What an agent says about itself, as far as its identity may say so.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use culvert_wire::{
    AgentId,
    identifiers::{Identifier, Identifiers},
};

use super::{Identity, nodes::Addresses};
use crate::config::{AgentIdentity, ClaimRules};

/// Why an agent may not have what it claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ClaimFault {
    /// The identity does not prove the id.
    #[error("the agent's id is not what it has proved to be: see --agent-identity")]
    IdNotProven,
    /// The identity does not prove an identifier.
    #[error("an identifier is not what the agent has proved to be")]
    IdentifierNotProven,
    /// An agent of another identity has the id.
    #[error("an agent of another identity has this id")]
    IdHeld,
    /// An agent of another identity has an identifier.
    #[error("an agent of another identity has this identifier")]
    IdentifierHeld,
}

impl ClaimFault {
    /// Every fault as a metric label.
    pub(crate) const LABELS: [&str; 4] =
        ["id_not_proven", "identifier_not_proven", "id_held", "identifier_held"];

    /// The fault as a metric label.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::IdNotProven => "id_not_proven",
            Self::IdentifierNotProven => "identifier_not_proven",
            Self::IdHeld => "id_held",
            Self::IdentifierHeld => "identifier_held",
        }
    }
}

/// The id and the identifiers of an agent. Only an identity gives them.
#[derive(Clone, Debug)]
pub(crate) struct Claims {
    /// Who the agent is.
    pub(crate) identity: Arc<Identity>,
    /// Name of the agent.
    pub(crate) agent_id: AgentId,
    /// Whether the rule lets it have no other id than those that it has proved to be.
    pub(crate) is_id_proven: bool,
    /// Identifiers that the rule lets it have.
    pub(crate) identifiers: Identifiers,
    /// Identifiers that the rule does not let it have.
    pub(crate) not_proven: Vec<Identifier>,
}

impl Claims {
    /// What an agent of this identity may say about itself by these rules. `addresses` are those of
    /// its node.
    ///
    /// # Errors
    /// When it may not have the id.
    pub(crate) fn new(
        identity: Arc<Identity>,
        rules: &ClaimRules,
        addresses: Option<&Addresses>,
        agent_id: AgentId,
        announced: &Identifiers,
    ) -> Result<Self, ClaimFault> {
        let names = identity.names(rules.identity);
        let (identifiers, not_proven) = match &names {
            None => (announced.clone(), Vec::new()),
            Some(names) => {
                if !names.contains(&agent_id.as_str()) {
                    return Err(ClaimFault::IdNotProven);
                }
                let is_proven = |identifier: &Identifier| {
                    let value = identifier.value.as_str();
                    match identifier.key.as_str() {
                        "host" => names.contains(&value),
                        // An address of the other family, or a name, which a dial would find like
                        // a host name, is proven by nothing.
                        "ipv4" => value.parse().is_ok_and(|address: Ipv4Addr| {
                            identity.may_have(address.into(), rules.identity, addresses)
                        }),
                        "ipv6" => value.parse().is_ok_and(|address: Ipv6Addr| {
                            identity.may_have(address.into(), rules.identity, addresses)
                        }),
                        "default-route" => rules.allow_default_route(&agent_id),
                        "cidr" => value
                            .parse()
                            .is_ok_and(|network| rules.allow_network(&agent_id, network)),
                        _ => true,
                    }
                };
                let (proven, not_proven): (Vec<_>, Vec<_>) =
                    announced.iter().cloned().partition(is_proven);
                (proven.try_into().expect("no more than were announced"), not_proven)
            }
        };
        let is_id_proven = names.is_some();
        Ok(Self { identity, agent_id, is_id_proven, identifiers, not_proven })
    }
}

impl Identity {
    /// Whether an agent of this identity may have the address. A certificate that names addresses
    /// says which; otherwise, by the rule of the node, the node's addresses do.
    fn may_have(&self, address: IpAddr, rule: AgentIdentity, of_node: Option<&Addresses>) -> bool {
        let named = self.certificate.as_ref().map(|certificate| &certificate.addresses);
        match named.filter(|addresses| !addresses.is_empty()) {
            Some(named) => named.contains(&address),
            None if rule == AgentIdentity::Node => {
                of_node.is_some_and(|addresses| addresses.contains(&address))
            }
            None => true,
        }
    }

    /// The addresses among the identifiers that a lookup of the node decides on.
    pub(crate) fn undecided_addresses(&self, announced: &Identifiers) -> Vec<IpAddr> {
        let named = self.certificate.as_ref().map(|certificate| &certificate.addresses);
        if named.is_some_and(|addresses| !addresses.is_empty()) {
            return Vec::new();
        }
        let is_address = |key: &str| matches!(key, "ipv4" | "ipv6");
        let addresses = announced.iter().filter(|identifier| is_address(identifier.key.as_str()));
        addresses.filter_map(|identifier| identifier.value.as_str().parse().ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Certificate, ServiceAccount},
        *,
    };
    use crate::testing::certificate;

    const ANNOUNCED: [(&str, &str); 10] = [
        ("host", "node-1"),
        ("host", "node-1.example"),
        ("host", "node-2"),
        ("ipv4", "10.0.0.1"),
        ("ipv6", "fd00::2"),
        ("default-route", "true"),
        ("cidr", "10.0.0.0/8"),
        // Names, which a dial would find, and an address of the other family.
        ("ipv4", "node-3"),
        ("ipv6", "node-3"),
        ("ipv4", "fd00::3"),
    ];

    fn of_certificate(name: &str, names: &[&str]) -> Identity {
        let certificate = Certificate::of(&certificate(name, names));
        Identity { certificate, ..Identity::default() }
    }

    fn on_node(node: Option<&str>) -> Identity {
        let node = node.map(str::to_owned);
        let account = Some(ServiceAccount { node, ..ServiceAccount::default() });
        Identity { account, ..Identity::default() }
    }

    /// The values that an agent of this name may have.
    fn granted(
        identity: Identity,
        rule: AgentIdentity,
        name: &str,
    ) -> Result<Vec<String>, ClaimFault> {
        let allowed = ["*=default-route", "*=10.0.0.0/7"].map(|entry| entry.parse().unwrap());
        let node: Addresses = ["10.0.0.1", "fd00::2"].map(|text| text.parse().unwrap()).into();
        granted_by(identity, &ClaimRules { identity: rule, allowed: allowed.into() }, &node, name)
    }

    fn granted_by(
        identity: Identity,
        rules: &ClaimRules,
        node: &Addresses,
        name: &str,
    ) -> Result<Vec<String>, ClaimFault> {
        let announced: Vec<_> =
            ANNOUNCED.iter().map(|(key, value)| Identifier::new(key, value).unwrap()).collect();
        let announced = Identifiers::try_from(announced).unwrap();
        let (identity, node) = (Arc::new(identity), Some(node));
        let claims = Claims::new(identity, rules, node, name.parse().unwrap(), &announced)?;
        assert_eq!(claims.identifiers.len() + claims.not_proven.len(), ANNOUNCED.len());
        Ok(claims.identifiers.iter().map(|identifier| identifier.value.to_string()).collect())
    }

    #[test]
    fn by_default_an_agent_may_have_any_id_and_identifiers() {
        let all = ANNOUNCED.map(|(_, value)| value.to_owned());
        for identity in [Identity::default(), of_certificate("agent", &["10.9.9.9"])] {
            assert_eq!(granted(identity, AgentIdentity::Any, "node-9").unwrap(), all);
        }
    }

    #[test]
    fn by_its_node_an_agent_has_the_name_of_the_node_alone() {
        let rule = AgentIdentity::Node;
        let expected = ["node-1", "10.0.0.1", "fd00::2", "true", "10.0.0.0/8"];
        for identity in [
            on_node(Some("node-1")),
            of_certificate("system:node:node-1", &[]),
            of_certificate("node-1", &["node-2"]),
        ] {
            assert_eq!(granted(identity.clone(), rule, "node-1").unwrap(), expected);
            assert_eq!(granted(identity, rule, "node-2"), Err(ClaimFault::IdNotProven));
        }
        for identity in [on_node(None), Identity::default()] {
            assert_eq!(granted(identity, rule, "node-1"), Err(ClaimFault::IdNotProven));
        }
    }

    #[test]
    fn by_its_node_an_agent_has_the_addresses_of_the_node_and_what_the_list_allows() {
        let granted = |allowed: &[&str], addresses: &[&str]| {
            let allowed = allowed.iter().map(|entry| entry.parse().unwrap()).collect();
            let rules = ClaimRules { identity: AgentIdentity::Node, allowed };
            let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
            granted_by(on_node(Some("node-1")), &rules, &addresses, "node-1").unwrap()
        };
        assert_eq!(granted(&[], &[]), ["node-1"]);
        assert_eq!(granted(&[], &["10.0.0.1", "10.0.0.9"]), ["node-1", "10.0.0.1"]);
        assert_eq!(granted(&["node-1=default-route"], &[]), ["node-1", "true"]);
        assert_eq!(granted(&["node-2=default-route", "*=10.0.0.0/9"], &[]), ["node-1"]);
        assert_eq!(granted(&["node-1=10.0.0.0/8"], &[]), ["node-1", "10.0.0.0/8"]);
        assert_eq!(granted(&["*=fd00::/8", "*=10.0.0.0/7"], &[]), ["node-1", "10.0.0.0/8"]);
    }

    #[test]
    fn by_its_certificate_an_agent_has_the_names_of_the_certificate() {
        let rule = AgentIdentity::Certificate;
        let identity = of_certificate("agent-1", &["node-1", "node-1.example", "10.0.0.1"]);
        let expected = ["node-1", "node-1.example", "10.0.0.1", "true", "10.0.0.0/8"];
        for name in ["agent-1", "node-1"] {
            assert_eq!(granted(identity.clone(), rule, name).unwrap(), expected);
        }
        assert_eq!(granted(identity, rule, "10.0.0.1"), Err(ClaimFault::IdNotProven));
        assert_eq!(granted(on_node(Some("node-1")), rule, "node-1"), Err(ClaimFault::IdNotProven));
    }
}
