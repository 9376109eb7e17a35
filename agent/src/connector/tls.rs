//! The agent's TLS, from its files as they are now.

use std::sync::Arc;

use culvert_konnectivity::ALPN_H2;
use culvert_transport::tls::{self, ClientOptions, Identity, KeyExchange, Tls12, TlsError};
use culvert_wire::version::ALPN;
use rustls::{ClientConfig, RootCertStore};

use crate::config::{AlpnOrder, ServersConfig};

/// TLS for the handshakes of an attempt.
#[derive(Debug)]
pub(crate) struct ClientTls {
    /// With the key exchanges of the configuration.
    pub(crate) first: CarrierTls,
    /// With a smaller, classical ClientHello, where the first one is large and need not be.
    pub(crate) smaller: Option<CarrierTls>,
}

/// TLS for each carrier. Over TCP, Konnectivity's ALPN is offered as well.
#[derive(Debug)]
pub(crate) struct CarrierTls {
    /// For QUIC.
    pub(crate) quic: Arc<ClientConfig>,
    /// For TCP.
    pub(crate) tcp: Arc<ClientConfig>,
}

impl ClientTls {
    /// Trusts this CA, and presents this certificate.
    ///
    /// # Errors
    /// When the certificate cannot be used.
    pub(crate) fn new(
        ca: Arc<RootCertStore>,
        identity: Option<Identity>,
        key_exchange: KeyExchange,
        servers: &ServersConfig,
    ) -> Result<Self, TlsError> {
        let with = |key_exchange| {
            let carriers = CarrierTls::new(ca.clone(), identity.clone(), key_exchange, servers);
            carriers.map(Some)
        };
        let smaller = match key_exchange {
            KeyExchange::Hybrid => with(KeyExchange::Classic)?,
            KeyExchange::PostQuantum | KeyExchange::Classic => None,
        };
        Ok(Self { first: CarrierTls::new(ca, identity, key_exchange, servers)?, smaller })
    }
}

impl CarrierTls {
    fn new(
        ca: Arc<RootCertStore>,
        identity: Option<Identity>,
        key_exchange: KeyExchange,
        servers: &ServersConfig,
    ) -> Result<Self, TlsError> {
        let rules = servers.tls.rules;
        let options = ClientOptions { key_exchange, tls12: Tls12::Off, rules };
        let mut quic = tls::client(ca.clone(), identity.clone(), &options)?;
        quic.alpn_protocols = vec![ALPN.to_vec()];
        let options = ClientOptions { tls12: servers.tls.tls12.clone(), ..options };
        let mut tcp = tls::client(ca, identity, &options)?;
        tcp.alpn_protocols = alpn(&servers.extra_alpn, servers.alpn_order);
        Ok(Self { quic: Arc::new(quic), tcp: Arc::new(tcp) })
    }
}

/// The ALPN names that are offered over TCP.
fn alpn(extra: &[String], order: AlpnOrder) -> Vec<Vec<u8>> {
    let ours = || Some(ALPN.to_vec());
    let (first, last) = match order {
        AlpnOrder::CulvertLast => (None, ours()),
        AlpnOrder::CulvertFirst => (ours(), None),
        AlpnOrder::Konnectivity => (None, None),
    };
    let konnectivity = extra.iter().map(|name| name.clone().into_bytes()).chain([ALPN_H2.to_vec()]);
    first.into_iter().chain(konnectivity).chain(last).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::config;

    #[test]
    fn the_place_of_culvert_s_alpn_name_can_be_chosen() {
        let names = |order| {
            let names = alpn(&["konnectivity".to_owned()], order);
            names.into_iter().map(|name| String::from_utf8(name).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(names(AlpnOrder::CulvertLast), ["konnectivity", "h2", "culvert/1"]);
        assert_eq!(names(AlpnOrder::CulvertFirst), ["culvert/1", "konnectivity", "h2"]);
        assert_eq!(names(AlpnOrder::Konnectivity), ["konnectivity", "h2"]);
    }

    #[test]
    fn a_smaller_hello_is_there_where_the_first_one_is_large_and_a_classical_one_is_allowed() {
        let servers = config(&[]).servers;
        let ca = rcgen::CertificateParams::default();
        let ca = ca.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
        let roots = tls::authorities(&[ca.der().clone()]).unwrap();
        for (key_exchange, expected) in [
            (KeyExchange::Hybrid, true),
            (KeyExchange::PostQuantum, false),
            (KeyExchange::Classic, false),
        ] {
            let tls = ClientTls::new(roots.clone(), None, key_exchange, &servers).unwrap();
            assert_eq!(tls.smaller.is_some(), expected);
        }
    }
}
