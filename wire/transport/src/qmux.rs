//! The carrier where UDP does not get through: QMux, which is QUIC's streams over a byte stream
//! (draft-ietf-quic-qmux-02). Decision 0008 says why it is spoken here.
//!
//! The byte stream is TLS over TCP, see [`super::tcp`], or anything else that is reliable, such as
//! a pipe within one process, see [`super::memory`]. All streams share its order: a lost packet
//! delays them all, which is why QUIC is preferred. They do not share a reader: a stream that is
//! not read has its own window, and the others go on.

//= docs/protocol.md#1-carrier

mod fault;
mod frame;
mod halves;
mod io;
mod mux;
mod stream;

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use culvert_wire::code::CloseCode;
use parking_lot::{Mutex, MutexGuard};
use rustls_pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    select,
    sync::{Notify, SetOnce},
};

pub(crate) use self::halves::{RecvStream, SendStream};
use self::{halves::Handle, mux::Mux, stream::Wakers};
use super::{Carrier, ConnectError, Settings, TransportFault, TunnelLost, TunnelStats};

/// Which end of the byte stream this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The agent's, which made the connection.
    Client,
    /// The server's.
    Server,
}

impl Role {
    /// The lowest bit of the streams that this end opens (RFC 9000 §2.1).
    fn bit(self) -> u64 {
        match self {
            Self::Client => 0,
            Self::Server => 1,
        }
    }
}

/// The peer at the other end of the byte stream.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// What carries the byte stream.
    pub carrier: Carrier,
    /// Its certificate chain, leaf first, if it presented one.
    pub certificates: Option<Vec<CertificateDer<'static>>>,
}

/// Begins QMux on a reliable byte stream whose other end does the same in the other role.
///
/// # Errors
/// When the peer does not begin within the idle time-out, or speaks another protocol.
///
/// # Cancel safety
/// Cancel safe: dropping the future closes the byte stream.
pub async fn establish<IO>(
    stream: IO,
    role: Role,
    peer: Peer,
    settings: &Settings,
) -> Result<Connection, ConnectError>
where
    IO: AsyncRead + AsyncWrite + Send + 'static,
{
    let idle = u64::try_from(settings.idle_timeout.as_millis()).unwrap_or(u64::MAX >> 2);
    let mux = Mux::new(role, settings.stream_receive_window, settings.max_streams, idle);
    let shared = Arc::new(Shared::new(mux, peer));
    start(stream, &shared, settings);
    let connection = Connection { owner: Arc::new(Owner(shared.clone())) };
    loop {
        let opened = shared.opened.notified();
        if shared.lock().peer().is_some() {
            return Ok(connection);
        }
        select! {
            () = opened => {}
            lost = shared.closed() => return Err(ConnectError::Handshake(lost)),
        }
    }
}

/// Starts the tasks of a connection. When one of them ends or panics, the connection ends.
#[expect(
    clippy::disallowed_methods,
    reason = "they outlive the owner by the time that its close may take, and end by themselves"
)]
fn start<IO>(stream: IO, shared: &Arc<Shared>, settings: &Settings)
where
    IO: AsyncRead + AsyncWrite + Send + 'static,
{
    let (reader, writer) = tokio::io::split(stream);
    let reading = io::read(reader, shared.clone(), settings.idle_timeout);
    let writing = io::write(writer, shared.clone(), settings.keep_alive_interval);
    let (read_end, write_end) = (EndOfTask(shared.clone()), EndOfTask(shared.clone()));
    tokio::spawn(async move {
        reading.await;
        drop(read_end);
    });
    tokio::spawn(async move {
        writing.await;
        drop(write_end);
    });
}

/// Ends the connection when it is dropped: when a task has ended or panicked.
struct EndOfTask(Arc<Shared>);

impl Drop for EndOfTask {
    fn drop(&mut self) {
        self.0.lose(TransportFault::Ended.into());
    }
}

/// A connection whose peer does what the script says, for the fuzzer.
#[cfg(fuzzing)]
pub fn fuzz_peer(script: &[u8]) {
    let _ = mux::exercise(script);
}

/// The state that the tasks, the handles and the streams of one connection share.
struct Shared {
    mux: Mutex<Mux>,
    /// Notified when there may be something to send.
    work: Notify,
    /// Notified when the peer has opened a stream, or allows one more.
    opened: Notify,
    /// Why the connection is over.
    lost: SetOnce<TunnelLost>,
    /// Set once the close was written.
    flushed: SetOnce<()>,
    /// The code and the reason with which this side closed the tunnel.
    close_reason: OnceLock<(CloseCode, String)>,
    peer: Peer,
    /// Microseconds for which the writer waited for the byte stream.
    sending: AtomicU64,
    /// `sent` and `sending` when the rate was measured last.
    measured: Mutex<(u64, u64)>,
    /// Bytes written to and read from the byte stream.
    sent: AtomicU64,
    received: AtomicU64,
    rtt_micros: AtomicU64,
}

