//! A UDP socket for quinn that stays responsive where calls fail.
//!
//! quinn's own socket repeats a failing receive call without end, inside one poll, and stops to send
//! batches to every peer after one error. This one falls back (see [`receiving`](super::receiving))
//! and sends packets one by one to those peers alone that batches do not reach.

use std::{
    collections::HashMap,
    fmt,
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use nix::errno::Errno;
use parking_lot::Mutex;
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use tokio::{
    io::Interest,
    net::UdpSocket,
    time::{Instant, Sleep, sleep},
};
use tokio_util::sync::ReusableBoxFuture;

use super::{
    calls::Calls,
    health::UdpHealth,
    intake::Intake,
    joined::Joined,
    receiving::{Call, Next, Receiving},
    unsendable::Unsendable,
};

/// Number of packets from which they are sent as a batch. Fewer are sent one by one, loss probes
/// and the flights of a handshake among them, so that a path that drops batches carries these.
pub(super) const MIN_BATCH: usize = 4;
/// Maximum number of calls that fail within one poll, before other tasks have their turn.
const MAX_CALLS: usize = 16;
/// Number of times that a call is repeated after errors that ICMP may have caused. More than that
/// arrive between two calls of a process that runs only in a flood that leaves no path usable.
const ICMP_REPEATS: u32 = 8;
/// Maximum number of batches that wait with a part of their packets sent.
const MAX_PARTIAL: usize = 256;

/// What follows when no packet can be received any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::quic) enum WhenBroken {
    /// The endpoint ends, and so do its connections.
    End,
    /// The endpoint stays, and the call is tried again every second.
    Stay,
}

/// What a socket may do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Abilities {
    /// Maximum number of packets in one batch; 1 sends none.
    pub(super) batch: usize,
    /// Whether the kernel joins packets on receiving.
    pub(super) joins: bool,
    /// Whether packets may be fragmented.
    pub(super) may_fragment: bool,
    /// What follows when no packet can be received any more.
    pub(super) when_broken: WhenBroken,
}

/// A UDP socket for quinn that stays responsive where calls fail.
#[derive(Debug)]
pub(super) struct Socket<C> {
    io: UdpSocket,
    calls: C,
    abilities: Abilities,
    health: Arc<UdpHealth>,
    unsendable: Arc<Unsendable>,
    receiver: Mutex<Receiver>,
    partial: Mutex<HashMap<SocketAddr, Partial>>,
}

/// The state of receiving, and the pause that it makes.
#[derive(Debug)]
struct Receiver {
    receiving: Receiving,
    intake: Intake,
    /// `None` where the kernel joins no packets.
    joined: Option<Joined>,
    pause: Option<Pin<Box<Sleep>>>,
    broken: bool,
}

/// A batch whose packets are sent one by one, when the kernel's buffer was full. quinn hands the
/// same batch in again.
#[derive(Debug, PartialEq, Eq)]
struct Partial {
    contents: (usize, usize),
    sent: usize,
}

impl<C: Calls> Socket<C> {
    pub(super) fn new(
        io: UdpSocket,
        calls: C,
        abilities: Abilities,
        health: Arc<UdpHealth>,
        intake: Intake,
    ) -> Self {
        let joined = abilities.joins.then(Joined::new);
        let (receiving, pause, broken) = Default::default();
        let receiver = Mutex::new(Receiver { receiving, intake, joined, pause, broken });
        let (unsendable, partial) = Default::default();
        Self { io, calls, abilities, health, unsendable, receiver, partial }
    }

    /// Why nothing can be sent. Only for a socket with one peer.
    pub(super) fn unsendable(&self) -> Arc<Unsendable> {
        self.unsendable.clone()
    }

    /// Sends a packet or a batch. A call that fails for another peer's sake is repeated; the failed
    /// call has taken that error from the socket.
    fn call(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let call = || self.io.try_io(Interest::WRITABLE, || self.calls.send(&self.io, transmit));
        let mut repeats = 0;
        loop {
            match call() {
                Err(error) if repeats < repeats_after(&error) => repeats += 1,
                sent => return sent,
            }
        }
    }

