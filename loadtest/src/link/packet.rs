//! The parts of a router that handle one IPv4 packet.

use etherparse::{
    IpNumber, Ipv4Header, Ipv4HeaderSlice, PacketBuilder, TcpHeader, TcpHeaderSlice, UdpHeader,
    icmpv4::DestUnreachableHeader,
};

use super::direction::Packet;

/// First port that hosts give to sockets without one; only those are behind the NAT.
const FIRST_EPHEMERAL_PORT: u16 = 32_768;
/// An ICMP error quotes the packet's header and this much behind it (RFC 792).
const QUOTED: usize = 8;

/// An IPv4 packet.
#[derive(Debug)]
pub(super) struct IpPacket(Vec<u8>);

/// Protocol and ports of a packet of TCP or UDP. The hosts' addresses belong to no flow here: there
/// are two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Flow {
    pub(super) protocol: IpNumber,
    pub(super) source: u16,
    pub(super) destination: u16,
}

impl Flow {
    /// The same flow as packets of the other direction have it.
    pub(super) fn reversed(self) -> Self {
        Self { source: self.destination, destination: self.source, ..self }
    }
}

/// Which of a packet's ports a NAT rewrites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Port {
    Source,
    Destination,
}

impl IpPacket {
    /// The packet that these bytes are, if they are one of IPv4.
    pub(super) fn new(bytes: &[u8]) -> Option<Self> {
        Ipv4HeaderSlice::from_slice(bytes).ok()?;
        Some(Self(bytes.to_vec()))
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    fn header(&self) -> Option<Ipv4HeaderSlice<'_>> {
        Ipv4HeaderSlice::from_slice(&self.0).ok()
    }

    pub(super) fn is_udp(&self) -> bool {
        self.header().is_some_and(|header| header.protocol() == IpNumber::UDP)
    }

    /// Protocol and ports; `None` where there are no ports.
    pub(super) fn flow(&self) -> Option<Flow> {
        let header = self.header()?;
        let protocol = header.protocol();
        if protocol != IpNumber::UDP && protocol != IpNumber::TCP {
            return None;
        }
        // Both have their ports in the first four bytes.
        let ports = self.0.get(header.slice().len()..)?.first_chunk::<4>()?;
        let [source, destination] =
            [[ports[0], ports[1]], [ports[2], ports[3]]].map(u16::from_be_bytes);
        Some(Flow { protocol, source, destination })
    }

    /// The answer of a host where no socket has the port.
    pub(super) fn port_unreachable(&self) -> Option<Self> {
        self.unreachable(DestUnreachableHeader::Port)
    }

    /// The answer of a router whose next link takes at most `mtu` bytes, if the packet must not be
    /// fragmented; others are dropped silently.
    pub(super) fn too_big(&self, mtu: u16) -> Option<Self> {
        let next_hop_mtu = mtu;
        let must_not = self.header()?.dont_fragment();
        must_not.then(|| {
            self.unreachable(DestUnreachableHeader::FragmentationNeeded { next_hop_mtu })
        })?
    }

    fn unreachable(&self, why: DestUnreachableHeader) -> Option<Self> {
        let header = self.header()?;
        let quote = &self.0[..self.0.len().min(header.slice().len() + QUOTED)];
        let answer = PacketBuilder::ipv4(header.destination(), header.source(), 64)
            .icmpv4(etherparse::Icmpv4Type::DestinationUnreachable(why));
        let mut bytes = Vec::with_capacity(answer.size(quote.len()));
        answer.write(&mut bytes, quote).ok()?;
        Some(Self(bytes))
    }

    /// Moves an ephemeral source port up, or a destination port back down, by `offset`, round the
    /// range of ephemeral ports.
    pub(super) fn translate(&mut self, which: Port, offset: u16) -> Option<()> {
        let ip = self.header()?.to_header();
        let (_, body) = self.0.split_at_mut_checked(ip.header_len())?;
        if ip.protocol == IpNumber::TCP {
            let mut tcp = TcpHeaderSlice::from_slice(body).ok()?.to_header();
            let port = tcp_port(&mut tcp, which);
            *port = moved(*port, which, offset);
            let length = tcp.header_len();
            tcp.checksum = tcp.calc_checksum_ipv4(&ip, &body[length..]).ok()?;
            tcp.write(&mut &mut body[..length]).ok()
        } else if ip.protocol == IpNumber::UDP {
            let (mut udp, payload) = UdpHeader::from_slice(body).ok()?;
            let port = udp_port(&mut udp, which);
            *port = moved(*port, which, offset);
            udp.checksum = udp.calc_checksum_ipv4(&ip, payload).ok()?;
            udp.write(&mut &mut body[..UdpHeader::LEN]).ok()
        } else {
            Some(())
        }
    }
}

