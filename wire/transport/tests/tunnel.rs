//! Tunnels over real QUIC, and over TLS on TCP, on loopback: what a dropped half means, who is let
//! in, and how a peer that does not answer is found out.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod carriers;

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use culvert_transport::{
    Carrier, ConnectError, ReadError, ReadFrameError, Settings, TransportFault, Tunnel, TunnelLost,
    Unreachable, WriteError,
    control::{ControlError, ControlStream, Event},
    quic::{Listener, connect},
    tcp,
    tls::{self, KeyExchange, ServerCredentials, Tls12, tunnel_client, tunnel_server},
};
use culvert_wire::{
    CloseCode, StreamCode,
    bounded::PeerText,
    control::{ControlMessage, Drain, Ping},
    frame::{self, FrameError},
    version::ALPN,
};

use rustls::{
    ClientConfig,
    version::{TLS12, TLS13},
};
use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use carriers::{Authority, Pair, on_each_carrier, within};

on_each_carrier![
    a_dropped_sender_is_a_reset_and_never_an_end,
    a_finished_sender_is_an_end_and_delivery_is_reported,
    a_dropped_receiver_stops_the_sender,
    a_reset_is_noticed_by_a_reader_that_holds_back,
    a_stream_that_was_watched_for_a_reset_is_read_to_its_clean_end,
    a_lost_tunnel_is_noticed_by_a_reader_that_holds_back,
    a_reset_stays_a_reset_however_often_it_is_asked_for,
    streams_end_with_the_reason_for_which_the_tunnel_was_closed,
    the_reason_of_a_close_is_short_and_cannot_pretend_to_be_another_line,
    a_peer_that_is_heard_and_does_not_answer_is_found_unresponsive,
    a_later_revisions_message_is_ignored_and_a_malformed_one_is_not,
    a_frame_is_read_exactly_and_leaves_what_follows,
    a_frame_that_is_cut_or_too_long_is_refused,
    stalled_streams_do_not_fill_the_tunnel,
];

/// Whether the future completes at once; it is dropped in any case.
async fn is_ready(future: impl Future) -> bool {
    tokio::select! {
        biased;
        _ = future => true,
        () = std::future::ready(()) => false,
    }
}

async fn a_dropped_sender_is_a_reset_and_never_an_end(carrier: Carrier) {
    let pair = Pair::new(carrier).await;
    let (mut send, _recv) = pair.server.open().await.unwrap();
    send.write_chunk(Bytes::from_static(b"half a sentence")).await.unwrap();
    let (_send, mut recv) = pair.agent.accept().await.unwrap();
    let mut chunks = [Bytes::new()];
    recv.read_chunks(&mut chunks).await.unwrap();
    drop(send);
    let error = recv.read_chunks(&mut chunks).await.unwrap_err();
    assert_eq!(error, ReadError::Reset(StreamCode::ABANDONED));
}

async fn a_finished_sender_is_an_end_and_delivery_is_reported(carrier: Carrier) {
    let pair = Pair::new(carrier).await;
    let (mut send, _recv) = pair.server.open().await.unwrap();
    send.write_chunk(Bytes::from_static(b"all")).await.unwrap();
    send.finish();
    send.reset(StreamCode::IO_ERROR); // too late to mean anything
    let delivered = send.stopped();
    drop(send);
    let (_send, mut recv) = pair.agent.accept().await.unwrap();
    let mut chunks = [Bytes::new()];
    assert_eq!(recv.read_chunks(&mut chunks).await.unwrap(), Some(1));
    assert_eq!(chunks[0], "all");
    assert_eq!(recv.read_chunks(&mut chunks).await.unwrap(), None);
    assert_eq!(delivered.await.unwrap(), None);
}

async fn a_dropped_receiver_stops_the_sender(carrier: Carrier) {
    let pair = Pair::new(carrier).await;
    let (mut send, _recv) = pair.server.open().await.unwrap();
    send.write_chunk(Bytes::from_static(b"x")).await.unwrap();
    let (_send, recv) = pair.agent.accept().await.unwrap();
    drop(recv);
    assert_eq!(send.stopped().await.unwrap(), Some(StreamCode::ABANDONED));
    let error = send.write_chunk(Bytes::from_static(b"y")).await.unwrap_err();
    assert_eq!(error, WriteError::Stopped(StreamCode::ABANDONED));
}

