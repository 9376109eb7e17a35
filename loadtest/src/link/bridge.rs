//! The thread that carries packets between the two hosts' devices, each direction at its own pace.

use std::{
    io,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::net::UnixDatagram,
    },
    sync::{
        Arc,
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::time::TimeSpec,
};
use parking_lot::Mutex;
use tun_rs::SyncDevice;

use super::{
    Counters, LinkSettings,
    direction::{Lane, Packet as _},
    nat::Nat,
    packet::IpPacket,
};

/// Maximum number of packets read from one device before the other is read.
const BATCH: usize = 64;

/// Index of the node's device.
const NODE_DEVICE: usize = 1;

/// Treatment of UDP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Udp {
    /// Carried like other packets.
    #[default]
    Pass,
    /// Dropped silently.
    Drop,
    /// Answered with ICMP port unreachable.
    Reject,
}

/// A command to a running link.
#[derive(Clone, Debug)]
pub(super) enum Command {
    Set(Box<LinkSettings>),
    Up(bool),
    Udp(Udp),
    PathMtu { mtu: u16, silent: bool },
    RebindNat,
    LoseFlows,
    Stop,
}

/// Dropped when a command was carried out.
#[derive(Debug)]
struct Done(#[expect(dead_code, reason = "its end is what counts")] Sender<()>);

/// The running thread. It stops when dropped.
#[derive(Debug)]
pub(super) struct Bridge {
    commands: Sender<(Command, Done)>,
    wake: UnixDatagram,
    counters: Arc<Mutex<[Counters; 2]>>,
    thread: Option<JoinHandle<()>>,
}

impl Bridge {
    /// Joins the devices of the server and of the node, which must not block.
    pub(super) fn start(
        devices: [Arc<SyncDevice>; 2],
        settings: &LinkSettings,
        seed: u64,
    ) -> io::Result<Self> {
        let (commands, received) = channel();
        let (wake, woken) = UnixDatagram::pair()?;
        woken.set_nonblocking(true)?;
        let counters = Arc::new(Mutex::default());
        let worker = Worker {
            devices,
            // The first carries what the server sends.
            lanes: [
                Lane::new(settings.to_node(), seed),
                Lane::new(settings.to_server(), seed.wrapping_add(1)),
            ],
            up: true,
            udp: Udp::Pass,
            path_mtu: None,
            nat: Nat::default(),
            commands: received,
            woken,
            counters: Arc::clone(&counters),
            start: Instant::now(),
        };
        let thread = thread::Builder::new().name("link".into()).spawn(move || worker.run())?;
        Ok(Self { commands, wake, counters, thread: Some(thread) })
    }

    /// Sends a command and waits until it was carried out.
    pub(super) fn command(&self, command: Command) {
        let (done, obeyed) = channel();
        // Fails only when the thread has ended, and then there is no link to command.
        let _ = self.commands.send((command, Done(done)));
        let _ = self.wake.send(&[0]);
        let _ = obeyed.recv();
    }

    /// Counters to the node and to the server.
    pub(super) fn counters(&self) -> [Counters; 2] {
        *self.counters.lock()
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.command(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Worker {
    devices: [Arc<SyncDevice>; 2],
    lanes: [Lane<IpPacket>; 2],
    up: bool,
    udp: Udp,
    /// Largest packet that passes, and whether larger ones vanish without an answer.
    path_mtu: Option<(u16, bool)>,
    nat: Nat,
    commands: Receiver<(Command, Done)>,
    woken: UnixDatagram,
    counters: Arc<Mutex<[Counters; 2]>>,
    start: Instant,
}

impl Worker {
    fn run(mut self) {
        let mut buffer = vec![0; 65_536];
        while self.obey() {
            let now = self.start.elapsed();
            for (lane, device) in self.lanes.iter_mut().zip(self.devices.iter().rev()) {
                while let Some(packet) = lane.pop(now) {
                    // A device that cannot take it is going away.
                    let _ = device.send(packet.as_bytes());
                }
            }
            *self.counters.lock() = self.lanes.each_ref().map(|lane| lane.counters);
            for (from, readable) in self.wait().into_iter().enumerate() {
                if readable {
                    self.read(from, &mut buffer);
                }
            }
        }
    }

    /// Carries out the commands; `false` when one was to stop.
    fn obey(&mut self) -> bool {
        let mut bytes = [0; 64];
        while self.woken.recv(&mut bytes).is_ok() {}
        loop {
            let (command, _done) = match self.commands.try_recv() {
                Ok(command) => command,
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            };
            match command {
                Command::Set(settings) => {
                    self.lanes[0].set(settings.to_node());
                    self.lanes[1].set(settings.to_server());
                }
                Command::Up(up) => {
                    self.up = up;
                    self.lanes.iter_mut().for_each(Lane::clear);
                }
                Command::Udp(udp) => self.udp = udp,
                Command::PathMtu { mtu, silent } => self.path_mtu = Some((mtu, silent)),
                Command::RebindNat => self.nat.rebind(),
                Command::LoseFlows => self.nat.lose(),
                Command::Stop => return false,
            }
        }
    }

    /// Waits for a packet, a command or the next arrival; which devices can be read.
    fn wait(&self) -> [bool; 2] {
        let next = self.lanes.iter().filter_map(Lane::next).min();
        let timeout = next.map(|next| next.saturating_sub(self.start.elapsed()));
        let fds: [BorrowedFd<'_>; 2] = self.devices.each_ref().map(|device| device.as_fd());
        let mut polled = [
            PollFd::new(fds[0], PollFlags::POLLIN),
            PollFd::new(fds[1], PollFlags::POLLIN),
            PollFd::new(self.woken.as_fd(), PollFlags::POLLIN),
        ];
        // An interrupted wait is a short one.
        let _ = ppoll(&mut polled, timeout.map(TimeSpec::from_duration), None);
        [polled[0].any().unwrap_or(false), polled[1].any().unwrap_or(false)]
    }

    fn read(&mut self, from: usize, buffer: &mut [u8]) {
        for _ in 0..BATCH {
            let Ok(length) = self.devices[from].recv(buffer) else { return };
            let now = self.start.elapsed();
            if let Some(packet) = IpPacket::new(&buffer[..length])
                && let Some(packet) = self.admit(from, packet)
            {
                self.lanes[from].push(now, packet);
            }
        }
    }

    /// Applies NAT, MTU and UDP treatment to a packet; `None` when it is not carried.
    fn admit(&mut self, from: usize, mut packet: IpPacket) -> Option<IpPacket> {
        let refusal = if !self.up {
            None
        } else if self.udp != Udp::Pass && packet.is_udp() {
            (self.udp == Udp::Reject).then(|| packet.port_unreachable()).flatten()
        } else if let Some((mtu, silent)) = self.path_mtu
            && packet.len() > usize::from(mtu)
        {
            if silent { None } else { packet.too_big(mtu) }
        } else if self.nat.pass(&mut packet, from == NODE_DEVICE) {
            return Some(packet);
        } else {
            None
        };
        self.lanes[from].counters.refused += 1;
        if let Some(refusal) = refusal {
            let _ = self.devices[from].send(refusal.as_bytes());
        }
        None
    }
}
