//! The control stream at work: messages in and out, pings answered, and a peer that does not answer
//! found out.

mod ping_rate;
mod writer;

use std::{future::ready, time::Duration};

use culvert_wire::{
    code::CloseCode,
    codec::{EncodeError, MAX_BODY_LEN},
    control::{ControlMessage, Ping, Pong},
    frame::FrameError,
};
use tokio::{
    select,
    time::{Instant, sleep_until},
};

use self::{ping_rate::PingRate, writer::Writer};
use crate::{
    ReadError, ReadFrameError, RecvHalf, SendHalf, Tunnel, TunnelLost, Unreachable, WriteError,
};

/// Time for the answer to a ping when the network reports that no process listens at the peer's
/// address: room for one repetition of a lost ping.
const REFUSED_LIMIT: Duration = Duration::from_millis(50);
/// Time for the answer to a ping when the network reports that the peer cannot be reached: routes
/// have time to change.
const UNREACHABLE_LIMIT: Duration = Duration::from_millis(1500);
/// Minimum time between two questions that reports of the network cause: on a path that loses
/// packets each of them can stay unanswered, and forged ICMP must not make that likely.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Time for the peer to take a message of this side. A peer that reads its control stream grants
/// credit for thousands of messages ahead.
const WRITE_LIMIT: Duration = Duration::from_millis(1500);
/// Number of times that a deadline is renewed because the peer was heard meanwhile, or
/// because this process did not run. A busy node answers late, and only silence means that it is
/// gone; a peer that is heard and never answers is broken.
const MAX_RENEWALS: u32 = 5;
/// Time by which a deadline may be noticed late. Beyond it this process did not run meanwhile, so
/// that an answer may have arrived unread.
const LATE: Duration = Duration::from_millis(100);
/// Priority of the control stream, above every other: a ping to a busy peer must not wait behind
/// the bytes that keep it busy.
const PRIORITY: i32 = 100;

/// Why a control stream ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The peer finished the stream, which only ends with the tunnel.
    #[error("the peer ended the control stream")]
    Ended,
    /// The peer sent a message that is not allowed at this point.
    #[error("a message that is not allowed at this point")]
    Unexpected,
    /// The peer's bytes break the protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A message of this side does not fit its frame.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The stream cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The stream cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The peer did not answer a ping in time.
    #[error("no answer to a ping within {0:?}")]
    Unresponsive(Duration),
    /// The peer pings more often than it may.
    #[error("too many pings")]
    TooManyPings,
    /// The peer grants no credit for the messages of this side.
    #[error("no message was taken within {0:?}")]
    NotReading(Duration),
}

impl From<ReadFrameError> for ControlError {
    fn from(error: ReadFrameError) -> Self {
        match error {
            ReadFrameError::End | ReadFrameError::Truncated => Self::Ended,
            ReadFrameError::Frame(error) => Self::Frame(error),
            ReadFrameError::Read(error) => Self::Read(error),
        }
    }
}

impl ControlError {
    /// Why the tunnel was lost, if that is what ended the stream: there is nothing left to close.
    pub fn lost(&self) -> Option<&TunnelLost> {
        match self {
            Self::Read(ReadError::Lost(lost)) | Self::Write(WriteError::Lost(lost)) => Some(lost),
            _ => None,
        }
    }

    /// The code with which this side closes the tunnel after the error.
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::Unresponsive(_) | Self::NotReading(_) => CloseCode::UNRESPONSIVE,
            Self::TooManyPings => CloseCode::TOO_MANY_PINGS,
            Self::Encode(_) => CloseCode::ABANDONED,
            _ => CloseCode::PROTOCOL_VIOLATION,
        }
    }
}

/// An event on a control stream.
#[derive(Debug)]
pub enum Event {
    /// The peer sent a message.
    Message(ControlMessage),
    /// The network reports that the peer cannot be reached. The peer was sent a ping; unless it
    /// answers, the stream fails soon.
    Unreachable(Unreachable),
}

/// Both halves of a tunnel's control stream.
///
/// Dropping it resets and stops the stream, which the peer takes for a broken protocol: close the
/// tunnel first.
#[derive(Debug)]
pub struct ControlStream {
    tunnel: Tunnel,
    writer: Writer,
    recv: RecvHalf,
    question: Option<Question>,
    pings: PingRate,
    /// When the next ping may be sent: a peer that is pinged too often closes the tunnel.
    ping_from: Instant,
    /// Whether a ping waits for that time.
    is_ping_due: bool,
    /// When the next report may cause a ping that has to be answered.
    question_from: Instant,
    /// Time left for the peer to grant credit for the messages of the writer.
    writing: Option<Patience>,
    next_echo: u64,
    /// Time for the answer after a report of the network, in place of the limit of its kind.
    report_limit: Option<Duration>,
}

/// A ping that has not been answered.
#[derive(Debug)]
struct Question {
    echo: u64,
    patience: Patience,
}

