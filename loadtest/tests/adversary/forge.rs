//! A peer over QUIC that sends other frames than quinn wrote.
//!
//! quinn calls the key of a packet with the packet in plain text, and this key changes it before it
//! encrypts it. The server acknowledges the packet, so quinn believes that it arrived as written.

use std::{
    any::Any,
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use bytes::BytesMut;
use parking_lot::Mutex;
use quinn::{
    ConnectError, ConnectionId, Side,
    crypto::{
        ClientConfig, CryptoError, ExportKeyingMaterialError, KeyPair, Keys, PacketKey, Session,
    },
};
use quinn_proto::{TransportError, transport_parameters::TransportParameters};

/// What is sent in place of what quinn wrote, on streams that the server opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Forgery {
    /// The first frame of each stream is left out, so that the rest waits behind a gap.
    Gap,
    /// Frames of one byte behind a gap, as many as fit in a packet.
    OneByte,
    /// One frame of one byte behind a gap in a packet, and padding.
    Padded,
    /// What quinn wrote, without acknowledgements.
    Unacknowledged,
    /// Pings of one byte, as many as fit in a packet, on streams of either side.
    Pings,
    /// Retirements of a connection id that is not used, in the same form.
    Retirements,
}

/// A forgery, which begins when it is switched on.
#[derive(Debug)]
pub(crate) struct Forger {
    forgery: Forgery,
    on: AtomicBool,
    /// Bytes that the server allows on a stream; quinn takes it for unlimited.
    window: AtomicU64,
    /// Where the next byte of each stream is sent.
    streams: Mutex<HashMap<u64, Sent>>,
}

#[derive(Debug)]
struct Sent {
    next: u64,
    limit: u64,
}

impl Forger {
    pub(crate) fn new(forgery: Forgery) -> Arc<Self> {
        let (on, window, streams) = Default::default();
        Arc::new(Self { forgery, on, window, streams })
    }

    /// Forges packets from now on.
    pub(crate) fn begin(&self) {
        self.on.store(true, Relaxed);
    }

    /// Whether quinn has to be wrong about the server's windows, because less is sent.
    pub(crate) fn sends_less(&self) -> bool {
        !matches!(self.forgery, Forgery::Gap | Forgery::Unacknowledged)
    }

    /// Whether the peer sends without a congestion window.
    pub(crate) fn heeds_nothing(&self) -> bool {
        matches!(self.forgery, Forgery::Pings | Forgery::Retirements)
    }

    fn forge(&self, payload: &mut [u8]) {
        if !self.on.load(Relaxed) {
            return;
        }
        let mut at = 0;
        while let Some(frame) = Frame::parse(payload, at) {
            match frame.kind {
                Kind::Ack if self.forgery == Forgery::Unacknowledged => {
                    payload[at..frame.end].fill(0);
                }
                Kind::Stream { .. } if self.forgery == Forgery::Pings => {
                    payload[at..frame.end].fill(1);
                }
                Kind::Stream { .. } if self.forgery == Forgery::Retirements => {
                    let frame = &mut payload[at..frame.end];
                    frame.fill(0);
                    frame.chunks_exact_mut(2).for_each(|frame| frame.copy_from_slice(&[0x19, 1]));
                }
                Kind::Stream { id, offset } if id & 1 == 1 => {
                    self.forge_stream(&mut payload[at..frame.end], id, offset);
                }
                _ => {}
            }
            at = frame.end;
        }
    }

    fn forge_stream(&self, frame: &mut [u8], id: u64, offset: u64) {
        if self.forgery == Forgery::Unacknowledged {
            return;
        }
        let mut streams = self.streams.lock();
        let is_first = !streams.contains_key(&id);
        let limit = self.window.load(Relaxed);
        let sent = streams.entry(id).or_insert(Sent { next: offset + 1, limit });
        let count = match self.forgery {
            Forgery::Gap if !is_first => return,
            Forgery::Gap | Forgery::Unacknowledged | Forgery::Pings | Forgery::Retirements => 0,
            Forgery::Padded => 1,
            Forgery::OneByte => usize::MAX,
        };
        let mut rest = &mut frame[..];
        rest.fill(0);
        for _ in 0..count {
            let mut head = vec![0x0e];
            put(&mut head, id);
            put(&mut head, sent.next);
            head.extend([1, 7]);
            if sent.next == sent.limit || rest.len() < head.len() {
                return;
            }
            let (space, left) = rest.split_at_mut(head.len());
            space.copy_from_slice(&head);
            (rest, sent.next) = (left, sent.next + 1);
        }
    }
}

