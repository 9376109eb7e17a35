//! What is known about one stream beyond the tunnel that carries it.

use std::{
    any::Any,
    fmt,
    future::ready,
    pin::{Pin, pin},
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use culvert_wire::{DialId, code::StreamCode, resume::ReceivedOffset};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    select,
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::{
    fault::ResumeFault,
    retained::Retained,
    session::{REPORT_BYTES, Session, SessionTunnel},
};
use crate::{RecvHalf, SendHalf, TunnelLost, WriteError};

/// Number of chunks that are sent again between two looks at the link.
const CHUNKS: usize = 32;

/// Completes as [`SendHalf::stopped`].
pub(crate) type Stopped =
    Pin<Box<dyn Future<Output = Result<Option<StreamCode>, TunnelLost>> + Send + Sync>>;

/// Lives as long as a stream is on a tunnel: what the stream uses of it.
pub type Use = Box<dyn Any + Send + Sync>;

/// One stream of a session: what it has sent and received, and the tunnel that it is on.
///
/// Its halves hold it, and the session until both directions are settled. Each time the stream
/// leaves a tunnel, the epoch grows: what the halves still read from the old tunnel does not count.
pub(crate) struct Link {
    id: DialId,
    session: Weak<Session>,
    epoch: AtomicU32,
    state: Mutex<State>,
    /// Notified when the halves have something to take, or the stream was given up.
    changed: Notify,
}

struct State {
    /// The tunnel that the stream is on, or the last one.
    on: Arc<SessionTunnel>,
    /// What the stream uses of the tunnel, as long as it has halves.
    used: Option<Use>,
    /// Number of halves that hold the link.
    halves: u8,
    /// When the stream was found to be without a tunnel.
    waiting_from: Option<Instant>,
    /// Why the last tunnel but this was lost.
    lost_reason: &'static str,
    /// Why the stream will get no other tunnel.
    given_up: Option<TunnelLost>,
    sent: Retained,
    send_end: Option<SendEnd>,
    /// Whether the carrier has delivered the end.
    is_acknowledged: bool,
    /// The halves on the new tunnel, until the old ones take their place.
    next_send: Option<Box<SendHalf>>,
    next_stopped: Option<Stopped>,
    next_recv: Option<Box<RecvHalf>>,
    received: u64,
    /// As far as the peer was told.
    reported: u64,
    /// Whether the peer is to be told more.
    is_due: bool,
    recv_end: Option<RecvEnd>,
}

/// How this side has ended what it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SendEnd {
    Finished,
    /// The peer takes no more: it has the end, or has stopped the stream.
    Delivered,
    Reset(StreamCode),
}

/// How what this side receives has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RecvEnd {
    Finished,
    Reset,
    Stopped(StreamCode),
}

/// A stream is on its new tunnel.
pub(super) struct Attached {
    /// Number of bytes that were sent again.
    pub(super) sent_again: u64,
    /// Time without a tunnel.
    pub(super) gap: Duration,
    /// The half of a direction that had ended before. Its end comes once more: dropped earlier, it
    /// would stop the peer.
    pub(super) unread: Option<RecvHalf>,
}

impl Link {
    pub(super) fn new(id: DialId, session: Weak<Session>, on: Arc<SessionTunnel>) -> Arc<Self> {
        let state = State {
            on,
            used: None,
            halves: 0,
            waiting_from: None,
            lost_reason: "",
            given_up: None,
            sent: Retained::default(),
            send_end: None,
            is_acknowledged: false,
            next_send: None,
            next_stopped: None,
            next_recv: None,
            received: 0,
            reported: 0,
            is_due: false,
            recv_end: None,
        };
        Arc::new(Self {
            id,
            session,
            epoch: AtomicU32::new(0),
            state: Mutex::new(state),
            changed: Notify::new(),
        })
    }

    pub(super) fn id(&self) -> DialId {
        self.id
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The tunnel that the stream is on, or the last one.
    pub(crate) fn tunnel(&self) -> Arc<SessionTunnel> {
        self.state().on.clone()
    }

    /// The state, if the stream has not left the tunnel of this epoch.
    fn in_epoch(&self, epoch: u32) -> Option<MutexGuard<'_, State>> {
        let state = self.state();
        (epoch == self.epoch()).then_some(state)
    }

    /// Removes the link from the session once neither side can need it.
    fn settle(&self, state: MutexGuard<'_, State>) {
        let is_settled = state.is_settled();
        drop(state);
        if is_settled && let Some(session) = self.session.upgrade() {
            session.remove(self.id);
        }
    }

    /// Records that a half holds the link.
    pub(crate) fn hold(&self) {
        self.state().halves += 1;
    }

