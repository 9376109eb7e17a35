//! One `Proxy` stream from its first packet to its last.
//!
//! ```text
//! Idle ──DIAL_REQ──▶ Dialing ──DIAL_RSP──▶ Connected ──CLOSE_REQ, CLOSE_RSP──▶ Over
//!  ▲                    │ DIAL_CLS             │ DATA both ways
//!  └────────────────────┘                      └ any fault: CLOSE_RSP with the reason
//! ```
//!
//! The answers to unexpected packets are those of Konnectivity. One differs: a second DIAL_REQ is
//! refused, where Konnectivity dials and then kills both connections at the first byte of the
//! second.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

use culvert_konnectivity::packet::{DialRequest, Packet, PacketMessage};
use culvert_process::metrics::{PacketType, Segment};
use culvert_transport::splice::{Cut, HalfEnd, Local};
use culvert_wire::{StreamCode, Target, bounded::Text, dial::Network};
use tokio::{sync::SetOnce, time::timeout};
use tonic::{Status, Streaming};
use tracing::debug;

use super::{
    super::{FrontendContext, hints::RequestHints},
    ProxyStream,
    connection::{self, CutOnDrop, Registration},
    second_dial_refused,
};
use crate::{
    dial::{DialError, DialParameters, Dialed, KonnectivityFailure},
    metrics::{FrontendKind, FrontendRefusal, ServerMetrics},
};

/// Id of the next connection of this process, from 1; 0 stands for no connection on the wire.
static NEXT_CONNECT_ID: AtomicI64 = AtomicI64::new(1);

/// Serves one `Proxy` stream until the frontend ends it, its connection is over, or it does not ask
/// for a target in time.
pub(super) async fn serve(
    context: Arc<FrontendContext>,
    hints: RequestHints,
    has_dialed: Arc<SetOnce<()>>,
    mut stream: ProxyStream,
) {
    let _counted = context.metrics.frontend_open(FrontendKind::Grpc);
    loop {
        let first = timeout(context.header_timeout, first_dial(&mut stream));
        let request = match first.await {
            Ok(Some(request)) => request,
            Ok(None) => break,
            Err(_) => {
                context.metrics.frontend_refused(FrontendRefusal::TimedOut);
                let text = "no dial was requested in time";
                // Ends the stream.
                let _ = stream.outbound.send(Err(Status::deadline_exceeded(text))).await;
                return;
            }
        };
        let _ = has_dialed.set(());
        let random = request.random;
        // On the heap: the connection has no room for it later.
        let dialed = match Box::pin(dial(&context, &hints, request, &mut stream)).await {
            Dialing::Done(dialed) => dialed,
            Dialing::Cancelled => continue,
            Dialing::Left => return,
        };
        match dialed {
            Ok(dialed) => return connected(&context, random, dialed, stream).await,
            Err(error) => {
                if matches!(error, DialError::NoAgent(_)) {
                    context.metrics.konnectivity_dial_failed(KonnectivityFailure::NoAgent);
                }
                let answer = Packet::dial_response(random, Err(error.to_string()));
                // A frontend that is gone needs no answer.
                let _ = context.metrics.flow.timed(stream.outbound.send(Ok(answer))).await;
                break;
            }
        }
    }
    ignore_rest(&mut stream.inbound).await;
}

/// Waits for the packet that asks for a target; `None` when none can follow.
async fn first_dial(stream: &mut ProxyStream) -> Option<DialRequest> {
    let ProxyStream { inbound, outbound, .. } = stream;
    while let Ok(Some(packet)) = inbound.message().await {
        match packet.into() {
            PacketMessage::Dial(request) => return Some(request),
            PacketMessage::Close(id) => {
                outbound
                    .send(Ok(Packet::close_response(id, "backend uninitialized")))
                    .await
                    .ok()?;
            }
            PacketMessage::Data(data) => {
                let answer = Packet::close_response(data.connect_id, "backend not initialized");
                outbound.send(Ok(answer)).await.ok()?;
                return None;
            }
            _ => {}
        }
    }
    None
}

