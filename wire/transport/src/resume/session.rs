//! The streams of one agent process and one server process, whichever tunnels carry them.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    fmt,
    pin::pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use culvert_wire::{
    CloseCode, DialId, StreamCode,
    extension::Extensions,
    frame::{self, Message},
    resume::{Received, ReceivedOffset, ResumeErrorKind, ResumeReply, ResumeRequest, Resumed},
};
use parking_lot::Mutex;
use tokio::{
    select,
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::{
    fault::ResumeFault,
    link::{Attached, Link, Use},
};
use crate::{ReadError, RecvHalf, SendHalf, Tunnel, TunnelLost};

/// Number of unreported bytes of one stream at which the peer is told.
pub(super) const REPORT_BYTES: u64 = 256 * 1024;
/// Time after which the peer is told of fewer.
const REPORT_DELAY: Duration = Duration::from_millis(250);
/// Number of streams whose progress the peer is told at once.
const REPORT_STREAMS: usize = 64;
/// Maximum number of streams in one report.
const MESSAGE_STREAMS: usize = 256;
/// Maximum number of streams in one message that names those that are resumed.
const RESUMED_STREAMS: usize = 1024;
/// Maximum number of lost tunnels of which the peer asks at once.
const MAX_ASKED: usize = 64;

/// Notified of what becomes of streams whose tunnels were lost.
pub trait Observer: fmt::Debug + Send + Sync {
    /// A stream goes on over another tunnel, after this time without one. Its tunnel was lost for this
    /// reason, and so many bytes were sent again.
    fn resumed(&self, reason: &'static str, gap: Duration, sent_again: u64);
    /// A stream does not go on, although a direction of it had not ended.
    fn given_up(&self);
    /// The number of streams that wait for a tunnel has changed by this much.
    fn waiting(&self, change: i64);
}

/// The streams between one agent process and one server process.
///
/// A stream is kept from its dial until both sides know its ends. When the tunnel that it is on is
/// lost, it waits for another one of the session.
pub struct Session {
    timeout: Duration,
    observer: Arc<dyn Observer>,
    links: Mutex<HashMap<DialId, Arc<Link>>>,
    /// Those that live, in the order in which they joined.
    tunnels: Mutex<Vec<Arc<SessionTunnel>>>,
    /// Number of changes after which streams may wait for a tunnel, or the peer for an answer. Tasks
    /// look again only after one: they come by with each message, and there may be many streams.
    changes: AtomicU64,
    /// Lost tunnels of which the peer has asked what goes on.
    asked: Mutex<HashSet<u64>>,
    /// Notified when tunnels joined or left, or the peer asked.
    changed: Notify,
}

impl Session {
    /// A session without streams, whose streams wait for a tunnel at most this long.
    pub fn new(timeout: Duration, observer: Arc<dyn Observer>) -> Arc<Self> {
        Arc::new(Self {
            timeout,
            observer,
            links: Mutex::default(),
            tunnels: Mutex::default(),
            changes: AtomicU64::new(0),
            asked: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// Time for which a stream waits for a tunnel.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// What is notified of the session's streams.
    pub(super) fn observer(&self) -> &dyn Observer {
        &*self.observer
    }

    /// Adds a tunnel of the session. The server has given it the number.
    pub fn join(self: &Arc<Self>, tunnel: Tunnel, number: u64) -> Arc<SessionTunnel> {
        let joined = Arc::new(SessionTunnel {
            session: self.clone(),
            tunnel,
            number,
            lost: OnceLock::new(),
            looked_at: AtomicU64::new(0),
            reports: Mutex::default(),
            is_due: Notify::new(),
            announced: Mutex::default(),
        });
        self.tunnels.lock().push(joined.clone());
        self.change();
        joined
    }

    /// Has the tasks of the tunnels look for streams that wait.
    fn change(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_waiters();
    }

    /// Number of tunnels that live.
    pub fn tunnels(&self) -> usize {
        self.tunnels.lock().len()
    }

    /// Number of streams that are kept.
    pub fn streams(&self) -> usize {
        self.links.lock().len()
    }

    /// Completes once the session has had no tunnel for as long as a stream waits for one.
    ///
    /// # Cancel safety
    /// Cancel safe; a later call begins anew.
    pub async fn expired(&self) {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.tunnels() > 0 {
                changed.await;
                continue;
            }
            select! {
                () = changed => {}
                () = tokio::time::sleep(self.timeout) => return,
            }
        }
    }

    /// Completes once the session has a tunnel.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn rejoined(&self) {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.tunnels() > 0 {
                return;
            }
            changed.await;
        }
    }

    /// Gives up all streams that are on no tunnel: the peer's process is another one by now.
    pub fn end(&self, lost: &TunnelLost) {
        let waiting = self.waiting();
        waiting.iter().for_each(|link| self.give_up(link, lost));
    }

    /// Takes a report of the peer; `false` if it has more than it was sent.
    pub fn received(&self, report: &Received) -> bool {
        report.streams.iter().all(|ReceivedOffset { id, offset, ended }| {
            let link = self.links.lock().get(id).cloned();
            link.is_none_or(|link| link.release(*offset, *ended))
        })
    }

    /// Closes the tunnel with this number if it lives.
    fn close(&self, number: u64, reason: &str) {
        let tunnel = self.tunnels.lock().iter().find(|it| it.number == number).cloned();
        if let Some(tunnel) = tunnel {
            tunnel.tunnel.close(CloseCode::SUPERSEDED, reason);
        }
    }

    /// Gives up the streams of a lost tunnel that the peer does not resume.
    pub fn resumed(&self, number: u64, resumed: &HashSet<DialId>) {
        self.close(number, "the server has given the tunnel up");
        let is_over =
            |link: &&Arc<Link>| link.tunnel().number == number && !resumed.contains(&link.id());
        let over: Vec<_> = self.links.lock().values().filter(is_over).cloned().collect();
        let lost = TunnelLost::TimedOut;
        over.iter().for_each(|link| self.give_up(link, &lost));
    }

    fn give_up(&self, link: &Link, lost: &TunnelLost) {
        if !link.has_ended() {
            self.observer.given_up();
        }
        link.give_up(lost);
    }

    /// The streams that are on no tunnel that lives.
    fn waiting(&self) -> Vec<Arc<Link>> {
        let live: HashSet<u64> = self.tunnels.lock().iter().map(|tunnel| tunnel.number).collect();
        let links = self.links.lock();
        links.values().filter(|link| !live.contains(&link.tunnel().number)).cloned().collect()
    }

    pub(super) fn remove(&self, id: DialId) {
        // Dropped without the lock.
        let _link = self.links.lock().remove(&id);
    }

    fn get(&self, id: DialId) -> Option<Arc<Link>> {
        self.links.lock().get(&id).cloned()
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("streams", &self.streams())
            .field("tunnels", &self.tunnels())
            .finish_non_exhaustive()
    }
}

/// One tunnel of a session.
pub struct SessionTunnel {
    session: Arc<Session>,
    tunnel: Tunnel,
    number: u64,
    /// Why the tunnel was lost, once it was.
    lost: OnceLock<&'static str>,
    /// The session's number of changes when this tunnel's task last found nothing to do.
    looked_at: AtomicU64,
    reports: Mutex<Reports>,
    is_due: Notify,
    /// Lost tunnels of which this side has asked the peer on this one.
    announced: Mutex<HashSet<u64>>,
}

/// The streams of which the peer is to be told.
#[derive(Default)]
struct Reports {
    due: Vec<DialId>,
    /// When it is to be told at the latest.
    at: Option<Instant>,
}

impl SessionTunnel {
    /// The session.
    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// The tunnel itself.
    pub fn tunnel(&self) -> &Tunnel {
        &self.tunnel
    }

    /// The tunnel's number.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Keeps a stream of this tunnel, under the id of its dial; `None` if another stream has the id.
    pub fn keep(self: &Arc<Self>, id: DialId) -> Option<KeptStream> {
        let link = Link::new(id, Arc::downgrade(&self.session), self.clone());
        match self.session.links.lock().entry(id) {
            Entry::Vacant(vacant) => {
                vacant.insert(link.clone());
            }
            Entry::Occupied(_) => return None,
        }
        if self.lost.get().is_some() {
            // The tunnel was lost before the stream was there.
            self.session.change();
        }
        Some(KeptStream { link, is_sent: false, is_received: false })
    }

    /// Removes the tunnel, which was lost, from the session. Its streams wait for another one.
    pub fn leave(&self, lost: &TunnelLost) {
        let _ = self.lost.set(lost.label());
        self.session.tunnels.lock().retain(|tunnel| tunnel.number != self.number);
        self.session.change();
    }

    /// Gives up the tunnel with this number, because the peer has. Its streams go on over the newest
    /// tunnel, and the peer is told which do.
    pub fn on_peer_lost(&self, number: u64) {
        self.session.close(number, "the peer has given the tunnel up");
        let mut asked = self.session.asked.lock();
        if asked.len() < MAX_ASKED {
            asked.insert(number);
        }
        drop(asked);
        self.session.change();
    }

    /// Why the tunnel was lost; or else how it is closed because the peer has given it up.
    pub(super) fn lost_reason(&self) -> &'static str {
        self.lost.get().copied().unwrap_or(CloseCode::SUPERSEDED.name())
    }

    fn is_newest(&self) -> bool {
        let tunnels = self.session.tunnels.lock();
        tunnels.last().is_some_and(|newest| newest.number == self.number)
    }

    /// Records that the peer is to be told of a stream.
    pub(super) fn report_due(&self, id: DialId, is_first: bool, is_urgent: bool) {
        let mut reports = self.reports.lock();
        if is_first {
            reports.due.push(id);
        }
        let now = Instant::now();
        let wakes = if is_urgent || reports.due.len() >= REPORT_STREAMS {
            let wakes = reports.at.is_none_or(|at| at > now);
            reports.at = Some(now);
            wakes
        } else {
            let wakes = reports.at.is_none();
            reports.at.get_or_insert(now + REPORT_DELAY);
            wakes
        };
        drop(reports);
        if wakes {
            self.is_due.notify_one();
        }
    }

    /// The next report to the peer, to be sent on this tunnel.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn report(&self) -> Received {
        loop {
            let at = self.reports.lock().at;
            match at {
                Some(at) if at <= Instant::now() => break,
                Some(at) => select! {
                    () = sleep_until(at) => {}
                    () = self.is_due.notified() => {}
                },
                None => self.is_due.notified().await,
            }
        }
        let due = {
            let mut reports = self.reports.lock();
            let count = reports.due.len().min(MESSAGE_STREAMS);
            let due: Vec<_> = reports.due.drain(..count).collect();
            if reports.due.is_empty() {
                *reports = Reports::default();
            }
            due
        };
        let taken = |id| Some(self.session.get(id)?.take_report());
        let streams: Vec<_> = due.into_iter().filter_map(taken).collect();
        Received { streams: streams.try_into().unwrap_or_default() }
    }

    /// The number of a lost tunnel with streams that wait, which the peer was not told of on this
    /// tunnel. It completes on the newest tunnel of the session alone.
    ///
    /// # Cancel safety
    /// Cancel safe: what it returns counts as announced.
    pub async fn next_lost(&self) -> u64 {
        loop {
            let mut changed = pin!(self.session.changed.notified());
            changed.as_mut().enable();
            let changes = self.session.changes.load(Ordering::Acquire);
            if self.looked_at.load(Ordering::Relaxed) != changes && self.is_newest() {
                let waiting = self.session.waiting();
                let mut announced = self.announced.lock();
                let lost = waiting.iter().map(|link| link.tunnel().number);
                if let Some(lost) = lost.into_iter().find(|lost| !announced.contains(lost)) {
                    announced.insert(lost);
                    return lost;
                }
                self.looked_at.store(changes, Ordering::Relaxed);
            }
            changed.await;
        }
    }

    /// The streams of a lost tunnel that are to be resumed over this one, and the messages that name
    /// them. It completes on the newest tunnel of the session alone.
    ///
    /// # Cancel safety
    /// Cancel safe: what it returns counts as begun.
    pub async fn next_to_resume(self: &Arc<Self>) -> (Vec<Resumed>, Vec<Resumption>) {
        loop {
            let mut changed = pin!(self.session.changed.notified());
            changed.as_mut().enable();
            let changes = self.session.changes.load(Ordering::Acquire);
            if self.looked_at.load(Ordering::Relaxed) == changes || !self.is_newest() {
                changed.await;
                continue;
            }
            if let Some((number, links)) = self.take_lost() {
                let begin = |link: Arc<Link>| {
                    let (epoch, received) = link.leave(self);
                    Resumption { tunnel: self.clone(), link, epoch, received }
                };
                let resumptions = links.into_iter().map(begin).collect();
                // Those that go on elsewhere too: the peer may not know yet.
                let ids: Vec<_> = self.session.links.lock().keys().copied().collect();
                return (messages(number, &ids), resumptions);
            }
            self.looked_at.store(changes, Ordering::Relaxed);
            changed.await;
        }
    }

    /// A lost tunnel with streams that wait, or of which the peer has asked.
    fn take_lost(&self) -> Option<(u64, Vec<Arc<Link>>)> {
        let waiting = self.session.waiting();
        let of_streams = waiting.first().map(|link| link.tunnel().number);
        let number = of_streams.or_else(|| {
            let live: HashSet<_> = self.session.tunnels.lock().iter().map(|it| it.number).collect();
            self.session.asked.lock().iter().find(|number| !live.contains(number)).copied()
        })?;
        self.session.asked.lock().remove(&number);
        let of_tunnel = |link: &Arc<Link>| link.tunnel().number == number;
        Some((number, waiting.into_iter().filter(of_tunnel).collect()))
    }

    /// Answers the server's request to go on with a stream over this tunnel.
    ///
    /// # Errors
    /// When the stream does not go on.
    ///
    /// # Cancel safety
    /// When the future is dropped, the stream waits for another tunnel.
    pub async fn answer(
        self: &Arc<Self>,
        request: &ResumeRequest,
        (mut send, mut recv): (SendHalf, RecvHalf),
        used: Use,
    ) -> Result<(), ResumeFault> {
        let Some(link) = self.session.get(request.id) else {
            return refuse((send, recv), ResumeErrorKind::UNKNOWN_STREAM).await;
        };
        let old = link.tunnel();
        if old.number != self.number {
            // The server has given it up.
            old.tunnel.close(CloseCode::SUPERSEDED, "the server resumes its streams elsewhere");
        }
        let (epoch, received) = link.leave(self);
        match link.check(request.received) {
            Ok(()) => {}
            Err(ResumeFault::LostBytes) => {
                self.session.give_up(&link, &TunnelLost::TimedOut);
                return refuse((send, recv), ResumeErrorKind::LOST_BYTES).await;
            }
            Err(fault) => {
                self.session.give_up(&link, &TunnelLost::TimedOut);
                send.reset(StreamCode::MALFORMED);
                recv.stop(StreamCode::MALFORMED);
                return Err(fault);
            }
        }
        let reset = link.reset_code();
        send.write_chunk(reply(Ok(received), reset)?).await?;
        if reset.is_some() {
            // A reset could overtake the reply, which has the code.
            send.finish();
        }
        self.attach(&link, epoch, (send, recv), request.received, used).await
    }

    async fn attach(
        &self,
        link: &Link,
        epoch: u32,
        stream: (SendHalf, RecvHalf),
        from: u64,
        used: Use,
    ) -> Result<(), ResumeFault> {
        let reason = link.lost_reason();
        match link.attach(epoch, stream, from, used).await {
            Ok(Attached { sent_again, gap, unread }) => {
                self.session.observer.resumed(reason, gap, sent_again);
                if let Some(mut recv) = unread {
                    let mut chunk = [Bytes::new()];
                    while let Ok(Some(_)) = recv.read_chunks(&mut chunk).await {}
                }
                Ok(())
            }
            Err(fault) => Err(fault),
        }
    }
}

