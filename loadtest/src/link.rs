//! A link that is really lossy, for TCP and QUIC alike: two hosts in network namespaces, joined
//! through TUN devices by a thread that queues, delays, loses and marks every packet.
//!
//! ```text
//!   server's host  ── TUN 10.77.0.1 ──▶ ┌────────┐ ──▶ TUN 10.77.0.2 ──  node's host
//!                                       │ bridge │
//!                  ◀─────────────────── └────────┘ ◀───────────────────
//! ```
//!
//! It needs the right to make network namespaces: root, or a user namespace (`unshare -Urn`).
//! Nothing of it has a name, so nothing is left behind when the process is killed.

mod bridge;
pub mod check;
mod direction;
pub mod exec;
mod host;
pub mod hosts;
mod loopback;
mod nat;
mod packet;
pub mod probe;
pub mod settings;

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

pub use bridge::Udp;
pub use direction::Counters;
pub use host::Host;
use parking_lot::Mutex;
pub use settings::LinkSettings;
use tun_rs::{DeviceBuilder, SyncDevice};

use bridge::{Bridge, Command};

/// Address of the server's host.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Address of the node's host, until it is changed.
pub const NODE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// An address that no host has: packets to it are lost.
pub const NOWHERE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 99);
/// Prefix length of the network that both are in.
const PREFIX: u8 = 24;
/// Packets that a device holds for the bridge: 5 ms at a million packets per second, so that none
/// is lost but by the link's own settings.
const DEVICE_QUEUE: u32 = 5000;

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The process may not make network namespaces.
    #[error(
        "cannot make a network namespace ({0}): run as root, or inside a user namespace, as in \
         `unshare -Urn culvert-loadtest …`"
    )]
    NotPermitted(io::Error),
    /// A device cannot be made.
    #[error("cannot set up a network device ({0}): is there a /dev/net/tun?")]
    Device(io::Error),
    /// The settings contradict themselves.
    #[error("{0}")]
    Settings(String),
}

/// A running link and its two hosts. They last until this is dropped and no process is left in
/// the hosts.
pub struct Link {
    /// Host of the server and its frontends.
    pub server: Arc<Host>,
    /// Host of the agent and its targets.
    pub node: Arc<Host>,
    bridge: Bridge,
    node_device: Arc<SyncDevice>,
    node_address: Mutex<Ipv4Addr>,
}

impl Link {
    /// Makes the hosts and joins them. Equal seeds lose equal packets.
    ///
    /// # Errors
    /// When the settings are wrong, or the process may not.
    pub fn start(settings: &LinkSettings, seed: u64) -> Result<Self, LinkError> {
        let faults = settings.faults();
        if !faults.is_empty() {
            return Err(LinkError::Settings(faults.join("; ")));
        }
        let (server, node) = (Arc::new(Host::new()?), Arc::new(Host::new()?));
        let device = |host: &Host, address| {
            host.run(|| device(address, settings.mtu)).map(Arc::new).map_err(LinkError::Device)
        };
        let devices = [device(&server, SERVER)?, device(&node, NODE)?];
        let node_device = Arc::clone(&devices[1]);
        let bridge = Bridge::start(devices, settings, seed).map_err(LinkError::Device)?;
        Ok(Self { server, node, bridge, node_device, node_address: Mutex::new(NODE) })
    }

    /// Changes the settings. Packets on the way keep their time; the MTU stays.
    pub fn set(&self, settings: &LinkSettings) {
        self.bridge.command(Command::Set(Box::new(*settings)));
    }

    /// Loses every packet from now on, and those on the way.
    pub fn down(&self) {
        self.bridge.command(Command::Up(false));
    }

    /// Carries packets again.
    pub fn up(&self) {
        self.bridge.command(Command::Up(true));
    }

    /// Treats UDP like this from now on.
    pub fn udp(&self, udp: Udp) {
        self.bridge.command(Command::Udp(udp));
    }

    /// Carries packets of at most `mtu` bytes from now on. Larger ones are answered with ICMP,
    /// unless `silent`.
    pub fn set_path_mtu(&self, mtu: u16, silent: bool) {
        self.bridge.command(Command::PathMtu { mtu, silent });
    }

    /// Maps the node's connections to other ports, as a NAT that has lost its mappings.
    pub fn rebind_nat(&self) {
        self.bridge.command(Command::RebindNat);
    }

    /// Loses every flow of TCP and UDP so far, as a load balancer that sends them to a host that is
    /// gone, or a NAT that has given their ports away: no packet of them passes any more in either
    /// direction, and neither side gets a report. Flows of new sockets pass.
    ///
    /// A NAT that gives the old socket a new port is [`Self::rebind_nat`]: QUIC survives that.
    pub fn lose_flows(&self) {
        self.bridge.command(Command::LoseFlows);
    }

    /// Gives the node another address instead of its own; the new one.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn change_node_address(&self) -> io::Result<Ipv4Addr> {
        let mut address = self.node_address.lock();
        let old = *address;
        let new = Ipv4Addr::from_bits(old.to_bits() + 1);
        self.node.run(|| {
            // In this order, because the kernel takes later addresses away with the first.
            self.node_device.remove_address(IpAddr::V4(old))?;
            self.node_device.add_address_v4(new, PREFIX)
        })?;
        *address = new;
        Ok(new)
    }

    /// Counters of the direction to the node and of that to the server.
    pub fn counters(&self) -> [Counters; 2] {
        self.bridge.counters()
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("node", &self.node_address).finish_non_exhaustive()
    }
}

fn device(address: Ipv4Addr, mtu: u16) -> io::Result<SyncDevice> {
    let device =
        DeviceBuilder::new().name("link").ipv4(address, PREFIX, None).mtu(mtu).build_sync()?;
    // Only the system's own root may; without it a burst beyond 500 packets can be lost here.
    let _ = device.set_tx_queue_len(DEVICE_QUEUE);
    device.set_nonblocking(true)?;
    Ok(device)
}
