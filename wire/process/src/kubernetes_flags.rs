//! Flags of kube-apiserver's client that server and agent share.

use clap::Args;

/// Shared flags, to be flattened into those of a process.
#[derive(Debug, Clone, Args)]
pub struct KubernetesFlags {
    /// Kubeconfig of the client of kube-apiserver; empty uses the pod's service account
    #[arg(long, help_heading = "Kubernetes client", value_name = "FILE", default_value = "")]
    pub kubeconfig: String,

    /// Media type of requests to kube-apiserver. Accepted and ignored: requests are JSON
    #[arg(
        long,
        help_heading = "Kubernetes client",
        value_name = "TYPE",
        default_value = "application/vnd.kubernetes.protobuf"
    )]
    pub kube_api_content_type: String,

    /// Namespace of the servers' Leases
    #[arg(
        long,
        help_heading = "Server set",
        value_name = "NAMESPACE",
        default_value = "kube-system"
    )]
    pub lease_namespace: String,
}
