//! A `Proxy` stream as the local side of a splice: DATA packets in and out, CLOSE at either end.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use culvert_konnectivity::packet::{Packet, PacketMessage};
use culvert_transport::splice::{Abort, LocalFault, LocalRead, LocalWrite};
use culvert_wire::StreamCode;
use tokio::{
    sync::SetOnce,
    time::{Instant, timeout_at},
};
use tonic::Streaming;

use super::{Outbound, second_dial_refused};

/// The client library enters a connection a moment after it has taken the DIAL_RSP from the wire,
/// and kills it when a DATA is faster. The first packet of a target that speaks first is held
/// back for this long, or until the client's own first DATA proves that it is ready.
const REGISTRATION_DELAY: Duration = Duration::from_millis(20);
/// The largest DATA packet to a frontend. Larger ones save nothing, and take longer to decode
/// before the first byte is seen.
const MAX_DATA_LEN: usize = 64 * 1024;

/// When the client library is ready for its connection's packets.
#[derive(Clone, Debug)]
pub(super) struct Registration {
    heard: Arc<SetOnce<()>>,
    latest: Instant,
}

impl Registration {
    /// The DIAL_RSP has just been handed to HTTP/2.
    pub(super) fn begin() -> Self {
        Self { heard: Arc::new(SetOnce::new()), latest: Instant::now() + REGISTRATION_DELAY }
    }

    /// The client has used its connection.
    fn heard(&self) {
        let _ = self.heard.set(());
    }

    /// Waits until the client is ready, as far as that can be known.
    async fn wait(&self) {
        if !self.heard.initialized() {
            let _ = timeout_at(self.latest, self.heard.wait()).await;
        }
    }
}

/// The three parts of a `Proxy` stream that a splice needs.
pub(super) fn halves(
    id: i64,
    inbound: Streaming<Packet>,
    outbound: Outbound,
    registration: Registration,
) -> (ProxyRead, ProxyWrite, ProxyAbort) {
    let closing = Closing { id, outbound, registration, sent: Arc::new(AtomicBool::new(false)) };
    let reader = ProxyRead { inbound, closing: closing.clone(), first_id: None, ended: false };
    (reader, ProxyWrite { closing }, ProxyAbort)
}

/// The connection's CLOSE_RSP, which is sent once.
#[derive(Clone, Debug)]
pub(super) struct Closing {
    id: i64,
    outbound: Outbound,
    registration: Registration,
    sent: Arc<AtomicBool>,
}

impl Closing {
    /// Ends the connection for the frontend; the error is empty when it ended in order.
    pub(super) async fn send(&self, error: String) {
        if self.sent.swap(true, Ordering::Relaxed) {
            return;
        }
        // A client that is not ready would ignore it and wait for ever.
        self.registration.wait().await;
        let _ = self.outbound.send(Ok(Packet::close_response(self.id, error))).await;
    }

    fn is_sent(&self) -> bool {
        self.sent.load(Ordering::Relaxed)
    }
}

/// What the frontend sends.
pub(super) struct ProxyRead {
    inbound: Streaming<Packet>,
    closing: Closing,
    /// The connection that the frontend's first DATA was for.
    first_id: Option<i64>,
    ended: bool,
}

impl ProxyRead {
    /// What a packet means for the connection: bytes, its end, or nothing.
    async fn handle(&mut self, packet: Packet) -> Result<Option<Bytes>, LocalFault> {
        let id = self.closing.id;
        let answer = match packet.into() {
            PacketMessage::Data(data) => {
                if data.connect_id == 0 {
                    return Ok(None);
                }
                let first_id = *self.first_id.get_or_insert(data.connect_id);
                if data.connect_id != first_id {
                    return Err(self.mismatch(data.connect_id, first_id).await);
                }
                if data.connect_id == id {
                    self.closing.registration.heard();
                    return Ok(Some(data.data));
                }
                Packet::close_response(data.connect_id, "unrecognized connectID")
            }
            PacketMessage::Close(closed) => {
                self.closing.registration.heard();
                // Nothing that follows has a meaning, whichever connection it names.
                self.ended = true;
                if closed == id {
                    return Ok(None);
                }
                Packet::close_response(closed, "Unknown connectID")
            }
            PacketMessage::Dial(second) => second_dial_refused(second.random),
            _ => return Ok(None),
        };
        self.closing.outbound.send(Ok(answer)).await.map_err(|_| cancelled())?;
        Ok(None)
    }