/// Has a tunnel leave its session when the task that serves it is dropped. Both hold one another, so
/// that the tunnel's socket would stay open.
#[derive(Debug)]
pub struct LeaveOnDrop(Option<Arc<SessionTunnel>>);

impl LeaveOnDrop {
    /// Guards a tunnel, if it belongs to a session.
    pub fn new(tunnel: Option<Arc<SessionTunnel>>) -> Self {
        Self(tunnel)
    }

    /// The tunnel, which from now on is the caller's to remove.
    pub fn into_inner(mut self) -> Option<Arc<SessionTunnel>> {
        self.0.take()
    }
}

impl Drop for LeaveOnDrop {
    fn drop(&mut self) {
        let Some(tunnel) = self.0.take() else { return };
        let (code, reason) = (CloseCode::ABANDONED, String::new());
        let lost = TunnelLost::ClosedHere { code, reason };
        tunnel.leave(&lost);
        if tunnel.session.tunnels() == 0 {
            tunnel.session.end(&lost);
        }
    }
}

impl fmt::Debug for SessionTunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionTunnel").field("number", &self.number).finish_non_exhaustive()
    }
}

/// Tells the server that a stream does not go on.
async fn refuse(
    (mut send, mut recv): (SendHalf, RecvHalf),
    kind: ResumeErrorKind,
) -> Result<(), ResumeFault> {
    send.write_chunk(reply(Err(kind), None)?).await?;
    send.finish();
    recv.stop(StreamCode::ABANDONED);
    Err(ResumeFault::Refused(kind))
}

