//! Whoever comes in at the tunnel port, from the handshake to the end: an agent of ours, or a stock one.

use std::sync::Arc;

use tokio::time::timeout;

use crate::{
    stock_agent,
    tunnel::{self, JOIN_TIMEOUT, JoinError, TunnelContext},
    tunnel_port::{Arrival, Incoming},
};

/// Serves whoever comes in until they are gone.
pub(crate) async fn serve(incoming: Incoming, context: Arc<TunnelContext>) {
    let remote = incoming.remote_address();
    let arrived = timeout(JOIN_TIMEOUT, incoming.complete()).await;
    match arrived.map(|arrived| arrived.map_err(JoinError::from)) {
        Ok(Ok(Arrival::Tunnel(tunnel))) => tunnel::serve_tunnel(tunnel, None, context).await,
        Ok(Ok(Arrival::Stock(stream))) => stock_agent::serve(*stream, remote, context).await,
        Ok(Err(error)) => tunnel::not_joined(remote, &error, &context),
        Err(_) => tunnel::not_joined(remote, &JoinError::TimedOut, &context),
    }
}
