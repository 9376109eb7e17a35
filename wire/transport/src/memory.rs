//! A tunnel within one process.

use std::time::Duration;

use tokio::io::duplex;

use crate::{
    ConnectError, Settings, Tunnel,
    qmux::{Peer, Role, establish},
};

/// Bytes that the pipe takes before its reader does.
const PIPE: usize = 128 * 1024;

/// Both ends of a tunnel within one process.
#[derive(Debug)]
pub struct Ends {
    /// The end that is an agent's.
    pub agent: Tunnel,
    /// The end that is a server's.
    pub server: Tunnel,
}

/// A pipe does not die of silence.
const NEVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// Makes a tunnel whose ends are both here; each end believes that `peer` is at the other.
///
/// # Errors
/// Never in practice: both sides speak the same.
pub async fn pipe(peer: Peer, agent: &Settings, server: &Settings) -> Result<Ends, ConnectError> {
    let silent = |settings: &Settings| Settings {
        idle_timeout: NEVER,
        keep_alive_interval: None,
        ..*settings
    };
    let (near, far) = duplex(PIPE);
    let (agent, server) = (silent(agent), silent(server));
    let (agent, server) = tokio::try_join!(
        establish(near, Role::Client, peer.clone(), &agent),
        establish(far, Role::Server, peer, &server),
    )?;
    Ok(Ends { agent, server })
}
