//! The bridge between a Konnectivity agent's one gRPC stream and a tunnel within this process.

use std::{collections::HashMap, pin::pin, sync::Arc, time::Duration};

use culvert_konnectivity::{
    Connections, End, Inbox, Outbound, PeerNotReading, Side, carry,
    packet::{DialResponse, Packet, PacketMessage},
};
use culvert_process::rate_limited;
use culvert_transport::{
    ConnectError, RecvHalf, SendHalf, Tunnel, TunnelLost,
    control::{ControlError, ControlStream},
    memory::{self, Ends},
    qmux::Peer,
    splice::{Cut, HalfEnd, Meter},
};
use culvert_wire::{
    CloseCode, StreamCode,
    bounded::PeerText,
    control::{ControlMessage, Drain, Hello},
    dial::{DialErrorKind, DialFailure, DialReply, DialRequest, DialTiming},
    extension::Extensions,
    frame::{self, Message},
};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    task::JoinSet,
    time::timeout_at,
};
use tonic::Streaming;
use tracing::debug;

use super::{AgentStream, keepalive::TooManyPings};
use crate::{
    agents::{AgentContext, admission::Authenticated, session, unadmitted::Attempt},
    dial::KonnectivityFailure,
    metrics::ServerMetrics,
};

/// Why a Konnectivity agent could not be introduced on its tunnel.
#[derive(Debug, thiserror::Error)]
pub(super) enum IntroductionError {
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
enum BridgeEnd {
    #[error("the agent ended its stream")]
    Stream,
    #[error("the agent's stream failed: {}", PeerText::lossy(.0.message().as_bytes()))]
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

impl BridgeEnd {
    fn close_code(&self) -> CloseCode {
        match self {
            Self::Pings(_) => CloseCode::TOO_MANY_PINGS,
            _ => CloseCode::DONE,
        }
    }
}

/// The agent's end of a tunnel, on which the bridge acts for a Konnectivity agent.
#[derive(Debug)]
pub(super) struct Bridge {
    tunnel: Tunnel,
    control: ControlStream,
    metrics: Arc<ServerMetrics>,
}

impl Bridge {
    /// Makes a tunnel within this process and introduces the agent on it.
    pub(super) async fn join(
        hello: Hello,
        authenticated: Authenticated,
        peer: Peer,
        context: &Arc<AgentContext>,
    ) -> Result<Self, IntroductionError> {
        let settings = context.settings;
        let streams = culvert_transport::Settings { max_streams: context.max_streams, ..settings };
        let Ends { agent: tunnel, server } = memory::connect(peer, &streams, &settings).await?;
        let attempt = Attempt::of_admitted();
        let deadline = attempt.deadline();
        let serving = session::serve(server, Some(authenticated), attempt, context.clone());
        context.tasks.spawn(serving);
        let introduced = async {
            let mut control = ControlStream::new(tunnel.clone(), tunnel.open().await?);
            control.send(&ControlMessage::Hello(Box::new(hello))).await?;
            match control.next().await? {
                ControlMessage::Welcome(_) => Ok(control),
                _ => Err(IntroductionError::NotWelcome),
            }
        };
        match timeout_at(deadline, introduced).await {
            Ok(Ok(control)) => Ok(Self { tunnel, control, metrics: context.metrics.clone() }),
            // The close of our own end names the cause.
            Ok(Err(IntroductionError::Control(ControlError::Read(_)))) => {
                Err(tunnel.closed().await.into())
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(IntroductionError::NotWelcome),
        }
    }

    /// Carries dials and connections until the agent's stream ends or the tunnel is lost.
    pub(super) async fn run(self, stream: AgentStream) {
        let Self { tunnel, mut control, metrics } = self;
        let AgentStream { inbound, outbound, too_many_pings } = stream;
        let connected = Arc::new(Connected {
            outbound,
            connections: Connections::new(tunnel.memory()),
            dials: Mutex::default(),
            drained: Notify::new(),
            metrics,
        });
        let mut accepting = pin!(accept(&tunnel, &connected));
        let ended = tokio::select! {
            // Before its consequence: the agent's stream fails too.
            biased;
            () = too_many_pings.cancelled() => Err(TooManyPings.into()),
            ended = connected.receive(inbound) => ended,
            ended = connected.converse(&mut control) => ended,
            ended = &mut accepting => ended,
        };
        let Err(ended) = ended;
        debug!(remote = %tunnel.remote_address(), %ended, "a Konnectivity agent's stream is over");
        // Closed while the streams still live: dials without an answer are lost with the tunnel,
        // and move to another one. The server sees the reason and nothing else.
        tunnel.close(ended.close_code(), &ended.to_string());
    }
}

/// The result of what ends only with an error.
type Never = std::convert::Infallible;

/// Serves each stream that our own end opens, in a task of its own.
async fn accept(tunnel: &Tunnel, connected: &Arc<Connected>) -> Result<Never, BridgeEnd> {
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            stream = tunnel.accept() => {
                let (connected, stream) = (connected.clone(), stream?);
                streams.spawn(async move { connected.serve(stream).await });
            }
            Some(_) = streams.join_next() => {}
        }
    }
}

/// A connection's id and what the agent sends on it; or why there is none, in the agent's words.
type Answer = Result<(i64, Arc<Inbox>), String>;

/// A connected agent, as the tasks of its bridge share it.
#[derive(Debug)]
struct Connected {
    outbound: Outbound,
    connections: Connections,
    /// Dials without an answer, by the random number of their request.
    dials: Mutex<HashMap<i64, oneshot::Sender<Answer>>>,
    /// Notified when the agent drains.
    drained: Notify,
    metrics: Arc<ServerMetrics>,
}

impl Connected {
    /// Receives what the agent sends. No connection may make it wait for long, because all of them
    /// share this stream.
    async fn receive(&self, mut inbound: Streaming<Packet>) -> Result<Never, BridgeEnd> {
        loop {
            match PacketMessage::from(inbound.message().await?.ok_or(BridgeEnd::Stream)?) {
                PacketMessage::Dialed(response) => self.dialed(response)?,
                PacketMessage::Data(data) => {
                    // A connection that is not here was closed; the agent reads on for a moment.
                    self.connections.deliver(data.connect_id, data.data).await;
                }
                PacketMessage::Closed(closed) => {
                    if let Some(inbox) = self.connections.remove(closed.connect_id) {
                        inbox.end(match closed.error {
                            error if error.is_empty() => End::Finished,
                            error => End::Cut {
                                code: StreamCode::PEER_RESET,
                                reason: PeerText::lossy(error.as_bytes()),
                            },
                        });
                    }
                }
                PacketMessage::Drain => self.drained.notify_one(),
                // Packets that only servers send, and those of later versions.
                PacketMessage::Dial(_)
                | PacketMessage::Close(_)
                | PacketMessage::CancelDial(_)
                | PacketMessage::Unknown => {}
            }
        }
    }