    /// Sends a packet. One that the kernel does not take is lost, as on the path; `false` then.
    fn send_packet(&self, transmit: &Transmit<'_>) -> io::Result<bool> {
        let Err(error) = self.call(transmit) else { return Ok(true) };
        if error.kind() == io::ErrorKind::WouldBlock {
            return Err(error);
        }
        // Larger than the path carries: MTU discovery tries that.
        if error.raw_os_error() != Some(Errno::EMSGSIZE as i32) {
            self.health.send_failed();
            self.unsendable.refused(&error);
        }
        Ok(false)
    }

    /// Sends the packets of a batch one by one; whether the kernel has taken all.
    fn send_packets(&self, transmit: &Transmit<'_>, size: usize) -> io::Result<bool> {
        let contents = contents(transmit);
        let before = self.partial.lock().remove(&transmit.destination);
        let mut sent = before.filter(|before| before.contents == contents).map_or(0, |p| p.sent);
        let mut all = true;
        for packet in transmit.contents[sent..].chunks(size) {
            let packet = Transmit { contents: packet, segment_size: None, ..transmit.clone() };
            match self.send_packet(&packet) {
                Ok(taken) => all &= taken,
                Err(error) => {
                    let mut partial = self.partial.lock();
                    if partial.len() >= MAX_PARTIAL {
                        // Of connections that ended meanwhile, most of all.
                        partial.clear();
                    }
                    partial.insert(transmit.destination, Partial { contents, sent });
                    return Err(error);
                }
            }
            sent += packet.contents.len();
        }
        Ok(all)
    }

    /// Whether a part of this batch was sent before.
    fn is_partly_sent(&self, transmit: &Transmit<'_>) -> bool {
        let partial = self.partial.lock();
        let before = partial.get(&transmit.destination);
        before.is_some_and(|before| before.contents == contents(transmit))
    }
}

/// What identifies a batch that is handed in again: address and length of its packets.
fn contents(transmit: &Transmit<'_>) -> (usize, usize) {
    (transmit.contents.as_ptr() as usize, transmit.contents.len())
}

/// Number of times that a call is repeated after this error, because it may concern a packet that
/// was sent before, to any peer: the kernel reports an ICMP error to the next call on the socket.
/// A full queue and a firewall's limit may pass as well.
fn repeats_after(error: &io::Error) -> u32 {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(
            Errno::ECONNREFUSED
            | Errno::EHOSTUNREACH
            | Errno::ENETUNREACH
            | Errno::EPROTO
            | Errno::EACCES
            | Errno::ENOPROTOOPT,
        ) => ICMP_REPEATS,
        Some(Errno::ENOBUFS | Errno::EPERM) => 1,
        _ => 0,
    }
}

/// Whether the error says that the kernel, the device or a sandbox cannot send a batch.
fn refuses_batch(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::EIO | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS)
    )
}

impl<C: Calls> AsyncUdpSocket for Socket<C> {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(WritePoller::new(self))
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let size = match transmit.segment_size {
            Some(size) if size < transmit.contents.len() => size,
            _ => return self.send_packet(transmit).map(drop),
        };
        let peer = transmit.destination.ip();
        let packets = transmit.contents.len().div_ceil(size);
        if packets < MIN_BATCH || self.health.is_unsegmented(peer) || self.is_partly_sent(transmit)
        {
            return self.send_packets(transmit, size).map(drop);
        }
        match self.call(transmit) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                // Not if the packets are refused as well: then it is not for being a batch.
                if self.send_packets(transmit, size)? && refuses_batch(&error) {
                    self.health.batches_refused(peer, &error);
                }
                Ok(())
            }
            sent => sent,
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut receiver = self.receiver.lock();
        let receiver = &mut *receiver;
        for _ in 0..MAX_CALLS {
            ready!(self.poll_room(receiver, cx));
            // Without a wake-up: quinn calls again until there is none.
            let handed_on = self.hand_on(receiver, bufs, meta);
            if handed_on > 0 {
                return Poll::Ready(Ok(handed_on));
            }
            if let Some(pause) = &mut receiver.pause {
                ready!(pause.as_mut().poll(cx));
                receiver.pause = None;
            }
            ready!(self.io.poll_recv_ready(cx))?;
            let call = receiver.receiving.call(Instant::now());
            let receive = |bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]| match call {
                Call::Many => self.calls.receive_many(&self.io, bufs, meta),
                Call::One => self.calls.receive_one(&self.io, bufs, &mut meta[0]).map(|()| 1),
            };
            let received = self.io.try_io(Interest::READABLE, || match &mut receiver.joined {
                Some(joined) => joined.receive(receive).map(|()| 0),
                None => receive(bufs, meta),
            });
            match received {
                Ok(count) => {
                    self.receive_worked(receiver, call);
                    if count > 0 {
                        self.choose(&mut receiver.intake, bufs, &mut meta[..count]);
                        return Poll::Ready(Ok(count));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.receive_worked(receiver, call);
                }
                Err(error) => self.receive_failed(receiver, call, error)?,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.abilities.batch
    }

    fn max_receive_segments(&self) -> usize {
        1
    }

    fn may_fragment(&self) -> bool {
        self.abilities.may_fragment
    }
}

