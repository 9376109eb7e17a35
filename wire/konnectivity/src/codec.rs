//! Packets as gRPC messages.

use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstDecoder, ProstEncoder};

use super::packet::Packet;

/// The largest packet that is taken. grpc-go sends whatever one write passed; its own receive
/// limit of 4 MiB is where users' writes end today, and a packet's other fields come on top.
pub const MAX_PACKET_LEN: usize = 5 * 1024 * 1024;

/// Protocol Buffers in buffers that begin small and grow with what passes: most connections are
/// idle, or carry keystrokes.
#[derive(Clone, Copy, Debug)]
pub struct SmallBuffers;

impl SmallBuffers {
    /// Bytes to begin with, and bytes that are encoded before they are sent.
    fn settings() -> BufferSettings {
        BufferSettings::new(512, 32 * 1024)
    }
}

impl Codec for SmallBuffers {
    type Encode = Packet;
    type Decode = Packet;
    type Encoder = ProstEncoder<Packet>;
    type Decoder = ProstDecoder<Packet>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(Self::settings())
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(Self::settings())
    }
}
