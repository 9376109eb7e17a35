//! A Konnectivity server's gRPC stream on one side, a tunnel on the other.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use culvert_konnectivity::{
    Connections, End, Inbox, Outbound, PeerNotReading, Side, carry, outbound,
    packet::{DialRequest, Packet, PacketMessage},
};
use culvert_transport::{
    ReadError, ReadFrameError, RecvHalf, SendHalf, Tunnel, TunnelLost,
    control::{ControlError, ControlStream},
    splice::Meter,
};
use culvert_wire::{
    CloseCode, DialId, StreamCode, Target,
    bounded::{List, PeerText},
    control::{ControlMessage, Welcome},
    dial::{DialReply, Network, StreamKind},
    extension::Extensions,
    frame::{self, Message},
    version::{Features, REVISION},
};
use hyper::client::conn::http2;
use parking_lot::Mutex;
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Streaming, body::Body};
use tracing::debug;

use super::call::{Call, CallError, call};

/// Maximum number of a server's dials and connections together. Konnectivity has no limit.
const MAX_CONNECTIONS: usize = 10_000;
/// Time for the last packets once the agent has closed the tunnel.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a bridge ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Refused(#[from] CallError),
    #[error("the server ended its stream")]
    Stream,
    #[error("the server's stream failed: {}", PeerText::lossy(.0.message().as_bytes()))]
    Failed(#[from] tonic::Status),
    #[error(transparent)]
    PeerNotReading(#[from] PeerNotReading),
    #[error("{0}")]
    Tunnel(#[from] TunnelLost),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("the agent began with another message than hello")]
    NotHello,
}

impl Ended {
    fn close_code(&self) -> CloseCode {
        match self {
            Self::Refused(_) => CloseCode::UNAUTHENTICATED,
            Self::Stream => CloseCode::SHUTDOWN,
            Self::PeerNotReading(_) => CloseCode::OVERLOADED,
            Self::NotHello => CloseCode::PROTOCOL_VIOLATION,
            Self::Failed(_) | Self::Tunnel(_) | Self::Control(_) => CloseCode::ABANDONED,
        }
    }
}

/// Acts as the server on `tunnel` for a Konnectivity server until the tunnel or the gRPC stream
/// ends. The HTTP/2 connection lives as long as `requests`.
///
/// # Cancel safety
/// Dropping the future ends all connections without the last packets.
pub(super) async fn run(tunnel: Tunnel, requests: http2::SendRequest<Body>) {
    let Ok(opened) = tunnel.accept().await else { return };
    let mut control = ControlStream::new(tunnel.clone(), opened);
    let Err(ended) = serve(&tunnel, &mut control, requests.clone()).await;
    debug!(remote = %tunnel.remote_address(), %ended, "a Konnectivity server's stream is over");
    // Before the control stream is dropped, so that the agent receives the reason.
    tunnel.close(ended.close_code(), &ended.to_string());
    tunnel.flushed(FLUSH_TIMEOUT).await;
}

async fn serve(
    tunnel: &Tunnel,
    control: &mut ControlStream,
    requests: http2::SendRequest<Body>,
) -> Result<Infallible, Ended> {
    let ControlMessage::Hello(hello) = control.next().await? else { return Err(Ended::NotHello) };
    let (outbound, packets) = outbound();
    let Call { server_id, server_count, mut inbound } = tokio::select! {
        called = call(requests, &hello, packets, tunnel.memory()) => called?,
        // A Konnectivity server may leave a call without an answer.
        lost = tunnel.closed() => return Err(lost.into()),
    };
    let welcome = Welcome {
        revision: REVISION,
        features: Features::default(),
        server_id,
        server_count,
        servers: List::default(),
        max_streams: u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX),
        extensions: Extensions::default(),
    };
    control.send(&ControlMessage::Welcome(Box::new(welcome))).await?;
    let shared = Arc::new(Shared {
        tunnel: tunnel.clone(),
        outbound,
        connections: Connections::new(tunnel.memory()),
        dials: Mutex::default(),
        last_id: AtomicI64::new(0),
    });
    let mut served = JoinSet::new();
    let ended = tokio::select! {
        ended = shared.receive(&mut inbound, &mut served) => ended,
        ended = shared.watch_control(control) => ended,
    };
    if matches!(ended, Err(Ended::Tunnel(_) | Ended::Control(_))) {
        // The agent has closed the tunnel. Report the end of every connection, then that of the
        // stream.
        let reported = async {
            while served.join_next().await.is_some() {}
            drop(shared);
            while let Ok(Some(_)) = inbound.message().await {}
        };
        // For a server that does not read, the end of the HTTP/2 connection is the report.
        let _ = timeout(FLUSH_TIMEOUT, reported).await;
    }
    ended
}

/// The state that the tasks of one bridge share.
#[derive(Debug)]
struct Shared {
    tunnel: Tunnel,
    outbound: Outbound,
    connections: Connections,
    /// Dials without an answer yet, by the server's random number; cancelled when the server gives
    /// up.
    dials: Mutex<HashMap<i64, CancellationToken>>,
    /// The number of the last connection.
    last_id: AtomicI64,
}

impl Shared {
    /// Handles the server's packets. No packet may wait for long, because all connections share the
    /// stream.
    async fn receive(
        self: &Arc<Self>,
        inbound: &mut Streaming<Packet>,
        served: &mut JoinSet<()>,
    ) -> Result<Infallible, Ended> {
        loop {
            let message = tokio::select! {
                message = inbound.message() => message?.ok_or(Ended::Stream)?,
                Some(_) = served.join_next() => continue,
            };
            match PacketMessage::from(message) {
                PacketMessage::Dial(request) if served.len() >= MAX_CONNECTIONS => {
                    let error = "agent has too many connections".to_owned();
                    self.outbound.send_urgent(Packet::dial_response(request.random, Err(error)))?;
                }
                PacketMessage::Dial(request) => {
                    let shared = self.clone();
                    // As in Konnectivity, a dial that fails uses its number up.
                    let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
                    let cancelled = CancellationToken::new();
                    self.dials.lock().insert(request.random, cancelled.clone());
                    served.spawn(async move { shared.serve(id, request, cancelled).await });
                }
                PacketMessage::CancelDial(random) => {
                    if let Some(cancelled) = self.dials.lock().remove(&random) {
                        cancelled.cancel();
                    }
                }
                PacketMessage::Data(data) if data.connect_id == 0 => {}
                PacketMessage::Data(data) => {
                    if !self.connections.deliver(data.connect_id, data.data).await {
                        self.unknown(data.connect_id, "unrecognized connectID")?;
                    }
                }
                PacketMessage::Close(id) => match self.connections.remove(id) {
                    Some(inbox) => inbox.end(End::Finished),
                    None => self.unknown(id, "Unknown connectID")?,
                },
                // Only agents send the first three; a later version may send the last.
                PacketMessage::Dialed(_)
                | PacketMessage::Closed(_)
                | PacketMessage::Drain
                | PacketMessage::Unknown => {}
            }
        }
    }

    fn unknown(&self, id: i64, reason: &str) -> Result<(), PeerNotReading> {
        self.outbound.send_urgent(Packet::close_response(id, reason))
    }

    /// Forwards the agent's control messages that Konnectivity has a packet for.
    async fn watch_control(&self, control: &mut ControlStream) -> Result<Infallible, Ended> {
        loop {
            match control.next().await {
                Ok(ControlMessage::Drain(_)) => self.outbound.send_urgent(Packet::drain())?,
                Ok(_) => {}
                // The reason is in the tunnel's close.
                Err(ControlError::Read(ReadError::Lost(lost))) => return Err(lost.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Serves one dial and the connection that it leads to.
    async fn serve(&self, id: i64, request: DialRequest, cancelled: CancellationToken) {
        let random = request.random;
        let dialed = tokio::select! {
            dialed = self.dial(request) => dialed,
            () = cancelled.cancelled() => return debug!(id, "a Konnectivity server gave a dial up"),
        };
        self.dials.lock().remove(&random);
        match dialed {
            Ok(stream) => {
                // Inserted before the server can send data for it.
                let inbox = self.connections.insert(id);
                if self.outbound.send(Packet::dial_response(random, Ok(id))).await {
                    self.carry((id, inbox), stream).await;
                }
            }
            // Without effect when the server is gone.
            Err(error) => {
                self.outbound.send(Packet::dial_response(random, Err(error))).await;
            }
        }
    }

    async fn carry(&self, connection: (i64, Arc<Inbox>), stream: (SendHalf, RecvHalf)) {
        let id = connection.0;
        let (outbound, meter) = (self.outbound.clone(), Meter::default());
        let carried =
            carry(connection, Side::Server, stream, outbound, &self.connections, &meter).await;
        match carried.end {
            Ok((to, from)) => {
                debug!(id, %to, %from, "a Konnectivity server's connection ended");
            }
            Err(cut) => debug!(id, %cut, "a Konnectivity server's connection ended"),
        }
    }

    /// Opens a stream to the target. The error is the text that a Konnectivity agent would send.
    async fn dial(&self, request: DialRequest) -> Result<(SendHalf, RecvHalf), String> {
        let request = self.request(request)?;
        let (mut send, mut recv) = self.tunnel.open().await.map_err(|lost| lost.to_string())?;
        let asked = frame::encode(&request).map_err(|error| error.to_string())?;
        send.write_chunk(asked).await.map_err(|error| error.to_string())?;
        let reply = recv.read_frame(DialReply::MAX_LEN).await.map_err(|error| match error {
            ReadFrameError::Read(ReadError::Reset(StreamCode::OVERLOADED)) => {
                "agent has too many connections".to_owned()
            }
            error => error.to_string(),
        })?;
        let reply: DialReply = reply.message().map_err(|error| error.to_string())?;
        reply.outcome.map_err(|failure| failure.to_string())?;
        Ok((send, recv))
    }

    fn request(&self, request: DialRequest) -> Result<culvert_wire::dial::DialRequest, String> {
        let DialRequest { protocol, address, .. } = request;
        let network = Network::from_name(&protocol)
            .ok_or_else(|| format!("dial {protocol}: unknown network {protocol}"))?;
        let target: Target =
            address.parse().map_err(|error: culvert_wire::target::InvalidTarget| {
                format!("dial {protocol}: {error}")
            })?;
        Ok(culvert_wire::dial::DialRequest {
            id: DialId(fastrand::u64(..)),
            network,
            target,
            kind: StreamKind::UNKNOWN,
            // Konnectivity's requests have no time-out.
            timeout_millis: 0,
            trace: None,
            extensions: Extensions::default(),
        })
    }
}
