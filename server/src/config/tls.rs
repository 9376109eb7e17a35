//! TLS over TCP.

use culvert_process::{faults::Faults, go_flags};

use super::Flags;

/// TLS of the frontend over TCP. Tunnels always use TLS 1.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TlsConfig {
    /// Oldest version to accept.
    pub min_version: TlsVersion,
}

/// Version of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// 1.2
    Tls12,
    /// 1.3
    Tls13,
}

/// Suites that Go calls secure (`crypto/tls.CipherSuites`): those that Konnectivity accepts.
const GO_CIPHER_SUITES: [&str; 13] = [
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
];

/// Checks the flags of TLS. Cipher suites are checked as Konnectivity checks them, and have no
/// effect.
pub(super) fn check(flags: &Flags, faults: &mut Faults) -> TlsConfig {
    let min_version = match flags.tls_min_version.as_str() {
        "" | "VersionTLS12" => TlsVersion::Tls12,
        "VersionTLS13" => TlsVersion::Tls13,
        "VersionTLS10" | "VersionTLS11" => {
            faults.warn("tls-min-version", "TLS below 1.2 is insecure (RFC 8996) and stays off");
            TlsVersion::Tls12
        }
        other => {
            let reason = format!(
                "{other:?} is unknown; use VersionTLS10, VersionTLS11, VersionTLS12 or VersionTLS13"
            );
            faults.add("tls-min-version", reason);
            TlsVersion::Tls12
        }
    };
    let cipher_suites = go_flags::parse_list(&flags.cipher_suites);
    for suite in &cipher_suites {
        faults.require(
            GO_CIPHER_SUITES.contains(&suite.as_str()),
            "cipher-suites",
            format!("{suite} does not exist or is insecure"),
        );
    }
    if !cipher_suites.is_empty() {
        faults.warn("cipher-suites", "has no effect yet, the TLS library's safe choice is used");
    }
    TlsConfig { min_version }
}
