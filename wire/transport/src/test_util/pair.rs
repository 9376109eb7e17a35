//! Tunnels within one process, over a line that fails on request. They need neither sockets nor TLS
//! and work in paused time (`#[tokio::test(start_paused = true)]`), idle time-out and keep-alive
//! included.
//!
//! ```text
//!  Pair { agent, server, line }
//!
//!  agent: Tunnel ══ QMux ══ line ══ QMux ══ server: Tunnel
//!                            │
//!                            ├ silence(Side::Agent)   nothing that the agent sends arrives
//!                            ├ restore(Side::Agent)   what it sent meanwhile arrives now
//!                            └ cut()                  both ends see a reset connection
//! ```

use std::net::{Ipv4Addr, SocketAddr};

use super::line::{Line, Side};
use crate::{
    Carrier, ConnectError, Settings, Tunnel,
    memory::{Ends, establish_both, lasting, pipe},
    qmux::Peer,
};

/// Both ends of a tunnel within one process, and the line between them.
#[derive(Debug)]
pub struct Pair {
    /// The agent's end.
    pub agent: Tunnel,
    /// The server's end.
    pub server: Tunnel,
    /// What the bytes of both directions pass through. Dropping it changes nothing.
    pub line: Line,
}

impl Pair {
    /// Makes a tunnel whose ends are set up with these settings. Each end takes `peer` for what is
    /// at the other.
    ///
    /// # Errors
    /// When the handshake takes longer than an idle time-out.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future drops both ends.
    pub async fn new(
        peer: Peer,
        agent: &Settings,
        server: &Settings,
    ) -> Result<Self, ConnectError> {
        let (near, far) = pipe();
        let line = Line::default();
        let ends = (line.end(Side::Agent, near), line.end(Side::Server, far));
        let Ends { agent, server } = establish_both(ends, peer, agent, server).await?;
        Ok(Self { agent, server, line })
    }

    /// The same, as [`memory::connect`](crate::memory::connect) makes it: it lives however long it
    /// is idle, and sends no keep-alive packets.
    ///
    /// # Errors
    /// As [`Pair::new`].
    ///
    /// # Cancel safety
    /// As [`Pair::new`].
    pub async fn without_idle_timeout(
        peer: Peer,
        agent: &Settings,
        server: &Settings,
    ) -> Result<Self, ConnectError> {
        Self::new(peer, &lasting(agent), &lasting(server)).await
    }
}

impl Peer {
    /// A peer without a certificate at a loopback address.
    pub fn local(carrier: Carrier) -> Self {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 8132));
        Self { address, carrier, certificates: None }
    }
}

#[cfg(test)]
mod tests {
    use std::{io, time::Duration};

    use bytes::Bytes;
    use culvert_wire::{CloseCode, bounded::PeerText};
    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::{RecvHalf, SendHalf, TransportFault, TunnelLost};

    const IDLE: Duration = Duration::from_secs(25);

    async fn pair() -> Pair {
        let settings = Settings { idle_timeout: IDLE, ..Settings::default() };
        Pair::new(Peer::local(Carrier::Tcp), &settings, &settings).await.unwrap()
    }

    /// A stream that the server opened, and the agent's reading half of it.
    async fn stream(pair: &Pair) -> (SendHalf, RecvHalf) {
        let (mut send, _recv) = pair.server.open().await.unwrap();
        send.write_chunk(Bytes::from_static(b"first")).await.unwrap();
        let (_send, mut recv) = pair.agent.accept().await.unwrap();
        assert_eq!(read(&mut recv).await, "first");
        (send, recv)
    }

    async fn read(recv: &mut RecvHalf) -> Bytes {
        let mut chunks = [Bytes::new()];
        assert_eq!(recv.read_chunks(&mut chunks).await, Ok(Some(1)));
        let [chunk] = chunks;
        chunk
    }

    #[tokio::test(start_paused = true)]
    async fn a_pair_that_keeps_alive_outlives_its_idle_timeout() {
        let pair = pair().await;
        sleep(IDLE * 10).await;
        let (mut send, mut recv) = stream(&pair).await;
        send.write_chunk(Bytes::from_static(b"second")).await.unwrap();
        assert_eq!(read(&mut recv).await, "second");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pair_with_traffic_in_one_direction_keeps_alive() {
        for sender in [Side::Agent, Side::Server] {
            let pair = pair().await;
            let (from, to) = match sender {
                Side::Agent => (&pair.agent, &pair.server),
                Side::Server => (&pair.server, &pair.agent),
            };
            let (mut send, _recv) = from.open().await.unwrap();
            send.write_chunk(Bytes::from_static(b"x")).await.unwrap();
            let (_send, mut recv) = to.accept().await.unwrap();
            assert_eq!(read(&mut recv).await, "x");
            let (mut heard, mut heard_at) = (from.stats().received_bytes, Instant::now());
            for second in 0..60 {
                sleep(Duration::from_secs(1)).await;
                let sent = send.write_chunk(Bytes::from_static(b"x")).await;
                assert!(sent.is_ok(), "{sender:?}, {second} s: {sent:?}");
                assert_eq!(read(&mut recv).await, "x");
                if from.stats().received_bytes != heard {
                    (heard, heard_at) = (from.stats().received_bytes, Instant::now());
                }
                assert!(heard_at.elapsed() <= Duration::from_secs(6), "{sender:?}, {second} s");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pair_without_idle_timeout_sends_nothing_and_lives_on() {
        let settings = Settings::default();
        let peer = Peer::local(Carrier::Grpc);
        let pair = Pair::without_idle_timeout(peer, &settings, &settings).await.unwrap();
        assert_eq!(pair.agent.carrier(), Carrier::Grpc);
        pair.line.silence(Side::Agent);
        pair.line.silence(Side::Server);
        sleep(IDLE * 1000).await;
        pair.line.restore(Side::Agent);
        pair.line.restore(Side::Server);
        stream(&pair).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_side_is_lost_after_the_idle_timeout() {
        let pair = pair().await;
        let start = Instant::now();
        pair.line.silence(Side::Agent);
        assert_eq!(pair.server.closed().await, TunnelLost::TimedOut);
        assert!(start.elapsed() <= IDLE, "{:?}", start.elapsed());
        assert!(start.elapsed() > IDLE - Duration::from_secs(6), "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_silent_side_sent_arrives_once_it_is_restored() {
        let pair = pair().await;
        let (mut send, mut recv) = stream(&pair).await;
        pair.line.silence(Side::Server);
        send.write_chunk(Bytes::from_static(b"second")).await.unwrap();
        let start = Instant::now();
        let line = pair.line.clone();
        let restore = async move {
            sleep(IDLE / 5).await;
            line.restore(Side::Server);
        };
        let (second, ()) = tokio::join!(read(&mut recv), restore);
        assert_eq!(second, "second");
        assert_eq!(start.elapsed(), IDLE / 5);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cut_line_ends_both_sides_at_once() {
        let pair = pair().await;
        pair.line.cut();
        let reset = io::Error::from(io::ErrorKind::ConnectionReset);
        let lost = TunnelLost::from(TransportFault::Io(reset.into()));
        assert_eq!(pair.agent.closed().await, lost);
        assert_eq!(pair.server.closed().await, lost);
    }

    #[tokio::test(start_paused = true)]
    async fn a_closed_end_is_closed_at_the_other() {
        let pair = pair().await;
        pair.server.close(CloseCode::SHUTDOWN, "over");
        let (code, reason) = (CloseCode::SHUTDOWN, PeerText::lossy(b"over"));
        assert_eq!(pair.agent.closed().await, TunnelLost::ClosedByPeer { code, reason });
    }
}
