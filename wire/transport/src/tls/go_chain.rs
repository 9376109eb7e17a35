//! Chains of certificates that Go's `crypto/x509` accepts and webpki refuses: of a CA that presents
//! its own certificate, of X.509 version 1, and for `anyExtendedKeyUsage`.
//!
//! Validity, extensions, key usages, path lengths and signatures are checked as in Go, with webpki's
//! algorithms for signatures. One rule is stricter: a chain with name constraints is left
//! to webpki, which knows them.

use rustls::{CertificateError, Error, RootCertStore};
use rustls_pki_types::{
    CertificateDer, SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer, TrustAnchor, UnixTime,
};
use x509_parser::{
    asn1_rs::{Any, FromDer as _, Oid},
    oid_registry::{
        OID_X509_EXT_BASIC_CONSTRAINTS, OID_X509_EXT_EXTENDED_KEY_USAGE, OID_X509_EXT_KEY_USAGE,
        OID_X509_EXT_NAME_CONSTRAINTS, OID_X509_EXT_SUBJECT_ALT_NAME,
    },
    prelude::{X509Certificate, X509Extension, X509Version},
};

/// Maximum number of signatures to check for one chain, which the peer chooses; Go's.
const MAX_SIGNATURES: usize = 100;
/// Maximum number of intermediate certificates; webpki's.
const MAX_INTERMEDIATES: usize = 6;
/// Extensions that are checked here or by the caller. Another critical one refuses a certificate.
const KNOWN_EXTENSIONS: [Oid<'static>; 4] = [
    OID_X509_EXT_BASIC_CONSTRAINTS,
    OID_X509_EXT_EXTENDED_KEY_USAGE,
    OID_X509_EXT_KEY_USAGE,
    OID_X509_EXT_SUBJECT_ALT_NAME,
];

/// Side of the connection that presents the certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presenter {
    Server,
    Client,
}

/// Whether webpki's refusal may be of a certificate that Go accepts.
pub(super) fn may_differ(error: &Error) -> bool {
    matches!(
        error,
        Error::InvalidCertificate(
            CertificateError::Other(_)
                | CertificateError::BadEncoding
                | CertificateError::InvalidPurpose
                | CertificateError::InvalidPurposeContext { .. }
        )
    )
}

/// Verifies that a chain leads from the end entity to a trust anchor. Names are the caller's.
///
/// # Errors
/// When it does not.
pub(super) fn verify(
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &RootCertStore,
    presenter: Presenter,
    now: UnixTime,
    algorithms: &[&dyn SignatureVerificationAlgorithm],
) -> Result<(), Error> {
    let end_entity = parse(end_entity)?;
    check(&end_entity, presenter, now)?;
    // What cannot be parsed leads nowhere.
    let intermediates = intermediates.iter().filter_map(|der| parse(der).ok()).collect();
    let mut search = Search { intermediates, roots, presenter, now, algorithms, signatures: 0 };
    match search.leads_to_root(&[&end_entity])? {
        true => Ok(()),
        false => Err(CertificateError::UnknownIssuer.into()),
    }
}

/// The public key of a certificate.
///
/// # Errors
/// When it cannot be parsed.
pub(super) fn public_key(
    certificate: &CertificateDer<'_>,
) -> Result<SubjectPublicKeyInfoDer<'static>, Error> {
    Ok(SubjectPublicKeyInfoDer::from(parse(certificate)?.public_key().raw.to_vec()))
}

/// Whether the certificate is of X.509 version 1, which webpki does not parse.
pub(super) fn is_version_1(certificate: &CertificateDer<'_>) -> bool {
    parse(certificate).is_ok_and(|certificate| certificate.version() == X509Version::V1)
}

/// Whether the algorithm of signatures is for this kind of public key.
pub(super) fn is_for_key(
    algorithm: &dyn SignatureVerificationAlgorithm,
    key: &SubjectPublicKeyInfoDer<'_>,
) -> bool {
    key_parts(key).is_some_and(|(id, _)| *algorithm.public_key_alg_id() == *id)
}

/// The bits of a public key.
pub(super) fn key_bits<'a>(key: &'a SubjectPublicKeyInfoDer<'_>) -> Option<&'a [u8]> {
    key_parts(key).map(|(_, bits)| bits)
}

/// The contents of the algorithm's identifier, and the bits of the key.
fn key_parts<'a>(key: &'a SubjectPublicKeyInfoDer<'_>) -> Option<(&'a [u8], &'a [u8])> {
    let (_, key) = Any::from_der(key.as_ref()).ok()?;
    let (rest, id) = Any::from_der(key.data).ok()?;
    let (_, bits) = Any::from_der(rest).ok()?;
    // The first byte is the number of unused bits, which keys do not have.
    match bits.data.split_first() {
        Some((0, bits)) => Some((id.data, bits)),
        _ => None,
    }
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, Error> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(CertificateError::BadEncoding.into()),
    }
}

