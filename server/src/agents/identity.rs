//! Who an agent is, as far as it has proved it.

use culvert_process::kubernetes::Timestamp;

/// The service account of an accepted token, and the pod that the token is bound to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ServiceAccount {
    /// Namespace.
    pub(crate) namespace: String,
    /// Name.
    pub(crate) name: String,
    /// Node of the pod; `None` for a token that is bound to none, and with a kube-apiserver that
    /// does not report it.
    pub(crate) node: Option<String>,
    /// Name of the pod.
    pub(crate) pod: Option<String>,
    /// UID of the pod.
    pub(crate) pod_uid: Option<String>,
    /// When the token expires; `None` for one that does not.
    pub(crate) expiry: Option<Timestamp>,
}
