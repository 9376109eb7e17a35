//! The node's NAT: it moves the node's ephemeral ports, and can lose flows for ever.

use std::collections::HashSet;

use super::packet::{Flow, IpPacket, Port};

/// Offset by which a rebinding moves the node's ports further.
const REBINDING: u16 = 1001;

/// State of the NAT.
#[derive(Debug, Default)]
pub(super) struct Nat {
    offset: u16,
    /// Every flow so far, with the node's own port.
    known: HashSet<Flow>,
    /// Flows of which no packet passes any more.
    lost: HashSet<Flow>,
}

impl Nat {
    /// Maps the node's ports to others from now on.
    pub(super) fn rebind(&mut self) {
        self.offset = self.offset.wrapping_add(REBINDING);
    }

    /// Loses every flow so far: no packet of them passes any more in either direction, and nothing
    /// is reported. Flows of other ports begin as before.
    pub(super) fn lose(&mut self) {
        self.lost.extend(self.known.drain());
    }

    /// Translates a packet on its way from the node, or to it; whether it passes.
    pub(super) fn pass(&mut self, packet: &mut IpPacket, from_node: bool) -> bool {
        // The node knows its own port, not the one outside.
        let flow = if from_node {
            let flow = packet.flow();
            self.translate(packet, Port::Source);
            flow
        } else {
            self.translate(packet, Port::Destination);
            packet.flow().map(Flow::reversed)
        };
        let Some(flow) = flow else { return true };
        if self.lost.contains(&flow) {
            return false;
        }
        self.known.insert(flow);
        true
    }

    fn translate(&self, packet: &mut IpPacket, which: Port) {
        if self.offset != 0 {
            packet.translate(which, self.offset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: u16 = 8132;

    /// Whether a packet of the node's port passes to the server, and one of the server to the port
    /// that it came from.
    fn passes(nat: &mut Nat, port: u16) -> [bool; 2] {
        let mut there = IpPacket::udp(port, SERVER);
        let out = nat.pass(&mut there, true);
        let mut back = IpPacket::udp(SERVER, there.flow().unwrap().source);
        [out, nat.pass(&mut back, false)]
    }

    #[test]
    fn flows_that_are_lost_are_dead_both_ways_and_new_ones_pass() {
        for rebindings in 0..3 {
            let mut nat = Nat::default();
            (0..rebindings).for_each(|_| nat.rebind());
            assert_eq!(passes(&mut nat, 40_000), [true, true]);
            nat.lose();
            for _ in 0..2 {
                assert_eq!(passes(&mut nat, 40_000), [false, false], "{rebindings} rebindings");
                assert_eq!(passes(&mut nat, 40_001), [true, true]);
            }
            // For ever, also from another port outside.
            nat.rebind();
            assert_eq!(passes(&mut nat, 40_000), [false, false]);
            assert_eq!(passes(&mut nat, 40_001), [true, true]);
            nat.lose();
            assert_eq!(passes(&mut nat, 40_001), [false, false]);
        }
    }

    #[test]
    fn a_flow_that_the_server_began_is_lost_too() {
        let mut nat = Nat::default();
        assert!(nat.pass(&mut IpPacket::udp(SERVER, 40_000), false));
        nat.lose();
        assert_eq!(passes(&mut nat, 40_000), [false, false]);
    }
}