    fn dialed(&self, response: DialResponse) -> Result<(), PeerNotReading> {
        let waiting = self.dials.lock().remove(&response.random);
        if waiting.is_none() {
            self.metrics.konnectivity_dial_failed(KonnectivityFailure::UnrecognizedResponse);
        }
        if !response.error.is_empty() {
            if let Some(waiting) = waiting {
                // A dial that was given up needs no answer.
                let _ = waiting.send(Err(response.error));
            }
            return Ok(());
        }
        let id = response.connect_id;
        // Entered at once: the bytes of a target that speaks first are right behind.
        let waits = waiting
            .is_some_and(|waiting| waiting.send(Ok((id, self.connections.insert(id)))).is_ok());
        if !waits {
            if let Some(inbox) = self.connections.remove(id) {
                let reason = PeerText::lossy(b"the agent gave its name away");
                inbox.end(End::Cut { code: StreamCode::MALFORMED, reason });
            }
            self.outbound.send_urgent(Packet::close_request(id))?;
        }
        Ok(())
    }

    /// Sends the agent's drain to our own end, and drops its messages, for which Konnectivity has
    /// no packets.
    async fn converse(&self, control: &mut ControlStream) -> Result<Never, BridgeEnd> {
        loop {
            tokio::select! {
                message = control.next() => drop(message?),
                () = self.drained.notified() => {
                    // The agent does not say when it leaves.
                    let drain = Drain { deadline_millis: u32::MAX };
                    control.send(&ControlMessage::Drain(drain)).await?;
                }
            }
        }
    }

