//! The stateless-reset key of this server, which no other server may share.

use std::{fs, io, os::unix::fs::MetadataExt};

use culvert_transport::quic::ResetKey;
use tracing::warn;

/// Differs from boot to boot and from host to host; containers see their host's.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Its inode distinguishes the network namespaces of one host.
const NETWORK_NAMESPACE: &str = "/proc/self/ns/net";

/// The key that `secret` yields for this server; `None` where this server cannot be distinguished
/// from others that hold the secret, so that a random key has to do.
///
/// Replicas share the secret when they share a TLS key. The key stays the same when the process is
/// started again on the same host in the same network namespace, as a container of a pod is.
pub(super) fn reset_key(secret: &[u8]) -> Option<ResetKey> {
    match owner() {
        Ok(owner) => Some(ResetKey::derive(secret, &owner)),
        Err(error) => {
            warn!(%error, "no reset key of its own: agents notice a restart of this server late");
            None
        }
    }
}

fn owner() -> io::Result<String> {
    let boot = fs::read_to_string(BOOT_ID)?;
    let namespace = fs::metadata(NETWORK_NAMESPACE)?.ino();
    Ok(format!("{}/{namespace}", boot.trim()))
}
