//! `culvert-server precheck`: whether this server would work, step by step.

use culvert_process::precheck::{Report, access::Access, steps};

use crate::{
    config::{Config, FrontendListen},
    files::ServerFiles,
    metrics::ServerMetrics,
};

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
    steps::uses_of_certificates(&files.reloads, report);
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
    let reviews = Access {
        group: "authentication.k8s.io",
        resource: "tokenreviews",
        namespace: None,
        verbs: &["create"],
        optional: &[],
    };
    let nodes = Access { group: "", resource: "nodes", verbs: &["get"], ..reviews };
    let verbs = &["create", "get", "list", "update", "delete"];
    let leases = Access::leases(namespace.unwrap_or_default(), verbs, &["watch"]);
    let clients = [(&files.reviews, reviews), (&files.leases, leases), (&files.nodes, nodes)];
    if clients.iter().all(|(client, _)| client.is_none()) {
        report.skip("kube-apiserver", "no flag needs it");
    }
    for (client, access) in clients {
        if let Some(client) = client
            && !access.check(client, report).await
        {
            return;
        }
    }
}