async fn a_reset_is_noticed_by_a_reader_that_holds_back(carrier: Carrier) {
    let pair = Pair::new(carrier).await;
    let (mut send, _recv) = pair.server.open().await.unwrap();
    send.write_chunk(Bytes::from_static(b"x")).await.unwrap();
    let (_send, mut recv) = pair.agent.accept().await.unwrap();
    send.reset(StreamCode::PEER_RESET);
    assert_eq!(recv.failed().await, ReadError::Reset(StreamCode::PEER_RESET));
}

/// Watching must leave nothing behind in the tunnel: neither a panic nor a waker, and no byte less.
async fn a_stream_that_was_watched_for_a_reset_is_read_to_its_clean_end(carrier: Carrier) {
    let pair = Pair::new(carrier).await;
    for bytes in ["", "unread"] {
        let (mut send, _recv) = pair.server.open().await.unwrap();
        send.write_chunk(Bytes::from_static(b"first")).await.unwrap();
        let (_send, mut recv) = pair.agent.accept().await.unwrap();
        let mut chunks = [const { Bytes::new() }; 4];
        assert_eq!(recv.read_chunks(&mut chunks).await.unwrap(), Some(1));
        send.write_chunk(Bytes::from_static(bytes.as_bytes())).await.unwrap();
        send.finish();
        // All of it has arrived before it is watched.
        assert_eq!(send.stopped().await.unwrap(), None);
        assert!(!is_ready(recv.failed()).await);
        let mut rest = Vec::new();
        while let Some(count) = recv.read_chunks(&mut chunks).await.unwrap() {
            rest.extend(chunks[..count].concat());
        }
        assert_eq!(rest, bytes.as_bytes());
        assert!(!is_ready(recv.failed()).await);
    }
}

async fn a_lost_tunnel_is_noticed_by_a_reader_that_holds_back(carrier: Carrier) {
    for bytes in ["", "unread"] {
        let pair = Pair::new(carrier).await;
        let (mut send, _recv) = pair.server.open().await.unwrap();
        send.write_chunk(Bytes::from_static(b"first")).await.unwrap();
        let (_send, mut recv) = pair.agent.accept().await.unwrap();
        recv.read_chunks(&mut [Bytes::new()]).await.unwrap();
        send.write_chunk(Bytes::from_static(bytes.as_bytes())).await.unwrap();
        pair.server.close(CloseCode::SHUTDOWN, "");
        let code = CloseCode::SHUTDOWN;
        let lost = TunnelLost::ClosedByPeer { code, reason: PeerText::default() };
        assert_eq!(recv.failed().await, ReadError::Lost(lost));
    }
}

async fn a_reset_stays_a_reset_however_often_it_is_asked_for(carrier: Carrier) {
    let pair = Pair::new(carrier).await;
    let reset = ReadError::Reset(StreamCode::CANCELLED);
    for watched in [false, true] {
        let (mut send, _recv) = pair.server.open().await.unwrap();
        send.reset(StreamCode::CANCELLED);
        let (_send, mut recv) = pair.agent.accept().await.unwrap();
        if watched {
            assert_eq!(recv.failed().await, reset);
        }
        for _ in 0..2 {
            assert_eq!(recv.read_chunks(&mut [Bytes::new()]).await, Err(reset.clone()));
            assert_eq!(recv.read_frame(8).await.unwrap_err(), reset.clone().into());
        }
        assert_eq!(recv.failed().await, reset);
    }
}

async fn streams_end_with_the_reason_for_which_the_tunnel_was_closed(carrier: Carrier) {
    let pair = Pair::new(carrier).await;
    let (mut send, mut recv) = pair.server.open().await.unwrap();
    send.write_chunk(Bytes::from_static(b"x")).await.unwrap();
    let (_send, mut far) = pair.agent.accept().await.unwrap();
    pair.server.close(CloseCode::UNRESPONSIVE, "no answer");
    let (code, reason) = (CloseCode::UNRESPONSIVE, "no answer".to_owned());
    let here = TunnelLost::ClosedHere { code, reason: reason.clone() };
    let there = TunnelLost::ClosedByPeer { code, reason: PeerText::truncated(reason) };
    let mut chunks = [Bytes::new()];
    assert_eq!(recv.read_chunks(&mut chunks).await.unwrap_err(), ReadError::Lost(here.clone()));
    assert_eq!(pair.server.closed().await, here);
    assert_eq!(pair.agent.closed().await, there);
    assert_eq!(far.failed().await, ReadError::Lost(there));
}

