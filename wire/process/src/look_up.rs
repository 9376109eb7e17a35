//! Look-ups of names by the system's resolver, which blocks its thread.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
};

use tokio::sync::Semaphore;

use crate::threads::on_thread;

/// Look-ups for one purpose. Those of different purposes do not wait for one another.
#[derive(Debug)]
pub struct LookUps {
    permits: Semaphore,
}

impl LookUps {
    /// At most `limit` look-ups at a time; more wait.
    pub const fn new(limit: usize) -> Self {
        Self { permits: Semaphore::const_new(limit) }
    }

    /// The addresses of `host`, with `port`. An address is its own, and needs no look-up.
    ///
    /// # Errors
    /// The resolver's, or the kernel's where no thread can be started.
    ///
    /// # Cancel safety
    /// Cancel safe. A look-up that has begun keeps its place until it is done.
    pub async fn look_up(&'static self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        if let Ok(address) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let permit = self.permits.acquire().await.map_err(io::Error::other)?;
        let host = host.to_owned();
        on_thread("look-up", move || {
            let _permit = permit;
            Ok((host, port).to_socket_addrs()?.collect())
        })
        .await?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static LOOK_UPS: LookUps = LookUps::new(1);

    #[tokio::test]
    async fn names_are_looked_up_and_addresses_are_not() {
        let found = LOOK_UPS.look_up("localhost", 80).await.unwrap();
        assert!(found.iter().all(|found| found.ip().is_loopback() && found.port() == 80));
        assert!(!found.is_empty());
        let _no_look_up = LOOK_UPS.permits.acquire().await.unwrap();
        for address in ["127.0.0.1", "fd00::1"] {
            let found = LOOK_UPS.look_up(address, 80).await.unwrap();
            assert_eq!(found, [SocketAddr::new(address.parse().unwrap(), 80)]);
        }
    }

    #[tokio::test]
    async fn a_name_without_an_address_is_an_error_and_frees_its_place() {
        for _ in 0..2 {
            LOOK_UPS.look_up("no-such-host.invalid", 80).await.unwrap_err();
        }
    }
}
