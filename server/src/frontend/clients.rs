//! Which clients may connect to the frontend over TCP, by the names of their certificates.

use std::time::Duration;

use culvert_process::rate_limited;
use culvert_wire::bounded::PeerText;
use rustls::pki_types::CertificateDer;

use crate::agents::identity::Certificate;

/// Names of which a client's certificate must have one.
#[derive(Clone, Debug)]
pub(super) struct ClientNames(Vec<String>);

impl ClientNames {
    /// These names; without any, every certificate that TLS accepts will do.
    pub(super) fn new(names: &[String]) -> Self {
        Self(names.to_vec())
    }

    /// Whether the client with this chain may connect. A refusal is logged.
    pub(super) fn permit(&self, chain: Option<&[CertificateDer<'_>]>) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let certificate = chain.and_then(<[_]>::first).and_then(Certificate::of);
        let names = certificate.iter().flat_map(Certificate::names);
        if names.into_iter().any(|name| self.0.iter().any(|allowed| allowed == name)) {
            return true;
        }
        // The certificate is one of the CA's, but its names may be anything.
        let shown = certificate.map_or_else(|| "no certificate".into(), |it| it.to_string());
        rate_limited!(
            Duration::from_secs(10), per certificate = PeerText::truncated(shown),
            at most 8 in all, WARN,
            "a frontend was refused for its certificate's names"
        );
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::certificate;

    #[test]
    fn a_common_name_or_an_alternative_name_permits_a_client() {
        let names = ["kube-apiserver", "apiserver.example"].map(str::to_owned);
        let names = ClientNames::new(&names);
        for (common_name, alternative_names, permitted) in [
            ("kube-apiserver", &[][..], true),
            ("other", &["apiserver.example"], true),
            ("", &["apiserver.example"], true),
            ("system:node:node-1", &["node-1.example"], false),
            ("kube-apiserver.example", &[], false),
            ("Kube-Apiserver", &[], false),
        ] {
            let chain = [certificate(common_name, alternative_names)];
            assert_eq!(names.permit(Some(&chain)), permitted, "{common_name}");
        }
        assert!(!names.permit(None));
        assert!(!names.permit(Some(&[CertificateDer::from(vec![1, 2, 3])])));
    }

    #[test]
    fn without_names_every_client_is_permitted() {
        assert!(ClientNames::new(&[]).permit(Some(&[certificate("any", &[])])));
    }
}
