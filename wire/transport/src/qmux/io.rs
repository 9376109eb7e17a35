//! The two tasks of a QMux connection: one reads, one writes.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::BytesMut;
use culvert_wire::code::CloseCode;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    select,
    time::{Instant, sleep_until, timeout},
};

use super::{
    Shared,
    fault::Fault,
    frame::{Frame, split_record},
    mux::Received,
};
use crate::{TransportFault, TunnelLost};

/// Room for one read, in bytes.
const READ_LEN: usize = 64 * 1024;
/// QUIC's code for a peer that broke the protocol (RFC 9000 §20.1).
const PROTOCOL_VIOLATION: u64 = 0x0a;
/// Maximum time for the peer to take the close and what was queued before it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Reads until the connection is over, and records why it is.
pub(super) async fn read<IO: AsyncRead>(
    mut io: tokio::io::ReadHalf<IO>,
    shared: Arc<Shared>,
    idle_timeout: Duration,
) {
    let mut input = BytesMut::new();
    let lost = loop {
        input.reserve(READ_LEN);
        let read = select! {
            read = timeout(idle_timeout, io.read_buf(&mut input)) => read,
            _ = shared.lost.wait() => return,
        };
        match read {
            Err(_) => break TunnelLost::TimedOut,
            Ok(Err(error)) => break error.into(),
            Ok(Ok(0)) => break TransportFault::Ended.into(),
            Ok(Ok(count)) => {
                shared.received.fetch_add(count as u64, Ordering::Relaxed);
            }
        }
        match receive(&mut input, &shared) {
            Ok(None) => {}
            Ok(Some(lost)) => break lost,
            Err(fault) => {
                let reason = fault.to_string();
                shared.lock().close(false, PROTOCOL_VIOLATION, &reason);
                break TransportFault::Protocol(reason).into();
            }
        }
        shared.work.notify_one();
    };
    shared.lose(lost);
}

/// Takes every whole record; why the connection is over, if it is.
fn receive(input: &mut BytesMut, shared: &Shared) -> Result<Option<TunnelLost>, Fault> {
    let mut mux = shared.lock();
    while let Some(mut record) = split_record(input)? {
        while !record.is_empty() {
            match mux.receive(Frame::decode(&mut record)?)? {
                Received::Nothing => {}
                Received::Streams => shared.opened.notify_waiters(),
                Received::Closed { application: true, code, reason } => {
                    let code = CloseCode::from_wire(code);
                    return Ok(Some(TunnelLost::ClosedByPeer { code, reason }));
                }
                Received::Closed { application: false, code, reason } => {
                    return Ok(Some(TransportFault::Aborted { code, reason }.into()));
                }
            }
        }
    }
    Ok(None)
}

/// Writes until the connection is over, then what is left, with the close at its end.
pub(super) async fn write<IO: AsyncWrite>(
    mut io: tokio::io::WriteHalf<IO>,
    shared: Arc<Shared>,
    keep_alive: Option<Duration>,
) {
    let mut output = BytesMut::new();
    let mut ping = None;
    let mut keep_alive = KeepAlive::new(keep_alive);
    while !shared.lost.initialized() {
        if keep_alive.is_due(shared.received.load(Ordering::Relaxed)) {
            ping = Some((shared.lock().ping(), Instant::now()));
        }
        output.clear();
        shared.lock().fill(&mut output);
        if output.is_empty() {
            select! {
                () = shared.work.notified() => {}
                _ = shared.lost.wait() => {}
                () = until(keep_alive.ping_at) => {}
            }
        } else {
            let (begun, length) = (Instant::now(), output.len());
            let written = select! {
                written = put(&mut io, &mut output) => written,
                // The rest, of which the close may be a part, is written below.
                _ = shared.lost.wait() => break,
            };
            match written {
                Ok(()) => {
                    let micros = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
                    shared.sending.fetch_add(micros, Ordering::Relaxed);
                    shared.sent.fetch_add(length as u64, Ordering::Relaxed);
                }
                Err(error) => shared.lose(error.into()),
            }
        }
        ping = measure(ping, &shared);
    }
    let close = async {
        put(&mut io, &mut output).await?;
        shared.lock().fill(&mut output);
        put(&mut io, &mut output).await?;
        io.shutdown().await
    };
    let _ = timeout(CLOSE_TIMEOUT, close).await;
    let _ = shared.flushed.set(());
}

/// When to send the next ping: an interval after the peer was heard last. What this side sends does
/// not count: the peer need not answer it, so that it keeps only the peer's reader alive.
struct KeepAlive {
    interval: Option<Duration>,
    /// Number of bytes received when the peer was heard last.
    heard: u64,
    /// `None` without an interval.
    ping_at: Option<Instant>,
}

impl KeepAlive {
    fn new(interval: Option<Duration>) -> Self {
        let mut keep_alive = Self { interval, heard: 0, ping_at: None };
        keep_alive.restart();
        keep_alive
    }

    fn restart(&mut self) {
        self.ping_at = self.interval.and_then(|interval| Instant::now().checked_add(interval));
    }

    /// Whether a ping is to be sent now, with this many bytes received so far.
    fn is_due(&mut self, received: u64) -> bool {
        let was_heard = self.heard != received;
        self.heard = received;
        let is_due = !was_heard && self.ping_at.is_some_and(|ping_at| ping_at <= Instant::now());
        if was_heard || is_due {
            self.restart();
        }
        is_due
    }
}

/// Writes and takes out all of `bytes`.
///
/// # Cancel safety
/// Cancel safe: `bytes` has what was not written.
async fn put(io: &mut (impl AsyncWrite + Unpin), bytes: &mut BytesMut) -> std::io::Result<()> {
    io.write_all_buf(bytes).await?;
    io.flush().await
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Records the round-trip time once the ping is answered; the ping, if it is not.
fn measure(ping: Option<(u64, Instant)>, shared: &Shared) -> Option<(u64, Instant)> {
    let (sequence, sent) = ping?;
    if shared.lock().answered() < sequence {
        return ping;
    }
    shared.set_rtt(sent.elapsed());
    None
}
