//! The steps of a dial that touch the host's network. Tests script them through [`TargetNetwork`].

use std::{io, net::SocketAddr};

use culvert_transport::splice::{
    self, Abort, Local, LocalRead, LocalWrite, SocketAbort, SocketRead, SocketWrite,
};
use tokio::net::TcpStream;

use crate::lookups::{LookupError, Lookups};

/// A connection to a target on the network `N`.
pub(crate) type LocalOf<N> =
    Local<<N as TargetNetwork>::Reader, <N as TargetNetwork>::Writer, <N as TargetNetwork>::Abort>;

/// The steps of a dial that touch the host's network.
pub(crate) trait TargetNetwork: Send + Sync {
    /// The reading half of a connection.
    type Reader: LocalRead;
    /// The writing half of a connection.
    type Writer: LocalWrite;
    /// The reset of a connection.
    type Abort: Abort;

    /// The addresses of a host name, with `port`.
    ///
    /// # Errors
    /// The resolver's.
    ///
    /// # Cancel safety
    /// As [`Lookups::look_up`].
    fn look_up(
        &self,
        host: &str,
        port: u16,
    ) -> impl Future<Output = Result<Vec<SocketAddr>, LookupError>> + Send;

    /// Connects to one address.
    ///
    /// # Errors
    /// The kernel's.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future abandons the connection.
    fn connect(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<LocalOf<Self>>> + Send
    where
        Self: Sized;
}

/// The host's own network.
#[derive(Debug)]
pub(crate) struct HostNetwork {
    /// Lookups of targets' names.
    pub(crate) lookups: Lookups,
}

impl TargetNetwork for HostNetwork {
    type Reader = SocketRead<TcpStream>;
    type Writer = SocketWrite<TcpStream>;
    type Abort = SocketAbort<TcpStream>;

    async fn look_up(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, LookupError> {
        let mut addresses = self.lookups.look_up(host).await?.to_vec();
        addresses.iter_mut().for_each(|address| address.set_port(port));
        Ok(addresses)
    }

    async fn connect(&self, address: SocketAddr) -> io::Result<LocalOf<Self>> {
        let socket = TcpStream::connect(address).await?;
        splice::prepare(&socket);
        let (reader, writer, abort) = splice::halves(socket);
        Ok(Local::new(reader, writer, abort))
    }
}
