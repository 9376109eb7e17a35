//! Tunnels within one process: the bridge to a Konnectivity peer holds one end and plays our kind
//! of peer on it.
//!
//! ```text
//!  Ends { agent, server }
//!
//!  agent: Tunnel ══ QMux ══ pipe ══ QMux ══ server: Tunnel
//! ```

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, duplex};

use crate::{
    ConnectError, Settings, Tunnel,
    qmux::{Peer, Role, establish},
};

/// Bytes that each direction of the pipe holds until its reader takes them.
const PIPE_LEN: usize = 128 * 1024;
/// An idle time-out that no process lives to see: a year.
const NEVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// Both ends of a tunnel within one process.
#[derive(Debug)]
pub struct Ends {
    /// The agent's end.
    pub agent: Tunnel,
    /// The server's end.
    pub server: Tunnel,
}

/// Makes a tunnel whose ends are set up with these settings. Each end takes `peer` for what is at
/// the other. Both have the same memory ([`Tunnel::set_memory`]).
///
/// It lives however long it is idle, and sends no keep-alive packets: both ends share their
/// process's fate.
///
/// # Errors
/// When the handshake fails.
///
/// # Cancel safety
/// Cancel safe: dropping the future drops both ends.
pub async fn connect(
    peer: Peer,
    agent: &Settings,
    server: &Settings,
) -> Result<Ends, ConnectError> {
    establish_both(pipe(), peer, &lasting(agent), &lasting(server)).await
}

/// Both ends of a pipe.
pub(crate) fn pipe() -> (DuplexStream, DuplexStream) {
    duplex(PIPE_LEN)
}

/// The settings of an end that lives however long it is idle.
pub(crate) fn lasting(settings: &Settings) -> Settings {
    Settings { idle_timeout: NEVER, keep_alive_interval: None, ..*settings }
}

/// Makes a tunnel on the agent's and the server's end of a byte stream.
pub(crate) async fn establish_both<IO>(
    (agent_io, server_io): (IO, IO),
    peer: Peer,
    agent: &Settings,
    server: &Settings,
) -> Result<Ends, ConnectError>
where
    IO: AsyncRead + AsyncWrite + Send + 'static,
{
    let (agent, server) = tokio::try_join!(
        establish(agent_io, Role::Client, peer.clone(), agent),
        establish(server_io, Role::Server, peer, server),
    )?;
    let agent = Tunnel::from(agent);
    let server = Tunnel::from(server).with_memory_of(&agent);
    Ok(Ends { agent, server })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio::time::sleep;

    use super::*;
    use crate::Carrier;

    #[tokio::test(start_paused = true)]
    async fn the_ends_send_nothing_while_they_are_idle_and_live_on() {
        let (settings, peer) = (Settings::default(), Peer::local(Carrier::Grpc));
        let Ends { agent, server } = connect(peer, &settings, &settings).await.unwrap();
        assert_eq!(agent.carrier(), Carrier::Grpc);
        let sent = || [&agent, &server].map(|end| end.stats().sent_bytes);
        let before = sent();
        sleep(settings.idle_timeout * 1000).await;
        assert_eq!(sent(), before);
        let (mut send, _recv) = server.open().await.unwrap();
        send.write_chunk(Bytes::from_static(b"first")).await.unwrap();
        let (_send, mut recv) = agent.accept().await.unwrap();
        assert_eq!(recv.read_chunks(&mut [Bytes::new()]).await, Ok(Some(1)));
    }
}