/// How long this side waits for the peer.
#[derive(Debug)]
struct Patience {
    /// Time from the start, or from a renewal, to the deadline.
    limit: Duration,
    deadline: Instant,
    /// Bytes that had arrived from the peer at the start, or at the last renewal.
    heard: u64,
    renewals: u32,
}

impl Patience {
    /// Waits for `limit` and three round trips from now on.
    fn new(limit: Duration, tunnel: &Tunnel) -> Self {
        let stats = tunnel.stats();
        let limit = stats.rtt * 3 + limit;
        let deadline = Instant::now() + limit;
        Self { limit, deadline, heard: stats.received_bytes, renewals: 0 }
    }

    /// Sets another deadline after one that has passed, if the peer was heard since or this process
    /// did not run. The error is the time that the peer has had.
    fn renew(&mut self, tunnel: &Tunnel) -> Result<(), Duration> {
        let (heard, now) = (tunnel.stats().received_bytes, Instant::now());
        // A process that was suspended or starved cannot blame the peer for its silence.
        let excused = heard != self.heard || now.saturating_duration_since(self.deadline) > LATE;
        if !excused || self.renewals == MAX_RENEWALS {
            return Err(self.limit * (self.renewals + 1));
        }
        self.renewals += 1;
        self.heard = heard;
        self.deadline = now + self.limit;
        Ok(())
    }
}

impl ControlStream {
    /// The control stream of `tunnel`, which consists of these halves.
    pub fn new(tunnel: Tunnel, (mut send, recv): (SendHalf, RecvHalf)) -> Self {
        send.set_priority(PRIORITY);
        let writer = Writer::new(send);
        Self {
            tunnel,
            writer,
            recv,
            question: None,
            pings: PingRate::default(),
            ping_from: Instant::now(),
            is_ping_due: false,
            question_from: Instant::now(),
            writing: None,
            next_echo: 0,
            report_limit: None,
        }
    }

    /// Sets the time that the peer has to answer when the network reports that it cannot be reached,
    /// whatever the report says. For a side that has no other path to its peer: ICMP is not
    /// authenticated, and a healthy peer must not be lost for a lost ping.
    pub fn set_report_limit(&mut self, limit: Duration) {
        self.report_limit = Some(limit);
    }

    /// Sends a message, and waits until the carrier has it.
    ///
    /// # Errors
    /// When it does not fit its frame, the stream is lost, or the peer takes no message in time:
    /// 1.5 s and three round trips, or six times that from a peer that is heard.
    ///
    /// # Cancel safety
    /// When the future is dropped, the message may still be sent, with the next one or during
    /// [`event`](Self::event); messages before and after it stay whole.
    pub async fn send(&mut self, message: &ControlMessage) -> Result<(), ControlError> {
        self.push(message)?;
        while !self.writer.is_idle() {
            select! {
                biased;
                flushed = self.writer.flush() => flushed?,
                () = overdue(self.writing.as_ref()) => self.renew_writing()?,
            }
        }
        self.writing = None;
        Ok(())
    }

    /// Has a message sent while the caller waits for events.
    fn push(&mut self, message: &ControlMessage) -> Result<(), ControlError> {
        let frame = message.encode()?;
        let writing = self.writing.get_or_insert_with(|| Patience::new(WRITE_LIMIT, &self.tunnel));
        match self.writer.push(frame) {
            true => Ok(()),
            false => Err(ControlError::NotReading(writing.limit * (writing.renewals + 1))),
        }
    }