async fn the_reason_of_a_close_is_short_and_cannot_pretend_to_be_another_line(carrier: Carrier) {
    let pair = Pair::new(carrier).await;
    let forged = format!("\n\u{2028}\u{202e}INFO agent connected{}", "x".repeat(500));
    pair.server.close(CloseCode::SHUTDOWN, &forged);
    let shown = pair.agent.closed().await.to_string();
    let start = "closed by the peer: shutdown: \\n\\u{2028}\\u{202e}INFO agent connectedxxx";
    assert!(shown.starts_with(start), "{shown}");
    assert!(shown.chars().count() < 250, "{shown}");
}

#[tokio::test]
async fn an_agent_without_a_certificate_or_with_a_strangers_is_refused() {
    within(async {
        let (authority, stranger) = (Authority::new(), Authority::new());
        let (kx, roots) = (KeyExchange::Classic, authority.roots());
        let tls = tunnel_server(authority.identity(), Some(roots.clone()), kx).unwrap();
        let address = "127.0.0.1:0".parse().unwrap();
        let settings = Settings::default();
        let listener = Listener::bind(address, tls.into(), &settings, None).unwrap();
        let remote = listener.local_addr().unwrap();
        for identity in [None, Some(stranger.identity())] {
            let is_anonymous = identity.is_none();
            let tls = tunnel_client(roots.clone(), identity, kx).unwrap();
            let accept = async { listener.accept().await.unwrap().complete().await };
            let connect = async {
                // The client is done a round trip before the server has looked at its certificate.
                match connect(remote, "127.0.0.1", tls.into(), &settings, &Arc::default()).await {
                    Ok((connection, _)) => Tunnel::from(connection).closed().await,
                    Err(ConnectError::Handshake(lost)) => lost,
                    Err(error) => panic!("{error}"),
                }
            };
            let (accepted, refused) = tokio::join!(accept, connect);
            assert!(accepted.is_err());
            let TunnelLost::Transport(TransportFault::TlsAlert { alert, .. }) = refused else {
                panic!("{refused:?}")
            };
            // certificate_required, or decrypt_error: both CAs have the same name, and other keys.
            assert_eq!(alert, if is_anonymous { 116 } else { 51 });
        }
    })
    .await;
}

#[tokio::test]
async fn a_server_of_another_name_or_ca_is_refused() {
    within(async {
        let (authority, stranger) = (Authority::new(), Authority::new());
        let kx = KeyExchange::Hybrid;
        let tls = tunnel_server(authority.identity(), None, kx).unwrap();
        let address = "127.0.0.1:0".parse().unwrap();
        let settings = Settings::default();
        let listener = Listener::bind(address, tls.into(), &settings, None).unwrap();
        let remote = listener.local_addr().unwrap();
        let serve = async {
            while let Some(incoming) = listener.accept().await {
                assert!(incoming.complete().await.is_err());
            }
        };
        let attempts = async {
            for (name, roots) in [("localhost", authority.roots()), ("127.0.0.1", stranger.roots())]
            {
                let tls = tunnel_client(roots, None, kx).unwrap();
                let attempt = connect(remote, name, tls.into(), &settings, &Arc::default()).await;
                assert!(matches!(attempt, Err(ConnectError::Handshake(_))), "{name}");
            }
        };
        tokio::select! {
            () = serve => unreachable!("the listener is open"),
            () = attempts => {}
        }
    })
    .await;
}

#[tokio::test]
async fn an_attempt_at_a_port_without_a_listener_fails_at_once() {
    within(async {
        let gone = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let authority = Authority::new();
        let tls = tunnel_client(authority.roots(), None, KeyExchange::Hybrid).unwrap();
        let attempt =
            connect(gone, "127.0.0.1", tls.into(), &Settings::default(), &Arc::default()).await;
        assert!(matches!(attempt, Err(ConnectError::Refused)));
    })
    .await;
}