    /// Records that a half is dropped. Without halves the stream uses nothing of its tunnel.
    pub(crate) fn let_go(&self) {
        let mut state = self.state();
        state.halves -= 1;
        let used = if state.halves == 0 { state.used.take() } else { None };
        self.settle(state);
        drop(used);
    }

    /// The same of the sending half. If the carrier has not delivered its end, nobody waits for that
    /// any more.
    pub(crate) fn let_go_of_sent(&self) {
        let mut state = self.state();
        if state.send_end == Some(SendEnd::Finished) && !state.is_acknowledged {
            state.send_end = Some(SendEnd::Delivered);
            state.sent.clear();
        }
        drop(state);
        self.let_go();
    }

    // The sending half.

    /// Records that the carrier has delivered the end, which the peer may not have taken yet.
    pub(crate) fn was_delivered(&self) {
        self.state().is_acknowledged = true;
    }

    /// Records that the peer has stopped the stream.
    pub(crate) fn was_stopped(&self) {
        let mut state = self.state();
        if !matches!(state.send_end, Some(SendEnd::Reset(_))) {
            state.send_end = Some(SendEnd::Delivered);
        }
        state.sent.clear();
        self.settle(state);
    }

    /// Retains a chunk that is written next; with the half on a new tunnel that it is written on.
    pub(crate) fn retain(&self, chunk: &Bytes) -> Option<Box<SendHalf>> {
        let mut state = self.state();
        // What the new half was given does not contain the chunk, and all that follows does.
        let next = state.next_send.take();
        state.sent.push(chunk.clone());
        next
    }