impl Packet for IpPacket {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn mark(&mut self) {
        let Some(mut header) = self.header().map(|header| header.to_header()) else { return };
        if header.ecn.value() != 0 {
            header.ecn = etherparse::IpEcn::CongestionExperienced;
            let _ = self.write(&mut header);
        }
    }
}

impl IpPacket {
    fn write(&mut self, header: &mut Ipv4Header) -> Option<()> {
        header.header_checksum = header.calc_header_checksum();
        let length = header.header_len();
        header.write_raw(&mut &mut self.0[..length]).ok()
    }
}

fn tcp_port(header: &mut TcpHeader, which: Port) -> &mut u16 {
    match which {
        Port::Source => &mut header.source_port,
        Port::Destination => &mut header.destination_port,
    }
}

fn udp_port(header: &mut UdpHeader, which: Port) -> &mut u16 {
    match which {
        Port::Source => &mut header.source_port,
        Port::Destination => &mut header.destination_port,
    }
}

fn moved(port: u16, which: Port, offset: u16) -> u16 {
    if port < FIRST_EPHEMERAL_PORT {
        return port;
    }
    let offset = offset % FIRST_EPHEMERAL_PORT;
    let place = match which {
        Port::Source => port - FIRST_EPHEMERAL_PORT + offset,
        Port::Destination => port - FIRST_EPHEMERAL_PORT + (FIRST_EPHEMERAL_PORT - offset),
    };
    FIRST_EPHEMERAL_PORT + place % FIRST_EPHEMERAL_PORT
}

#[cfg(test)]
impl IpPacket {
    /// A packet of UDP between these ports.
    pub(super) fn udp(source: u16, destination: u16) -> Self {
        let builder =
            PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).udp(source, destination);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, b"hello").unwrap();
        Self::new(&bytes).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{IpEcn, SlicedPacket, TransportSlice};

    use super::*;

    fn ports(packet: &IpPacket) -> (u16, u16) {
        let sliced = SlicedPacket::from_ip(packet.as_bytes()).unwrap();
        let Some(TransportSlice::Udp(udp)) = sliced.transport else { panic!("not UDP") };
        let header = packet.header().unwrap().to_header();
        let parsed = udp.to_header();
        assert_eq!(parsed.checksum, parsed.calc_checksum_ipv4(&header, udp.payload()).unwrap());
        (udp.source_port(), udp.destination_port())
    }

    #[test]
    fn a_port_that_was_translated_comes_back() {
        for port in [32_768, 40_000, 65_535] {
            let mut there = IpPacket::udp(port, 8132);
            there.translate(Port::Source, 30_001).unwrap();
            let (outside, destination) = ports(&there);
            assert_ne!(outside, port);
            assert_eq!(destination, 8132);
            let mut back = IpPacket::udp(8132, outside);
            back.translate(Port::Destination, 30_001).unwrap();
            assert_eq!(ports(&back), (8132, port));
        }
    }

    #[test]
    fn a_flow_has_the_ports_of_its_packets_and_other_protocols_have_none() {
        let flow = IpPacket::udp(40_000, 8132).flow().unwrap();
        assert_eq!((flow.source, flow.destination), (40_000, 8132));
        assert_eq!(IpPacket::udp(8132, 40_000).flow(), Some(flow.reversed()));
        assert_eq!(IpPacket::udp(1, 2).port_unreachable().unwrap().flow(), None);
    }

    #[test]
    fn only_packets_that_allow_it_are_marked() {
        for (before, after) in
            [(IpEcn::NotEct, IpEcn::NotEct), (IpEcn::Ect0, IpEcn::CongestionExperienced)]
        {
            let mut packet = IpPacket::udp(1, 2);
            let mut header = packet.header().unwrap().to_header();
            header.ecn = before;
            packet.write(&mut header).unwrap();
            packet.mark();
            let header = packet.header().unwrap().to_header();
            assert_eq!(header.ecn, after);
            assert_eq!(header.header_checksum, header.calc_header_checksum());
        }
    }

    #[test]
    fn a_refusal_goes_back_and_quotes_the_packet() {
        let packet = IpPacket::udp(40_000, 8132);
        let answer = packet.port_unreachable().unwrap();
        let header = answer.header().unwrap();
        assert_eq!((header.source(), header.destination()), ([10, 0, 0, 2], [10, 0, 0, 1]));
        assert_eq!(answer.as_bytes()[20..22], [3, 3]);
        assert_eq!(answer.as_bytes()[28..], packet.as_bytes()[..28]);
        // PacketBuilder allows no fragments by default.
        assert_eq!(packet.too_big(1300).unwrap().as_bytes()[20..28][6..], 1300_u16.to_be_bytes());
    }

    #[test]
    fn what_is_not_ipv4_is_no_packet() {
        assert!(IpPacket::new(&[0x60; 40]).is_none());
        assert!(IpPacket::new(&[]).is_none());
    }
}