#[tokio::test]
async fn an_attempt_whose_packets_the_kernel_refuses_fails_at_once() {
    within(async {
        // Only a socket with the option for it may send to the broadcast address.
        let forbidden = SocketAddr::from((Ipv4Addr::BROADCAST, 8132));
        let authority = Authority::new();
        let tls = tunnel_client(authority.roots(), None, KeyExchange::Hybrid).unwrap();
        let begun = Instant::now();
        let (settings, health) = (Settings::default(), Arc::default());
        let attempt = connect(forbidden, "127.0.0.1", tls.into(), &settings, &health).await;
        let Err(ConnectError::Unreachable(fault)) = attempt else { panic!("{attempt:?}") };
        assert_eq!(fault.kind, std::io::ErrorKind::PermissionDenied);
        // The other results come with the handshake's time-out, 10 s, or later.
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    })
    .await;
}

/// The control stream of each end.
async fn controls(server: &Tunnel, agent: &Tunnel) -> (ControlStream, ControlStream) {
    let mut agent = ControlStream::new(agent.clone(), agent.open().await.unwrap());
    // A stream exists for the peer from its first byte.
    agent.send(&ControlMessage::Drain(Drain { deadline_millis: 1 })).await.unwrap();
    let mut server = ControlStream::new(server.clone(), server.accept().await.unwrap());
    assert!(matches!(server.next().await.unwrap(), ControlMessage::Drain(_)));
    (server, agent)
}

/// Forwards packets between one client and this server until it is dropped, which closes its
/// sockets.
async fn relay(server: SocketAddr) -> (SocketAddr, JoinSet<()>) {
    let near = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let far = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    far.connect(server).await.unwrap();
    let address = near.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let (mut up, mut down) = (vec![0; 65_536], vec![0; 65_536]);
        let mut client = None;
        loop {
            tokio::select! {
                Ok((length, from)) = near.recv_from(&mut up) => {
                    client = Some(from);
                    let _ = far.send(&up[..length]).await;
                }
                Ok(length) = far.recv(&mut down) => {
                    let _ = near.send_to(&down[..length], client.unwrap()).await;
                }
            }
        }
    });
    (address, tasks)
}

