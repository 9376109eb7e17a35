//! The link does what its settings say, measured from outside.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use culvert_loadtest::link::{
    Link, LinkError, LinkSettings, NODE, SERVER, Udp,
    probe::{Measured, Probe, measure},
    settings::Direction,
};

/// Long enough for a link to answer, short enough to see that it does not.
const SHORT: Duration = Duration::from_millis(300);

/// The link, or `None` with a word where this process may not have one.
fn link(each_way: Direction) -> Option<Link> {
    let settings = LinkSettings { each_way, ..LinkSettings::default() };
    match Link::start(&settings, 1) {
        Ok(link) => Some(link),
        Err(LinkError::NotPermitted(error)) => {
            eprintln!("skipped: no right to make network namespaces ({error})");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn probed(link: &Link, datagrams: u32, length: usize, per_second: f64) -> Measured {
    measure(link, Probe { datagrams, length, per_second }).unwrap()
}

#[test]
fn a_packet_takes_the_delay_and_at_most_a_millisecond_more() {
    let Some(link) = link(Direction { delay_ms: 25.0, ..Direction::default() }) else { return };
    let measured = probed(&link, 500, 100, 500.0);
    assert_eq!(measured.delays.len(), 500);
    assert!(measured.delay(0.0) >= Duration::from_millis(25), "{:?}", measured.delay(0.0));
    assert!(measured.delay(0.9) <= Duration::from_millis(26), "{:?}", measured.delay(0.9));
}

#[test]
fn a_flood_is_cut_to_the_rate_and_waits_in_the_buffer() {
    let each_way =
        Direction { rate_mbit: Some(50.0), buffer_ms: Some(40.0), ..Direction::default() };
    let Some(link) = link(each_way) else { return };
    let measured = probed(&link, 8000, 1250, 8000.0);
    let rate = measured.mbit_per_second;
    assert!((49.0..51.0).contains(&rate), "{rate}");
    let delay = measured.delay(0.5).as_secs_f64();
    assert!((0.035..0.042).contains(&delay), "{delay}");
    let [to_node, _] = link.counters();
    assert_eq!(to_node.dropped + measured.delays.len() as u64, 8000);
}

#[test]
fn packets_are_lost_at_their_share() {
    let Some(link) = link(Direction { loss: 0.05, ..Direction::default() }) else { return };
    let loss = probed(&link, 20_000, 100, 20_000.0).loss();
    // Three standard deviations on either side.
    assert!((0.0454..0.0546).contains(&loss), "{loss}");
}

#[test]
fn the_directions_are_as_different_as_their_settings() {
    let to_server = Some(Direction { delay_ms: 40.0, ..Direction::default() });
    let settings = LinkSettings { to_server, ..LinkSettings::default() };
    let Some(link) = link(Direction::default()) else { return };
    link.set(&settings);
    let (server, node) = udp_pair(&link);
    let start = std::time::Instant::now();
    server.send(b"there").unwrap();
    assert_eq!(echo(&node).unwrap().ip(), SERVER);
    assert!(start.elapsed() < Duration::from_millis(30));
    server.recv(&mut [0; 16]).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(40));
}

/// A socket of the server, connected to one of the node.
fn udp_pair(link: &Link) -> (UdpSocket, UdpSocket) {
    let bind = |address: Ipv4Addr| {
        let socket = UdpSocket::bind((address, 0))?;
        socket.set_read_timeout(Some(SHORT))?;
        Ok(socket)
    };
    let node = link.node.run(|| bind(NODE)).unwrap();
    let server = link.server.run(|| bind(SERVER)).unwrap();
    server.connect(node.local_addr().unwrap()).unwrap();
    (server, node)
}

/// Sends back what comes; where it came from.
fn echo(socket: &UdpSocket) -> io::Result<SocketAddr> {
    let mut bytes = [0; 16];
    let (length, from) = socket.recv_from(&mut bytes)?;
    socket.send_to(&bytes[..length], from)?;
    Ok(from)
}

#[test]
fn what_is_down_carries_nothing_until_it_is_up() {
    let Some(link) = link(Direction::default()) else { return };
    let (server, node) = udp_pair(&link);
    link.down();
    server.send(b"lost").unwrap();
    assert!(echo(&node).is_err());
    link.up();
    server.send(b"there").unwrap();
    echo(&node).unwrap();
}

#[test]
fn udp_is_dropped_in_silence_or_rejected_aloud() {
    let Some(link) = link(Direction::default()) else { return };
    let (server, node) = udp_pair(&link);
    link.udp(Udp::Drop);
    server.send(b"lost").unwrap();
    let silence = server.recv(&mut [0; 16]).unwrap_err();
    assert_eq!(silence.kind(), io::ErrorKind::WouldBlock);
    link.udp(Udp::Reject);
    server.send(b"refused").unwrap();
    let refusal = server.recv(&mut [0; 16]).unwrap_err();
    assert_eq!(refusal.kind(), io::ErrorKind::ConnectionRefused);
    link.udp(Udp::Pass);
    server.send(b"there").unwrap();
    echo(&node).unwrap();
}

#[test]
fn tcp_finds_its_way_when_the_path_takes_less() {
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
fn a_nat_that_forgets_gives_another_port() {
    let Some(link) = link(Direction::default()) else { return };
    let server = link.server.run(|| UdpSocket::bind((SERVER, 0))).unwrap();
    server.set_read_timeout(Some(SHORT)).unwrap();
    let node = link.node.run(|| UdpSocket::bind((NODE, 0))).unwrap();
    node.set_read_timeout(Some(SHORT)).unwrap();
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
fn a_node_that_moved_has_another_address() {
    let Some(link) = link(Direction::default()) else { return };
    let server = link.server.run(|| UdpSocket::bind((SERVER, 0))).unwrap();
    server.set_read_timeout(Some(SHORT)).unwrap();
    let node = link.node.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    node.send_to(b"hello", server.local_addr().unwrap()).unwrap();
    assert_eq!(echo(&server).unwrap().ip(), NODE);
    let moved = link.change_node_address().unwrap();
    node.send_to(b"hello", server.local_addr().unwrap()).unwrap();
    assert_eq!(echo(&server).unwrap().ip(), moved);
}

#[test]
fn settings_that_cannot_be_are_all_told() {
    let each_way = Direction { loss: 1.5, delay_ms: -1.0, ..Direction::default() };
    let settings = LinkSettings { each_way, mtu: 10, ..LinkSettings::default() };
    let LinkError::Settings(faults) = Link::start(&settings, 1).unwrap_err() else { panic!() };
    for word in ["mtu", "loss", "delay_ms"] {
        assert!(faults.contains(word), "{faults}");
    }
}
