//! The two tasks of a QMux connection: one that reads, one that writes.

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use culvert_wire::code::CloseCode;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    select,
    time::{Instant, sleep_until, timeout},
};

use super::{
    Shared,
    frame::{Frame, split_record},
    mux::{Fault, Taken},
};
use crate::{TransportFault, TunnelLost};

/// Room for one read.
const READ_LEN: usize = 64 * 1024;
/// QUIC's code for a peer that broke the protocol (RFC 9000 §20.1).
const PROTOCOL_VIOLATION: u64 = 0x0a;
/// How long the peer is given to take the last words.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// Reads until the connection is over, and says why it is.
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
            Ok(Ok(_)) => {}
        }
        match take(&mut input, &shared) {
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
fn take(input: &mut BytesMut, shared: &Shared) -> Result<Option<TunnelLost>, Fault> {
    let mut mux = shared.lock();
    while let Some(mut record) = split_record(input)? {
        while !record.is_empty() {
            match mux.take(Frame::decode(&mut record)?)? {
                Taken::Nothing => {}
                Taken::Opened => shared.opened.notify_waiters(),
                Taken::Closed { application: true, code, reason } => {
                    let code = CloseCode::from_wire(code);
                    return Ok(Some(TunnelLost::ClosedByPeer { code, reason }));
                }
                Taken::Closed { application: false, code, reason } => {
                    return Ok(Some(TransportFault::Aborted { code, reason }.into()));
                }
            }
        }
    }
    Ok(None)
}

/// Writes what there is to write until the connection is over, then its last words.
pub(super) async fn write<IO: AsyncWrite>(
    mut io: tokio::io::WriteHalf<IO>,
    shared: Arc<Shared>,
    keep_alive: Option<Duration>,
) {
    let mut output = BytesMut::new();
    let mut asked = None;
    while !shared.lost.initialized() {
        output.clear();
        shared.lock().fill(&mut output);
        if output.is_empty() {
            let quiet = keep_alive.map(|interval| Instant::now() + interval);
            select! {
                () = shared.work.notified() => {}
                _ = shared.lost.wait() => {}
                () = until(quiet) => {
                    asked = Some((shared.lock().ping(), Instant::now()));
                }
            }
        } else {
            let written = select! {
                written = put(&mut io, &output) => written,
                _ = shared.lost.wait() => break,
            };
            if let Err(error) = written {
                shared.lose(error.into());
            }
        }
        asked = measure(asked, &shared);
    }
    let close_reason = async {
        output.clear();
        shared.lock().fill(&mut output);
        let _ = put(&mut io, &output).await;
        let _ = io.shutdown().await;
    };
    let _ = timeout(FAREWELL_LIMIT, close_reason).await;
    let _ = shared.flushed.set(());
}

async fn put(io: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> std::io::Result<()> {
    io.write_all(bytes).await?;
    io.flush().await
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Learns the round-trip time from a question that has been answered.
fn measure(asked: Option<(u64, Instant)>, shared: &Shared) -> Option<(u64, Instant)> {
    let (question, since) = asked?;
    if shared.lock().answered() < question {
        return asked;
    }
    shared.set_rtt(since.elapsed());
    None
}
