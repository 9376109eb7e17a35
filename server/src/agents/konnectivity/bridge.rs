//! A Konnectivity agent's one stream on one side, a tunnel on the other.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use culvert_konnectivity::{
    Connections, End, Inbox, Outbound, PeerNotReading, Side, carry,
    packet::{DialResponse, Packet, PacketMessage},
};
use culvert_process::rate_limited;
use culvert_transport::{
    ConnectError, RecvHalf, SendHalf, Tunnel, TunnelLost,
    control::{ControlError, ControlStream},
    memory::Pair,
    qmux::Peer,
    splice::{Cut, HalfEnd, Meter},
};
use culvert_wire::{
    CloseCode, StreamCode,
    control::{ControlMessage, Drain, Hello},
    dial::{DialErrorKind, DialFailure, DialReply, DialRequest, DialTiming},
    extension::Extensions,
    frame::{self, Message},
};
use tokio::{
    sync::{Notify, oneshot},
    task::JoinSet,
    time::{Instant, timeout_at},
};
use tonic::Streaming;
use tracing::debug;

use super::{Call, keepalive::TooManyPings};
use crate::agents::{AgentContext, admission::Authenticated, session, unadmitted::JOIN_TIMEOUT};

/// Why a Konnectivity agent was not let in.
#[derive(Debug, thiserror::Error)]
pub(super) enum JoinError {
    #[error(transparent)]
    Pipe(#[from] ConnectError),
    #[error("{0}")]
    Lost(#[from] TunnelLost),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("no welcome")]
    NotWelcome,
}

/// Why a bridge ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the agent ended its stream")]
    Stream,
    #[error("the agent's stream failed: {}", .0.message())]
    Failed(#[from] tonic::Status),
    #[error(transparent)]
    PeerNotReading(#[from] PeerNotReading),
    #[error(transparent)]
    Pings(#[from] TooManyPings),
    #[error("{0}")]
    Tunnel(#[from] TunnelLost),
    #[error(transparent)]
    Control(#[from] ControlError),
}

impl Ended {
    fn close_code(&self) -> CloseCode {
        match self {
            Self::Pings(_) => CloseCode::TOO_MANY_PINGS,
            _ => CloseCode::DONE,
        }
    }
}

/// Plays a Konnectivity agent's part on its tunnel.
#[derive(Debug)]
pub(super) struct Bridge {
    tunnel: Tunnel,
    control: ControlStream,
}

impl Bridge {
    /// Introduces the agent on a new tunnel of this process.
    pub(super) async fn join(
        hello: Hello,
        authenticated: Authenticated,
        peer: Peer,
        context: &Arc<AgentContext>,
    ) -> Result<Self, JoinError> {
        let settings = context.settings;
        let streams = culvert_transport::Settings { max_streams: context.max_streams, ..settings };
        let ends = Pair::without_idle_timeout(peer, &streams, &settings).await?;
        let deadline = Instant::now() + JOIN_TIMEOUT;
        let serving = session::serve(ends.server, Some(authenticated), deadline, context.clone());
        context.tasks.spawn(serving);
        let tunnel = ends.agent;
        let introduced = async {
            let mut control = ControlStream::new(tunnel.clone(), tunnel.open().await?);
            control.send(&ControlMessage::Hello(Box::new(hello))).await?;
            match control.next().await? {
                ControlMessage::Welcome(_) => Ok(control),
                _ => Err(JoinError::NotWelcome),
            }
        };
        match timeout_at(deadline, introduced).await {
            Ok(Ok(control)) => Ok(Self { tunnel, control }),
            // Our own end says best why it closed the tunnel.
            Ok(Err(JoinError::Control(ControlError::Read(_)))) => Err(tunnel.closed().await.into()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(JoinError::NotWelcome),
        }
    }

    /// Carries dials and connections until the agent or the tunnel is gone.
    pub(super) async fn run(self, call: Call) {
        let Self { tunnel, mut control } = self;
        let Call { inbound, outbound, too_many_pings } = call;
        let shared = Arc::new(Shared {
            outbound,
            connections: Connections::default(),
            dials: Mutex::default(),
            drained: Notify::new(),
        });
        let mut accepting = pin!(accept(&tunnel, &shared));
        let ended = tokio::select! {
            // Before what comes of it: the agent's stream fails too.
            biased;
            () = too_many_pings.cancelled() => Err(TooManyPings.into()),
            ended = shared.hear(inbound) => ended,
            ended = shared.converse(&mut control) => ended,
            ended = &mut accepting => ended,
        };
        let Err(ended) = ended;
        debug!(remote = %tunnel.remote_address(), %ended, "a Konnectivity agent's stream is over");
        // While the streams still live: dials that were not answered are lost with the tunnel, and made
        // again elsewhere, and the server hears the reason and nothing else.
        tunnel.close(ended.close_code(), &ended.to_string());
    }
}

/// Ends only with an error.
type Never = std::convert::Infallible;

/// Serves each stream that the server opens in a task of its own.
async fn accept(tunnel: &Tunnel, shared: &Arc<Shared>) -> Result<Never, Ended> {
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            stream = tunnel.accept() => {
                let (shared, stream) = (shared.clone(), stream?);
                streams.spawn(async move { shared.serve(stream).await });
            }
            Some(_) = streams.join_next() => {}
        }
    }
}

/// A connection's name and what the agent sends on it, or why there is none.
type Answer = Result<(i64, Arc<Inbox>), String>;

/// What the tasks of one bridge share.
#[derive(Debug)]
struct Shared {
    outbound: Outbound,
    connections: Connections,
    /// Dials that were not answered.
    dials: Mutex<HashMap<i64, oneshot::Sender<Answer>>>,
    /// Told when the agent drains.
    drained: Notify,
}

impl Shared {
    /// Takes what the agent sends. It waits for nobody for long: all connections share this stream.
    async fn hear(&self, mut inbound: Streaming<Packet>) -> Result<Never, Ended> {
        loop {
            match PacketMessage::from(inbound.message().await?.ok_or(Ended::Stream)?) {
                PacketMessage::Dialed(response) => self.dialed(response)?,
                // One that is not here was closed; the agent goes on reading its target for a
                // moment.
                PacketMessage::Data(data) => {
                    if let Some(inbox) = self.connections.push(data.connect_id, data.data) {
                        inbox.pace().await;
                    }
                }
                PacketMessage::Closed(closed) => {
                    if let Some(inbox) = self.connections.remove(closed.connect_id) {
                        inbox.end(match closed.error {
                            error if error.is_empty() => End::Finished,
                            reason => End::Cut { code: StreamCode::PEER_RESET, reason },
                        });
                    }
                }
                PacketMessage::Drain => self.drained.notify_one(),
                // What only servers say, and what later versions may.
                PacketMessage::Dial(_)
                | PacketMessage::Close(_)
                | PacketMessage::CancelDial(_)
                | PacketMessage::Unknown => {}
            }
        }
    }

    fn dialed(&self, response: DialResponse) -> Result<(), PeerNotReading> {
        let waiting = self.dials().remove(&response.random);
        if !response.error.is_empty() {
            if let Some(waiting) = waiting {
                // Whoever has gone need not know.
                let _ = waiting.send(Err(response.error));
            }
            return Ok(());
        }
        let id = response.connect_id;
        // Entered at once: a target that speaks first is right behind.
        let waits = waiting
            .is_some_and(|waiting| waiting.send(Ok((id, self.connections.enter(id)))).is_ok());
        if !waits {
            if let Some(inbox) = self.connections.remove(id) {
                let reason = "the agent gave its name away".into();
                inbox.end(End::Cut { code: StreamCode::MALFORMED, reason });
            }
            self.outbound.send_urgent(Packet::close_request(id))?;
        }
        Ok(())
    }

    /// Tells our own end that the agent drains, and reads what it has to say, of which a Konnectivity agent
    /// understands nothing.
    async fn converse(&self, control: &mut ControlStream) -> Result<Never, Ended> {
        loop {
            tokio::select! {
                message = control.next() => drop(message?),
                () = self.drained.notified() => {
                    // It does not say when it will be gone.
                    let drain = Drain { deadline_millis: u32::MAX };
                    control.send(&ControlMessage::Drain(drain)).await?;
                }
            }
        }
    }

    /// One stream: the dial, its answer, the connection.
    async fn serve(&self, (mut send, mut recv): (SendHalf, RecvHalf)) {
        let request = match recv.read_frame(DialRequest::MAX_LEN).await {
            Ok(frame) => frame.message::<DialRequest>(),
            Err(_) => return,
        };
        let Ok(request) = request else { return send.reset(StreamCode::MALFORMED) };
        let answer = tokio::select! {
            answer = self.dial(&request) => answer,
            // The server gave up, and has told the stream so.
            _ = send.stopped() => return,
            _ = recv.failed() => return,
        };
        let reply = DialReply {
            outcome: answer.as_ref().map(|_| ()).map_err(|text| failure(text)),
            timing: DialTiming::default(),
            extensions: Extensions::default(),
        };
        let Ok(reply) = frame::encode(&reply) else { return };
        if send.write_chunk(reply).await.is_err() {
            // Without a reader the splice below would find the same; the agent is told there.
            debug!(target = %request.target, "nobody waits for a Konnectivity agent's answer");
        }
        match answer {
            Ok(connection) => {
                let meter = Meter::default();
                let (outbound, stream) = (self.outbound.clone(), (send, recv));
                let outcome =
                    carry(connection, Side::Agent, stream, outbound, &self.connections, &meter);
                told(&request, &outcome.await.end);
            }
            Err(_) => {
                send.finish();
                recv.stop(StreamCode::DIAL_FAILED);
            }
        }
    }

    /// Asks the agent and waits for its answer, for as long as the stream's other end does.
    async fn dial(&self, request: &DialRequest) -> Answer {
        let random = fastrand::i64(1..);
        let (answered, answer) = oneshot::channel();
        self.dials().insert(random, answered);
        let mut pending = PendingDial { shared: self, random, answer };
        let packet =
            Packet::dial_request(random, request.network.name(), request.target.to_string());
        self.outbound.send_urgent(packet).map_err(|not_reading| not_reading.to_string())?;
        (&mut pending.answer).await.unwrap_or_else(|_| Err("dial closed".into()))
    }

    fn dials(&self) -> MutexGuard<'_, HashMap<i64, oneshot::Sender<Answer>>> {
        // Every change is complete before it could panic.
        self.dials.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A dial whose answer nobody has taken; when dropped it is forgotten, and the agent is told.
struct PendingDial<'a> {
    shared: &'a Shared,
    random: i64,
    answer: oneshot::Receiver<Answer>,
}

impl Drop for PendingDial<'_> {
    fn drop(&mut self) {
        let Shared { outbound, connections, .. } = self.shared;
        self.answer.close();
        // An agent that does not even read this is lost soon enough.
        let _ = match self.answer.try_recv() {
            // It came while the dial was given up.
            Ok(Ok((id, _))) => {
                connections.remove(id);
                outbound.send_urgent(Packet::close_request(id))
            }
            Ok(Err(_)) => Ok(()),
            // One that comes nevertheless is answered with CLOSE_REQ.
            Err(_) => match self.shared.dials().remove(&self.random) {
                Some(_) => outbound.send_urgent(Packet::close_dial(self.random)),
                None => Ok(()),
            },
        };
    }
}

/// Logs how a connection ended, and aloud when it was cut off for a reader that is too slow: the
/// frontend learns no more than that.
fn told(request: &DialRequest, end: &Result<(HalfEnd, HalfEnd), Cut>) {
    let target = &request.target;
    match end {
        Err(Cut::Local(fault)) if fault.code == StreamCode::OVERLOADED => {
            rate_limited!(
                Duration::from_secs(1), WARN, %target, %fault,
                "a Konnectivity agent's connection was cut off"
            );
        }
        end => debug!(%target, ?end, "a Konnectivity agent's connection ended"),
    }
}

/// The reason in a Konnectivity agent's words, which are Go's, and its kind as far as they tell.
fn failure(text: &str) -> DialFailure {
    let kind = [
        ("connection refused", DialErrorKind::REFUSED),
        ("timeout", DialErrorKind::TIMEOUT),
        ("no such host", DialErrorKind::UNRESOLVABLE),
        ("unreachable", DialErrorKind::UNREACHABLE),
        ("no route to host", DialErrorKind::UNREACHABLE),
        ("connection reset", DialErrorKind::RESET),
        ("too many open files", DialErrorKind::OVERLOADED),
    ]
    .into_iter()
    .find_map(|(words, kind)| text.contains(words).then_some(kind));
    DialFailure::new(kind.unwrap_or(DialErrorKind::OTHER), text)
}
