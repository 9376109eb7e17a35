//! The steps of a dial that touch the network, which tests script.

use std::{io, net::SocketAddr};

use culvert_transport::splice::{self, Local, SocketAbort, SocketRead, SocketWrite};
use tokio::net::TcpStream;

#[cfg(test)]
use super::scripted::Scripted;
use crate::lookups::{LookupError, Lookups};

/// A connection to a target.
pub(super) type Connection =
    Local<SocketRead<TcpStream>, SocketWrite<TcpStream>, SocketAbort<TcpStream>>;

/// The network of targets.
#[derive(Debug)]
pub(super) enum TargetNetwork {
    /// The host's own network.
    Host {
        /// Lookups of targets' names.
        lookups: Lookups,
    },
    /// A network that answers from a script.
    #[cfg(test)]
    Scripted(Scripted),
}

impl TargetNetwork {
    /// The addresses of a host name, with `port`.
    ///
    /// # Errors
    /// The resolver's.
    ///
    /// # Cancel safety
    /// As [`Lookups::look_up`].
    pub(super) async fn look_up(
        &self,
        host: &str,
        port: u16,
    ) -> Result<Vec<SocketAddr>, LookupError> {
        let mut addresses = match self {
            Self::Host { lookups } => lookups.look_up(host).await?.to_vec(),
            #[cfg(test)]
            Self::Scripted(script) => script.look_up().await?,
        };
        addresses.iter_mut().for_each(|address| address.set_port(port));
        Ok(addresses)
    }

    /// Connects to one address.
    ///
    /// # Errors
    /// The kernel's.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future abandons the connection.
    pub(super) async fn connect(&self, address: SocketAddr) -> io::Result<Connection> {
        let socket = match self {
            Self::Host { .. } => TcpStream::connect(address).await?,
            #[cfg(test)]
            Self::Scripted(script) => script.connect(address).await?,
        };
        splice::prepare(&socket);
        let (reader, writer, abort) = splice::halves(socket);
        Ok(Local::new(reader, writer, abort))
    }
}
