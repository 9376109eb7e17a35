//! A link measured from outside, with nothing but UDP sockets in its hosts.

use std::{
    io,
    net::UdpSocket,
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt};

use super::{Link, NODE};

/// Receive buffer of the probes, so that only the link loses something.
const SOCKET_BUFFER: usize = 32 << 20;
/// Time of silence after which no packet is on its way any more.
const SILENCE: Duration = Duration::from_millis(500);

/// Datagrams to send from the server's host to the node's.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// Number of datagrams.
    pub datagrams: u32,
    /// Length of the IP packets in bytes, at least 64.
    pub length: usize,
    /// How many per second; as fast as the sender can if that is more.
    pub per_second: f64,
}

/// Result of a probe.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Datagrams sent.
    pub sent: u32,
    /// Delay of each datagram that arrived, in the order of arrival.
    pub delays: Vec<Duration>,
    /// IP bytes that arrived per second, in Mbit/s, between the first and the last.
    pub mbit_per_second: f64,
    /// Packets that arrived per second.
    pub packets_per_second: f64,
}

impl Measured {
    /// The share that did not arrive.
    pub fn loss(&self) -> f64 {
        1.0 - self.delays.len() as f64 / f64::from(self.sent)
    }

    /// The delay that `share` of those that arrived did not exceed.
    pub fn delay(&self, share: f64) -> Duration {
        let mut delays = self.delays.clone();
        delays.sort_unstable();
        let place = (share * delays.len() as f64) as usize;
        delays.get(place.min(delays.len().saturating_sub(1))).copied().unwrap_or_default()
    }
}

/// Sends a probe through the link.
///
/// # Errors
/// When a host cannot be entered or a socket fails.
pub fn measure(link: &Link, probe: Probe) -> io::Result<Measured> {
    let start = Instant::now();
    let receiver = link.node.run(|| {
        let socket = UdpSocket::bind((NODE, 0))?;
        // Beyond the system's limit where that is allowed.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER);
        socket.set_read_timeout(Some(SILENCE))?;
        Ok(socket)
    })?;
    let target = receiver.local_addr()?;
    let sender = link.server.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(target)?;
        Ok(socket)
    })?;
    thread::scope(|scope| {
        let received = scope.spawn(|| receive(&receiver, start));
        send(&sender, start, probe)?;
        let (delays, first, last) = received.join().map_err(|_| io::ErrorKind::Other)??;
        let seconds = last.saturating_sub(first).as_secs_f64();
        // The first opens the interval and is not in it.
        let packets_per_second = delays.len().saturating_sub(1) as f64 / seconds;
        Ok(Measured {
            sent: probe.datagrams,
            delays,
            mbit_per_second: packets_per_second * probe.length as f64 * 8.0 / 1e6,
            packets_per_second,
        })
    })
}

#[expect(clippy::disallowed_methods, reason = "a thread of its own that keeps a schedule")]
fn send(socket: &UdpSocket, start: Instant, probe: Probe) -> io::Result<()> {
    let begun = start.elapsed();
    // 20 bytes of IPv4 header and 8 of UDP belong to the packet.
    let mut payload = vec![0; probe.length - 28];
    for number in 0..probe.datagrams {
        let due = begun + Duration::from_secs_f64(f64::from(number) / probe.per_second);
        if let Some(wait) = due.checked_sub(start.elapsed()) {
            thread::sleep(wait);
        }
        payload[..8].copy_from_slice(&(start.elapsed().as_nanos() as u64).to_be_bytes());
        socket.send(&payload)?;
    }
    Ok(())
}

fn receive(socket: &UdpSocket, start: Instant) -> io::Result<(Vec<Duration>, Duration, Duration)> {
    let mut delays = Vec::new();
    let (mut first, mut last) = (None, Duration::ZERO);
    let mut payload = [0; 9000];
    loop {
        match socket.recv(&mut payload) {
            Ok(_) => {
                last = start.elapsed();
                first.get_or_insert(last);
                let sent = payload.first_chunk().map_or(0, |sent| u64::from_be_bytes(*sent));
                delays.push(last.saturating_sub(Duration::from_nanos(sent)));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && first.is_some() => {
                return Ok((delays, first.unwrap_or_default(), last));
            }
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock && start.elapsed() < SILENCE * 20 => {}
            Err(error) => return Err(error),
        }
    }
}