impl Shared {
    fn new(mux: Mux, peer: Peer) -> Self {
        Self {
            mux: Mutex::new(mux),
            work: Notify::new(),
            opened: Notify::new(),
            lost: SetOnce::new(),
            flushed: SetOnce::new(),
            close_reason: OnceLock::new(),
            peer,
            sending: AtomicU64::new(0),
            measured: Mutex::default(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            rtt_micros: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Mux> {
        self.mux.lock()
    }

    /// Ends the connection for this reason, unless it has ended already.
    fn lose(&self, lost: TunnelLost) {
        let _ = self.lost.set(lost);
    }

    fn close(&self, code: CloseCode, reason: &str) {
        // Only the first close counts, for the peer too.
        if self.close_reason.set((code, reason.to_owned())).is_ok() {
            self.lock().close(true, code.as_u32().into(), reason);
            self.lose(TunnelLost::ClosedHere { code, reason: reason.to_owned() });
        }
    }

    async fn closed(&self) -> TunnelLost {
        self.lost.wait().await.clone()
    }

    /// Bytes per second that the byte stream takes while it is written to, since the last call;
    /// `None` if it was not.
    fn sent_rate(&self) -> Option<u64> {
        let now = [&self.sent, &self.sending].map(|count| count.load(Ordering::Relaxed));
        let before = std::mem::replace(&mut *self.measured.lock(), now.into());
        let (sent, micros) = (now[0] - before.0, now[1] - before.1);
        (sent > 0).then(|| sent.saturating_mul(1_000_000) / micros.max(1))
    }

    fn set_rtt(&self, rtt: Duration) {
        let micros = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX);
        self.rtt_micros.store(micros, Ordering::Relaxed);
    }
}

/// Closes the connection when its last handle, those of its streams included, is dropped.
struct Owner(Arc<Shared>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.close(CloseCode::DONE, "");
    }
}

/// An established QMux connection: make a [`Tunnel`](crate::Tunnel) of it.
#[derive(Clone)]
pub struct Connection {
    owner: Arc<Owner>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("peer", &self.shared().peer).finish_non_exhaustive()
    }
}

impl Connection {
    fn shared(&self) -> &Shared {
        &self.owner.0
    }

    pub(super) async fn open(&self) -> Result<(SendStream, RecvStream), TunnelLost> {
        self.stream(Mux::open).await
    }

    pub(super) async fn accept(&self) -> Result<(SendStream, RecvStream), TunnelLost> {
        self.stream(Mux::accept).await
    }

    /// Waits for the stream that `get` gives.
    async fn stream(
        &self,
        get: impl Fn(&mut Mux) -> Option<(u64, Arc<Wakers>)>,
    ) -> Result<(SendStream, RecvStream), TunnelLost> {
        loop {
            let opened = self.shared().opened.notified();
            if let Some(lost) = self.shared().lost.get() {
                return Err(lost.clone());
            }
            let stream = get(&mut self.shared().lock());
            if let Some((id, wakers)) = stream {
                let handle = Handle::new(id, wakers, self.owner.clone());
                return Ok((SendStream::new(handle.clone()), RecvStream::new(handle)));
            }
            select! {
                () = opened => {}
                lost = self.shared().closed() => return Err(lost),
            }
        }
    }

    pub(super) fn close(&self, code: CloseCode, reason: &str) {
        self.shared().close(code, reason);
    }

    pub(super) async fn closed(&self) -> TunnelLost {
        self.shared().closed().await
    }

    pub(super) async fn flushed(&self, limit: Duration) {
        let _ = tokio::time::timeout(limit, self.shared().flushed.wait()).await;
    }

    pub(super) fn set_max_streams(&self, count: u32) {
        self.shared().lock().set_max_streams(count);
        self.shared().work.notify_one();
    }

    pub(super) fn remote_address(&self) -> SocketAddr {
        self.shared().peer.address
    }

    pub(super) fn carrier(&self) -> Carrier {
        self.shared().peer.carrier
    }

    pub(super) fn peer_certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        self.shared().peer.certificates.clone()
    }

    pub(super) fn stats(&self) -> TunnelStats {
        let now = |count: &AtomicU64| count.load(Ordering::Relaxed);
        TunnelStats {
            rtt: Duration::from_micros(now(&self.shared().rtt_micros)),
            sent_bytes: now(&self.shared().sent),
            received_bytes: now(&self.shared().received),
            ..TunnelStats::default()
        }
    }
}