struct Frame {
    kind: Kind,
    end: usize,
}

enum Kind {
    Ack,
    Stream { id: u64, offset: u64 },
    Other,
}

impl Frame {
    /// The frame at this place; `None` at the end, and at a frame that the peer does not send while
    /// it forges.
    fn parse(payload: &[u8], at: usize) -> Option<Self> {
        let mut reader = Reader { payload, at };
        let kind = match reader.byte()? {
            0x00 | 0x01 | 0x1e | 0x1f => Kind::Other,
            // ACK_FREQUENCY, in two bytes
            0x40 => {
                reader.byte().filter(|kind| *kind == 0xaf)?;
                reader.ints(4)?
            }
            0x1a | 0x1b => {
                reader.at += 8;
                Kind::Other
            }
            ack @ 0x02..=0x03 => {
                reader.ints(2)?;
                let ranges = reader.int()?;
                reader.ints(1 + 2 * ranges + if ack == 3 { 3 } else { 0 })?;
                Kind::Ack
            }
            0x04 => reader.ints(3)?,
            0x05 | 0x11 | 0x15 => reader.ints(2)?,
            stream @ 0x08..=0x0f => {
                let id = reader.int()?;
                let offset = if stream & 4 != 0 { reader.int()? } else { 0 };
                let length = match stream & 2 {
                    0 => payload.len() - reader.at,
                    _ => reader.int()? as usize,
                };
                reader.at += length;
                Kind::Stream { id, offset }
            }
            0x18 => {
                reader.ints(2)?;
                let length = reader.byte()?;
                reader.at += usize::from(length) + 16;
                Kind::Other
            }
            0x10 | 0x12..=0x14 | 0x16 | 0x17 | 0x19 => reader.ints(1)?,
            _ => return None,
        };
        (reader.at <= payload.len()).then_some(Self { kind, end: reader.at })
    }
}

struct Reader<'a> {
    payload: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn byte(&mut self) -> Option<u8> {
        self.at += 1;
        self.payload.get(self.at - 1).copied()
    }

    fn int(&mut self) -> Option<u64> {
        let first = self.byte()?;
        (1..1 << (first >> 6)).try_fold(u64::from(first & 0x3f), |value, _| {
            Some(value << 8 | u64::from(self.byte()?))
        })
    }

    fn ints(&mut self, count: u64) -> Option<Kind> {
        (0..count).try_for_each(|_| self.int().map(drop)).map(|()| Kind::Other)
    }
}

fn put(to: &mut Vec<u8>, value: u64) {
    match value {
        0..0x40 => to.push(value as u8),
        0x40..0x4000 => to.extend((value as u16 | 0x4000).to_be_bytes()),
        0x4000..0x4000_0000 => to.extend((value as u32 | 0x8000_0000).to_be_bytes()),
        _ => to.extend((value | 0xc000_0000_0000_0000).to_be_bytes()),
    }
}

/// A client whose packets are forged.
pub(crate) struct ForgingClient {
    pub(crate) client: Arc<dyn ClientConfig>,
    pub(crate) forger: Arc<Forger>,
}

impl ClientConfig for ForgingClient {
    fn start_session(
        self: Arc<Self>,
        version: u32,
        server_name: &str,
        params: &TransportParameters,
    ) -> Result<Box<dyn Session>, ConnectError> {
        let session = self.client.clone().start_session(version, server_name, params)?;
        Ok(Box::new(ForgingSession { session, forger: self.forger.clone() }))
    }
}

struct ForgingSession {
    session: Box<dyn Session>,
    forger: Arc<Forger>,
}

