//! What kube-apiserver permits this process (`SelfSubjectAccessReview`).

use std::time::Duration;

use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::{Api, api::PostParams};
use tokio::time::timeout;

use super::Report;
use crate::kubernetes::{CurrentClient, reason};

/// Time for kube-apiserver to answer one question.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Permissions on one kind of resource.
#[derive(Clone, Copy, Debug)]
pub struct Access<'a> {
    /// API group; empty for the core one.
    pub group: &'static str,
    /// Resource, in plural.
    pub resource: &'static str,
    /// Namespace; `None` for a resource that has none.
    pub namespace: Option<&'a str>,
    /// Verbs without which the process does not work.
    pub verbs: &'static [&'static str],
    /// Verbs without which it works less well.
    pub optional: &'static [&'static str],
}

impl Access<'_> {
    /// The Leases of servers, in their namespace.
    pub fn leases<'a>(
        namespace: &'a str,
        verbs: &'static [&'static str],
        optional: &'static [&'static str],
    ) -> Access<'a> {
        let (group, resource) = ("coordination.k8s.io", "leases");
        Access { group, resource, namespace: Some(namespace), verbs, optional }
    }

    /// Adds a step for each verb. Returns whether kube-apiserver answered: without an answer,
    /// further questions have none either.
    pub async fn check(&self, client: &CurrentClient, report: &mut Report) -> bool {
        let verbs = self.verbs.iter().map(|verb| (*verb, true));
        let optional = self.optional.iter().map(|verb| (*verb, false));
        for (verb, is_needed) in verbs.chain(optional) {
            let step = format!("kube-apiserver: {verb} {}", self.resource);
            let remedy = "bind the roles of deploy/helm/rendered/permissions.yaml";
            match self.permits(client, verb).await {
                Ok(true) => report.ok(step, "permitted"),
                Ok(false) if is_needed => report.fail(step, "not permitted", remedy),
                Ok(false) => report.warn(step, "not permitted; it works less well without", remedy),
                Err(reason) => {
                    let remedy = "check --kubeconfig, its address and its credentials";
                    report.fail(step, reason, remedy);
                    return false;
                }
            }
        }
        true
    }

    async fn permits(&self, client: &CurrentClient, verb: &str) -> Result<bool, String> {
        let attributes = ResourceAttributes {
            group: Some(self.group.into()),
            resource: Some(self.resource.into()),
            verb: Some(verb.into()),
            namespace: self.namespace.map(str::to_owned),
            ..ResourceAttributes::default()
        };
        let spec = SelfSubjectAccessReviewSpec {
            resource_attributes: Some(attributes),
            ..SelfSubjectAccessReviewSpec::default()
        };
        let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
        let api: Api<SelfSubjectAccessReview> = Api::all(client.get());
        let asked = timeout(ANSWER_TIMEOUT, api.create(&PostParams::default(), &review)).await;
        let answer = asked.map_err(|_| client.no_answer_within(ANSWER_TIMEOUT))?;
        let answer = answer.map_err(|error| reason(&error))?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }
}
