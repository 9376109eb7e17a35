//! What certificates and tokens say of themselves, for lists and checks. Nothing is verified.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer as _, X509Certificate},
};

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateText {
    /// The subject.
    pub subject: String,
    /// The first second of its validity.
    pub not_before: Timestamp,
    /// The last second of its validity.
    pub not_after: Timestamp,
    /// Alternative names that are DNS names or addresses.
    pub names: Vec<String>,
}

impl CertificateText {
    /// What a certificate in DER says; `None` if it cannot be parsed.
    pub fn of(certificate: &[u8]) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let validity = parsed.validity();
        let names = parsed.subject_alternative_name().ok().flatten();
        let names = names.map(|names| names.value.general_names.iter().filter_map(name).collect());
        Some(Self {
            subject: parsed.subject().to_string(),
            not_before: Timestamp::from_second(validity.not_before.timestamp()).ok()?,
            not_after: Timestamp::from_second(validity.not_after.timestamp()).ok()?,
            names: names.unwrap_or_default(),
        })
    }
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes)
                .ok()
                .map(|bytes| std::net::Ipv4Addr::from(bytes).to_string()),
            16 => <[u8; 16]>::try_from(*bytes)
                .ok()
                .map(|bytes| std::net::Ipv6Addr::from(bytes).to_string()),
            _ => None,
        },
        _ => None,
    }
}

/// What a token says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenText {
    /// Who it is for, such as a service account.
    pub subject: Option<String>,
    /// Whom it may be presented to.
    pub audiences: Vec<String>,
    /// When it was issued.
    pub issued: Option<Timestamp>,
    /// When it expires.
    pub expires: Option<Timestamp>,
}

impl TokenText {
    /// What a JSON Web Token says; `None` if it is none.
    pub fn of(token: &str) -> Option<Self> {
        let mut parts = token.trim().split('.');
        let (Some(_), Some(claims), Some(_), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return None;
        };
        let claims = BASE64_URL_SAFE_NO_PAD.decode(claims).ok()?;
        let claims: Value = serde_json::from_slice(&claims).ok()?;
        let time =
            |name: &str| claims[name].as_i64().and_then(|at| Timestamp::from_second(at).ok());
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let audiences = match &claims["aud"] {
            Value::Array(items) => items.iter().filter_map(text).collect(),
            value => text(value).into_iter().collect(),
        };
        claims.is_object().then(|| Self {
            subject: text(&claims["sub"]),
            audiences,
            issued: time("iat"),
            expires: time("exp"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_audiences_and_times() {
        let encode = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(text);
        let token = |claims: &str| format!("{}.{}.{}", encode("{}"), encode(claims), encode("s"));
        let text = TokenText::of(&token(
            r#"{"sub":"system:serviceaccount:n:a","aud":["x","y"],"iat":1,"exp":3600}"#,
        ))
        .unwrap();
        assert_eq!(text.subject.as_deref(), Some("system:serviceaccount:n:a"));
        assert_eq!(text.audiences, ["x", "y"]);
        assert_eq!(text.expires, Some(Timestamp::from_second(3600).unwrap()));
        assert_eq!(TokenText::of(&token(r#"{"aud":"z"}"#)).unwrap().audiences, ["z"]);
        for bad in ["", "a.b", "a.b.c.d", &token("[]"), &token("x")] {
            assert_eq!(TokenText::of(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_certificate_has_a_subject_dates_and_names() {
        let names = vec!["a.test".to_owned(), "10.0.0.1".to_owned(), "fd00::1".to_owned()];
        let mut params = rcgen::CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "sample");
        params.not_after = rcgen::date_time_ymd(2040, 1, 2);
        let certificate = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
        let text = CertificateText::of(certificate.der()).unwrap();
        assert_eq!(text.subject, "CN=sample");
        assert_eq!(text.not_after.to_string(), "2040-01-02T00:00:00Z");
        assert_eq!(text.names, ["a.test", "10.0.0.1", "fd00::1"]);
        assert_eq!(CertificateText::of(b"x"), None);
    }
}
