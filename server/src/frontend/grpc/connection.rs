//! A `Proxy` stream as the local side of a splice: DATA packets in and out, CLOSE at either end.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use culvert_konnectivity::{
    DataWriter, NoAbort,
    packet::{Packet, PacketMessage, Payload},
};
use culvert_transport::{
    budget::Holder,
    splice::{LocalFault, LocalRead, LocalWrite},
};
use culvert_wire::StreamCode;
use tokio::{
    sync::SetOnce,
    time::{Instant, timeout_at},
};
use tonic::Streaming;

use super::{Outbound, ProxyStream, second_dial_refused};
use crate::http2::Holders;

/// Time for which the first packet of a target that speaks first is held back, unless the client's
/// own first DATA proves earlier that it is ready. The client library registers a connection a
/// moment after it has taken the DIAL_RSP from the wire, and kills it when a DATA is faster.
const REGISTRATION_DELAY: Duration = Duration::from_millis(20);
/// Maximum length of a DATA packet to a frontend, in bytes. Larger ones save nothing, and take
/// longer to decode before the first byte is seen.
const MAX_DATA_LEN: usize = 64 * 1024;

/// The moment from which the client library is ready for its connection's packets.
#[derive(Clone, Debug)]
pub(super) struct Registration {
    heard: Arc<SetOnce<()>>,
    latest: Instant,
}

impl Registration {
    /// The registration of a client whose DIAL_RSP has just been handed to HTTP/2.
    pub(super) fn begin() -> Self {
        Self { heard: Arc::new(SetOnce::new()), latest: Instant::now() + REGISTRATION_DELAY }
    }

    /// Records that the client has used its connection, and so is ready.
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

/// A `Proxy` stream as the three parts of a splice's local side.
pub(super) fn halves(
    id: i64,
    stream: ProxyStream,
    registration: Registration,
) -> (ProxyRead, ProxyWrite, NoAbort) {
    let ProxyStream { inbound, outbound, holders } = stream;
    let close = CloseOnce { id, outbound, registration, sent: Arc::new(AtomicBool::new(false)) };
    let reader = ProxyRead {
        inbound,
        holders: holders.clone(),
        close: close.clone(),
        first_id: None,
        ended: false,
    };
    (reader, ProxyWrite { close, holders, data: DataWriter::new(id, MAX_DATA_LEN) }, NoAbort)
}

/// Sends the connection's CLOSE_RSP, once.
#[derive(Clone, Debug)]
pub(super) struct CloseOnce {
    id: i64,
    outbound: Outbound,
    registration: Registration,
    sent: Arc<AtomicBool>,
}

impl CloseOnce {
    /// Ends the connection for the frontend; the error is empty when it ended in order.
    pub(super) async fn send(&self, error: String) {
        if self.sent.swap(true, Ordering::Relaxed) {
            return;
        }
        // A client that is not ready would ignore the packet and wait for ever.
        self.registration.wait().await;
        let _ = self.outbound.send(Ok(Packet::close_response(self.id, error))).await;
    }

    fn is_sent(&self) -> bool {
        self.sent.load(Ordering::Relaxed)
    }
}

/// Reads what the frontend sends.
pub(super) struct ProxyRead {
    inbound: Streaming<Packet>,
    holders: Holders,
    close: CloseOnce,
    /// Id of the connection that the frontend's first DATA was for.
    first_id: Option<i64>,
    ended: bool,
}

impl ProxyRead {
    /// Handles one packet; the bytes that it carries for the connection, if any.
    async fn handle(&mut self, packet: Packet) -> Result<Option<Bytes>, LocalFault> {
        let id = self.close.id;
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
                    self.close.registration.heard();
                    return Ok(Some(data.data));
                }
                Packet::close_response(data.connect_id, "unrecognized connectID")
            }
            PacketMessage::Close(closed) => {
                self.close.registration.heard();
                // Packets that follow have no meaning, whichever connection they name.
                self.ended = true;
                if closed == id {
                    return Ok(None);
                }
                Packet::close_response(closed, "Unknown connectID")
            }
            PacketMessage::Dial(second) => second_dial_refused(second.random),
            _ => return Ok(None),
        };
        self.close.outbound.send(Ok(answer)).await.map_err(|_| cancelled())?;
        Ok(None)
    }

    /// Ends the connection of a frontend that confuses connection ids.
    async fn mismatch(&self, found: i64, first: i64) -> LocalFault {
        let text = "mismatched connection IDs";
        let _ = self.close.outbound.send(Ok(Packet::close_response(found, text))).await;
        if first == self.close.id {
            self.close.send(text.into()).await;
        } else {
            let _ = self.close.outbound.send(Ok(Packet::close_response(first, text))).await;
            self.close.sent.store(true, Ordering::Relaxed);
        }
        LocalFault { code: StreamCode::FRONTEND_MISBEHAVED, source: io::Error::other(text) }
    }
}

