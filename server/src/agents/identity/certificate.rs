//! A certificate that an agent has proved itself with.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use aws_lc_rs::digest::{SHA256, digest};
use culvert_process::kubernetes::Timestamp;
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// The parts of a verified certificate that say whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Certificate {
    /// Distinguished name, such as `O=system:nodes, CN=system:node:node-1`; may be empty.
    pub(crate) subject: String,
    /// The same name as it is encoded, for comparison: its text may be that of another name.
    encoded_subject: Vec<u8>,
    /// Common name of the subject.
    pub(crate) common_name: Option<String>,
    /// Alternative names that are DNS names or URIs.
    pub(crate) alternative_names: Vec<String>,
    /// Alternative names that are addresses.
    pub(crate) addresses: Vec<IpAddr>,
    /// SHA-256 of the certificate.
    pub(crate) fingerprint: Vec<u8>,
    /// The last second in which it is valid.
    pub(crate) not_after: Timestamp,
}

impl Certificate {
    /// The parts of this certificate; `None` if it cannot be parsed.
    pub(crate) fn of(der: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(der).ok()?;
        let mut common_names = parsed.subject().iter_common_name();
        let common_name = common_names.next().and_then(|name| name.as_str().ok());
        let (mut alternative_names, mut addresses) = (Vec::new(), Vec::new());
        let extension = parsed.subject_alternative_name().ok()?;
        for name in extension.iter().flat_map(|extension| &extension.value.general_names) {
            match name {
                GeneralName::DNSName(name) | GeneralName::URI(name) => {
                    alternative_names.push((*name).to_owned());
                }
                GeneralName::IPAddress(bytes) => addresses.extend(address(bytes)),
                _ => {}
            }
        }
        Some(Self {
            subject: parsed.subject().to_string(),
            encoded_subject: parsed.subject().as_raw().to_vec(),
            common_name: common_name.map(str::to_owned),
            alternative_names,
            addresses,
            fingerprint: digest(&SHA256, der).as_ref().to_vec(),
            not_after: Timestamp::from_second(parsed.validity().not_after.timestamp()).ok()?,
        })
    }

    /// Whether both are certificates of the same subject, as after a renewal. Without a subject the
    /// alternative names count.
    pub(super) fn is_same_subject(&self, other: &Self) -> bool {
        match (self.subject.is_empty(), other.subject.is_empty()) {
            (true, true) => {
                let names = |of: &Self| (of.alternative_names.clone(), of.addresses.clone());
                names(self) == names(other)
            }
            _ => self.encoded_subject == other.encoded_subject,
        }
    }

    /// The names of the certificate's owner.
    pub(crate) fn names(&self) -> Vec<&str> {
        let alternative_names = self.alternative_names.iter().map(String::as_str);
        self.common_name.as_deref().into_iter().chain(alternative_names).collect()
    }
}

/// The subject or, without one, the alternative names.
impl fmt::Display for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.subject.is_empty() {
            false => write!(f, "certificate {:?}", self.subject),
            true => write!(f, "certificate of {:?}", self.alternative_names),
        }
    }
}

/// The address in an alternative name, which has 4 or 16 bytes.
fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(|bytes| Ipv4Addr::from(bytes).into());
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(|bytes| Ipv6Addr::from(bytes).into())).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::certificate;

    #[test]
    fn names_addresses_and_dates_are_read() {
        let names = ["node-1.example", "10.0.0.1", "fd00::1"];
        let der = certificate("system:node:node-1", &names);
        let found = Certificate::of(&der).unwrap();
        assert_eq!(found.subject, "CN=system:node:node-1");
        assert_eq!(found.names(), ["system:node:node-1", "node-1.example"]);
        let addresses: [IpAddr; 2] =
            ["10.0.0.1", "fd00::1"].map(|address| address.parse().unwrap());
        assert_eq!(found.addresses, addresses);
        assert_eq!(found.fingerprint.len(), 32);
        // rcgen's default.
        assert_eq!(found.not_after.to_string(), "4096-01-01T00:00:00Z");
        assert!(Certificate::of(&CertificateDer::from(vec![1, 2, 3])).is_none());
    }

    #[test]
    fn certificates_without_a_subject_are_the_same_by_their_alternative_names() {
        let of = |names: &[&str]| Certificate::of(&certificate("", names)).unwrap();
        assert_eq!(of(&["spiffe-1"]).subject, "");
        assert!(of(&["spiffe-1"]).is_same_subject(&of(&["spiffe-1"])));
        assert!(!of(&["spiffe-1"]).is_same_subject(&of(&["spiffe-2"])));
        assert_eq!(of(&["spiffe-1"]).to_string(), "certificate of [\"spiffe-1\"]");
        let named = Certificate::of(&certificate("agent", &["spiffe-1"])).unwrap();
        assert!(!named.is_same_subject(&of(&["spiffe-1"])));
    }

    /// Texts of names are not unique: an attribute may look like several.
    #[test]
    fn a_subject_that_only_reads_like_another_is_not_the_same() {
        let of = |parts: &[(rcgen::DnType, &str)]| {
            let mut params = rcgen::CertificateParams::default();
            params.distinguished_name = rcgen::DistinguishedName::new();
            for (kind, text) in parts {
                params.distinguished_name.push(kind.clone(), *text);
            }
            let der = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().into();
            Certificate::of(&der).unwrap()
        };
        let (o, cn) = (rcgen::DnType::OrganizationName, rcgen::DnType::CommonName);
        let agent = of(&[(o.clone(), "system:nodes"), (cn, "system:node:node-1")]);
        let forged = of(&[(o, "system:nodes, CN=system:node:node-1")]);
        assert_eq!(agent.subject, forged.subject);
        assert!(!forged.is_same_subject(&agent));
    }
}
