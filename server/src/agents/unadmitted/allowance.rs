//! The limit of what a peer may send on a byte stream before it is admitted.
//!
//! An introduction is small: in QMux parameters and a hello, in HTTP/2 the preface, settings, and
//! headers with a token. Both protocols let a peer send more than that: HTTP/2 keeps what arrives
//! on a stream that is not read, as far as the windows of a Konnectivity agent go, and both have
//! frames that need no window and cost work. QUIC has windows of its own.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, ReadBuf};
use tokio_util::sync::CancellationToken;

use crate::filtered::{Filtered, ReadFilter};

/// Maximum number of bytes that a peer may send before it is admitted.
const MAX_BYTES: usize = 64 * 1024;

/// A byte stream on which a peer may send a little until it is admitted, and then anything.
pub(in crate::agents) type Limited<IO> = Filtered<IO, Allowance>;

/// Limits a byte stream at its beginning, until `admitted` is cancelled. `exceeded` is cancelled
/// when the peer has sent more than it may; nothing of the stream is read any more then.
pub(super) fn limited<IO>(
    io: IO,
    admitted: CancellationToken,
    exceeded: CancellationToken,
) -> Limited<IO> {
    Filtered::new(io, Allowance { read: 0, lifted: false, admitted, exceeded })
}

/// What is left of what the peer may send.
#[derive(Debug)]
pub(in crate::agents) struct Allowance {
    /// Number of bytes that were read before the peer was admitted.
    read: usize,
    /// Whether the peer was found to be admitted: the token is not asked again, which takes a lock.
    lifted: bool,
    admitted: CancellationToken,
    exceeded: CancellationToken,
}

impl ReadFilter for Allowance {
    fn poll_read<IO: AsyncRead + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read > MAX_BYTES {
            // The owner of the attempt ends the connection.
            return Poll::Pending;
        }
        let before = buf.filled().len();
        ready!(Pin::new(io).poll_read(cx, buf))?;
        self.lifted = self.lifted || self.admitted.is_cancelled();
        if self.lifted {
            return Poll::Ready(Ok(()));
        }
        self.read += buf.filled().len() - before;
        if self.read <= MAX_BYTES {
            return Poll::Ready(Ok(()));
        }
        buf.set_filled(before);
        self.exceeded.cancel();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        time::timeout,
    };

    use super::*;
    use crate::agents::{
        join::JoinError,
        unadmitted::{Attempt, JOIN_TIMEOUT},
    };

    #[tokio::test(start_paused = true)]
    async fn a_peer_may_send_a_little_before_it_is_admitted_and_then_anything() {
        for admitted in [false, true] {
            let (mut peer, io) = duplex(4 * MAX_BYTES);
            let attempt = Attempt::of_admitted();
            let mut io = attempt.limit(io);
            let mut read = vec![0; MAX_BYTES];
            peer.write_all(&read).await.unwrap();
            io.read_exact(&mut read).await.unwrap();
            attempt.within(async { Ok(()) }).await.unwrap();
            if admitted {
                attempt.admit();
            }
            peer.write_all(&read).await.unwrap();
            let reading = attempt.within(async { Ok(io.read_exact(&mut read).await.unwrap()) });
            let outcome = reading.await;
            assert_eq!(outcome.is_ok(), admitted);
            if !admitted {
                assert!(matches!(outcome, Err(JoinError::Excess)));
                assert!(matches!(attempt.failed().await, JoinError::Excess));
                // An admission that comes too late does not lift it.
                attempt.admit();
                assert!(timeout(JOIN_TIMEOUT, io.read(&mut read)).await.is_err());
            }
        }
    }
}