impl LocalRead for ProxyRead {
    async fn read(&mut self, holder: &Arc<Holder>) -> Result<Option<Bytes>, LocalFault> {
        while !self.ended {
            match self.inbound.message().await {
                Ok(Some(packet)) => match self.handle(packet).await? {
                    Some(data) if !data.is_empty() => return Ok(Some(holder.hold_bytes(data))),
                    _ => {}
                },
                // A frontend that was sent the end leaves by ending or cancelling its stream.
                Ok(None) | Err(_) if self.close.is_sent() => self.ended = true,
                // Without a CLOSE_REQ it was cut off: HTTP/2's layers show a cancelled stream as
                // an ended one, and the client library never just ends it.
                Ok(None) | Err(_) => return Err(cancelled()),
            }
        }
        Ok(None)
    }

    async fn failed(&mut self) -> LocalFault {
        tokio::select! {
            biased;
            () = self.holders.cut() => overloaded(),
            () = self.close.outbound.closed() => cancelled(),
        }
    }
}

fn cancelled() -> LocalFault {
    let source = io::Error::new(io::ErrorKind::ConnectionAborted, "the frontend's stream ended");
    LocalFault { code: StreamCode::CANCELLED, source }
}

fn overloaded() -> LocalFault {
    let source = io::Error::other("the process has no more memory for what is not read");
    LocalFault { code: StreamCode::OVERLOADED, source }
}

/// Writes to the frontend.
pub(super) struct ProxyWrite {
    close: CloseOnce,
    holders: Holders,
    data: DataWriter,
}

impl ProxyWrite {
    pub(super) fn close(&self) -> CloseOnce {
        self.close.clone()
    }
}

impl LocalWrite for ProxyWrite {
    async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), LocalFault> {
        self.close.registration.wait().await;
        let Self { close, holders, data } = self;
        let send = async |packet| {
            let packet = held(packet, &holders.unsent);
            close.outbound.send(Ok(packet)).await.map_err(|_| cancelled())
        };
        tokio::select! {
            biased;
            () = holders.cut() => Err(overloaded()),
            written = data.write(chunks, send) => written,
        }
    }

    fn progress(&self) -> Option<Arc<AtomicU64>> {
        Some(self.data.taken())
    }

    async fn finish(&mut self) -> Result<(), LocalFault> {
        self.close.send(String::new()).await;
        Ok(())
    }

    /// A frontend that has closed reads no more: CLOSE_REQ ends both directions.
    async fn gone(&mut self) {}
}

/// A packet whose bytes are held until they are encoded.
fn held(mut packet: Packet, holder: &Arc<Holder>) -> Packet {
    if let Some(Payload::Data(data)) = &mut packet.payload {
        data.data = holder.hold_bytes(std::mem::take(&mut data.data));
        holder.relieve();
    }
    packet
}

/// Cuts the connection off for the frontend, unless its end was sent before the drop.
#[derive(Debug)]
pub(super) struct CutOnDrop(pub(super) CloseOnce);

impl Drop for CutOnDrop {
    fn drop(&mut self) {
        if !self.0.is_sent() {
            let status = tonic::Status::aborted("the connection was cut off");
            // Without room for it, the stream ends without a CLOSE_RSP, which means the same.
            let _ = self.0.outbound.try_send(Err(status));
        }
    }
}