fn reply(
    outcome: Result<u64, ResumeErrorKind>,
    reset: Option<StreamCode>,
) -> Result<Bytes, ResumeFault> {
    let reset = reset.map(StreamCode::as_u32);
    let reply = ResumeReply { outcome, reset, extensions: Extensions::default() };
    frame::encode(&reply).map_err(|_| ResumeFault::Ended)
}

/// The messages that name these streams of a lost tunnel.
fn messages(tunnel: u64, ids: &[DialId]) -> Vec<Resumed> {
    let mut parts: Vec<_> = ids.chunks(RESUMED_STREAMS).map(<[DialId]>::to_vec).collect();
    let last = parts.pop().unwrap_or_default();
    let part = |ids: Vec<DialId>, more| Resumed {
        tunnel,
        streams: ids.try_into().unwrap_or_default(),
        more,
    };
    let parts = parts.into_iter().map(|ids| part(ids, true));
    parts.chain([part(last, false)]).collect()
}

/// A stream whose halves are to be kept, each once the head of its direction has passed, which has no
/// offset. A half that was not kept when this is dropped has ended for the session.
#[derive(Debug)]
pub struct KeptStream {
    link: Arc<Link>,
    is_sent: bool,
    is_received: bool,
}

impl KeptStream {
    /// Keeps what the half sends from now on.
    pub fn keep_sent(&mut self, send: &mut SendHalf) {
        self.is_sent = true;
        send.keep(self.link.clone());
    }

