//! Certificates, keys and CAs as sets of files.

use std::{fmt, path::Path};

use culvert_transport::tls::{Authorities, Identity, KeyExchange, parse_chain, pem_fault_of};
use k8s_openapi::jiff::Timestamp;
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    sign::CertifiedKey,
};
use x509_parser::{
    extensions::ExtendedKeyUsage,
    prelude::{FromDer as _, X509Certificate, X509Version},
};

use super::{Files, LoadError};
use crate::faults::CertificatePair;

/// When a certificate is valid, in seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Validity {
    /// The file.
    pub(super) file: String,
    /// The certificate's subject.
    pub(super) subject: String,
    /// The first second.
    pub(super) not_before: i64,
    /// The last second.
    pub(super) not_after: i64,
    /// Whether it is the certificate of this process, not one of a CA.
    pub(super) is_own: bool,
}

impl Validity {
    fn of(file: &Path, certificate: &CertificateDer<'_>) -> Result<Self, LoadError> {
        let unreadable = |error: String| {
            LoadError::new(format!("{}: a certificate cannot be parsed: {error}", file.display()))
        };
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|error| unreadable(error.to_string()))?;
        let validity = parsed.validity();
        Ok(Self {
            file: file.display().to_string(),
            subject: parsed.subject().to_string(),
            not_before: validity.not_before.timestamp(),
            not_after: validity.not_after.timestamp(),
            is_own: false,
        })
    }

    /// The fault of a certificate that ends before it begins.
    ///
    /// # Errors
    /// When it does: no clock finds it valid.
    fn require_a_life(&self) -> Result<(), LoadError> {
        if self.not_before <= self.not_after {
            return Ok(());
        }
        Err(LoadError::new(format!(
            "{}: the certificate {self} is never valid: its notAfter is before its notBefore; \
             issue it anew",
            self.file
        )))
    }

    /// Why the certificate is not valid now; `None` when it is.
    pub(super) fn fault(&self, now: i64) -> Option<String> {
        let state = match now {
            now if now > self.not_after => "has expired",
            now if now < self.not_before => "is not valid yet",
            _ => return None,
        };
        Some(format!("{}: the certificate {self} {state}", self.file))
    }
}

/// The subject and the dates.
impl fmt::Display for Validity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to) = (date(self.not_before), date(self.not_after));
        // The subject is the operator's, but a line break would still be one.
        write!(f, "{:?} (valid from {from} to {to})", self.subject)
    }
}

/// A time in RFC 3339.
pub(super) fn date(seconds: i64) -> String {
    Timestamp::from_second(seconds).map_or_else(|_| seconds.to_string(), |at| at.to_string())
}

/// The private key of a PEM text; the file is named in errors, and nothing of the text is quoted.
pub(crate) fn parse_private_key(
    file: &Path,
    pem: &[u8],
) -> Result<PrivateKeyDer<'static>, LoadError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|error| {
        LoadError::new(format!("{}: {}", file.display(), pem_fault_of(&error, "private key", pem)))
    })
}

/// Which side of TLS presents a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Clients compare its names with the name that they expect.
    Server,
    /// The names are free.
    Client,
}

