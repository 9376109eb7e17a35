//! Flags of the queues that Konnectivity has for its streams. Culvert accepts and ignores them:
//! each stream has a window of its own. Server and agent differ in the defaults alone.

use crate::faults::Faults;

/// Help of `--xfr-channel-size`.
pub const CHANNEL_SIZE: &str = "Length of Konnectivity's queue of packets. Accepted and ignored: \
                                --stream-receive-window bounds what waits for one connection, \
                                and --memory-limit what waits for all";

/// Help of `--warn-on-channel-limit`.
pub const WARN_ON_CHANNEL_LIMIT: &str =
    "Log a warning when Konnectivity's queue of packets is full. Accepted and ignored";

/// Checks `--xfr-channel-size` by Konnectivity's rule, and warns if it is not the default.
pub fn check_channel_size(size: i64, default: i64, faults: &mut Faults) {
    const FLAG: &str = "xfr-channel-size";
    faults.require(size > 0, FLAG, format!("must be greater than 0, got {size}"));
    if size != default {
        faults.warn(FLAG, "has no effect, see --stream-receive-window and --memory-limit");
    }
}
