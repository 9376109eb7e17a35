//! Which addresses and ports the agent may connect to.
//!
//! A decision is made on the address that is about to be connected to, after the lookup of its
//! name: a name can change between two lookups, and two resolvers can disagree.

mod address_rule;
mod builtin;
mod file;
mod spellings;

use std::{fmt, net::SocketAddr};

pub use self::address_rule::{AddressRule, InvalidRule};
use self::{builtin::Builtin, spellings::Spellings};

/// The rules of an agent's egress. Without any, the built-in denials alone apply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Addresses that the built-in denials do not apply to.
    pub exempt: Vec<AddressRule>,
    /// Addresses that are denied.
    pub deny: Vec<AddressRule>,
    /// The only addresses that are allowed; all are if there is no rule.
    pub allow: Vec<AddressRule>,
}

/// What the policy says of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::egress) enum Decision {
    /// The agent may connect to it.
    Allowed,
    /// The agent may not, because of this rule.
    Denied(Rule),
}

/// Why an address is denied. `Display` is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// A built-in denial.
    Builtin(Builtin),
    /// A rule of the operator's deny list.
    Deny(AddressRule),
    /// There is an allow list, and the address is not in it.
    NotAllowed,
}

impl Policy {
    /// Whether it has no rule.
    pub(crate) fn is_empty(&self) -> bool {
        self.exempt.is_empty() && self.deny.is_empty() && self.allow.is_empty()
    }

    /// Decides on one address and port: the built-in denials come first, then the deny list, then
    /// the allow list.
    ///
    /// A denial applies to every address that the given one leads to, such as the IPv4 address in
    /// one of NAT64. The exempt list and the allow list apply to the address itself alone.
    pub(in crate::egress) fn decide(&self, address: SocketAddr) -> Decision {
        let (spellings, port) = (Spellings::of(address.ip()), address.port());
        let contains =
            |rules: &[AddressRule]| rules.iter().any(|rule| rule.matches(spellings.address, port));
        if !contains(&self.exempt)
            && let Some(denial) = spellings.iter().find_map(Builtin::of)
        {
            return Decision::Denied(Rule::Builtin(denial));
        }
        let denies = |rule: &&AddressRule| spellings.iter().any(|ip| rule.matches(ip, port));
        if let Some(rule) = self.deny.iter().find(denies) {
            return Decision::Denied(Rule::Deny(*rule));
        }
        if !self.allow.is_empty() && !contains(&self.allow) {
            return Decision::Denied(Rule::NotAllowed);
        }
        Decision::Allowed
    }

    /// Adds the rules of `other`.
    fn extend(&mut self, other: Self) {
        self.exempt.extend(other.exempt);
        self.deny.extend(other.deny);
        self.allow.extend(other.allow);
    }
}

impl Rule {
    /// Every label.
    pub(crate) fn labels() -> impl Iterator<Item = &'static str> {
        Builtin::ALL.map(Builtin::label).into_iter().chain(["deny", "not_allowed"])
    }

    /// The rule's value in metrics.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Builtin(builtin) => builtin.label(),
            Self::Deny(_) => "deny",
            Self::NotAllowed => "not_allowed",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Builtin(builtin) => f.write_str(builtin.name()),
            Self::Deny(rule) => write!(f, "deny {rule}"),
            Self::NotAllowed => f.write_str("not in the allow list"),
        }
    }
}

#[cfg(test)]
mod tests;