impl Role {
    /// Why peers will most likely refuse a certificate in this role, one text for each fault.
    fn faults_of(self, certificate: &X509Certificate<'_>) -> Vec<&'static str> {
        let mut faults = Vec::new();
        let names = certificate.subject_alternative_name().ok().flatten();
        let has_name = names.is_some_and(|names| !names.value.general_names.is_empty());
        if self == Self::Server && certificate.version() != X509Version::V3 {
            faults.push("is not of X.509 version 3, and has no subjectAltName: clients refuse it");
        } else if self == Self::Server && !has_name {
            faults.push("has no subjectAltName: clients accept a server by its names there alone");
        }
        let usage = certificate.extended_key_usage().ok().flatten();
        let is_for = |role: fn(&ExtendedKeyUsage<'_>) -> bool| {
            usage.as_ref().is_none_or(|usage| usage.value.any || role(usage.value))
        };
        match self {
            Self::Server if !is_for(|usage| usage.server_auth) => {
                faults.push("is not for servers: its extendedKeyUsage lacks serverAuth");
            }
            Self::Client if !is_for(|usage| usage.client_auth) => {
                faults.push("is not for clients: its extendedKeyUsage lacks clientAuth");
            }
            _ => {}
        }
        faults
    }
}

/// Whether another CA has issued the certificate, and not as that of a CA. One that has issued
/// itself may be meant as its own CA, and version 1 does not say.
fn is_leaf(certificate: &X509Certificate<'_>) -> bool {
    let constraints = certificate.basic_constraints().ok().flatten();
    certificate.version() == X509Version::V3
        && !constraints.is_some_and(|constraints| constraints.value.ca)
        && certificate.subject() != certificate.issuer()
}

fn validities(file: &Path, chain: &[CertificateDer<'_>]) -> Result<Vec<Validity>, LoadError> {
    chain.iter().map(|certificate| Validity::of(file, certificate)).collect()
}

impl Files {
    /// Reads a certificate chain and its key, which this process presents in this role. That peers
    /// will refuse the certificate is a warning.
    ///
    /// # Errors
    /// When either cannot be read or parsed, the key is not the certificate's, or a certificate
    /// ends before it begins.
    pub fn identity(
        &mut self,
        pair: &CertificatePair,
        role: Role,
    ) -> Result<(Identity, CertifiedKey), LoadError> {
        let (file, key_file) = (pair.certificate.as_path(), pair.key.as_path());
        // Both are read, so that a change of either is noticed.
        let (chain, key) = (self.read(file), self.read(key_file));
        let identity = Identity::from_pem((file, &chain?), (key_file, &key?))?;
        let mut validities = validities(file, &identity.chain)?;
        validities.iter().try_for_each(Validity::require_a_life)?;
        validities[0].is_own = true;
        let leaf = validities[0].clone();
        // The algorithms of keys do not depend on the key exchange.
        let certified = identity.certified(&KeyExchange::Hybrid.provider()).map_err(|error| {
            let (key, file) = (key_file.display(), file.display());
            let mismatch = matches!(error, rustls::Error::InconsistentKeys(_));
            LoadError::new(match mismatch {
                true => format!("{key}: the key is not that of the certificate {leaf} in {file}"),
                false => format!("{key}: the key cannot be used with {file}: {error}"),
            })
        })?;
        if let Ok((_, parsed)) = X509Certificate::from_der(&identity.chain[0]) {
            for fault in role.faults_of(&parsed) {
                self.warn_of_use(format!("{}: the certificate {leaf} {fault}", file.display()));
            }
        }
        validities.into_iter().for_each(|validity| self.record(validity));
        self.record_presented(leaf);
        Ok((identity, certified))
    }

    /// Reads a chain of certificates alone, and records none of them.
    ///
    /// # Errors
    /// When the file cannot be read, or holds no certificate, or one that cannot be parsed or ends
    /// before it begins.
    pub(crate) fn chain(&mut self, file: &Path) -> Result<(), LoadError> {
        let chain = parse_chain(file, &self.read(file)?)?;
        validities(file, &chain)?.iter().try_for_each(Validity::require_a_life)
    }

    /// Reads a private key alone, and records no certificate: for what is derived from a key whose
    /// certificate is read by [`Files::identity`].
    ///
    /// # Errors
    /// When the file cannot be read, or holds no private key.
    pub fn private_key(&mut self, file: &Path) -> Result<PrivateKeyDer<'static>, LoadError> {
        parse_private_key(file, &self.read(file)?)
    }

    /// Reads a CA file. A block that cannot be used is left out, with a warning, and there is one for
    /// a certificate that is not a CA's.
    ///
    /// # Errors
    /// When the file cannot be read, or no block of it can be used.
    pub fn authorities(&mut self, file: &Path) -> Result<RootCertStore, LoadError> {
        let found = Authorities::from_pem(file, &self.read(file)?)?;
        for left_out in found.left_out {
            self.warn(format!("{}: {left_out}", file.display()));
        }
        for certificate in &found.certificates {
            // TLS takes a CA whose dates are odd, so this is no reason to refuse it.
            match Validity::of(file, certificate) {
                Ok(validity) => {
                    let parsed = X509Certificate::from_der(certificate);
                    if parsed.is_ok_and(|(_, parsed)| is_leaf(&parsed)) {
                        self.warn_of_use(format!(
                            "{}: the certificate {validity} is not a CA's; \
                             name the file of the CA that issued it",
                            file.display()
                        ));
                    }
                    self.record(validity);
                }
                Err(error) => self.warn(error.to_string()),
            }
        }
        Ok(found.roots)
    }

    /// Records the CAs in a PEM text of a file, if it holds any: for expiry alone.
    pub(crate) fn record_authorities(&mut self, file: &Path, pem: &[u8]) {
        if let Ok(found) = Authorities::from_pem(file, pem) {
            let validities = found.certificates.iter().map(|found| Validity::of(file, found));
            validities.flatten().for_each(|validity| self.record(validity));
        }
    }

    /// Records the certificates in a PEM text of a file, if it holds any, of which the first is that
    /// of this process: for expiry alone.
    pub(crate) fn record_chain(&mut self, file: &Path, pem: &[u8]) {
        let chain = parse_chain(file, pem).unwrap_or_default();
        let validities = validities(file, &chain).unwrap_or_default();
        for (index, mut validity) in validities.into_iter().enumerate() {
            validity.is_own = index == 0;
            self.record(validity);
        }
    }
}
