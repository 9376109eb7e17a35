//! Which carrier a tunnel gets.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use culvert_wire::transport::{
    BufferSizes, Tunnel, TunnelLost,
    quic::{self, ConnectError, Settings},
    tcp,
};
use tokio::{select, time::sleep};
use tracing::info;

use crate::config::Transport;

/// How long QUIC may take before TCP is tried beside it: what a handshake takes whose first packets
/// are lost.
const QUIC_ALONE: Duration = Duration::from_secs(3);

/// Makes a tunnel to a server; with QUIC, what the kernel granted its socket.
///
/// # Errors
/// When no carrier that may be used gets through; with [`Transport::Auto`] it is QUIC's reason.
///
/// # Cancel safety
/// Dropping the future gives up what was begun.
pub async fn connect(
    transport: Transport,
    remote: SocketAddr,
    server_name: &str,
    tls: Arc<rustls::ClientConfig>,
    settings: &Settings,
) -> Result<(Tunnel, Option<BufferSizes>), ConnectError> {
    let over_quic = async {
        let connected = quic::connect(remote, server_name, tls.clone(), settings).await;
        connected.map(|(tunnel, buffers)| (tunnel, Some(buffers)))
    };
    let over_tcp = async {
        let connected = tcp::connect(remote, server_name, tls.clone(), settings).await;
        connected.map(|tunnel| (tunnel, None))
    };
    match transport {
        Transport::Quic => over_quic.await,
        Transport::Tcp => over_tcp.await,
        Transport::Auto => {
            let mut over_quic = std::pin::pin!(over_quic);
            let failed = select! {
                connected = &mut over_quic => match connected {
                    Ok(connected) => return Ok(connected),
                    Err(error) => Some(error),
                },
                () = sleep(QUIC_ALONE) => None,
            };
            let Some(error) = failed else {
                info!(%remote, "QUIC has not got through yet, TCP is tried beside it");
                return select! {
                    Ok(connected) = &mut over_quic => Ok(connected),
                    Ok(connected) = over_tcp => Ok(connected),
                    else => Err(ConnectError::Handshake(TunnelLost::TimedOut)),
                };
            };
            info!(%remote, %error, "QUIC does not get through, TCP is tried");
            over_tcp.await.map_err(|_| error)
        }
    }
}
