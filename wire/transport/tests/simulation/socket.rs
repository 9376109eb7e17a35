//! UDP sockets on the network.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    fmt, io,
    io::IoSliceMut,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use tokio::time::{Instant, Sleep, sleep_until};

use super::pipe::{Counters, Pipe, Settings};

/// The whole network: sockets by address, and a pipe for each direction.
pub(super) struct Network(Mutex<State>);

struct State {
    /// Towards servers, towards agents.
    pipes: [Pipe; 2],
    inboxes: HashMap<SocketAddr, Inbox>,
    order: u64,
}

#[derive(Default)]
struct Inbox {
    packets: BinaryHeap<Reverse<Packet>>,
    waker: Option<Waker>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    arrival: Instant,
    order: u64,
    from: SocketAddr,
    payload: Vec<u8>,
}

impl Network {
    pub(super) fn new(to_server: Settings, to_agent: Settings, seed: u64) -> Arc<Self> {
        let pipes = [Pipe::new(to_server, seed), Pipe::new(to_agent, seed + 1)];
        Arc::new(Self(Mutex::new(State { pipes, inboxes: HashMap::new(), order: 0 })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }

    pub(super) fn counters(&self) -> Counters {
        self.state().pipes[0].counters
    }

    /// When packets towards servers came into the queue, and how long each waits in it.
    pub(super) fn waits(&self) -> Vec<(Instant, Duration)> {
        self.state().pipes[0].waits.clone()
    }

    pub(super) fn socket(self: &Arc<Self>, address: SocketAddr, is_server: bool) -> Arc<Socket> {
        self.state().inboxes.insert(address, Inbox::default());
        let pipe = usize::from(is_server);
        Arc::new(Socket { network: Arc::clone(self), address, pipe, timer: Mutex::default() })
    }
}

/// One socket.
pub(super) struct Socket {
    network: Arc<Network>,
    address: SocketAddr,
    /// Index of the pipe that it sends into.
    pipe: usize,
    timer: Mutex<Option<Pin<Box<Sleep>>>>,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket").field("address", &self.address).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let mut state = self.network.state();
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        for payload in transmit.contents.chunks(segment) {
            let Some(arrival) = state.pipes[self.pipe].push(payload.len()) else { continue };
            state.order += 1;
            let packet = Packet {
                arrival,
                order: state.order,
                from: self.address,
                payload: payload.to_vec(),
            };
            if let Some(inbox) = state.inboxes.get_mut(&transmit.destination) {
                inbox.packets.push(Reverse(packet));
                inbox.waker.take().into_iter().for_each(Waker::wake);
            }
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.network.state();
        let inbox = state.inboxes.get_mut(&self.address).unwrap();
        let mut received = 0;
        for (buf, meta) in bufs.iter_mut().zip(meta) {
            let due = inbox.packets.peek().is_some_and(|next| next.0.arrival <= Instant::now());
            let Some(Reverse(packet)) = due.then(|| inbox.packets.pop()).flatten() else { break };
            let len = packet.payload.len();
            buf[..len].copy_from_slice(&packet.payload);
            *meta = RecvMeta { addr: packet.from, len, stride: len, ecn: None, dst_ip: None };
            received += 1;
        }
        if received > 0 {
            return Poll::Ready(Ok(received));
        }
        inbox.waker = Some(cx.waker().clone());
        let next = inbox.packets.peek().map(|next| next.0.arrival);
        drop(state);
        let mut timer = self.timer.lock();
        *timer = next.map(|next| Box::pin(sleep_until(next)));
        if timer.as_mut().is_some_and(|timer| timer.as_mut().poll(cx).is_ready()) {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }

    fn max_transmit_segments(&self) -> usize {
        10
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
