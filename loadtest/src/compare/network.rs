//! The network between server and node in a run, and the events that change it.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use crate::{
    link::{self, Counters, Host, Link, LinkSettings, Udp},
    scenario::{Event, LinkEvent},
};

/// The network between server and node.
pub(super) enum Network {
    Loopback(Arc<Host>),
    Link(Box<Link>),
}

impl Network {
    pub(super) fn new(settings: Option<&LinkSettings>, seed: u64) -> anyhow::Result<Self> {
        Ok(match settings {
            Some(settings) => Self::Link(Box::new(Link::start(settings, seed)?)),
            None => Self::Loopback(Arc::new(Host::new()?)),
        })
    }

    pub(super) fn hosts(&self) -> [Arc<Host>; 2] {
        match self {
            Self::Loopback(host) => [Arc::clone(host), Arc::clone(host)],
            Self::Link(link) => [Arc::clone(&link.server), Arc::clone(&link.node)],
        }
    }

    /// Addresses of the server and of the target.
    pub(super) fn addresses(&self) -> (IpAddr, IpAddr) {
        match self {
            Self::Loopback(_) => (Ipv4Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()),
            Self::Link(_) => (link::SERVER.into(), link::NODE.into()),
        }
    }

    /// An address that no host has and nothing answers for.
    pub(super) fn nowhere(&self) -> SocketAddr {
        match self {
            // Loopback answers for all its addresses; this network has no route.
            Self::Loopback(_) => (Ipv4Addr::new(10, 77, 0, 99), 9).into(),
            Self::Link(_) => (link::NOWHERE, 9).into(),
        }
    }

    pub(super) fn counters(&self) -> Option<[Counters; 2]> {
        match self {
            Self::Loopback(_) => None,
            Self::Link(link) => Some(link.counters()),
        }
    }

    /// Applies an event to the link, if there is one.
    ///
    /// # Errors
    /// When the node's device refuses another address.
    pub(super) fn apply(&self, event: &Event) -> anyhow::Result<()> {
        let Self::Link(link) = self else { return Ok(()) };
        match event.link {
            Some(LinkEvent::Down) => link.down(),
            Some(LinkEvent::Up) => link.up(),
            Some(LinkEvent::DropUdp) => link.udp(Udp::Drop),
            Some(LinkEvent::RejectUdp) => link.udp(Udp::Reject),
            Some(LinkEvent::PassUdp) => link.udp(Udp::Pass),
            Some(LinkEvent::RebindNat) => link.rebind_nat(),
            Some(LinkEvent::LoseFlows) => link.lose_flows(),
            Some(LinkEvent::ChangeAddress) => drop(link.change_node_address()?),
            None => {}
        }
        if let Some(mtu) = event.mtu {
            link.set_path_mtu(mtu, event.silent);
        }
        if let Some(each_way) = event.set {
            link.set(&LinkSettings { each_way, ..LinkSettings::default() });
        }
        Ok(())
    }
}
