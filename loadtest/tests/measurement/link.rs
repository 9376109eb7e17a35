//! The link does what its settings say, measured from outside. Its delays, rates and losses are
//! tested exactly, in virtual time, where they are computed; the bounds here only show that the
//! packets of real sockets go through that computation.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use culvert_loadtest::link::{
    Link, LinkError, LinkSettings, NODE, SERVER, Udp,
    probe::{Measured, Probe, measure},
    settings::Direction,
};

use crate::support::network;

/// Time for a packet that arrives.
const PATIENCE: Duration = Duration::from_secs(20);
/// Time after which a packet counts as lost.
const SILENCE: Duration = Duration::from_millis(300);

/// A link with these settings each way; `None` when tests with namespaces are skipped.
fn link(each_way: Direction) -> Option<Link> {
    network::link(&LinkSettings { each_way, ..LinkSettings::default() })
}

fn probed(link: &Link, datagrams: u32, length: usize, per_second: f64) -> Measured {
    measure(link, Probe { datagrams, length, per_second }).unwrap()
}

#[test]
fn a_packet_takes_the_delay() {
    let Some(link) = link(Direction { delay_ms: 25.0, ..Direction::default() }) else { return };
    let measured = probed(&link, 500, 100, 500.0);
    assert_eq!(measured.delays.len(), 500);
    assert!(measured.delay(0.0) >= Duration::from_millis(25), "{:?}", measured.delay(0.0));
    // Twice the delay would be the delay of both directions.
    assert!(measured.delay(0.1) < Duration::from_millis(50), "{:?}", measured.delay(0.1));
}

#[test]
fn a_flood_is_cut_to_the_rate_and_waits_in_the_buffer() {
    let each_way =
        Direction { rate_mbit: Some(50.0), buffer_ms: Some(40.0), ..Direction::default() };
    let Some(link) = link(each_way) else { return };
    let measured = probed(&link, 8000, 1250, 8000.0);
    let rate = measured.mbit_per_second;
    assert!((25.0..55.0).contains(&rate), "{rate}");
    // The buffer is full for most of the time: the flood is 80 Mbit/s.
    let longest = measured.delay(1.0);
    assert!(longest > Duration::from_millis(35), "{longest:?}");
    let [to_node, _] = link.counters();
    assert!(to_node.dropped > 0);
    assert_eq!(to_node.dropped + measured.delays.len() as u64, 8000);
}

/// The link has a seed, so the count is the same in every run, but for packets of the kernel's own.
#[test]
fn packets_are_lost_at_their_rate() {
    let Some(link) = link(Direction { loss: 0.05, ..Direction::default() }) else { return };
    let measured = probed(&link, 20_000, 100, 20_000.0);
    let [to_node, _] = link.counters();
    // Six standard deviations on either side.
    assert!((815..1185).contains(&to_node.lost), "{}", to_node.lost);
    let arrived = measured.delays.len() as u64;
    assert!(arrived <= to_node.packets - to_node.lost, "{arrived} arrived");
}

#[test]
fn each_direction_has_its_own_settings() {
    const SLOW: Duration = Duration::from_secs(2);
    let to_server = Some(Direction { delay_ms: 2000.0, ..Direction::default() });
    let settings = LinkSettings { to_server, ..LinkSettings::default() };
    let Some(link) = link(Direction::default()) else { return };
    link.set(&settings);
    let (server, node) = udp_pair(&link);
    let start = Instant::now();
    server.send(b"there").unwrap();
    assert_eq!(echo(&node).unwrap().ip(), SERVER);
    assert!(start.elapsed() < SLOW, "{:?}", start.elapsed());
    server.recv(&mut [0; 16]).unwrap();
    assert!(start.elapsed() >= SLOW, "{:?}", start.elapsed());
}