impl<C: Calls> Socket<C> {
    /// Waits until the connections have processed enough of what was handed on.
    fn poll_room(&self, receiver: &mut Receiver, cx: &Context<'_>) -> Poll<()> {
        let was_paused = receiver.intake.is_paused;
        let room = receiver.intake.poll_room(cx);
        if room.is_pending() && !was_paused {
            self.health.receive_paused();
        }
        room
    }

    /// Hands on packets that the kernel has joined; their number.
    fn hand_on(
        &self,
        receiver: &mut Receiver,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> usize {
        let Some(joined) = &mut receiver.joined else { return 0 };
        joined.hand_on(bufs, meta, |packet, source| {
            let admitted = receiver.intake.admit(packet, source.ip());
            if !admitted {
                self.health.packet_dropped();
            }
            admitted
        })
    }

    /// Empties the packets that are not to be handed on; quinn passes over them.
    fn choose(&self, intake: &mut Intake, bufs: &[IoSliceMut<'_>], meta: &mut [RecvMeta]) {
        for (buf, meta) in bufs.iter().zip(meta) {
            if !intake.admit(&buf[..meta.len], meta.addr.ip()) {
                self.health.packet_dropped();
                meta.len = 0;
            }
        }
    }

    fn receive_worked(&self, receiver: &mut Receiver, call: Call) {
        let recovered = receiver.receiving.worked(call);
        if recovered.many {
            self.health.recvmmsg_works();
        }
        if recovered.broken {
            receiver.broken = false;
            self.health.receive_ended(true);
        }
    }

    /// Falls back, or begins a pause.
    ///
    /// # Errors
    /// With the error, when the endpoint has to end.
    fn receive_failed(
        &self,
        receiver: &mut Receiver,
        call: Call,
        error: io::Error,
    ) -> io::Result<()> {
        let pause = match receiver.receiving.failed(call, Instant::now(), &error) {
            Next::Again => return Ok(()),
            Next::OneByOne => {
                self.health.recvmmsg_refused(&error);
                return Ok(());
            }
            Next::Pause(pause) => pause,
            Next::Broken(pause) => {
                self.health.receive_broken(&error);
                receiver.broken = true;
                if self.abilities.when_broken == WhenBroken::End {
                    return Err(error);
                }
                pause
            }
        };
        receiver.pause = Some(Box::pin(sleep(pause)));
        Ok(())
    }
}

impl<C> Drop for Socket<C> {
    fn drop(&mut self) {
        if self.receiver.get_mut().broken {
            self.health.receive_ended(false);
        }
    }
}

/// Waits until packets can be sent, for one connection.
struct WritePoller<C> {
    socket: Arc<Socket<C>>,
    writable: ReusableBoxFuture<'static, io::Result<()>>,
}

impl<C: Calls> WritePoller<C> {
    fn new(socket: Arc<Socket<C>>) -> Self {
        let writable = ReusableBoxFuture::new(writable(socket.clone()));
        Self { socket, writable }
    }
}

async fn writable<C: Calls>(socket: Arc<Socket<C>>) -> io::Result<()> {
    socket.io.writable().await
}

impl<C: Calls> UdpPoller for WritePoller<C> {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = ready!(self.writable.poll(cx));
        let next = writable(self.socket.clone());
        self.writable.set(next);
        Poll::Ready(result)
    }
}

impl<C> fmt::Debug for WritePoller<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WritePoller").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
