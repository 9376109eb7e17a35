//! Why a socket cannot send to its peer at all, for as long as it has one peer.

use std::{
    io,
    sync::atomic::{AtomicI32, Ordering},
};

use nix::errno::Errno;
use tokio::sync::Notify;

/// The last error of a call that sends which shows that no packet gets to the peer.
#[derive(Debug, Default)]
pub(in crate::quic) struct Unsendable {
    /// Its number; 0 before the first one.
    errno: AtomicI32,
    reported: Notify,
}

impl Unsendable {
    /// Records that the kernel refused a packet.
    pub(super) fn refused(&self, error: &io::Error) {
        if let Some(errno) = error.raw_os_error().filter(|errno| is_definite(*errno)) {
            self.errno.store(errno, Ordering::Release);
            self.reported.notify_one();
        }
    }

    /// Completes once no packet gets to the peer. For one waiter.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(in crate::quic) async fn error(&self) -> io::Error {
        loop {
            match self.errno.load(Ordering::Acquire) {
                0 => self.reported.notified().await,
                errno => return io::Error::from_raw_os_error(errno),
            }
        }
    }
}

/// Whether the next packet would be refused as well: the host has no route or no address for it
/// (`EINVAL` is that of a route that discards), or a packet filter of the host forbids it.
fn is_definite(errno: i32) -> bool {
    matches!(
        Errno::from_raw(errno),
        Errno::ENETUNREACH
            | Errno::EHOSTUNREACH
            | Errno::ENETDOWN
            | Errno::EADDRNOTAVAIL
            | Errno::EINVAL
            | Errno::EACCES
            | Errno::EPERM
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_route_is_definite_and_a_full_queue_is_not() {
        let unsendable = Unsendable::default();
        for errno in [Errno::ENOBUFS, Errno::EMSGSIZE, Errno::ECONNREFUSED, Errno::EAGAIN] {
            unsendable.refused(&errno.into());
        }
        assert_eq!(unsendable.errno.load(Ordering::Acquire), 0);
        unsendable.refused(&Errno::ENETUNREACH.into());
        assert_eq!(unsendable.error().await.kind(), io::ErrorKind::NetworkUnreachable);
    }
}