/// A socket of the server, connected to one of the node.
fn udp_pair(link: &Link) -> (UdpSocket, UdpSocket) {
    let bind = |address: Ipv4Addr| {
        let socket = UdpSocket::bind((address, 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    };
    let node = link.node.run(|| bind(NODE)).unwrap();
    let server = link.server.run(|| bind(SERVER)).unwrap();
    server.connect(node.local_addr().unwrap()).unwrap();
    (server, node)
}

/// Echoes one packet; its sender.
fn echo(socket: &UdpSocket) -> io::Result<SocketAddr> {
    let mut bytes = [0; 16];
    let (length, from) = socket.recv_from(&mut bytes)?;
    socket.send_to(&bytes[..length], from)?;
    Ok(from)
}

/// Whether no packet comes for a while.
fn is_silent(socket: &UdpSocket) -> bool {
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    let silent = socket.recv(&mut [0; 16]).is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    silent
}

#[test]
fn a_link_that_is_down_carries_nothing_until_it_is_up() {
    let Some(link) = link(Direction::default()) else { return };
    let (server, node) = udp_pair(&link);
    link.down();
    server.send(b"lost").unwrap();
    assert!(is_silent(&node));
    link.up();
    server.send(b"there").unwrap();
    echo(&node).unwrap();
}

#[test]
fn udp_is_dropped_silently_or_rejected_with_icmp() {
    let Some(link) = link(Direction::default()) else { return };
    let (server, node) = udp_pair(&link);
    link.udp(Udp::Drop);
    server.send(b"lost").unwrap();
    assert!(is_silent(&server));
    link.udp(Udp::Reject);
    server.send(b"refused").unwrap();
    let refusal = server.recv(&mut [0; 16]).unwrap_err();
    assert_eq!(refusal.kind(), io::ErrorKind::ConnectionRefused);
    link.udp(Udp::Pass);
    server.send(b"there").unwrap();
    echo(&node).unwrap();
}

#[test]
fn tcp_adapts_to_a_smaller_path_mtu() {
    let Some(link) = link(Direction::default()) else { return };
    link.set_path_mtu(900, false);
    let listener = link.node.run(|| TcpListener::bind((NODE, 0))).unwrap();
    let address = listener.local_addr().unwrap();
    let mut server = link.server.run(|| TcpStream::connect(address)).unwrap();
    let writer = std::thread::spawn(move || server.write_all(&[7; 100_000]));
    let mut received = Vec::new();
    listener.accept().unwrap().0.read_to_end(&mut received).unwrap();
    writer.join().unwrap().unwrap();
    assert_eq!(received, [7; 100_000]);
    assert!(link.counters()[0].refused > 0);
}

#[test]
fn a_nat_that_rebinds_gives_another_port() {
    let Some(link) = link(Direction::default()) else { return };
    let server = link.server.run(|| UdpSocket::bind((SERVER, 0))).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let node = link.node.run(|| UdpSocket::bind((NODE, 0))).unwrap();
    node.set_read_timeout(Some(PATIENCE)).unwrap();
    // Below the ephemeral ports there is no NAT; above, it shifts.
    let server_port = server.local_addr().unwrap().port();
    let ask = || {
        node.send_to(b"who am I?", (SERVER, server_port)).unwrap();
        let from = echo(&server).unwrap();
        node.recv(&mut [0; 16]).unwrap();
        from.port()
    };
    let own = node.local_addr().unwrap().port();
    assert_eq!(ask(), own);
    link.rebind_nat();
    assert_ne!(ask(), own);
}

#[test]
fn a_flow_that_is_lost_is_silent_both_ways_and_a_new_socket_works() {
    let Some(link) = link(Direction::default()) else { return };
    let (server, node) = udp_pair(&link);
    let to_server = server.local_addr().unwrap();
    server.send(b"there").unwrap();
    echo(&node).unwrap();
    server.recv(&mut [0; 16]).unwrap();
    link.lose_flows();
    server.send(b"lost").unwrap();
    assert!(is_silent(&node));
    node.send_to(b"lost too", to_server).unwrap();
    assert!(is_silent(&server));
    let (_, new_node) = udp_pair(&link);
    server.connect(new_node.local_addr().unwrap()).unwrap();
    server.send(b"there").unwrap();
    echo(&new_node).unwrap();
}

#[test]
fn a_node_that_moved_has_another_address() {
    let Some(link) = link(Direction::default()) else { return };
    let server = link.server.run(|| UdpSocket::bind((SERVER, 0))).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let node = link.node.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    node.send_to(b"hello", server.local_addr().unwrap()).unwrap();
    assert_eq!(echo(&server).unwrap().ip(), NODE);
    let moved = link.change_node_address().unwrap();
    node.send_to(b"hello", server.local_addr().unwrap()).unwrap();
    assert_eq!(echo(&server).unwrap().ip(), moved);
}

#[test]
fn every_impossible_setting_is_reported() {
    let each_way = Direction { loss: 1.5, delay_ms: -1.0, ..Direction::default() };
    let settings = LinkSettings { each_way, mtu: 10, ..LinkSettings::default() };
    let LinkError::Settings(faults) = Link::start(&settings, 1).unwrap_err() else { panic!() };
    for word in ["mtu", "loss", "delay_ms"] {
        assert!(faults.contains(word), "{faults}");
    }
}