    /// The half on a new tunnel, which has been sent all that was retained.
    ///
    /// # Errors
    /// When there is none in time.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn next_send(&self, lost: TunnelLost) -> Result<Box<SendHalf>, TunnelLost> {
        self.next(lost, |state| state.next_send.take()).await
    }

    /// The future of the half on a new tunnel; for one caller.
    ///
    /// # Errors
    /// When there is none in time.
    pub(crate) async fn next_stopped(&self, lost: TunnelLost) -> Result<Stopped, TunnelLost> {
        self.next(lost, |state| match state.send_end {
            Some(SendEnd::Delivered) => Some(Box::pin(ready(Ok(None))) as Stopped),
            _ => state.next_stopped.take(),
        })
        .await
    }

    /// Records that all was written; with the half on a new tunnel that is to be finished.
    pub(crate) fn finish(&self) -> Option<Box<SendHalf>> {
        let mut state = self.state();
        state.send_end.get_or_insert(SendEnd::Finished);
        state.next_send.take()
    }

    /// Records that nothing more is sent; with the half on a new tunnel that is to be reset.
    pub(crate) fn reset(&self, code: StreamCode) -> Option<Box<SendHalf>> {
        let mut state = self.state();
        state.send_end = Some(SendEnd::Reset(code));
        state.sent.clear();
        let next = state.next_send.take();
        self.settle(state);
        next
    }

    /// Takes the peer's report; `false` if it has more than it was sent.
    pub(super) fn release(&self, to: u64, ended: bool) -> bool {
        let mut state = self.state();
        if matches!(state.send_end, Some(SendEnd::Reset(_))) || state.given_up.is_some() {
            return true;
        }
        if !state.sent.release(to) {
            return false;
        }
        if ended && state.send_end == Some(SendEnd::Finished) {
            state.send_end = Some(SendEnd::Delivered);
            state.sent.clear();
            self.settle(state);
            self.changed.notify_waiters();
        }
        true
    }

    // The receiving half.

    /// The number of times that the stream has left a tunnel.
    pub(crate) fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Counts bytes that were read in this epoch; `false` if they do not count, because the stream
    /// has left that tunnel.
    pub(crate) fn received(&self, epoch: u32, bytes: u64) -> bool {
        let Some(mut state) = self.in_epoch(epoch) else { return false };
        state.received += bytes;
        self.report(state);
        true
    }

    /// The same for the end.
    pub(crate) fn ended(&self, epoch: u32) -> bool {
        let Some(mut state) = self.in_epoch(epoch) else { return false };
        state.recv_end = Some(RecvEnd::Finished);
        self.report(state);
        true
    }

    /// The same for a reset by the peer.
    pub(crate) fn was_reset(&self, epoch: u32) -> bool {
        let Some(mut state) = self.in_epoch(epoch) else { return false };
        state.recv_end = Some(RecvEnd::Reset);
        self.settle(state);
        true
    }

    /// Records that this side reads no more; with the half on a new tunnel that is to be stopped.
    pub(crate) fn stop(&self, code: StreamCode) -> Option<Box<RecvHalf>> {
        let mut state = self.state();
        let next = state.next_recv.take();
        if state.recv_end.is_none() {
            state.recv_end = Some(RecvEnd::Stopped(code));
            self.report(state);
        }
        next
    }

    /// The half on a new tunnel, and its epoch.
    ///
    /// # Errors
    /// When there is none in time.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn next_recv(
        &self,
        lost: TunnelLost,
    ) -> Result<(Box<RecvHalf>, u32), TunnelLost> {
        self.next(lost, |state| {
            let next = state.next_recv.take()?;
            Some((next, self.epoch()))
        })
        .await
    }

    /// Has the peer told what was received.
    fn report(&self, mut state: MutexGuard<'_, State>) {
        let unreported = state.received - state.reported;
        let is_first = !std::mem::replace(&mut state.is_due, true);
        let on = (is_first || unreported >= REPORT_BYTES).then(|| state.on.clone());
        drop(state);
        if let Some(on) = on {
            on.report_due(self.id, is_first, unreported >= REPORT_BYTES);
        }
    }

    /// What the peer is to be told.
    pub(super) fn take_report(&self) -> ReceivedOffset {
        let mut state = self.state();
        state.is_due = false;
        state.reported = state.received;
        let ended = state.recv_end.is_some();
        let taken = ReceivedOffset { id: self.id, offset: state.received, ended };
        self.settle(state);
        taken
    }

    // Both halves.

    /// What `take` finds, as soon as the stream is on another tunnel.
    async fn next<T>(
        &self,
        lost: TunnelLost,
        mut take: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, TunnelLost> {
        if !lost.is_resumable() {
            self.give_up(&lost);
        }
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            let deadline = {
                let mut state = self.state();
                if let Some(next) = take(&mut state) {
                    return Ok(next);
                }
                if let Some(lost) = &state.given_up {
                    return Err(lost.clone());
                }
                let Some(session) = self.session.upgrade() else { return Err(lost) };
                state.wait(&session).checked_add(session.timeout())
            };
            select! {
                () = &mut changed => {}
                () = reached(deadline) => self.give_up(&lost),
            }
        }
    }

    /// Gives the stream up: it gets no other tunnel. If both directions have ended, the peer knows the
    /// stream no more because it has everything.
    pub(super) fn give_up(&self, lost: &TunnelLost) {
        let mut state = self.state();
        if state.given_up.is_none() {
            if (state.send_end, state.recv_end)
                == (Some(SendEnd::Finished), Some(RecvEnd::Finished))
            {
                state.send_end = Some(SendEnd::Delivered);
            }
            state.given_up = Some(lost.clone());
            state.sent.clear();
            state.used = None;
            state.wait_no_more(self.session.upgrade().as_deref());
            (state.next_send, state.next_stopped, state.next_recv) = (None, None, None);
        }
        self.settle(state);
        self.changed.notify_waiters();
    }

    /// Whether the stream is known to be without a tunnel.
    pub(crate) fn is_waiting(&self) -> bool {
        self.state().waiting_from.is_some()
    }

    /// Why the tunnel was lost that the stream was on.
    pub(super) fn lost_reason(&self) -> &'static str {
        self.state().lost_reason
    }

    /// Whether both directions have ended as far as this side is concerned.
    pub(super) fn has_ended(&self) -> bool {
        let state = self.state();
        state.send_end.is_some() && state.recv_end.is_some()
    }

    /// Takes the stream off the tunnel that it is on, for this one; with the new epoch and the number
    /// of bytes that this side has received.
    pub(super) fn leave(&self, to: &Arc<SessionTunnel>) -> (u32, u64) {
        let mut state = self.state();
        let epoch = self.epoch.load(Ordering::Relaxed) + 1;
        self.epoch.store(epoch, Ordering::Release);
        // Those of a tunnel that was lost too before they were taken.
        let old = (state.next_send.take(), state.next_recv.take());
        state.next_stopped = None;
        state.used = None;
        let left = std::mem::replace(&mut state.on, to.clone());
        // It may have been lost before the stream went on over it.
        if state.waiting_from.is_none() || state.lost_reason.is_empty() {
            state.lost_reason = left.lost_reason();
        }
        state.wait(to.session());
        // What is told now need not be told again, but the end is.
        state.reported = state.received;
        state.is_due = false;
        let received = state.received;
        match state.recv_end {
            Some(RecvEnd::Finished | RecvEnd::Stopped(_)) => self.report(state),
            _ => drop(state),
        }
        drop(old);
        (epoch, received)
    }

    /// Whether this side can send from this offset on.
    ///
    /// # Errors
    /// When the bytes from there on are not kept, or were never sent.
    pub(super) fn check(&self, from: u64) -> Result<(), ResumeFault> {
        let state = self.state();
        // Nothing is sent any more.
        if matches!(state.send_end, Some(SendEnd::Delivered | SendEnd::Reset(_))) {
            return Ok(());
        }
        match from.cmp(&state.sent.end()) {
            std::cmp::Ordering::Greater => Err(ResumeFault::NeverSent),
            _ if state.sent.from(from, 1).is_none() => Err(ResumeFault::LostBytes),
            _ => Ok(()),
        }
    }

    /// The code with which this side has reset what it sends.
    pub(super) fn reset_code(&self) -> Option<StreamCode> {
        match self.state().send_end {
            Some(SendEnd::Reset(code)) => Some(code),
            _ => None,
        }
    }

    /// Puts the stream on its new tunnel, on these halves: sends what the peer has not received, and
    /// has the old halves take the new ones.
    ///
    /// # Errors
    /// When the tunnel is lost, when the stream has left it again, or when the peer has not received
    /// bytes that it has reported.
    ///
    /// # Cancel safety
    /// When the future is dropped, the stream waits for another tunnel.
    pub(super) async fn attach(
        &self,
        epoch: u32,
        (mut send, recv): (SendHalf, RecvHalf),
        from: u64,
        used: Use,
    ) -> Result<Attached, ResumeFault> {
        let unread = self.attach_recv(epoch, recv)?;
        let (mut at, mut used) = (from, Some(used));
        loop {
            let chunks = {
                let mut state = self.current(epoch)?;
                match state.send_end {
                    Some(SendEnd::Reset(code)) => {
                        send.reset(code);
                        break;
                    }
                    Some(SendEnd::Delivered) => {
                        send.finish();
                        break;
                    }
                    None | Some(SendEnd::Finished) => {}
                }
                let chunks = state.sent.from(at, CHUNKS).ok_or(ResumeFault::LostBytes)?;
                if chunks.is_empty() {
                    if state.send_end == Some(SendEnd::Finished) {
                        send.finish();
                    }
                    state.place(send, used.take());
                    drop(state);
                    self.changed.notify_waiters();
                    break;
                }
                chunks
            };
            let mut stopped = false;
            for chunk in chunks {
                at += chunk.len() as u64;
                match send.write_chunk(chunk).await {
                    Ok(()) => {}
                    Err(WriteError::Lost(lost)) => return Err(lost.into()),
                    Err(WriteError::Stopped(_) | WriteError::Ended) => stopped = true,
                }
            }
            if stopped {
                // The half finds out by itself.
                self.current(epoch)?.place(send, used.take());
                self.changed.notify_waiters();
                break;
            }
        }
        let session = self.session.upgrade();
        let gap = self.state().wait_no_more(session.as_deref());
        Ok(Attached { sent_again: at - from, gap, unread })
    }

    /// Hands the receiving half to the old one; returns it if there is nothing more to receive.
    fn attach_recv(&self, epoch: u32, mut recv: RecvHalf) -> Result<Option<RecvHalf>, ResumeFault> {
        let mut state = self.current(epoch)?;
        match state.recv_end {
            None => {
                state.next_recv = Some(Box::new(recv));
                drop(state);
                self.changed.notify_waiters();
            }
            Some(RecvEnd::Finished | RecvEnd::Reset) => return Ok(Some(recv)),
            Some(RecvEnd::Stopped(code)) => recv.stop(code),
        }
        Ok(None)
    }

    /// The same, if the stream was not given up either.
    fn current(&self, epoch: u32) -> Result<MutexGuard<'_, State>, ResumeFault> {
        let state = self.in_epoch(epoch).filter(|state| state.given_up.is_none());
        state.ok_or(ResumeFault::Left)
    }
}

