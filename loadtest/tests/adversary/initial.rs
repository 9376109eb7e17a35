//! A stranger over QUIC whose first packets are written by hand (RFC 9000 §17.2.2).

use std::sync::Arc;

use quinn::{
    ConnectionId, Side,
    crypto::{ClientConfig, Keys, rustls::QuicClientConfig},
};
use quinn_proto::transport_parameters::TransportParameters;
use tokio::net::UdpSocket;

use crate::victim::Victim;

const VERSION: u32 = 1;
/// Length of a datagram with an Initial packet, in bytes, at least.
const LENGTH: usize = 1200;
/// Length of the connection ids and of packet numbers.
const ID: usize = 8;
const NUMBER: usize = 4;

/// A handshake that began.
pub(crate) struct Stranger {
    id: [u8; ID],
    keys: Keys,
    next: u64,
}

impl Stranger {
    /// One that has sent nothing yet.
    pub(crate) fn new(victim: &Victim, number: u64) -> Self {
        let tls = QuicClientConfig::try_from(victim.tls(&[b"culvert/1"])).unwrap();
        let none = TransportParameters::read(Side::Client, &mut &[][..]).unwrap();
        let session = Arc::new(tls).start_session(VERSION, "localhost", &none).unwrap();
        let id = number.to_be_bytes();
        let keys = session.initial_keys(&ConnectionId::new(&id), Side::Client);
        Self { id, keys, next: 0 }
    }

    /// Sends an Initial packet with these frames.
    pub(crate) async fn send(&mut self, socket: &UdpSocket, frames: &[u8]) {
        let mut packet = vec![0xc0 | (NUMBER as u8 - 1)];
        packet.extend(VERSION.to_be_bytes());
        for _ in 0..2 {
            packet.push(ID as u8);
            packet.extend(self.id);
        }
        // No token; then the length of the rest, in two bytes.
        packet.push(0);
        let number_at = packet.len() + 2;
        let end = LENGTH.max(number_at + NUMBER + frames.len() + self.keys.packet.local.tag_len());
        packet.extend((0x4000 | (end - number_at) as u16).to_be_bytes());
        packet.extend((self.next as u32).to_be_bytes());
        let header = packet.len();
        packet.extend(frames);
        packet.resize(end, 0);
        self.keys.packet.local.encrypt(self.next, &mut packet, header);
        self.keys.header.local.encrypt(number_at, &mut packet);
        self.next += 1;
        socket.send(&packet).await.unwrap();
    }
}

/// A CRYPTO frame of one byte.
pub(crate) fn crypto(offset: u16) -> [u8; 5] {
    let [high, low] = (0x4000 | offset).to_be_bytes();
    [6, high, low, 1, 7]
}
