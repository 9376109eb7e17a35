//! TLS 1.2, for peers over TCP that have no 1.3.

use std::sync::Arc;

use rustls::{
    CipherSuite, SupportedProtocolVersion,
    crypto::{CryptoProvider, aws_lc_rs},
    version::{TLS12, TLS13},
};

use super::KeyExchange;

/// Whether TLS 1.2 is spoken besides 1.3, and with which cipher suites.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Tls12 {
    /// TLS 1.3 alone.
    #[default]
    Off,
    /// With every cipher suite of the TLS library, all of which have forward secrecy.
    AnySuite,
    /// With these cipher suites, of those that the TLS library has.
    Suites(Vec<CipherSuite>),
}

impl Tls12 {
    /// The cipher suites of TLS 1.2 that the TLS library has.
    pub fn supported_suites() -> Vec<CipherSuite> {
        let all = aws_lc_rs::ALL_CIPHER_SUITES.iter().filter(|suite| suite.tls13().is_none());
        all.map(|suite| suite.suite()).collect()
    }

    /// What is left of TLS 1.2 with this key exchange: nothing where it must be post-quantum.
    pub(super) fn with(&self, key_exchange: KeyExchange) -> &Self {
        match key_exchange {
            KeyExchange::PostQuantum => &Self::Off,
            KeyExchange::Hybrid | KeyExchange::Classic => self,
        }
    }

    /// The versions that are spoken, the preferred one first.
    pub(super) fn versions(&self) -> &'static [&'static SupportedProtocolVersion] {
        static VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];
        let is_off = match self {
            Self::Off => true,
            Self::AnySuite => false,
            Self::Suites(suites) => suites.is_empty(),
        };
        if is_off { &VERSIONS[..1] } else { &VERSIONS }
    }

    /// The provider with these key exchanges, and these cipher suites besides those of TLS 1.3.
    pub(super) fn provider(&self, key_exchange: KeyExchange) -> Arc<CryptoProvider> {
        let provider = key_exchange.provider();
        let Self::Suites(suites) = self else { return provider };
        let mut provider = Arc::unwrap_or_clone(provider);
        provider
            .cipher_suites
            .retain(|suite| suite.tls13().is_some() || suites.contains(&suite.suite()));
        Arc::new(provider)
    }
}
