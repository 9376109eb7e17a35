//! The codec of `Proxy` streams, which counts their packets.

use std::sync::Arc;

use culvert_konnectivity::{codec::SmallBuffers, packet::Packet};
use culvert_process::metrics::{PacketType, Segment};
use tonic::{
    Status,
    codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

use crate::metrics::ServerMetrics;

/// [`SmallBuffers`] that count each packet.
#[derive(Clone, Debug)]
pub(super) struct Counted(pub(super) Arc<ServerMetrics>);

/// An encoder or decoder of [`Counted`].
#[derive(Debug)]
pub(super) struct Counting<T> {
    inner: T,
    metrics: Arc<ServerMetrics>,
}

impl<T> Counting<T> {
    fn count(&self, segment: Segment, packet: &Packet) {
        if let Some(packet) = PacketType::from_number(packet.r#type) {
            self.metrics.flow.packet(segment, packet);
        }
    }
}

impl Codec for Counted {
    type Encode = Packet;
    type Decode = Packet;
    type Encoder = Counting<<SmallBuffers as Codec>::Encoder>;
    type Decoder = Counting<<SmallBuffers as Codec>::Decoder>;

    fn encoder(&mut self) -> Self::Encoder {
        Counting { inner: SmallBuffers.encoder(), metrics: self.0.clone() }
    }

    fn decoder(&mut self) -> Self::Decoder {
        Counting { inner: SmallBuffers.decoder(), metrics: self.0.clone() }
    }
}

impl<T: Encoder<Item = Packet, Error = Status>> Encoder for Counting<T> {
    type Item = Packet;
    type Error = Status;

    fn encode(&mut self, packet: Packet, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        self.count(Segment::ToClient, &packet);
        self.inner.encode(packet, buffer)
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.inner.buffer_settings()
    }
}

impl<T: Decoder<Item = Packet, Error = Status>> Decoder for Counting<T> {
    type Item = Packet;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Packet>, Status> {
        let packet = self.inner.decode(buffer)?;
        if let Some(packet) = &packet {
            self.count(Segment::FromClient, packet);
        }
        Ok(packet)
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.inner.buffer_settings()
    }
}
