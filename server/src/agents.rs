//! Whoever comes in at the tunnel port, from the handshake to the end: an agent of ours, or a Konnectivity one.

pub mod admission;
pub mod konnectivity;
pub mod listener;
pub mod session;

use std::sync::Arc;

use tokio::time::timeout;

use crate::agents::{
    listener::{Arrival, Incoming},
    session::{JOIN_TIMEOUT, JoinError, TunnelContext},
};

/// Serves whoever comes in until they are gone.
pub(crate) async fn serve(incoming: Incoming, context: Arc<TunnelContext>) {
    let remote = incoming.remote_address();
    let arrived = timeout(JOIN_TIMEOUT, incoming.complete()).await;
    match arrived.map(|arrived| arrived.map_err(JoinError::from)) {
        Ok(Ok(Arrival::Tunnel(tunnel))) => session::serve_tunnel(tunnel, None, context).await,
        Ok(Ok(Arrival::Konnectivity(stream))) => {
            konnectivity::serve(*stream, remote, context).await
        }
        Ok(Err(error)) => session::not_joined(remote, &error, &context),
        Err(_) => session::not_joined(remote, &JoinError::TimedOut, &context),
    }
}
