//! What a token says by itself, before kube-apiserver is asked about it.
//!
//! Tokens of service accounts are signed JWTs in compact form (RFC 7519): those that are bound to a
//! pod, and those of Secrets, which have neither an audience nor an expiry. Their claims are read
//! here without a check of the signature, so they can only refuse a token, never accept one.

use aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD as BASE64};
use culvert_process::kubernetes::Timestamp;
use culvert_wire::control::Secret;
use serde_json::{Map, Value};

use super::Refusal;

/// Difference between this host's clock and that of kube-apiserver, with its own leeway of a
/// minute, within which a token is left to kube-apiserver; in seconds.
const LEEWAY: f64 = 300.0;

/// SHA-256 of a token, so that tokens themselves are not kept.
pub(super) type TokenDigest = [u8; SHA256_OUTPUT_LEN];

pub(super) fn token_digest(token: &Secret) -> TokenDigest {
    let mut bytes = [0; SHA256_OUTPUT_LEN];
    bytes.copy_from_slice(digest(&SHA256, token.expose().as_bytes()).as_ref());
    bytes
}

/// The claims of a token that matter here. A claim of another type than RFC 7519 has it is left to
/// kube-apiserver.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Claims(Map<String, Value>);

impl Claims {
    /// The claims of `token`.
    ///
    /// # Errors
    /// When the token is no JWT, and so not a service account's.
    pub(super) fn of(token: &Secret) -> Result<Self, Refusal> {
        let malformed = || Refusal::Invalid("it is no token of a service account".into());
        let parts: Vec<_> = token.expose().split('.').collect();
        let [header, claims, signature] = parts[..] else { return Err(malformed()) };
        let object = |part| serde_json::from_slice(&BASE64.decode(part).ok()?).ok();
        let _: Map<String, Value> = object(header).ok_or_else(malformed)?;
        let claims = object(claims).ok_or_else(malformed)?;
        let is_signed = !signature.is_empty() && BASE64.decode(signature).is_ok();
        if is_signed { Ok(Self(claims)) } else { Err(malformed()) }
    }

    /// Refuses a token that kube-apiserver would refuse as well.
    ///
    /// # Errors
    /// When the token is for other audiences, or not valid now.
    pub(super) fn check(&self, audience: &str, now: Timestamp) -> Result<(), Refusal> {
        let invalid = |reason: String| Err(Refusal::Invalid(reason));
        let is_meant = match self.0.get("aud") {
            Some(Value::String(one)) => one == audience,
            Some(Value::Array(all)) if !all.is_empty() => all.iter().any(|one| one == audience),
            _ => true,
        };
        if !is_meant {
            return invalid(format!("the token is not meant for {audience:?}"));
        }
        #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 are far below 2^52")]
        let now = now.as_second() as f64;
        let time = |claim| self.0.get(claim).and_then(Value::as_f64);
        if time("exp").is_some_and(|expiry| expiry + LEEWAY < now) {
            return invalid("the token has expired".into());
        }
        if time("nbf").is_some_and(|begin| now + LEEWAY < begin)
            || time("iat").is_some_and(|issued| now + LEEWAY < issued)
        {
            return Err(Refusal::Refused("the token is not valid yet".into()));
        }
        Ok(())
    }

    /// Who issued the token.
    pub(super) fn issuer(&self) -> Option<&str> {
        self.0.get("iss")?.as_str()
    }

    /// The last second in which the token is valid; `None` for a token without an expiry.
    pub(super) fn expiry(&self) -> Option<Timestamp> {
        let expiry = self.0.get("exp")?;
        #[expect(clippy::cast_possible_truncation, reason = "far too large is refused below")]
        let seconds = expiry.as_i64().or_else(|| expiry.as_f64().map(|float| float as i64))?;
        Timestamp::from_second(seconds).ok()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::jwt;

    const NOW: i64 = 1_800_000_000;
    const AUDIENCE: &str = "system:konnectivity-server";

    fn checked(claims: Value) -> Result<(), String> {
        let claims = Claims::of(&jwt(&claims)).unwrap();
        let now = Timestamp::from_second(NOW).unwrap();
        claims.check(AUDIENCE, now).map_err(|refusal| refusal.to_string())
    }

    #[test]
    fn what_is_no_signed_jwt_is_no_token_of_a_service_account() {
        let good = jwt(&json!({}));
        let [header, claims, signature] =
            good.expose().split('.').collect::<Vec<_>>().try_into().unwrap();
        assert!(Claims::of(&good).is_ok());
        let not_json = BASE64.encode("x");
        let list = BASE64.encode("[]");
        for token in [
            String::new(),
            "opaque".into(),
            format!("{header}.{claims}"),
            format!("{header}.{claims}."),
            format!("{header}.{claims}.{signature}."),
            format!("{header}.{claims}.!"),
            format!("{not_json}.{claims}.{signature}"),
            format!("{header}.{not_json}.{signature}"),
            format!("{header}.{list}.{signature}"),
            format!("{header}.{claims}=.{signature}"),
        ] {
            let refusal = Claims::of(&Secret::new(&token).unwrap()).unwrap_err();
            assert_eq!(refusal.label(), "unauthenticated", "{token}");
        }
    }

    #[test]
    fn a_token_is_refused_for_its_audience_alone_if_it_has_one() {
        for accepted in [
            json!({}),
            json!({ "aud": [] }),
            json!({ "aud": AUDIENCE }),
            json!({ "aud": ["api", AUDIENCE] }),
            json!({ "aud": 7 }),
        ] {
            assert_eq!(checked(accepted.clone()), Ok(()), "{accepted}");
        }
        for refused in [json!({ "aud": "api" }), json!({ "aud": ["api", 7] }), json!({ "aud": "" })]
        {
            let reason = checked(refused.clone()).unwrap_err();
            assert!(reason.contains("not meant for"), "{refused}: {reason}");
        }
    }

    #[test]
    fn a_token_is_refused_for_its_times_only_beyond_the_leeway() {
        let margin = 300;
        for accepted in [
            json!({ "exp": NOW - margin, "nbf": NOW + margin, "iat": NOW + margin }),
            json!({ "exp": 1.5e10, "nbf": 0.5 }),
            json!({ "exp": "tomorrow" }),
        ] {
            assert_eq!(checked(accepted.clone()), Ok(()), "{accepted}");
        }
        for (refused, expected) in [
            (json!({ "exp": NOW - margin - 1 }), "the token has expired"),
            (json!({ "nbf": NOW + margin + 1 }), "the token is not valid yet"),
            (json!({ "iat": NOW + margin + 1 }), "the token is not valid yet"),
        ] {
            let reason = checked(refused.clone()).unwrap_err();
            assert!(reason.ends_with(expected), "{refused}: {reason}");
        }
    }

    #[test]
    fn issuer_and_expiry_are_read_if_they_are_there() {
        let claims = |claims: Value| Claims::of(&jwt(&claims)).unwrap();
        let both = claims(json!({ "iss": "https://issuer", "exp": NOW }));
        assert_eq!(both.issuer(), Some("https://issuer"));
        assert_eq!(both.expiry(), Timestamp::from_second(NOW).ok());
        let neither = claims(json!({ "iss": 7, "exp": 1e300 }));
        assert_eq!((neither.issuer(), neither.expiry()), (None, None));
    }
}