    /// The first message of the peer, whatever it is. Nothing is answered: a peer that has not
    /// introduced itself must not cause work.
    ///
    /// # Errors
    /// When the first frame is no message of a control stream, or the stream is lost.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn first(&mut self) -> Result<ControlMessage, ControlError> {
        let frame = self.recv.read_frame(MAX_BODY_LEN).await?;
        Ok(ControlMessage::decode(&frame)?)
    }

    /// The next message for the caller, as [`event`](Self::event) returns it; other events are
    /// skipped.
    ///
    /// # Errors
    /// As [`event`](Self::event).
    ///
    /// # Cancel safety
    /// As [`event`](Self::event).
    pub async fn next(&mut self) -> Result<ControlMessage, ControlError> {
        loop {
            if let Event::Message(message) = self.event().await? {
                return Ok(message);
            }
        }
    }

    /// The next event for the caller: not a ping, not a pong, not a kind that this build does not
    /// know.
    ///
    /// While it waits it answers the peer's pings. When the network reports that the peer is gone
    /// it sends a ping, and once a second it fails if the peer stays silent. A peer that is heard
    /// but does not answer gets more time.
    ///
    /// # Errors
    /// When the peer breaks the protocol, ends the stream, pings too often or does not answer a
    /// ping. Close the tunnel with [`ControlError::close_code`] then.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn event(&mut self) -> Result<Event, ControlError> {
        loop {
            let frame = select! {
                frame = self.recv.read_frame(MAX_BODY_LEN) => frame?,
                why = unreachable(&self.tunnel, self.ping_from) => {
                    let now = Instant::now();
                    let limit = self.report_limit.unwrap_or(match why {
                        Unreachable::Port => REFUSED_LIMIT,
                        Unreachable::Host => UNREACHABLE_LIMIT,
                    });
                    if now >= self.question_from {
                        self.question_from = now + REPORT_INTERVAL;
                        self.ask(limit).await?;
                    } else {
                        self.nudge().await?;
                    }
                    return Ok(Event::Unreachable(why));
                }
                flushed = self.writer.flush(), if self.writing.is_some() => {
                    flushed?;
                    self.writing = None;
                    continue;
                }
                () = sleep_until(self.ping_from), if self.is_ping_due => {
                    self.nudge().await?;
                    continue;
                }
                () = overdue(self.question.as_ref().map(|question| &question.patience)) => {
                    self.renew_question()?;
                    continue;
                }
                () = overdue(self.writing.as_ref()) => {
                    self.renew_writing()?;
                    continue;
                }
            };
            match ControlMessage::decode(&frame)? {
                ControlMessage::Ping(Ping { echo }) => {
                    if !self.pings.admit(Instant::now()) {
                        return Err(ControlError::TooManyPings);
                    }
                    self.push(&ControlMessage::Pong(Pong { echo }))?;
                }
                ControlMessage::Pong(Pong { echo }) => {
                    if self.question.as_ref().is_some_and(|question| question.echo == echo) {
                        self.question = None;
                    }
                }
                ControlMessage::Unknown { kind } => {
                    tracing::debug!(kind, "ignored a control message of a later revision");
                }
                message => return Ok(Event::Message(message)),
            }
        }
    }

    /// Sends a ping that the peer must answer. [`event`](Self::event) fails when no answer arrives
    /// within `limit` and three round trips, or six times that for a peer that is heard or while
    /// this process does not run. While a ping is unanswered no second one is sent; its deadline
    /// only comes nearer. A ping that the peer does not take is unanswered as well.
    ///
    /// It may be called as often as the caller likes: a ping that would be one too many for the
    /// peer is sent during [`event`](Self::event), at most 50 ms later.
    ///
    /// # Errors
    /// When the stream is lost, or the peer has taken no message for long.
    ///
    /// # Cancel safety
    /// Cancel safe: it does not wait.
    pub async fn ask(&mut self, limit: Duration) -> Result<(), ControlError> {
        let delay = self.ping_from.saturating_duration_since(Instant::now());
        let patience = Patience::new(limit + delay, &self.tunnel);
        if let Some(Question { patience: pending, .. }) = &mut self.question {
            pending.limit = pending.limit.min(patience.limit);
            pending.deadline = pending.deadline.min(patience.deadline);
            return Ok(());
        }
        self.question = Some(Question { echo: self.next_echo, patience });
        self.nudge().await
    }

    /// Sends a ping that the peer may leave unanswered: the answer only counts as something
    /// received, for callers that watch [`Tunnel::stats`]. It is delayed as that of
    /// [`ask`](Self::ask).
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    ///
    /// # Cancel safety
    /// As [`ask`](Self::ask).
    pub async fn nudge(&mut self) -> Result<(), ControlError> {
        let now = Instant::now();
        self.is_ping_due = now < self.ping_from;
        if self.is_ping_due {
            return Ok(());
        }
        self.ping_from = now + ping_rate::INTERVAL;
        let echo = self.next_echo;
        self.next_echo += 1;
        self.push(&ControlMessage::Ping(Ping { echo }))?;
        // What is not taken at once is sent during `event`.
        select! {
            biased;
            flushed = self.writer.flush() => {
                flushed?;
                self.writing = None;
            }
            () = ready(()) => {}
        }
        Ok(())
    }

    fn renew_question(&mut self) -> Result<(), ControlError> {
        let Some(Question { patience, .. }) = &mut self.question else { return Ok(()) };
        patience.renew(&self.tunnel).map_err(ControlError::Unresponsive)
    }

    fn renew_writing(&mut self) -> Result<(), ControlError> {
        let Some(patience) = &mut self.writing else { return Ok(()) };
        patience.renew(&self.tunnel).map_err(ControlError::NotReading)
    }
}

/// Completes with the network's next report that the peer cannot be reached, and not before `from`:
/// reports can be forged, and a peer that is pinged too often closes the tunnel.
async fn unreachable(tunnel: &Tunnel, from: Instant) -> Unreachable {
    sleep_until(from).await;
    tunnel.unreachable().await
}

/// Completes when the deadline has passed.
async fn overdue(patience: Option<&Patience>) {
    match patience {
        Some(patience) => sleep_until(patience.deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
