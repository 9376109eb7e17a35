//! What a server presents and whom it accepts, both replaceable while it serves.

use std::sync::Arc;

use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms},
    server::{
        ClientHello, ResolvesServerCert,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, UnixTime};

use super::{
    CertificateRules, Current, Identity, KeyExchange, TlsError,
    verifier::{self, tls12_signature, tls13_signature},
};

/// What a server presents, and the CA of its clients. Replacing either changes the handshakes that
/// begin later, and no connection.
#[derive(Clone, Debug)]
pub struct ServerCredentials {
    /// The chain that the server presents, and its key.
    pub identity: Current<CertifiedKey>,
    /// The CA whose certificates clients must present; `None` asks for no certificate.
    pub client_ca: Option<Current<ClientVerifier>>,
}

impl ServerCredentials {
    /// Credentials that are never replaced.
    ///
    /// # Errors
    /// When certificate and key do not fit, or the CA cannot be used.
    pub fn fixed(
        identity: &Identity,
        client_ca: Option<Arc<RootCertStore>>,
        key_exchange: KeyExchange,
    ) -> Result<Self, TlsError> {
        let identity = identity.certified(&key_exchange.provider())?;
        let verifier = |roots| ClientVerifier::new(roots, CertificateRules::default());
        let client_ca = client_ca.map(verifier).transpose()?;
        Ok(Self { identity: Current::fixed(identity), client_ca: client_ca.map(Current::fixed) })
    }
}

/// Verifies that a client's certificate is of one of a set of CAs.
#[derive(Debug)]
pub struct ClientVerifier(Arc<dyn ClientCertVerifier>);

impl ClientVerifier {
    /// A verifier with these CAs and rules.
    ///
    /// # Errors
    /// When there are no CAs.
    pub fn new(roots: Arc<RootCertStore>, rules: CertificateRules) -> Result<Self, TlsError> {
        verifier::of_clients(roots, rules).map(Self)
    }
}

/// Presents the current identity.
#[derive(Debug)]
pub(super) struct CurrentIdentity(pub(super) Current<CertifiedKey>);

impl ResolvesServerCert for CurrentIdentity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.get())
    }
}

/// Asks for a certificate of the current CAs.
#[derive(Debug)]
pub(super) struct CurrentVerifier {
    client_ca: Current<ClientVerifier>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl CurrentVerifier {
    pub(super) fn new(client_ca: Current<ClientVerifier>, provider: Arc<CryptoProvider>) -> Self {
        Self { client_ca, algorithms: provider.signature_verification_algorithms }
    }
}

impl ClientCertVerifier for CurrentVerifier {
    /// No hints, because they could not be replaced. A client without hints presents the
    /// certificate that it has.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.client_ca.get().0.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