/// The time after which a server finds an agent gone whose port was closed.
async fn found_gone(report_limit: Option<Duration>) -> Duration {
    let authority = Authority::new();
    let kx = KeyExchange::Classic;
    let tls = tunnel_server(authority.identity(), None, kx).unwrap();
    let settings = Settings::default();
    let address = "127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(address, tls.into(), &settings, None).unwrap();
    let (path, relay) = relay(listener.local_addr().unwrap()).await;
    let tls = tunnel_client(authority.roots(), None, kx).unwrap();
    let accept = async { listener.accept().await.unwrap().complete().await.unwrap() };
    let health = Arc::default();
    let (server, agent) =
        tokio::join!(accept, connect(path, "127.0.0.1", tls.into(), &settings, &health));
    let (server, agent) = (Tunnel::from(server), Tunnel::from(agent.unwrap().0));
    let (mut control, _agent) = controls(&server, &agent).await;
    if let Some(limit) = report_limit {
        control.set_report_limit(limit);
    }
    drop(relay);
    // The next packet meets a closed port.
    control.nudge().await.unwrap();
    let event = control.event().await.unwrap();
    assert!(matches!(event, Event::Unreachable(Unreachable::Port)), "{event:?}");
    loop {
        match control.event().await {
            // Each packet to the port is answered.
            Ok(Event::Unreachable(Unreachable::Port)) => {}
            Err(ControlError::Unresponsive(waited)) => return waited,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_peer_whose_port_is_closed_is_reported_and_found_gone_at_once() {
    let waited = within(found_gone(None)).await;
    assert!(waited < Duration::from_millis(500), "{waited:?}");
}

#[tokio::test]
async fn a_report_of_the_network_makes_a_side_with_one_path_ask_and_no_less_patient() {
    let limit = Duration::from_millis(1500);
    let waited = within(found_gone(Some(limit))).await;
    assert!(waited >= limit, "{waited:?}");
}

/// Its carrier acknowledges what nothing reads: that renews the deadline, but not for ever.
async fn a_peer_that_is_heard_and_does_not_answer_is_found_unresponsive(carrier: Carrier) {
    let pair = Pair::new(carrier).await;
    let (mut server, _agent) = controls(&pair.server, &pair.agent).await;
    let limit = Duration::from_millis(50);
    server.ask(limit).await.unwrap();
    let error = server.next().await.unwrap_err();
    assert!(matches!(error, ControlError::Unresponsive(waited) if waited >= limit));
    assert_eq!(error.close_code(), CloseCode::UNRESPONSIVE);
}

async fn a_later_revisions_message_is_ignored_and_a_malformed_one_is_not(carrier: Carrier) {
    let pair = Pair::new(carrier).await;
    let (mut send, _recv) = pair.agent.open().await.unwrap();
    let ping = frame::encode(&Ping { echo: 1 }).unwrap();
    let drain = frame::encode(&Drain { deadline_millis: 9 }).unwrap();
    let later: &[u8] = &[0x40, 0, 2, 1, 2];
    send.write_chunk([later, &ping, &drain].concat().into()).await.unwrap();
    let mut server = ControlStream::new(pair.server.clone(), pair.server.accept().await.unwrap());
    let message = server.next().await.unwrap();
    assert_eq!(message, ControlMessage::Drain(Drain { deadline_millis: 9 }));
    send.write_chunk(Bytes::from_static(&[0x03, 0xff, 0xff])).await.unwrap();
    let error = server.next().await.unwrap_err();
    assert!(matches!(error, ControlError::Frame(FrameError::Oversized { kind: 3, .. })));
    assert_eq!(error.close_code(), CloseCode::PROTOCOL_VIOLATION);
}

async fn a_frame_is_read_exactly_and_leaves_what_follows(carrier: Carrier) {
    let pair = Pair::new(carrier).await;
    let (mut send, _recv) = pair.server.open().await.unwrap();
    let bytes = [&frame::encode(&Ping { echo: 5 }).unwrap()[..], b"raw bytes"].concat();
    for byte in bytes.chunks(1) {
        send.write_chunk(Bytes::copy_from_slice(byte)).await.unwrap();
    }
    send.finish();
    let (_send, mut recv) = pair.agent.accept().await.unwrap();
    let ping: Ping = recv.read_frame(16).await.unwrap().message().unwrap();
    assert_eq!(ping, Ping { echo: 5 });
    let mut rest = Vec::new();
    let mut chunks = [const { Bytes::new() }; 8];
    while let Some(count) = recv.read_chunks(&mut chunks).await.unwrap() {
        chunks[..count].iter().for_each(|chunk| rest.extend_from_slice(chunk));
    }
    assert_eq!(rest, b"raw bytes");
}

async fn a_frame_that_is_cut_or_too_long_is_refused(carrier: Carrier) {
    let pair = Pair::new(carrier).await;
    for (bytes, limit, is_expected) in [
        (&[][..], 10, (|e| *e == ReadFrameError::End) as fn(&ReadFrameError) -> bool),
        (&[3, 0], 10, |e| *e == ReadFrameError::Truncated),
        (&[3, 0, 5, 1], 10, |e| *e == ReadFrameError::Truncated),
        (&[3, 0, 11], 10, |e| matches!(e, ReadFrameError::Frame(FrameError::Oversized { .. }))),
    ] {
        let (mut send, _recv) = pair.server.open().await.unwrap();
        send.write_chunk(Bytes::copy_from_slice(bytes)).await.unwrap();
        send.finish();
        let (_send, mut recv) = pair.agent.accept().await.unwrap();
        let error = recv.read_frame(limit).await.unwrap_err();
        assert!(is_expected(&error), "{bytes:?}: {error}");
    }
}

/// Each connection has its own stream: one that is not read does not affect the others.
async fn stalled_streams_do_not_fill_the_tunnel(carrier: Carrier) {
    const WINDOW: usize = 64 * 1024;
    const CHUNK: usize = 16 * 1024;
    let settings = Settings { stream_receive_window: WINDOW as u32, ..Settings::default() };
    let pair = Pair::with(carrier, &settings).await;
    let mut stalled = Vec::new();
    for _ in 0..64 {
        let (mut send, recv) = pair.server.open().await.unwrap();
        let mut accepted = 0;
        // Until a write has to wait: the window is taken by then, or will be once it is sent.
        while is_ready(send.write_chunk(vec![0; CHUNK].into())).await {
            accepted += CHUNK;
        }
        assert!(accepted >= WINDOW, "{accepted} bytes");
        stalled.push((send, recv, pair.agent.accept().await.unwrap()));
    }
    let (mut send, _recv) = pair.server.open().await.unwrap();
    send.write_chunk(vec![1; 32 * 1024].into()).await.unwrap();
    send.finish();
    let (_send, mut recv) = pair.agent.accept().await.unwrap();
    let mut chunks = [const { Bytes::new() }; 64];
    let mut got = 0;
    while let Some(count) = recv.read_chunks(&mut chunks).await.unwrap() {
        got += chunks[..count].iter().map(Bytes::len).sum::<usize>();
    }
    assert_eq!(got, 32 * 1024);
    drop(stalled);
    pair.server.close(CloseCode::DONE, "");
    pair.server.flushed(Duration::from_secs(1)).await;
}

#[tokio::test]
async fn a_peer_that_is_not_admitted_sends_no_more_than_a_small_window() {
    within(async {
        const WINDOW: u32 = 16 * 1024;
        const LEN: usize = 512 * 1024;
        /// Bytes of the handshake, of acknowledgements and of heads of packets.
        const OTHER: u64 = 48 * 1024;
        // Without probes for a larger packet, which would count.
        let settings = Settings { mtu_cap: 1200, ..Settings::default() };
        let settings = settings.with_unadmitted_window(WINDOW);
        let pair = Pair::with(Carrier::Quic, &settings).await;
        let (mut send, _recv) = pair.agent.open().await.unwrap();
        let writing = culvert_transport::task::owned(async move {
            for _ in 0..LEN / 1024 {
                send.write_chunk(Bytes::from_static(&[7; 1024])).await.unwrap();
            }
            send.finish();
        });
        let (_send, mut recv) = pair.server.accept().await.unwrap();
        // Round trips, in which a peer with credit would send the rest.
        for _ in 0..30 {
            let (mut send, _recv) = pair.server.open().await.unwrap();
            send.write_chunk(Bytes::from_static(b"x")).await.unwrap();
            send.finish();
            send.stopped().await.unwrap();
        }
        let received = pair.server.stats().received_bytes;
        assert!((u64::from(WINDOW)..u64::from(WINDOW) + OTHER).contains(&received), "{received}");
        pair.server.admit();
        let (mut chunks, mut read) = ([Bytes::new()], 0);
        while recv.read_chunks(&mut chunks).await.unwrap().is_some() {
            read += chunks[0].len();
        }
        assert_eq!(read, LEN);
        writing.await.unwrap();
    })
    .await;
}

/// TLS 1.2 is for Konnectivity agents alone.
#[tokio::test]
async fn no_tunnel_begins_over_tls_1_2() {
    within(async {
        let (authority, kx) = (Authority::new(), KeyExchange::Classic);
        let credentials = ServerCredentials::fixed(&authority.identity(), None, kx).unwrap();
        let mut server = tls::server(credentials, kx, &Tls12::AnySuite).unwrap();
        server.alpn_protocols = vec![ALPN.to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(server));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        for (version, is_tunnel) in [(&TLS12, false), (&TLS13, true)] {
            let client = ClientConfig::builder_with_provider(kx.provider());
            let client = client.with_protocol_versions(&[version]).unwrap();
            let mut client = client.with_root_certificates(authority.roots()).with_no_client_auth();
            client.alpn_protocols = vec![ALPN.to_vec()];
            let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let name = "127.0.0.1".try_into().unwrap();
            let connect = TlsConnector::from(Arc::new(client)).connect(name, socket);
            let accept = async { acceptor.accept(listener.accept().await.unwrap().0).await };
            let (stream, client) = tokio::join!(accept, connect);
            let (stream, _client) = (stream.unwrap(), client.unwrap());
            let accepted = |carrier| tcp::accepted(&stream, carrier, &Settings::default());
            assert_eq!(accepted(Carrier::Tcp).is_ok(), is_tunnel);
            assert!(accepted(Carrier::Grpc).is_ok());
        }
    })
    .await;
}
