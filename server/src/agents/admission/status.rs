//! The verdict of kube-apiserver about a token, by Konnectivity's rules (`pkg/server/server.go`,
//! `validateAuthToken`): the token must be accepted for the audience, and belong to one account.

use k8s_openapi::api::authentication::v1::{TokenReviewStatus, UserInfo};

use super::{Refusal, ServiceAccount, token::Claims};
use crate::config::TokenConfig;

/// Checks that kube-apiserver accepts the token, and that it belongs to the expected account.
///
/// Whether kube-apiserver could not check the token, or has found it invalid, is not in its answer:
/// both are an error. So such a token is refused, and may be accepted later. A token that is
/// accepted and belongs to another account stays that account's.
pub(super) fn check_status(
    status: TokenReviewStatus,
    claims: &Claims,
    expected: &TokenConfig,
) -> Result<ServiceAccount, Refusal> {
    let refused = |reason: String| Err(Refusal::Refused(reason));
    let invalid = |reason: String| Err(Refusal::Invalid(reason));
    if let Some(error) = status.error.filter(|error| !error.is_empty()) {
        return refused(error);
    }
    if status.authenticated != Some(true) {
        return refused("service account jwt not valid".into());
    }
    // A kube-apiserver without audiences returns none, and has checked its own alone.
    let for_audience =
        status.audiences.is_some_and(|audiences| audiences.contains(&expected.audience));
    if !for_audience {
        return invalid(format!("the token is not meant for {:?}", expected.audience));
    }
    let user = status.user.unwrap_or_default();
    let name = user.username.clone().unwrap_or_default();
    let parts: Vec<_> = name.split(':').collect();
    let [system, kind, namespace, account] = parts[..] else {
        return invalid("unexpected username format".into());
    };
    if (system, kind) != ("system", "serviceaccount") {
        return invalid("username returned is not a service account".into());
    }
    let expect = |what, found: &str, expected: &str| match found == expected {
        true => Ok(()),
        false => {
            let reason = format!("incoming request from {found:?} {what}. Expected {expected:?}");
            Err(Refusal::Invalid(reason))
        }
    };
    expect("namespace", namespace, &expected.namespace)?;
    expect("service account", account, &expected.service_account)?;
    Ok(ServiceAccount {
        namespace: namespace.into(),
        name: account.into(),
        node: extra(&user, "node-name"),
        pod: extra(&user, "pod-name"),
        pod_uid: extra(&user, "pod-uid"),
        expiry: claims.expiry(),
    })
}

/// What kube-apiserver adds about the pod that a token is bound to.
fn extra(user: &UserInfo, name: &str) -> Option<String> {
    let key = format!("authentication.kubernetes.io/{name}");
    let value = user.extra.as_ref()?.get(&key)?.first()?;
    (!value.is_empty()).then(|| value.clone())
}

#[cfg(test)]
mod tests {
    use culvert_process::kubernetes::Timestamp;
    use serde_json::json;

    use super::*;
    use crate::testing::{accepted, account, jwt};

    const AUDIENCE: &str = "system:konnectivity-server";

    fn checked(change: impl FnOnce(&mut TokenReviewStatus)) -> Result<ServiceAccount, String> {
        let mut status = accepted();
        change(&mut status);
        let claims = Claims::of(&jwt(&json!({ "exp": 1_800_000_000 }))).unwrap();
        check_status(status, &claims, &account()).map_err(|refusal| refusal.konnectivity_message())
    }

    fn user(name: &str) -> Option<UserInfo> {
        Some(UserInfo { username: Some(name.into()), ..UserInfo::default() })
    }

    #[test]
    fn a_token_of_the_expected_account_is_accepted() {
        let expected = ServiceAccount {
            namespace: "kube-system".into(),
            name: "konnectivity-agent".into(),
            expiry: Timestamp::from_second(1_800_000_000).ok(),
            ..ServiceAccount::default()
        };
        assert_eq!(checked(|_| {}), Ok(expected.clone()));
        assert_eq!(checked(|status| status.error = Some(String::new())), Ok(expected));
    }

    #[test]
    fn every_other_token_is_refused_in_konnectivitys_words() {
        let refused = |expected: &str, change: fn(&mut TokenReviewStatus)| {
            let text =
                format!("Failed to validate authentication token, err:lookup failed: {expected}");
            assert_eq!(checked(change), Err(text));
        };
        refused("token has expired", |status| status.error = Some("token has expired".into()));
        refused("service account jwt not valid", |status| status.authenticated = Some(false));
        refused("service account jwt not valid", |status| *status = TokenReviewStatus::default());
        refused("unexpected username format", |status| status.user = None);
        refused("unexpected username format", |status| status.user = user("admin"));
        refused("unexpected username format", |status| status.user = user("a:b:c:d:e"));
        refused("username returned is not a service account", |status| {
            status.user = user("system:node:kube-system:konnectivity-agent");
        });
        refused("incoming request from \"ns\" namespace. Expected \"kube-system\"", |status| {
            status.user = user("system:serviceaccount:ns:konnectivity-agent");
        });
        refused(
            "incoming request from \"x\" service account. Expected \"konnectivity-agent\"",
            |status| {
                status.user = user("system:serviceaccount:kube-system:x");
            },
        );
    }

    #[test]
    fn the_pod_and_the_node_of_a_bound_token_are_known() {
        let account = checked(|status| {
            let user = status.user.as_mut().unwrap();
            user.extra = Some(
                [("node-name", "node-1"), ("pod-name", "agent-x"), ("pod-uid", "1-2")]
                    .map(|(key, value)| {
                        (format!("authentication.kubernetes.io/{key}"), vec![value.into()])
                    })
                    .into(),
            );
        })
        .unwrap();
        assert_eq!(account.node.as_deref(), Some("node-1"));
        assert_eq!(account.pod.as_deref(), Some("agent-x"));
        assert_eq!(account.pod_uid.as_deref(), Some("1-2"));
    }

    #[test]
    fn a_token_for_another_audience_is_refused() {
        let meant = format!(
            "Failed to validate authentication token, err:lookup failed: \
             the token is not meant for {AUDIENCE:?}"
        );
        assert_eq!(checked(|status| status.audiences = None), Err(meant.clone()));
        let other = |status: &mut TokenReviewStatus| status.audiences = Some(vec!["other".into()]);
        assert_eq!(checked(other), Err(meant));
    }
}