/// Outcome of a dial.
enum Dialing {
    Done(Result<Box<Dialed>, DialError>),
    /// The frontend cancelled it and may ask again.
    Cancelled,
    /// The frontend has left.
    Left,
}

/// Dials, and answers the frontend's packets meanwhile.
async fn dial(
    context: &FrontendContext,
    hints: &RequestHints,
    request: DialRequest,
    stream: &mut ProxyStream,
) -> Dialing {
    let ProxyStream { inbound, outbound, .. } = stream;
    let parameters = match parameters(hints, &request) {
        Ok(parameters) => parameters,
        Err(error) => {
            context.metrics.dial_failed(&error);
            return Dialing::Done(Err(error));
        }
    };
    let mut dialing = pin!(context.dialer.dial(parameters));
    loop {
        let packet = tokio::select! {
            result = &mut dialing => return Dialing::Done(result.map(Box::new)),
            packet = inbound.message() => packet,
        };
        let Ok(Some(packet)) = packet else {
            context.metrics.dial_given_up();
            context.metrics.flow.canceled(Segment::FromClient, None);
            return Dialing::Left;
        };
        let refusal = match packet.into() {
            PacketMessage::CancelDial(random) if random == request.random => {
                context.metrics.dial_given_up();
                return Dialing::Cancelled;
            }
            PacketMessage::Dial(second) => second_dial_refused(second.random),
            PacketMessage::Data(data) if data.connect_id == 0 => continue,
            PacketMessage::Data(data) => {
                Packet::close_response(data.connect_id, "unrecognized connectID")
            }
            PacketMessage::Close(id) => Packet::close_response(id, "Unknown connectID"),
            _ => continue,
        };
        if outbound.send(Ok(refusal)).await.is_err() {
            return Dialing::Left;
        }
    }
}

fn parameters(hints: &RequestHints, request: &DialRequest) -> Result<DialParameters, DialError> {
    let network = Network::from_name(&request.protocol)
        .ok_or_else(|| DialError::Network(Text::truncated(request.protocol.clone())))?;
    let target: Target = request.address.parse()?;
    let RequestHints { kind, trace } = hints.clone();
    Ok(DialParameters { network, target, kind, trace })
}

/// Sends the frontend the id of its connection, and splices it until both directions have ended.
async fn connected(
    context: &FrontendContext,
    random: i64,
    dialed: Box<Dialed>,
    stream: ProxyStream,
) {
    let id = NEXT_CONNECT_ID.fetch_add(1, Ordering::Relaxed);
    let ServerMetrics { flow, .. } = &*context.metrics;
    let answer = stream.outbound.send(Ok(Packet::dial_response(random, Ok(id))));
    if flow.timed(answer).await.is_err() {
        context.metrics.konnectivity_dial_failed(KonnectivityFailure::SendResponse);
        flow.canceled(Segment::ToClient, Some(PacketType::DialRsp));
        return debug!("a frontend left before its dial was answered");
    }
    let registration = Registration::begin();
    let (reader, writer, abort) = connection::halves(id, stream, registration);
    let CutOnDrop(close) = &CutOnDrop(writer.close());
    let end = context.carry(Local::new(reader, writer, abort), dialed).await;
    if matches!(&end, Err(Cut::Local(fault)) if fault.code == StreamCode::CANCELLED) {
        flow.canceled(Segment::FromClient, None);
    }
    let error = match end {
        Ok((_, HalfEnd::Finished)) => return, // the writer has sent CLOSE_RSP
        Ok((HalfEnd::Finished, _)) => String::new(),
        Ok((HalfEnd::Stopped(code), _)) => format!("target stopped reading: {code}"),
        Err(Cut::Lost(lost)) => format!("agent lost: {lost}"),
        Err(cut) => cut.to_string(),
    };
    close.send(error).await;
}

/// Reads until the frontend ends the stream. Its packets have no meaning any more, but a stream
/// that the server ends first would look like a failure.
async fn ignore_rest(inbound: &mut Streaming<Packet>) {
    while let Ok(Some(_)) = inbound.message().await {}
}
