//! Faults of TLS in words: whose certificate it is, and dates as dates.

use x509_parser::time::ASN1Time;

/// Why this side refused the peer, from what rustls reports.
pub(super) fn refusal(reason: &str) -> String {
    let Some((_, fault)) = reason.split_once("invalid peer certificate: ") else {
        let known = if reason.contains("peer sent no certificates") {
            "the peer presents no certificate"
        } else if is_not_tls(reason) {
            "the peer's answer is not TLS"
        } else {
            reason
        };
        return known.into();
    };
    if fault == "UnknownIssuer" {
        return "the peer's certificate is of no CA that this side trusts".into();
    }
    if is_of_another_version(fault) {
        return "the peer's certificate is of X.509 version 1 or 2, and version 3 is needed".into();
    }
    if is_never_valid(fault) {
        return "the peer's certificate is never valid: its notAfter is before its notBefore"
            .into();
    }
    if let Some(date) = date_after(fault, "is not valid after ") {
        return format!("the peer's certificate expired at {date}");
    }
    if let Some(date) = date_after(fault, "is not valid before ") {
        return format!("the peer's certificate is not valid before {date}, by this side's clock");
    }
    if let Some(names) = fault.strip_prefix("certificate not valid for name ") {
        let names = names.replace("DnsName(\"", "").replace("IpAddress(", "").replace("\")", "");
        let names =
            names.replace(')', "").replace("; certificate is only valid for ", ", but for ");
        return format!("the peer's certificate is not for the name {names}");
    }
    format!("the peer's certificate cannot be accepted: {fault}")
}

/// Whether a refusal is of a certificate that no clock and no CA of this side would accept.
pub(super) fn needs_another_certificate(reason: &str) -> bool {
    let fault = reason.split_once("invalid peer certificate: ").map(|(_, fault)| fault);
    fault.is_some_and(|fault| is_of_another_version(fault) || is_never_valid(fault))
}

fn is_of_another_version(fault: &str) -> bool {
    fault.contains("UnsupportedCertVersion")
}

/// One that has expired is reported with its date.
fn is_never_valid(fault: &str) -> bool {
    fault == "Expired"
}

/// Whether a refusal is of bytes that are no record of TLS: another service has the port.
pub(super) fn is_not_tls(reason: &str) -> bool {
    reason.contains("message of type InvalidContentType")
}

/// The date of the seconds since 1970 that follow this text.
fn date_after(fault: &str, text: &str) -> Option<String> {
    let (_, rest) = fault.split_once(text)?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    let date = ASN1Time::from_timestamp(digits.parse().ok()?).ok()?.to_datetime();
    let (hour, minute, second) = date.to_hms();
    Some(format!("{}T{hour:02}:{minute:02}:{second:02}Z", date.date()))
}

/// Why the peer refused this side, from the alert that it sent (RFC 8446 §6.2).
pub(super) fn alert(alert: u8) -> String {
    let text = match alert {
        40 => "it has no key exchange or cipher suite in common with this side",
        42 => "it cannot accept this side's certificate, or its name",
        43 | 46 => "it cannot accept this side's certificate",
        44 => "this side's certificate was revoked",
        45 => "this side's certificate has expired, or is not valid yet, by its clock",
        48 => "this side's certificate is of no CA that it trusts",
        51 => "a signature with this side's certificate is wrong, or that of its CA",
        70 => "it has no version of TLS in common with this side",
        116 => "it requires a certificate, and this side presents none",
        120 => "it speaks no protocol that this side offers",
        _ => return format!("TLS alert {alert}"),
    };
    format!("{text} (TLS alert {alert})")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustls::{
        CertificateError, Error,
        pki_types::{ServerName, UnixTime},
    };

    use super::*;

    fn words(fault: CertificateError) -> String {
        let raw = Error::InvalidCertificate(fault).to_string();
        let over_quic = format!("the cryptographic handshake failed: error 48: {raw}");
        assert_eq!(refusal(&raw), refusal(&over_quic));
        refusal(&raw)
    }

    #[test]
    fn a_refusal_names_the_peers_certificate_its_dates_and_its_names() {
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let (time, past, future) = (at(1_800_000_000), at(1_706_745_600), at(1_900_000_000));
        let expired = words(CertificateError::ExpiredContext { time, not_after: past });
        assert!(expired.contains("certificate expired at 2024-02-01T00:00:00Z"), "{expired}");
        let early = words(CertificateError::NotValidYetContext { time, not_before: future });
        assert!(early.contains("is not valid before 2030-03-17T17:46:40Z"), "{early}");
        let other = words(CertificateError::NotValidForNameContext {
            expected: ServerName::try_from("wrong.test").unwrap(),
            presented: vec!["IpAddress(127.0.0.1)".into(), "DnsName(\"localhost\")".into()],
        });
        let expected = "the peer's certificate is not for the name \"wrong.test\", but for \
                        127.0.0.1 or localhost";
        assert_eq!(other, expected);
        let unknown = words(CertificateError::UnknownIssuer);
        assert_eq!(unknown, "the peer's certificate is of no CA that this side trusts");
        assert!(words(CertificateError::Revoked).contains("cannot be accepted: "));
        let none = refusal(&Error::NoCertificatesPresented.to_string());
        assert_eq!(none, "the peer presents no certificate");
        let other = Error::from(rustls::InvalidMessage::InvalidContentType).to_string();
        assert_eq!(refusal(&other), "the peer's answer is not TLS");
        let misbehaved = Error::DecryptError.to_string();
        assert_eq!(refusal(&misbehaved), misbehaved);
    }

    #[test]
    fn an_alert_names_this_sides_certificate() {
        assert_eq!(alert(48), "this side's certificate is of no CA that it trusts (TLS alert 48)");
        assert_eq!(
            alert(116),
            "it requires a certificate, and this side presents none (TLS alert 116)"
        );
        assert_eq!(alert(80), "TLS alert 80");
    }
}
