//! Flags of TLS that server and agent share.

use clap::{
    Args,
    builder::{PossibleValue, PossibleValuesParser},
};
use culvert_transport::tls::{CertificateRules, Tls12};
use rustls::CipherSuite;

use crate::{faults::Faults, go_flags};

/// Shared flags, to be flattened into those of a process.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsFlags {
    /// Cipher suites of TLS 1.2, by Go's names, separated by commas. Those of TLS 1.3 are always on,
    /// and those with CBC do not exist here. May be repeated [default: all that there are]
    #[arg(long, value_name = "LIST")]
    pub cipher_suites: Vec<String>,

    /// Oldest TLS version that is spoken over TCP with kube-apiserver and with Konnectivity's
    /// servers and agents. VersionTLS10, VersionTLS11 and empty mean VersionTLS12. Tunnels between Culvert's own processes always use TLS 1.3
    #[arg(long, value_name = "VERSION", value_parser = versions(), default_value = "")]
    pub tls_min_version: String,

    /// Refuse certificates of peers that Go, and so Konnectivity, accepts and the web's PKI does not:
    /// a CA's own, those of X.509 version 1, and those with the extended key usage "any"
    #[arg(long)]
    pub strict_certificates: bool,
}

/// The values of `--tls-min-version`.
fn versions() -> PossibleValuesParser {
    let names = ["VersionTLS10", "VersionTLS11", "VersionTLS12", "VersionTLS13"];
    let empty = PossibleValue::new("").hide(true);
    PossibleValuesParser::new([empty].into_iter().chain(names.map(PossibleValue::new)))
}

/// What TLS accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// Whether TLS 1.2 is spoken over TCP with peers other than Culvert's.
    pub tls12: Tls12,
    /// Rules for the certificates of peers.
    pub rules: CertificateRules,
}

impl Default for TlsConfig {
    /// The configuration without any flag.
    fn default() -> Self {
        Self { tls12: Tls12::AnySuite, rules: CertificateRules::default() }
    }
}