/// What every certificate of a chain must fulfil.
fn check(
    certificate: &X509Certificate<'_>,
    presenter: Presenter,
    now: UnixTime,
) -> Result<(), Error> {
    let validity = certificate.validity();
    let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if seconds < validity.not_before.timestamp() {
        return Err(CertificateError::NotValidYet.into());
    }
    if seconds > validity.not_after.timestamp() {
        return Err(CertificateError::Expired.into());
    }
    let extensions = certificate.extensions();
    let is_unknown = |oid: &Oid<'_>| !KNOWN_EXTENSIONS.contains(oid);
    if extensions.iter().any(|extension| extension.critical && is_unknown(&extension.oid)) {
        return Err(CertificateError::UnhandledCriticalExtension.into());
    }
    // One that says nothing here may be one that restricts.
    let is_malformed = |extension: &X509Extension<'_>| {
        !is_unknown(&extension.oid) && extension.parsed_extension().error().is_some()
    };
    if certificate.extensions_map().is_err() || extensions.iter().any(is_malformed) {
        return Err(CertificateError::BadEncoding.into());
    }
    if extensions.iter().any(|extension| extension.oid == OID_X509_EXT_NAME_CONSTRAINTS) {
        return Err(other("name constraints"));
    }
    let usage = certificate.extended_key_usage().map_err(|_| CertificateError::BadEncoding)?;
    let is_fit = usage.is_none_or(|usage| {
        usage.value.any
            || match presenter {
                Presenter::Server => usage.value.server_auth,
                Presenter::Client => usage.value.client_auth,
            }
    });
    if is_fit { Ok(()) } else { Err(CertificateError::InvalidPurpose.into()) }
}

/// The search for a chain.
struct Search<'a> {
    intermediates: Vec<X509Certificate<'a>>,
    roots: &'a RootCertStore,
    presenter: Presenter,
    now: UnixTime,
    algorithms: &'a [&'a dyn SignatureVerificationAlgorithm],
    /// Number of signatures that were checked.
    signatures: usize,
}

impl Search<'_> {
    /// Whether the last certificate of `chain`, the end entity first, leads to a trust anchor.
    ///
    /// # Errors
    /// When too many signatures were checked.
    fn leads_to_root(&mut self, chain: &[&X509Certificate<'_>]) -> Result<bool, Error> {
        let subject = chain[chain.len() - 1];
        for anchor in &self.roots.roots {
            let is_issuer = sequence(&anchor.subject) == subject.issuer().as_raw();
            if is_issuer && self.is_signed_by(subject, &anchor_key(anchor))? {
                return Ok(anchor.name_constraints.is_none());
            }
        }
        let count = chain.len() - 1;
        if count == MAX_INTERMEDIATES {
            return Ok(false);
        }
        for candidate in self.intermediates.clone() {
            let is_new = chain.iter().all(|member| member.as_raw() != candidate.as_raw());
            let is_issuer = candidate.subject().as_raw() == subject.issuer().as_raw();
            if !is_new || !is_issuer || !self.is_authority(&candidate, count) {
                continue;
            }
            let key = SubjectPublicKeyInfoDer::from(candidate.public_key().raw);
            if !self.is_signed_by(subject, &key)? {
                continue;
            }
            let mut longer = chain.to_vec();
            longer.push(&candidate);
            if self.leads_to_root(&longer)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether an intermediate certificate may sign others, with this many intermediates below it.
    fn is_authority(&self, candidate: &X509Certificate<'_>, below: usize) -> bool {
        let Ok(Some(constraints)) = candidate.basic_constraints() else { return false };
        let length = constraints.value.path_len_constraint;
        let Ok(usage) = candidate.key_usage() else { return false };
        candidate.version() == X509Version::V3
            && constraints.value.ca
            && length.is_none_or(|length| below <= length as usize)
            && usage.is_none_or(|usage| usage.value.key_cert_sign())
            && check(candidate, self.presenter, self.now).is_ok()
    }

    /// Whether the holder of the key has signed the certificate.
    ///
    /// # Errors
    /// When too many signatures were checked.
    fn is_signed_by(
        &mut self,
        certificate: &X509Certificate<'_>,
        key: &SubjectPublicKeyInfoDer<'_>,
    ) -> Result<bool, Error> {
        let Some(algorithm) = signature_algorithm(certificate) else { return Ok(false) };
        let Some(bits) = key_bits(key) else { return Ok(false) };
        let (message, signature) =
            (certificate.tbs_certificate.as_ref(), &certificate.signature_value.data);
        for candidate in self.algorithms {
            if *candidate.signature_alg_id() != *algorithm || !is_for_key(*candidate, key) {
                continue;
            }
            self.signatures += 1;
            if self.signatures > MAX_SIGNATURES {
                return Err(other("too many signatures"));
            }
            if candidate.verify_signature(bits, message, signature).is_ok() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The contents of the identifier of the signature's algorithm; `None` unless the signed part names
/// the same one.
fn signature_algorithm<'a>(certificate: &X509Certificate<'a>) -> Option<&'a [u8]> {
    if certificate.tbs_certificate.signature != certificate.signature_algorithm {
        return None;
    }
    let (_, certificate) = Any::from_der(certificate.as_raw()).ok()?;
    let (rest, _signed) = Any::from_der(certificate.data).ok()?;
    Some(Any::from_der(rest).ok()?.1.data)
}

/// The public key of a trust anchor, which has it without its outermost tag.
fn anchor_key(anchor: &TrustAnchor<'_>) -> SubjectPublicKeyInfoDer<'static> {
    SubjectPublicKeyInfoDer::from(sequence(&anchor.subject_public_key_info))
}

/// A DER sequence with these contents.
fn sequence(contents: &[u8]) -> Vec<u8> {
    const TAG: u8 = 0x30;
    let mut length = contents.len().to_be_bytes().to_vec();
    length.drain(..length.iter().position(|byte| *byte != 0).unwrap_or(length.len() - 1));
    let mut der = vec![TAG];
    if contents.len() >= 0x80 {
        der.push(0x80 | u8::try_from(length.len()).expect("at most 8"));
    }
    der.extend(length);
    der.extend(contents);
    der
}

fn other(reason: &'static str) -> Error {
    let reason: Box<dyn std::error::Error + Send + Sync> = reason.into();
    Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(reason.into())))
}
