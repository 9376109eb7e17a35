//! A peer over QMux, TLS and TCP that sends the bytes that it is given
//! (draft-ietf-quic-qmux-02).

use std::sync::Arc;

use tokio::{
    io::{self, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::victim::Victim;

/// QX_TRANSPORT_PARAMETERS, as an eight-byte number.
const PARAMETERS: u64 = 0x3f51_5330_0d0a_0d0a | 0xc000_0000_0000_0000;
/// Longest record.
const MAX_RECORD: usize = 16_382;

/// A peer whose TLS handshake is complete.
pub(crate) struct Peer {
    pub(crate) socket: TlsStream<TcpStream>,
}

impl Peer {
    /// Connects and grants the server everything.
    pub(crate) async fn connect(victim: &Victim) -> Self {
        let mut peer = Self { socket: tls(victim, b"culvert/1").await };
        let mut parameters = Vec::new();
        // Idle time-out, data, data of own and of the server's streams, streams (RFC 9000 §18.2).
        for (id, value) in [(1, 60_000), (4, 1 << 50), (5, 1 << 50), (6, 1 << 50), (8, 10_000)] {
            parameters.extend([id, 8]);
            parameters.extend(number(value));
        }
        let mut frame = PARAMETERS.to_be_bytes().to_vec();
        frame.extend(number(parameters.len() as u64));
        frame.extend(parameters);
        peer.record(&frame).await.unwrap();
        peer
    }

    /// Sends one record with these frames.
    pub(crate) async fn record(&mut self, frames: &[u8]) -> io::Result<()> {
        assert!(frames.len() <= MAX_RECORD);
        let mut record = number(frames.len() as u64).to_vec();
        record.extend(frames);
        self.socket.write_all(&record).await?;
        self.socket.flush().await
    }

    /// Sends these bytes on the control stream, in frames of at most `chunk` bytes, from `offset`.
    pub(crate) async fn send(&mut self, offset: u64, bytes: &[u8], chunk: usize) -> io::Result<()> {
        let mut frames = Vec::new();
        for (index, data) in bytes.chunks(chunk).enumerate() {
            let frame = stream_frame(offset + (index * chunk) as u64, data);
            if frames.len() + frame.len() > MAX_RECORD {
                self.record(&frames).await?;
                frames.clear();
            }
            frames.extend(frame);
        }
        self.record(&frames).await
    }
}

/// A TLS connection to the port for agents that speaks one protocol.
pub(crate) async fn tls(victim: &Victim, protocol: &[u8]) -> TlsStream<TcpStream> {
    let socket = TcpStream::connect(victim.deployment.tunnel()).await.unwrap();
    let name = victim.deployment.tunnel().ip().into();
    let connector = TlsConnector::from(Arc::new(victim.tls(&[protocol])));
    connector.connect(name, socket).await.unwrap()
}

/// A STREAM frame of the control stream, with offset and length.
fn stream_frame(offset: u64, data: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x0e, 0];
    frame.extend(number(offset));
    frame.extend(number(data.len() as u64));
    frame.extend(data);
    frame
}

/// A QUIC number of eight bytes (RFC 9000 §16).
fn number(value: u64) -> [u8; 8] {
    (value | 0xc000_0000_0000_0000).to_be_bytes()
}