impl Session for ForgingSession {
    fn initial_keys(&self, dst_cid: &ConnectionId, side: Side) -> Keys {
        self.session.initial_keys(dst_cid, side)
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        self.session.handshake_data()
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        self.session.peer_identity()
    }

    fn early_crypto(&self) -> Option<(Box<dyn quinn::crypto::HeaderKey>, Box<dyn PacketKey>)> {
        None
    }

    fn early_data_accepted(&self) -> Option<bool> {
        None
    }

    fn is_handshaking(&self) -> bool {
        self.session.is_handshaking()
    }

    fn read_handshake(&mut self, buf: &[u8]) -> Result<bool, TransportError> {
        self.session.read_handshake(buf)
    }

    /// Remembers the server's window, and raises it where quinn is to write more than is sent.
    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        /// Windows of the connection, of streams that the server opens, and of the peer's.
        const MAX_DATA: u64 = 4;
        const MAX_STREAM_DATA: u64 = 5;
        const MAX_STREAM_DATA_PEER: u64 = 6;
        let is_window = |id| matches!(id, MAX_DATA | MAX_STREAM_DATA | MAX_STREAM_DATA_PEER);
        let Some(parameters) = self.session.transport_parameters()? else { return Ok(None) };
        let (mut bytes, mut raised) = (Vec::new(), Vec::new());
        parameters.write(&mut bytes);
        let mut reader = Reader { payload: &bytes, at: 0 };
        while let (Some(id), Some(length)) = (reader.int(), reader.int()) {
            let value = &bytes[reader.at..][..length as usize];
            reader.at += length as usize;
            put(&mut raised, id);
            if id == MAX_STREAM_DATA {
                let window = Reader { payload: value, at: 0 }.int().unwrap_or_default();
                self.forger.window.store(window, Relaxed);
            }
            if self.forger.sends_less() && is_window(id) {
                put(&mut raised, 8);
                put(&mut raised, 1 << 50);
            } else {
                put(&mut raised, length);
                raised.extend(value);
            }
        }
        Ok(TransportParameters::read(Side::Client, &mut &raised[..]).ok())
    }

    fn write_handshake(&mut self, buf: &mut Vec<u8>) -> Option<Keys> {
        let Keys { header, packet } = self.session.write_handshake(buf)?;
        let packet = self.forging(packet);
        Some(Keys { header, packet })
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        let keys = self.session.next_1rtt_keys()?;
        Some(self.forging(keys))
    }

    fn is_valid_retry(&self, orig_dst_cid: &ConnectionId, header: &[u8], payload: &[u8]) -> bool {
        self.session.is_valid_retry(orig_dst_cid, header, payload)
    }

    fn export_keying_material(
        &self,
        output: &mut [u8],
        label: &[u8],
        context: &[u8],
    ) -> Result<(), ExportKeyingMaterialError> {
        self.session.export_keying_material(output, label, context)
    }
}

impl ForgingSession {
    fn forging(&self, keys: KeyPair<Box<dyn PacketKey>>) -> KeyPair<Box<dyn PacketKey>> {
        let local = Box::new(ForgingKey { key: keys.local, forger: self.forger.clone() });
        KeyPair { local, remote: keys.remote }
    }
}

struct ForgingKey {
    key: Box<dyn PacketKey>,
    forger: Arc<Forger>,
}

impl PacketKey for ForgingKey {
    fn encrypt(&self, packet: u64, buf: &mut [u8], header_len: usize) {
        let end = buf.len() - self.key.tag_len();
        self.forger.forge(&mut buf[header_len..end]);
        self.key.encrypt(packet, buf, header_len);
    }

    fn decrypt(
        &self,
        packet: u64,
        header: &[u8],
        payload: &mut BytesMut,
    ) -> Result<(), CryptoError> {
        self.key.decrypt(packet, header, payload)
    }

    fn tag_len(&self) -> usize {
        self.key.tag_len()
    }

    fn confidentiality_limit(&self) -> u64 {
        self.key.confidentiality_limit()
    }

    fn integrity_limit(&self) -> u64 {
        self.key.integrity_limit()
    }
}