    /// Ends the connection of a frontend that mixes up names.
    async fn mismatch(&self, found: i64, first: i64) -> LocalFault {
        let text = "mismatched connection IDs";
        let _ = self.closing.outbound.send(Ok(Packet::close_response(found, text))).await;
        if first == self.closing.id {
            self.closing.send(text.into()).await;
        } else {
            let _ = self.closing.outbound.send(Ok(Packet::close_response(first, text))).await;
            self.closing.sent.store(true, Ordering::Relaxed);
        }
        LocalFault { code: StreamCode::FRONTEND_MISBEHAVED, source: io::Error::other(text) }
    }
}

impl LocalRead for ProxyRead {
    async fn read(&mut self) -> Result<Option<Bytes>, LocalFault> {
        while !self.ended {
            match self.inbound.message().await {
                Ok(Some(packet)) => match self.handle(packet).await? {
                    Some(data) if !data.is_empty() => return Ok(Some(data)),
                    _ => {}
                },
                // A frontend that was told of the end leaves by ending or cancelling its stream.
                Ok(None) | Err(_) if self.closing.is_sent() => self.ended = true,
                // Without a CLOSE_REQ it was cut off: HTTP/2's layers show a cancelled stream as
                // an ended one, and the client library never just ends it.
                Ok(None) | Err(_) => return Err(cancelled()),
            }
        }
        Ok(None)
    }

    async fn failed(&mut self) -> LocalFault {
        self.closing.outbound.closed().await;
        cancelled()
    }
}

fn cancelled() -> LocalFault {
    let source = io::Error::new(io::ErrorKind::ConnectionAborted, "the frontend's stream ended");
    LocalFault { code: StreamCode::CANCELLED, source }
}

/// What the frontend gets.
pub(super) struct ProxyWrite {
    closing: Closing,
}

impl ProxyWrite {
    pub(super) fn closing(&self) -> Closing {
        self.closing.clone()
    }

    async fn send(&self, data: Bytes) -> Result<(), LocalFault> {
        let packet = Packet::data(self.closing.id, data);
        self.closing.outbound.send(Ok(packet)).await.map_err(|_| cancelled())
    }
}

impl LocalWrite for ProxyWrite {
    async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), LocalFault> {
        self.closing.registration.wait().await;
        // One packet of a tunnel's payload is too little for a message of its own.
        let mut batch = BytesMut::new();
        if let [chunk] = chunks {
            return self.send(std::mem::take(chunk)).await;
        }
        for chunk in chunks {
            if !batch.is_empty() && batch.len() + chunk.len() > MAX_DATA_LEN {
                self.send(batch.split().freeze()).await?;
            }
            if batch.is_empty() {
                batch.reserve(MAX_DATA_LEN);
            }
            batch.extend_from_slice(chunk);
            *chunk = Bytes::new();
        }
        self.send(batch.freeze()).await
    }

    async fn finish(&mut self) -> Result<(), LocalFault> {
        self.closing.send(String::new()).await;
        Ok(())
    }

    /// A frontend that has closed reads no more: CLOSE_REQ ends both directions.
    async fn gone(&mut self) {}
}

/// Nothing to be done here: whoever awaits the splice's end tells it to the frontend.
#[derive(Debug)]
pub(super) struct ProxyAbort;

impl Abort for ProxyAbort {
    fn abort(&self) {}
}

/// Cuts the connection off for the frontend when nobody comes to tell how it ended.
#[derive(Debug)]
pub(super) struct CutOnDrop(pub(super) Closing);

impl Drop for CutOnDrop {
    fn drop(&mut self) {
        if !self.0.is_sent() {
            let status = tonic::Status::aborted("the connection was cut off");
            // Without room the stream's own end, short of a CLOSE_RSP, has to do.
            let _ = self.0.outbound.try_send(Err(status));
        }
    }
}
