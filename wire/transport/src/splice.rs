//! Joins a stream and a local connection: bytes in both directions, and every end passed on
//! exactly.
//!
//! | on one side | on the other |
//! | --- | --- |
//! | clean end | clean end; the other half stays open as long as it likes |
//! | reset, error, crash | reset with a code, then a reset of the socket: never a clean end |
//! | peer stops reading | this stream's window fills; no other stream is affected |
//! | peer has closed for reading | stop with a code, at once, even while idle |
//! | written, then closed | every byte arrives |
//! | host gone | reset with a code, after two and a half minutes |
//! | closed for good, and what it sent is not taken | reset with a code, after five minutes without progress |
//!
//! The two directions are pumped in one task, each at its own pace. A direction whose reader has
//! closed is read on and discarded until the other direction has ended, because a peer that cannot
//! write its answer to the end may never read what it was sent.
//!
//! ```text
//!                   ┌── pump_to_tunnel ──▶ SendHalf
//!  Local { reader ──┘                                  ══ tunnel ══
//!          writer ◀─── pump_from_tunnel ◀── RecvHalf
//!          guard }     resets the connection unless the splice ended in order
//! ```
//!
//! `local` says what a connection must be able to do, `socket` does it for sockets, `pumps` moves
//! the bytes, `outcome` says how it ended.
//= docs/protocol.md#9-splicing

mod backlog;
mod local;
mod outcome;
mod outq;
mod preamble;
mod pumps;
mod socket;
mod tcp_info;
#[cfg(test)]
mod tests;

use culvert_wire::code::StreamCode;
use tokio::select;

use self::pumps::Pumps;
pub use self::{
    backlog::Backlog,
    local::{Abort, Local, LocalFault, LocalRead, LocalWrite},
    outcome::{Cut, HalfEnd, Meter, Outcome},
    preamble::Preamble,
    socket::{
        BufferedRead, BufferedWrite, SocketAbort, SocketRead, SocketWrite, SpliceSocket, buffered,
        halves, prepare, until_hung_up,
    },
};
use crate::{RecvHalf, SendHalf, budget::Held};

/// Joins a local connection and a stream until both directions have ended.
///
/// # Cancel safety
/// Dropping the future resets both sides.
// Not `async`: a future that only awaits another one holds all arguments a second time.
pub fn splice<R: LocalRead, W: LocalWrite, A: Abort>(
    local: Local<R, W, A>,
    stream: (SendHalf, RecvHalf),
    meter: &Meter,
) -> impl Future<Output = Outcome> {
    splice_after((), local, stream, meter)
}

/// As [`splice()`], where the backlog has what was taken from the stream before there was a local
/// connection.
///
/// # Cancel safety
/// Dropping the future resets both sides.
pub fn splice_behind<R: LocalRead, W: LocalWrite, A: Abort>(
    backlog: Backlog,
    local: Local<R, W, A>,
    stream: (SendHalf, RecvHalf),
    meter: &Meter,
) -> impl Future<Output = Outcome> {
    splice_all((), backlog, local, stream, meter)
}

/// As [`splice()`], where a preamble still precedes the stream's bytes. What the local side sends
/// goes out meanwhile.
///
/// # Cancel safety
/// Dropping the future resets both sides.
pub fn splice_after<R: LocalRead, W: LocalWrite, A: Abort>(
    preamble: impl Preamble,
    local: Local<R, W, A>,
    stream: (SendHalf, RecvHalf),
    meter: &Meter,
) -> impl Future<Output = Outcome> {
    let backlog = Backlog::new(&stream.0);
    splice_all(preamble, backlog, local, stream, meter)
}

async fn splice_all<R: LocalRead, W: LocalWrite, A: Abort>(
    preamble: impl Preamble,
    backlog: Backlog,
    mut local: Local<R, W, A>,
    (mut send, mut recv): (SendHalf, RecvHalf),
    meter: &Meter,
) -> Outcome {
    let progress = send.progress().clone();
    let pumps = Pumps::new(meter, progress.clone(), local.stuck_timeout);
    let taken = local.writer.progress();
    let (reader, writer) = (&mut local.reader, &mut local.writer);
    let (holder, guard) = (send.memory().holder(Held::Send), &local.guard);
    let end = select! {
        end = pumps.run(
            (reader, &holder), (writer, backlog), preamble, guard, (&mut send, &mut recv),
        ) => end,
        () = holder.cut() => Err(Cut::Memory),
        cut = pumps.stuck(taken.as_deref()) => Err(cut),
        fault = guard.vanished() => Err(fault.into()),
    };
    match &end {
        Ok((HalfEnd::Finished, _)) => local.guard.disarm(),
        Ok((HalfEnd::Stopped(code), _)) => {
            let (reader, writer) = (&mut local.reader, &mut local.writer);
            let is_flushed = pumps::discard_until_flushed(reader, writer, &holder).await;
            // Without a reset the kernel would offer the rest to the peer for many minutes.
            if *code == StreamCode::CLOSED && is_flushed {
                local.guard.disarm();
            }
        }
        Err(cut) => {
            send.reset(cut.code());
            recv.stop(cut.code());
        }
    }
    Outcome { to_tunnel: progress.to_tunnel(), from_tunnel: progress.from_tunnel(), end }
}

/// Checks when it is compiled that a splice can move between threads.
const _: fn(SocketLocal<tokio::net::TcpStream>, (SendHalf, RecvHalf), &'static Meter) = {
    fn assert_send<T: Send>(_: T) {}
    |local, stream, meter| assert_send(splice(local, stream, meter))
};
type SocketLocal<S> = Local<SocketRead<S>, SocketWrite<S>, SocketAbort<S>>;