#[cfg(test)]
mod tests {
    use culvert_konnectivity::codec::{MAX_PACKET_LEN, SmallBuffers};
    use culvert_transport::{
        SendHalf,
        budget::{Held, MemoryBudget, StreamMemory},
        splice::{Cut, Local, Meter, Outcome, splice},
        test_util::Pair,
    };
    use http_body_util::StreamBody;
    use hyper::body::Frame;
    use tokio::{sync::mpsc, time::sleep};
    use tonic::{Status, codec::Codec as _};

    use super::*;
    use crate::testing::pair;

    const ID: i64 = 7;
    /// Number of bytes that the target sends: more than wait on their way to the frontend.
    const LENGTH: usize = 2 << 20;

    /// A connection whose client has closed while the target's bytes wait for a slow frontend.
    struct Closed {
        packets: mpsc::Receiver<Result<Packet, Status>>,
        outcome: tokio_util::task::AbortOnDropHandle<Outcome>,
        _target: SendHalf,
        _pair: Pair,
    }

    async fn closed() -> Closed {
        let pair = pair().await;
        let mut near = pair.server.open().await.unwrap();
        // A stream is announced by its first bytes.
        near.0.write_chunk(Bytes::from_static(b"!")).await.unwrap();
        let (mut target, mut client) = pair.agent.accept().await.unwrap();
        // The frontend's half stays open, as that of a frontend that only reads.
        let body = StreamBody::new(tokio_stream::pending::<Result<Frame<Bytes>, Status>>());
        let decoder = SmallBuffers.decoder();
        let inbound = Streaming::new_request(decoder, body, None, Some(MAX_PACKET_LEN));
        let (outbound, packets) = mpsc::channel(2);
        let memory = StreamMemory::of(&MemoryBudget::new(0));
        let [unread, unsent] = [Held::Send, Held::Receive].map(|kind| memory.holder(kind));
        let holders = Holders { unread, unsent };
        let stream = ProxyStream { inbound, outbound, holders };
        let (reader, writer, abort) = halves(ID, stream, Registration::begin());
        let outcome = culvert_transport::task::owned(async move {
            splice(Local::new(reader, writer, abort), near, &Meter::default()).await
        });
        let target = culvert_transport::task::owned(async move {
            target.write_chunk(Bytes::from(vec![7; LENGTH])).await.unwrap();
            target.finish();
            target
        });
        sleep(REGISTRATION_DELAY * 2).await;
        client.stop(StreamCode::CLOSED);
        Closed { packets, outcome, _target: target.await.unwrap(), _pair: pair }
    }

    #[tokio::test(start_paused = true)]
    async fn a_frontend_that_reads_slowly_after_the_close_gets_every_byte() {
        let mut closed = closed().await;
        let (mut taken, mut steps) = (0, 0);
        while taken < LENGTH {
            // Less than the time after which a frontend that takes nothing is cut.
            sleep(Duration::from_secs(40)).await;
            match closed.packets.recv().await.unwrap().unwrap().into() {
                PacketMessage::Data(data) => taken += data.data.len(),
                other => panic!("{other:?} after {taken} bytes"),
            }
            steps += 1;
        }
        assert!(steps > 10, "{steps} packets take no longer than one limit");
        let last = closed.packets.recv().await.unwrap().unwrap().into();
        assert!(matches!(last, PacketMessage::Closed(end) if end.error.is_empty()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_frontend_that_reads_nothing_after_the_close_is_cut_off_after_a_minute() {
        let closed = closed().await;
        let begun = Instant::now();
        let outcome = closed.outcome.await.unwrap();
        assert!(matches!(outcome.end, Err(Cut::Stuck)), "{outcome:?}");
        assert!((55..=65).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_data_is_held_back_for_the_delay_once() {
        let begun = Instant::now();
        let registration = Registration::begin();
        registration.wait().await;
        assert_eq!(begun.elapsed(), REGISTRATION_DELAY);
        registration.wait().await;
        assert_eq!(begun.elapsed(), REGISTRATION_DELAY);
    }

    #[tokio::test(start_paused = true)]
    async fn data_of_the_client_ends_the_delay() {
        const USED_AFTER: Duration = Duration::from_millis(3);
        let begun = Instant::now();
        let registration = Registration::begin();
        let client = async {
            sleep(USED_AFTER).await;
            registration.heard();
        };
        tokio::join!(registration.wait(), client);
        assert_eq!(begun.elapsed(), USED_AFTER);
    }
}
