//! Who an agent is, as far as it has proved it.
//!
//! An agent proves itself with a certificate, with the token of a service account, or with both.
//! Its id and its identifiers are claims, and an identity decides which of them count: by the
//! server's rule ([`AgentIdentity`]), and by which other identity may have them already
//! ([`Identity::may_replace`]).

mod certificate;
mod claims;
pub(crate) mod nodes;

use std::{fmt, time::Duration};

use culvert_process::kubernetes::Timestamp;
use tokio::time::Instant;

pub(crate) use self::{
    certificate::Certificate,
    claims::{ClaimFault, Claims},
};
use crate::config::AgentIdentity;

/// Prefix of the user names of kubelets, in certificates.
const NODE_PREFIX: &str = "system:node:";

/// Who an agent is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The certificate that the handshake verified; `None` where agents need none.
    pub(crate) certificate: Option<Certificate>,
    /// The service account whose token kube-apiserver accepted; `None` where agents need none.
    pub(crate) account: Option<ServiceAccount>,
}

/// The service account of an accepted token, and the pod that the token is bound to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ServiceAccount {
    /// Namespace.
    pub(crate) namespace: String,
    /// Name.
    pub(crate) name: String,
    /// Node of the pod; `None` for a token that is bound to none, and with a kube-apiserver that
    /// does not report it.
    pub(crate) node: Option<String>,
    /// Name of the pod.
    pub(crate) pod: Option<String>,
    /// UID of the pod.
    pub(crate) pod_uid: Option<String>,
    /// When the token expires; `None` for one that does not.
    pub(crate) expiry: Option<Timestamp>,
}

/// When a proof expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Expiry {
    /// By the clock of this process, which does not jump.
    pub(crate) at: Instant,
    /// By the calendar.
    pub(crate) time: Timestamp,
}

impl Identity {
    /// Whether an agent of this identity may have what one of `other` has: it is the same one, or
    /// the same one with more proof.
    ///
    /// A renewed certificate has the same subject, and a renewed token the same account and node.
    /// A pod that is started again on its node has another name, so the pod does not matter. A
    /// token that names a node proves more than one of the same account that names none, which an
    /// older kube-apiserver issued.
    pub(crate) fn may_replace(&self, other: &Self) -> bool {
        let certificate = match (&self.certificate, &other.certificate) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(own), Some(others)) => own.is_same_subject(others),
        };
        let account = match (&self.account, &other.account) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(own), Some(others)) => own.may_replace(others),
        };
        certificate && account
    }

    /// When the proof expires by the clock of this process, at `now`; `None` for one that does not
    /// within a hundred years.
    pub(crate) fn expires(&self, now: Instant) -> Option<Expiry> {
        const NEVER: Duration = Duration::from_secs(100 * 365 * 86_400);
        let time = self.expiry()?;
        let left = Duration::try_from(time.duration_since(Timestamp::now())).unwrap_or_default();
        (left < NEVER).then(|| Expiry { at: now + left, time })
    }

    /// When the proof expires; `None` for one that does not.
    pub(crate) fn expiry(&self) -> Option<Timestamp> {
        let certificate = self.certificate.as_ref().map(|certificate| certificate.not_after);
        let account = self.account.as_ref().and_then(|account| account.expiry);
        certificate.into_iter().chain(account).min()
    }

    /// The node that the agent has proved to be on: that of its pod or, in a certificate, the
    /// kubelet's or the common name.
    pub(crate) fn node(&self) -> Option<&str> {
        if let Some(account) = &self.account {
            return account.node.as_deref();
        }
        let name = self.certificate.as_ref()?.common_name.as_deref()?;
        Some(name.strip_prefix(NODE_PREFIX).unwrap_or(name))
    }

    /// The names that an agent of this identity may have by a rule; `None` if it may have any.
    fn names(&self, rule: AgentIdentity) -> Option<Vec<&str>> {
        match rule {
            AgentIdentity::Any => None,
            AgentIdentity::Node => Some(self.node().into_iter().collect()),
            AgentIdentity::Certificate => {
                Some(self.certificate.as_ref().map(Certificate::names).unwrap_or_default())
            }
        }
    }
}

/// The identity in one line, for logs and lists.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.certificate, &self.account) {
            (None, None) => f.write_str("anonymous"),
            (Some(certificate), None) => write!(f, "{certificate}"),
            (None, Some(account)) => write!(f, "{account}"),
            (Some(certificate), Some(account)) => write!(f, "{account}, {certificate}"),
        }
    }
}