    /// Serves one stream: the dial, its reply, the connection.
    async fn serve(&self, (mut send, mut recv): (SendHalf, RecvHalf)) {
        let request = match recv.read_frame(DialRequest::MAX_LEN).await {
            Ok(frame) => frame.message::<DialRequest>(),
            Err(_) => return,
        };
        let Ok(request) = request else { return send.reset(StreamCode::MALFORMED) };
        let answer = tokio::select! {
            answer = self.dial(&request) => answer,
            // The dial was given up, which ended the stream.
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
            // The splice below finds the same, and closes the agent's connection.
            debug!(dial_target = %request.target, "a Konnectivity agent's answer came too late");
        }
        match answer {
            Ok(connection) => {
                let meter = Meter::default();
                let (outbound, stream) = (self.outbound.clone(), (send, recv));
                let outcome =
                    carry(connection, Side::Agent, stream, outbound, &self.connections, &meter);
                log_end(&request, &outcome.await.end);
            }
            Err(_) => {
                send.finish();
                recv.stop(StreamCode::DIAL_FAILED);
            }
        }
    }

    /// Asks the agent and waits for its answer, without a limit of its own.
    async fn dial(&self, request: &DialRequest) -> Answer {
        let random = fastrand::i64(1..);
        let (answered, answer) = oneshot::channel();
        self.dials.lock().insert(random, answered);
        let mut pending = PendingDial { connected: self, random, answer };
        let packet =
            Packet::dial_request(random, request.network.name(), request.target.to_string());
        self.outbound.send_urgent(packet).map_err(|not_reading| not_reading.to_string())?;
        (&mut pending.answer).await.unwrap_or_else(|_| Err("dial closed".into()))
    }
}

/// A dial whose answer was not taken. Dropping it cancels the dial at the agent.
struct PendingDial<'a> {
    connected: &'a Connected,
    random: i64,
    answer: oneshot::Receiver<Answer>,
}

impl Drop for PendingDial<'_> {
    fn drop(&mut self) {
        let Connected { outbound, connections, .. } = self.connected;
        self.answer.close();
        // An agent that leaves even this unread is lost soon.
        let _ = match self.answer.try_recv() {
            // The answer arrived while the dial was given up.
            Ok(Ok((id, _))) => {
                connections.remove(id);
                outbound.send_urgent(Packet::close_request(id))
            }
            Ok(Err(_)) => Ok(()),
            // An answer that arrives nevertheless is answered with CLOSE_REQ.
            Err(_) => match self.connected.dials.lock().remove(&self.random) {
                Some(_) => outbound.send_urgent(Packet::close_dial(self.random)),
                None => Ok(()),
            },
        };
    }
}

/// Logs how a connection ended; as a warning when it was cut off because its reader is too slow:
/// the frontend sees no cause.
fn log_end(request: &DialRequest, end: &Result<(HalfEnd, HalfEnd), Cut>) {
    let target = &request.target;
    match end {
        Err(Cut::Local(fault)) if fault.code == StreamCode::OVERLOADED => {
            rate_limited!(
                Duration::from_secs(10), per dial_target = target, WARN, %fault,
                "a Konnectivity agent's connection was cut off"
            );
        }
        Err(cut) => {
            debug!(dial_target = %target, %cut, "a Konnectivity agent's connection ended");
        }
        Ok((to, from)) => {
            debug!(dial_target = %target, %to, %from, "a Konnectivity agent's connection ended");
        }
    }
}

/// The failure with this text, which is the agent's and so Go's, and with the kind that it names.
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
