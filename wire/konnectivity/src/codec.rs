//! The gRPC codec of packets.

use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstDecoder, ProstEncoder};

use super::packet::Packet;

/// Maximum size of a received packet, in bytes. A packet of grpc-go holds the bytes of one write;
/// its own receive limit of 4 MiB bounds those, and the packet's other fields come on top.
pub const MAX_PACKET_LEN: usize = 5 * 1024 * 1024;

/// Protocol Buffers with small initial buffers: most connections are idle or carry keystrokes.
#[derive(Clone, Copy, Debug)]
pub struct SmallBuffers;

impl SmallBuffers {
    /// Initial size, and number of encoded bytes above which they are sent, both in bytes.
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use prost::Message as _;
    use tonic::codec::{Decoder as _, Encoder as _};

    use super::*;

    #[test]
    fn packets_are_encoded_and_decoded_with_small_buffers() {
        let mut codec = SmallBuffers;
        let expected = format!("{:?}", BufferSettings::new(512, 32_768));
        assert_eq!(format!("{:?}", codec.encoder().buffer_settings()), expected);
        assert_eq!(format!("{:?}", codec.decoder().buffer_settings()), expected);
    }

    #[test]
    fn the_largest_write_that_konnectivity_takes_fits_a_packet() {
        let write = Bytes::from(vec![7; 4 << 20]);
        let len = Packet::data(i64::MAX, write).encoded_len();
        assert!(len > 4 << 20 && len <= MAX_PACKET_LEN, "{len}");
    }
}