    /// Counts what the half has not handed on yet, and what it receives from now on.
    pub fn keep_received(&mut self, recv: &mut RecvHalf) {
        self.is_received = true;
        recv.keep(self.link.clone());
    }
}

impl Drop for KeptStream {
    fn drop(&mut self) {
        if !self.is_sent {
            self.link.reset(StreamCode::ABANDONED);
        }
        if !self.is_received {
            self.link.stop(StreamCode::ABANDONED);
        }
    }
}

/// A stream that is to go on over a tunnel.
#[derive(Debug)]
pub struct Resumption {
    tunnel: Arc<SessionTunnel>,
    link: Arc<Link>,
    epoch: u32,
    received: u64,
}

impl Resumption {
    /// The stream's dial.
    pub fn id(&self) -> DialId {
        self.link.id()
    }

    /// Opens a stream on the tunnel and goes on with the old one there.
    ///
    /// # Errors
    /// When the stream does not go on over this tunnel.
    ///
    /// # Cancel safety
    /// When the future is dropped, the stream waits for another tunnel.
    pub async fn run(self, used: Use) -> Result<(), ResumeFault> {
        let Self { tunnel, link, epoch, received } = self;
        let (mut send, mut recv) = tunnel.tunnel.open().await?;
        let request = ResumeRequest { id: link.id(), received, extensions: Extensions::default() };
        send.write_chunk(frame::encode(&request).map_err(|_| ResumeFault::Ended)?).await?;
        let frame = recv.read_frame(ResumeReply::MAX_LEN).await?;
        let reply: ResumeReply =
            frame.message().map_err(|error| ResumeFault::Frame(error.into()))?;
        match reply.outcome {
            Ok(from) => {
                if let Err(fault) = link.check(from) {
                    tunnel.session.give_up(&link, &TunnelLost::TimedOut);
                    send.reset(StreamCode::MALFORMED);
                    recv.stop(StreamCode::MALFORMED);
                    return Err(fault);
                }
                if let Some(code) = reply.reset {
                    recv.fail(ReadError::Reset(StreamCode::from_u32(code)));
                }
                tunnel.attach(&link, epoch, (send, recv), from, used).await
            }
            Err(kind) => {
                tunnel.session.give_up(&link, &TunnelLost::TimedOut);
                Err(ResumeFault::Refused(kind))
            }
        }
    }
}
