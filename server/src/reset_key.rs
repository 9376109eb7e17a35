//! What makes the stateless-reset key of this server differ from that of every other one.

use std::{fs, io, os::unix::fs::MetadataExt};

use tracing::warn;

/// Differs from boot to boot and from host to host; containers see their host's.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Its inode distinguishes the network namespaces of one host.
const NETWORK_NAMESPACE: &str = "/proc/self/ns/net";

/// The owner for which the reset key is derived. `None` if this server cannot be distinguished from
/// others with the same secret: then its key is random.
///
/// Replicas share the secret when they share a TLS key. The owner stays the same when the process
/// is started again on the same host in the same network namespace, as a container of a pod is.
pub(crate) fn reset_key_owner() -> Option<String> {
    match owner() {
        Ok(owner) => Some(owner),
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
