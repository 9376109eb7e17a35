//! The one accept loop: errors of accept are logged and waited out, and never end a listener.
//!
//! ```no_run
//! # async fn run(mut agents: culvert_process::accept::Acceptor<tokio::net::TcpListener>) {
//! loop {
//!     let (socket, remote) = agents.accept().await;
//! #   drop((socket, remote));
//! }
//! # }
//! ```

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream, unix},
    time::{Instant, sleep_until},
};

use crate::{
    descriptors::{Reserve, is_shortage},
    rate_limited,
};

/// Pause after a failed accept. The usual cause is a lack of file descriptors, and the failed
/// connection stays in the kernel's queue: without a pause the loop would spin.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Minimum time between two log lines about failed accepts.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// A socket that accepts connections.
pub trait Listener {
    /// An accepted connection.
    type Connection;

    /// The next connection, or the kernel's error. Only the last caller's waker is woken.
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Connection>>;
}

impl Listener for TcpListener {
    type Connection = (TcpStream, SocketAddr);

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Connection>> {
        self.poll_accept(cx)
    }
}

impl Listener for UnixListener {
    type Connection = (UnixStream, unix::SocketAddr);

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Connection>> {
        self.poll_accept(cx)
    }
}

/// A listener whose accept cannot fail.
///
/// Each listener has an `Acceptor` of its own, so that the pause of one delays no other.
#[derive(Debug)]
pub struct Acceptor<L> {
    listener: L,
    name: &'static str,
    retry_at: Option<Instant>,
    /// Descriptors to accept with when the process has no others.
    reserve: Option<Reserve>,
}

impl<L: Listener> Acceptor<L> {
    /// Accepts from `listener`, which log lines call `name`.
    pub fn new(name: &'static str, listener: L) -> Self {
        Self { listener, name, retry_at: None, reserve: None }
    }

    /// As [`Self::new`], and keeps a few descriptors, so that it can accept when the process has no
    /// others. While [`Self::is_short`], its connections must be short.
    pub fn with_reserve(name: &'static str, listener: L) -> Self {
        Self { reserve: Some(Reserve::new()), ..Self::new(name, listener) }
    }

    /// Whether descriptors are missing from the reserve. Takes those that are free again.
    pub fn is_short(&mut self) -> bool {
        self.reserve.as_mut().is_some_and(|reserve| !reserve.refill())
    }

    /// The listener, for its address.
    pub fn listener(&self) -> &L {
        &self.listener
    }

    /// The next connection.
    ///
    /// An error that concerns one connection is skipped. After any other, the next attempt comes
    /// 100 ms later, and at most one line in 10 s is logged for each listener. Without descriptors,
    /// one of the reserve is used first.
    ///
    /// # Cancel safety
    /// Cancel safe: no accepted connection is lost, and the pause after an error is not shortened.
    pub async fn accept(&mut self) -> L::Connection {
        loop {
            if let Some(retry_at) = self.retry_at {
                sleep_until(retry_at).await;
                self.retry_at = None;
            }
            match poll_fn(|cx| self.listener.poll_accept(cx)).await {
                Ok(connection) => return connection,
                Err(error) if concerns_one_connection(&error) => {}
                Err(error) if is_shortage(&error) && self.release() => {}
                Err(error) => {
                    self.retry_at = Some(Instant::now() + RETRY_INTERVAL);
                    rate_limited!(
                        LOG_INTERVAL, per listener = self.name, WARN, %error,
                        "a connection was not accepted"
                    );
                    self.is_short();
                }
            }
        }
    }

    /// Frees a descriptor of the reserve; whether there was one.
    fn release(&mut self) -> bool {
        self.reserve.as_mut().is_some_and(Reserve::release)
    }
}

/// Whether the client has gone before it was accepted; the next one can be accepted at once.
fn concerns_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, collections::VecDeque};

    use nix::errno::Errno;

    use super::*;

    /// Answers each accept with the next result of the script, then with none.
    struct Scripted(RefCell<VecDeque<Result<u32, Errno>>>);

    impl Listener for Scripted {
        type Connection = u32;

        fn poll_accept(&self, _: &mut Context<'_>) -> Poll<io::Result<u32>> {
            match self.0.borrow_mut().pop_front() {
                Some(result) => Poll::Ready(result.map_err(io::Error::from)),
                None => Poll::Pending,
            }
        }
    }

    fn acceptor(script: impl Into<VecDeque<Result<u32, Errno>>>) -> Acceptor<Scripted> {
        Acceptor::new("test", Scripted(RefCell::new(script.into())))
    }

    #[tokio::test(start_paused = true)]
    async fn each_lack_of_descriptors_costs_one_pause() {
        let start = Instant::now();
        let mut acceptor = acceptor([Ok(1), Err(Errno::EMFILE), Err(Errno::ENFILE), Ok(2)]);
        assert_eq!(acceptor.accept().await, 1);
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert_eq!(acceptor.accept().await, 2);
        let pauses = 2 * RETRY_INTERVAL;
        let late = start.elapsed() - pauses;
        assert!(late < Duration::from_millis(5), "{late:?}"); // timers count whole milliseconds
    }

    #[tokio::test(start_paused = true)]
    async fn a_reserve_is_used_before_a_pause() {
        let start = Instant::now();
        let script = Scripted(RefCell::new([Err(Errno::EMFILE), Ok(1)].into()));
        let mut acceptor = Acceptor::with_reserve("test", script);
        assert_eq!(acceptor.accept().await, 1);
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert!(!acceptor.is_short(), "it is full again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_was_aborted_early_costs_no_pause() {
        let start = Instant::now();
        let mut acceptor = acceptor([Err(Errno::ECONNABORTED), Ok(1)]);
        assert_eq!(acceptor.accept().await, 1);
        assert_eq!(start.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_accept_keeps_its_pause() {
        let start = Instant::now();
        let mut acceptor = acceptor([Err(Errno::EMFILE), Ok(1)]);
        for _ in 0..9 {
            let cancelled = tokio::time::timeout(RETRY_INTERVAL / 10, acceptor.accept()).await;
            assert_eq!(cancelled.ok(), None);
        }
        assert_eq!(acceptor.accept().await, 1);
        assert!(start.elapsed() >= RETRY_INTERVAL, "{:?}", start.elapsed());
        assert!(start.elapsed() < RETRY_INTERVAL * 2, "{:?}", start.elapsed());
    }

    #[tokio::test]
    async fn tcp_and_unix_connections_are_accepted() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut tcp = Acceptor::new("tcp", listener);
        let address = tcp.listener().local_addr().unwrap();
        let (client, (_, remote)) = tokio::join!(TcpStream::connect(address), tcp.accept());
        assert_eq!(client.unwrap().local_addr().unwrap(), remote);

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let mut unix = Acceptor::new("unix", UnixListener::bind(&path).unwrap());
        let (client, _) = tokio::join!(UnixStream::connect(&path), unix.accept());
        client.unwrap();
    }
}
