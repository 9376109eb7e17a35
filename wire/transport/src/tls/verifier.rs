//! Verifiers of peers' certificates: webpki's, and Go's rules where webpki is stricter.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, PeerMisbehaved,
    RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{
        WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
        verify_tls13_signature_with_raw_key,
    },
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{
    KeyExchange, TlsError,
    go_chain::{self, Presenter},
};

/// Rules for certificates of peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CertificateRules {
    /// Those of Go, and so of Konnectivity: the certificate may be a CA's, of X.509 version 1, or
    /// for any extended key usage.
    #[default]
    Go,
    /// Those of the web's PKI (webpki).
    Strict,
}

/// Verifies a peer's certificate.
#[derive(Debug)]
struct Rules<V: ?Sized> {
    roots: Arc<RootCertStore>,
    rules: CertificateRules,
    algorithms: WebPkiSupportedAlgorithms,
    webpki: Arc<V>,
}

/// A verifier of servers' certificates, of these CAs.
///
/// # Errors
/// When there are none.
pub(super) fn of_servers(
    roots: Arc<RootCertStore>,
    rules: CertificateRules,
) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
    // The key exchanges of the provider are of no concern here.
    let provider = KeyExchange::Hybrid.provider();
    let algorithms = provider.signature_verification_algorithms;
    let webpki = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider).build();
    let webpki = webpki.map_err(|error| TlsError::Authority(error.to_string()))?;
    Ok(Arc::new(Rules { roots, rules, algorithms, webpki }))
}

/// A verifier of clients' certificates, of these CAs.
///
/// # Errors
/// When there are none.
pub(super) fn of_clients(
    roots: Arc<RootCertStore>,
    rules: CertificateRules,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let provider = KeyExchange::Hybrid.provider();
    let algorithms = provider.signature_verification_algorithms;
    let webpki = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider).build();
    let webpki = webpki.map_err(|error| TlsError::Authority(error.to_string()))?;
    Ok(Arc::new(Rules { roots, rules, algorithms, webpki }))
}

impl<V: ?Sized> Rules<V> {
    /// Verifies by Go's rules what webpki refused.
    ///
    /// # Errors
    /// With webpki's error where these rules do not accept the chain either.
    fn verify_refused(
        &self,
        refused: Error,
        (end_entity, intermediates): (&CertificateDer<'_>, &[CertificateDer<'_>]),
        presenter: Presenter,
        now: UnixTime,
    ) -> Result<(), Error> {
        if self.rules == CertificateRules::Strict || !go_chain::may_differ(&refused) {
            return Err(refused);
        }
        let algorithms = self.algorithms.all;
        go_chain::verify(end_entity, intermediates, &self.roots, presenter, now, algorithms)
            .map_err(|_| refused)
    }
}

impl<V: ServerCertVerifier + ?Sized> ServerCertVerifier for Rules<V> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.webpki.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        verified.or_else(|refused| {
            let chain = (end_entity, intermediates);
            self.verify_refused(refused, chain, Presenter::Server, now)?;
            // Also refuses version 1, which has no names but the common name.
            verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
            Ok(ServerCertVerified::assertion())
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl<V: ClientCertVerifier + ?Sized> ClientCertVerifier for Rules<V> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.webpki.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.webpki.verify_client_cert(end_entity, intermediates, now);
        verified.or_else(|refused| {
            let chain = (end_entity, intermediates);
            self.verify_refused(refused, chain, Presenter::Client, now)?;
            Ok(ClientCertVerified::assertion())
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Verifies a handshake's signature by a certificate that was verified, also one of version 1.
pub(super) fn tls13_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
    algorithms: &WebPkiSupportedAlgorithms,
) -> Result<HandshakeSignatureValid, Error> {
    if !go_chain::is_version_1(certificate) {
        return verify_tls13_signature(message, certificate, signed, algorithms);
    }
    let key = go_chain::public_key(certificate)?;
    verify_tls13_signature_with_raw_key(message, &key, signed, algorithms)
}

/// The same for TLS 1.2, whose schemes stand for several algorithms.
pub(super) fn tls12_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
    algorithms: &WebPkiSupportedAlgorithms,
) -> Result<HandshakeSignatureValid, Error> {
    if !go_chain::is_version_1(certificate) {
        return verify_tls12_signature(message, certificate, signed, algorithms);
    }
    let key = go_chain::public_key(certificate)?;
    let bits = go_chain::key_bits(&key).ok_or(CertificateError::BadEncoding)?;
    let found = algorithms.mapping.iter().find(|(scheme, _)| *scheme == signed.scheme);
    let (_, candidates) = found.ok_or(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme)?;
    let candidate = candidates.iter().find(|candidate| go_chain::is_for_key(**candidate, &key));
    candidate
        .is_some_and(|candidate| {
            candidate.verify_signature(bits, message, signed.signature()).is_ok()
        })
        .then(HandshakeSignatureValid::assertion)
        .ok_or_else(|| CertificateError::BadSignature.into())
}

#[cfg(test)]
mod tests;