impl State {
    /// Records that the stream is without a tunnel; since when.
    fn wait(&mut self, session: &Session) -> Instant {
        *self.waiting_from.get_or_insert_with(|| {
            session.observer().waiting(1);
            Instant::now()
        })
    }

    /// Records that the stream does not wait for a tunnel any more; how long it did.
    fn wait_no_more(&mut self, session: Option<&Session>) -> Duration {
        let Some(from) = self.waiting_from.take() else { return Duration::ZERO };
        self.lost_reason = "";
        if let Some(session) = session {
            session.observer().waiting(-1);
        }
        from.elapsed()
    }

    /// Has the old sending half take this one.
    fn place(&mut self, send: SendHalf, used: Option<Use>) {
        self.next_stopped = Some(Box::pin(send.stopped()));
        self.next_send = Some(Box::new(send));
        self.used = used.filter(|_| self.halves > 0);
    }

    /// Whether neither side can need the link.
    fn is_settled(&self) -> bool {
        let is_sent = matches!(self.send_end, Some(SendEnd::Delivered | SendEnd::Reset(_)));
        let is_received = match self.recv_end {
            None => false,
            Some(RecvEnd::Finished | RecvEnd::Stopped(_)) => !self.is_due,
            Some(RecvEnd::Reset) => true,
        };
        self.given_up.is_some() || (is_sent && is_received)
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Completes at this time; never without one.
async fn reached(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