/// Suites that Go calls secure (`crypto/tls.CipherSuites`): those that Konnectivity accepts. `None`
/// are those of TLS 1.3.
const GO_CIPHER_SUITES: [(&str, Option<CipherSuite>); 13] = {
    use CipherSuite as S;
    [
        ("TLS_AES_128_GCM_SHA256", None),
        ("TLS_AES_256_GCM_SHA384", None),
        ("TLS_CHACHA20_POLY1305_SHA256", None),
        ("TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA", Some(S::TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA)),
        ("TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA", Some(S::TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA)),
        ("TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA", Some(S::TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA)),
        ("TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA", Some(S::TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA)),
        (
            "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
            Some(S::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
        ),
        (
            "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
            Some(S::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384),
        ),
        ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", Some(S::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256)),
        ("TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", Some(S::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384)),
        (
            "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
            Some(S::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256),
        ),
        (
            "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
            Some(S::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256),
        ),
    ]
};

impl TlsFlags {
    /// The checked configuration. Faults of the flags go to `faults`.
    pub fn check(&self, faults: &mut Faults) -> TlsConfig {
        let suites = self.suites(faults);
        let rules = match self.strict_certificates {
            true => CertificateRules::Strict,
            false => CertificateRules::Go,
        };
        let tls12 = match self.tls_min_version.as_str() {
            "" | "VersionTLS12" => suites,
            "VersionTLS13" => Tls12::Off,
            "VersionTLS10" | "VersionTLS11" => {
                let text = "TLS below 1.2 is insecure (RFC 8996) and stays off";
                faults.warn("tls-min-version", text);
                suites
            }
            other => {
                let reason = format!(
                    "{other:?} is unknown; use VersionTLS10, VersionTLS11, VersionTLS12 or \
                     VersionTLS13"
                );
                faults.add("tls-min-version", reason);
                suites
            }
        };
        TlsConfig { tls12, rules }
    }

    /// TLS 1.2 with the suites of the flag.
    fn suites(&self, faults: &mut Faults) -> Tls12 {
        const FLAG: &str = "cipher-suites";
        let lists = self.cipher_suites.iter();
        let names: Vec<_> = lists.flat_map(|list| go_flags::parse_list(list)).collect();
        if names.is_empty() {
            return Tls12::AnySuite;
        }
        let supported = Tls12::supported_suites();
        let (mut suites, mut left_out) = (Vec::new(), Vec::new());
        for name in &names {
            match GO_CIPHER_SUITES.iter().find(|(known, _)| known == name) {
                Some((_, None)) => {}
                Some((_, Some(suite))) if supported.contains(suite) => suites.push(*suite),
                Some(_) => left_out.push(name.as_str()),
                None => faults.add(FLAG, format!("{name} does not exist or is insecure")),
            }
        }
        if !left_out.is_empty() {
            let names = left_out.join(", ");
            faults.warn(FLAG, format!("left out, because the TLS library lacks CBC: {names}"));
        }
        if suites.is_empty() {
            faults.warn(FLAG, "names no suite of TLS 1.2 that is there: TLS 1.3 alone is spoken");
        }
        Tls12::Suites(suites)
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Flags {
        #[command(flatten)]
        tls: TlsFlags,
    }

    fn check(args: &[&str]) -> Result<(TlsConfig, Vec<String>), String> {
        let args = ["x"].iter().chain(args).map(OsString::from);
        let flags: Flags = go_flags::try_parse_from(args).map_err(|exit| exit.text)?;
        let mut faults = Faults::new();
        let tls = flags.tls.check(&mut faults);
        let warnings = faults.finish().map_err(|errors| errors.to_string())?;
        Ok((tls, warnings))
    }

    #[test]
    fn tls_1_2_is_spoken_unless_the_oldest_version_is_1_3() {
        for args in [&[][..], &["--tls-min-version="], &["--tls-min-version=VersionTLS12"]] {
            assert_eq!(check(args).unwrap(), (TlsConfig::default(), vec![]), "{args:?}");
        }
        for old in ["--tls-min-version=VersionTLS10", "--tls-min-version=VersionTLS11"] {
            let (tls, warnings) = check(&[old]).unwrap();
            assert_eq!((tls, warnings.len()), (TlsConfig::default(), 1), "{old}");
        }
        let (tls, warnings) = check(&["--tls-min-version=VersionTLS13"]).unwrap();
        assert_eq!((tls.tls12, warnings.len()), (Tls12::Off, 0));
        assert!(check(&["--tls-min-version=VersionTLS14"]).is_err());
    }

    #[test]
    fn cipher_suites_are_those_of_all_lists_that_the_library_has() {
        let (tls, warnings) = check(&[
            "--cipher-suites=TLS_AES_128_GCM_SHA256,TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
            "--cipher-suites=[TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256]",
        ])
        .unwrap();
        let expected = vec![
            CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
            CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        ];
        assert_eq!((tls.tls12, warnings), (Tls12::Suites(expected), vec![]));
        let (tls, warnings) = check(&["--cipher-suites=TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA,\
             TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384"])
        .unwrap();
        let expected = vec![CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384];
        assert_eq!(tls.tls12, Tls12::Suites(expected));
        assert!(warnings[0].contains("TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA"), "{warnings:?}");
        let (tls, warnings) = check(&["--cipher-suites=TLS_AES_128_GCM_SHA256"]).unwrap();
        assert_eq!((tls.tls12, warnings.len()), (Tls12::Suites(vec![]), 1));
        for unknown in ["TLS_RSA_WITH_AES_128_CBC_SHA", "tls_aes_128_gcm_sha256"] {
            let fault = check(&[&format!("--cipher-suites={unknown}")]).unwrap_err();
            assert!(fault.contains(&format!("--cipher-suites: {unknown}")), "{fault}");
        }
    }

    #[test]
    fn every_suite_of_go_without_cbc_is_there() {
        let supported = Tls12::supported_suites();
        for (name, suite) in GO_CIPHER_SUITES {
            let Some(suite) = suite else { continue };
            assert_eq!(supported.contains(&suite), !name.contains("CBC"), "{name}");
        }
    }

    #[test]
    fn strict_certificates_are_a_choice() {
        assert_eq!(check(&[]).unwrap().0.rules, CertificateRules::Go);
        let strict = check(&["--strict-certificates"]).unwrap().0;
        assert_eq!(strict.rules, CertificateRules::Strict);
    }
}