impl ServiceAccount {
    fn may_replace(&self, other: &Self) -> bool {
        (&self.namespace, &self.name) == (&other.namespace, &other.name)
            && (other.node.is_none() || self.node == other.node)
    }
}

impl fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "service account {}/{}", self.namespace, self.name)?;
        match &self.node {
            Some(node) => write!(f, " on node {}", node.escape_debug()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::certificate;

    fn of_account(name: &str, node: Option<&str>) -> Identity {
        let account = ServiceAccount {
            namespace: "kube-system".into(),
            name: name.into(),
            node: node.map(str::to_owned),
            ..ServiceAccount::default()
        };
        Identity { account: Some(account), ..Identity::default() }
    }

    fn of_certificate(name: &str) -> Identity {
        let certificate = Certificate::of(&certificate(name, &[])).unwrap();
        Identity { certificate: Some(certificate), ..Identity::default() }
    }

    #[test]
    fn an_identity_is_replaced_by_itself_and_by_one_with_more_proof() {
        let both = |name: &str| Identity {
            certificate: of_certificate(name).certificate,
            ..of_account("agent", Some("n1"))
        };
        for (new, old) in [
            (Identity::default(), Identity::default()),
            // Each certificate has a key of its own.
            (of_certificate("agent"), of_certificate("agent")),
            (of_account("agent", Some("n1")), of_account("agent", Some("n1"))),
            (of_account("agent", None), of_account("agent", None)),
            (of_account("agent", Some("n1")), of_account("agent", None)),
            (both("agent"), both("agent")),
            (both("agent"), of_account("agent", None)),
        ] {
            assert!(new.may_replace(&old), "{new} replaces {old}");
        }
        for (new, old) in [
            (of_certificate("stranger"), of_certificate("agent")),
            (of_account("agent", Some("n2")), of_account("agent", Some("n1"))),
            (of_account("agent", None), of_account("agent", Some("n1"))),
            (of_account("other", None), of_account("agent", None)),
            (both("stranger"), both("agent")),
            (of_account("agent", Some("n1")), both("agent")),
            (Identity::default(), of_certificate("agent")),
        ] {
            assert!(!new.may_replace(&old), "{new} replaces {old}");
        }
    }

    #[test]
    fn a_pod_that_is_started_again_on_its_node_is_the_same_identity() {
        let pod = |name: &str| {
            let mut identity = of_account("agent", Some("n1"));
            let account = identity.account.as_mut().unwrap();
            (account.pod, account.pod_uid) = (Some(name.into()), Some(format!("uid-{name}")));
            identity
        };
        assert!(pod("agent-abcde").may_replace(&pod("agent-fghij")));
    }

    #[test]
    fn the_node_is_that_of_the_pod_or_the_name_of_the_certificate() {
        assert_eq!(of_account("agent", Some("n1")).node(), Some("n1"));
        assert_eq!(of_account("agent", None).node(), None);
        assert_eq!(of_certificate("system:node:n1").node(), Some("n1"));
        assert_eq!(of_certificate("n1").node(), Some("n1"));
        assert_eq!(Identity::default().node(), None);
        // The account proves no node, and the certificate is every node's.
        let shared = Identity {
            certificate: of_certificate("agent").certificate,
            ..of_account("agent", None)
        };
        assert_eq!(shared.node(), None);
    }

    #[test]
    fn the_first_proof_to_expire_counts() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let mut identity = of_certificate("agent");
        let not_after = identity.expiry().unwrap();
        let expire = |identity: &mut Identity, second| {
            let account = ServiceAccount { expiry: Some(at(second)), ..ServiceAccount::default() };
            identity.account = Some(account);
        };
        expire(&mut identity, 1000);
        assert_eq!(identity.expiry(), Some(at(1000)));
        expire(&mut identity, not_after.as_second() + 1);
        assert_eq!(identity.expiry(), Some(not_after));
        assert_eq!(of_account("agent", None).expiry(), None);
        assert_eq!(Identity::default().expiry(), None);
    }

    #[test]
    fn an_identity_is_described_in_one_line() {
        for (identity, text) in [
            (Identity::default(), "anonymous"),
            (of_certificate("a\nb"), "certificate \"CN=a\\nb\""),
            (of_account("agent", None), "service account kube-system/agent"),
            (of_account("agent", Some("n1")), "service account kube-system/agent on node n1"),
        ] {
            assert_eq!(identity.to_string(), text);
        }
    }
}
