//! `culvert-server precheck`: whether this server would work, step by step.

use std::time::Duration;

use culvert_process::{
    kubernetes::CurrentClient,
    precheck::{Report, steps},
};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::{Api, api::PostParams};
use tokio::time::timeout;

use crate::{
    config::{Config, FrontendListen},
    files::ServerFiles,
    metrics::ServerMetrics,
};

/// Time for kube-apiserver to answer one question.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Makes all steps.
pub(crate) async fn check(config: Config, report: &mut Report) {
    steps::udp_buffers(report);
    check_ports(&config, report);
    let Ok(metrics) = ServerMetrics::new() else { return };
    let files = match ServerFiles::read(&config, metrics.inner()) {
        Ok(files) => files,
        Err(faults) => {
            let remedy = "mend the file; nothing that needs it was checked";
            return faults.iter().for_each(|fault| report.fail("files", fault, remedy));
        }
    };
    // A key that does not match its certificate is a fault of the files.
    report.ok("files", "can be read, and each key matches its certificate");
    certificate("--cluster-cert", &config.agents.certificate.certificate, report);
    if let FrontendListen::Tcp { certificate: pair, .. } = &config.frontend.listen {
        certificate("--server-cert", &pair.certificate, report);
    }
    check_kubernetes(&config, &files, report).await;
}

fn certificate(flag: &str, file: &std::path::Path, report: &mut Report) {
    match culvert_transport::tls::certificates(file) {
        Ok(chain) => steps::certificate(&format!("certificate of {flag}"), chain.first(), report),
        Err(error) => report.fail(format!("certificate of {flag}"), error, "give PEM"),
    }
}

fn check_ports(config: &Config, report: &mut Report) {
    steps::port("--agent-port", config.agents.address, true, report);
    steps::port("--agent-port", config.agents.address, false, report);
    match &config.frontend.listen {
        FrontendListen::Unix { path, .. } => steps::socket_folder("--uds-name", path, report),
        FrontendListen::Tcp { address, .. } => {
            steps::port("--server-port", *address, false, report)
        }
    }
    steps::port("--health-port", config.health_address, false, report);
    steps::port("--admin-port", config.admin_address, false, report);
    if let Some(path) = &config.operator_socket {
        steps::socket_folder("--operator-socket", path, report);
    }
}

async fn check_kubernetes(config: &Config, files: &ServerFiles, report: &mut Report) {
    let namespace = config.leases.as_ref().map(|leases| leases.namespace.as_str());
    let leases = ["create", "get", "list", "update", "delete"];
    let questions = [
        (&files.reviews, "authentication.k8s.io", "tokenreviews", &["create"][..], None),
        (&files.leases, "coordination.k8s.io", "leases", &leases[..], namespace),
        (&files.nodes, "", "nodes", &["get"][..], None),
    ];
    if questions.iter().all(|(client, ..)| client.is_none()) {
        report.skip("kube-apiserver", "no flag needs it");
    }
    for (client, group, resource, verbs, namespace) in questions {
        let Some(client) = client else { continue };
        for verb in verbs {
            let attributes = ResourceAttributes {
                group: Some(group.into()),
                resource: Some(resource.into()),
                verb: Some((*verb).into()),
                namespace: namespace.map(str::to_owned),
                ..ResourceAttributes::default()
            };
            let step = format!("kube-apiserver: {verb} {resource}");
            if !may(client, attributes, step, report).await {
                // It is not reached, so that further questions have no answer.
                return;
            }
        }
    }
}

/// Adds whether kube-apiserver permits something. Returns whether it answered.
async fn may(
    client: &CurrentClient,
    attributes: ResourceAttributes,
    step: String,
    report: &mut Report,
) -> bool {
    let api: Api<SelfSubjectAccessReview> = Api::all(client.get());
    let spec = SelfSubjectAccessReviewSpec {
        resource_attributes: Some(attributes),
        ..SelfSubjectAccessReviewSpec::default()
    };
    let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
    let remedy = "check --kubeconfig, its address and its credentials";
    match timeout(ANSWER_TIMEOUT, api.create(&PostParams::default(), &review)).await {
        Ok(Ok(answer)) if answer.status.as_ref().is_some_and(|status| status.allowed) => {
            report.ok(step, "permitted");
        }
        Ok(Ok(_)) => {
            report.fail(step, "not permitted", "bind the roles of deploy/kubernetes/rbac.yaml");
        }
        Ok(Err(error)) => {
            report.fail(step, culvert_process::kubernetes::reason(&error), remedy);
            return false;
        }
        Err(_) => {
            report.fail(step, format!("no answer within {ANSWER_TIMEOUT:?}"), remedy);
            return false;
        }
    }
    true
}
