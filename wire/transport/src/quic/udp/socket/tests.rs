use std::{sync::atomic::AtomicUsize, time::Duration};

use quinn::udp::EcnCodepoint;

use super::*;
use crate::quic::udp::calls::KernelCalls;

/// Calls of the kernel, some of which fail by script.
#[derive(Debug)]
struct Scripted {
    kernel: KernelCalls,
    script: Mutex<Script>,
    received: AtomicUsize,
    sent: Mutex<Vec<(SocketAddr, usize)>>,
}

/// Which calls fail, and with what.
#[derive(Clone, Copy, Debug, Default)]
struct Script {
    many: Option<Errno>,
    one: Option<Errno>,
    batch: Option<(Errno, Option<SocketAddr>)>,
    packet: Option<Errno>,
    /// The error of the next calls that send, whatever they send, and how many.
    pending: Option<(Errno, u32)>,
    /// Number of packets that the kernel takes before its buffer is full.
    room: Option<usize>,
}

fn fail(error: Option<Errno>) -> io::Result<()> {
    error.map_or(Ok(()), |error| Err(error.into()))
}

impl Calls for Scripted {
    fn send(&self, socket: &UdpSocket, transmit: &Transmit<'_>) -> io::Result<()> {
        let mut script = self.script.lock();
        if let Some((error, left @ 1..)) = &mut script.pending {
            *left -= 1;
            return Err((*error).into());
        }
        match (transmit.segment_size, script.batch) {
            (None, _) => fail(script.packet)?,
            (_, Some((error, peer))) if peer.is_none_or(|peer| peer == transmit.destination) => {
                return Err(error.into());
            }
            _ => {}
        }
        match &mut script.room {
            Some(0) => return Err(io::ErrorKind::WouldBlock.into()),
            Some(room) => *room -= 1,
            None => {}
        }
        self.sent.lock().push((transmit.destination, transmit.contents.len()));
        self.kernel.send(socket, transmit)
    }

    fn receive_many(
        &self,
        socket: &UdpSocket,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> io::Result<usize> {
        self.received.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        fail(self.script.lock().many)?;
        self.kernel.receive_many(socket, bufs, meta)
    }

    fn receive_one(
        &self,
        socket: &UdpSocket,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut RecvMeta,
    ) -> io::Result<()> {
        self.received.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        fail(self.script.lock().one)?;
        self.kernel.receive_one(socket, bufs, meta)
    }
}

impl Scripted {
    fn calls(&self) -> usize {
        self.received.load(std::sync::atomic::Ordering::Relaxed)
    }
}

type TestSocket = Socket<Scripted>;

async fn socket(address: &str, when_broken: WhenBroken, script: Script) -> TestSocket {
    let io = UdpSocket::bind(address).await.unwrap();
    let kernel = KernelCalls::new(&io).unwrap();
    let (batch, joined) = kernel.segments();
    let abilities = Abilities { batch, joins: joined > 1, may_fragment: false, when_broken };
    let script = Mutex::new(script);
    let calls = Scripted { kernel, script, received: AtomicUsize::new(0), sent: Mutex::default() };
    let intake = Intake::new(Arc::default(), 1 << 20);
    Socket::new(io, calls, abilities, Arc::default(), intake)
}

/// The next packet that the socket receives.
async fn receive(socket: &TestSocket) -> io::Result<(Vec<u8>, RecvMeta)> {
    let mut bufs = [vec![0; 1500]];
    let mut meta = [RecvMeta::default()];
    std::future::poll_fn(|cx| {
        let mut bufs: Vec<_> = bufs.iter_mut().map(|buf| IoSliceMut::new(buf)).collect();
        socket.poll_recv(cx, &mut bufs, &mut meta)
    })
    .await
    .map(|_| (bufs[0][..meta[0].len].to_vec(), meta[0]))
}

/// Sends two packets to the socket and receives one.
async fn receive_one_of_two(socket: &TestSocket) -> io::Result<Vec<u8>> {
    let sender = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for packet in [b"first", b"other"] {
        sender.send_to(packet, socket.local_addr().unwrap()).await.unwrap();
    }
    receive(socket).await.map(|(packet, _)| packet)
}

const ALL: &[Errno] = &[Errno::ENOSYS, Errno::EPERM, Errno::EIO];

#[tokio::test]
async fn packets_are_received_one_by_one_where_recvmmsg_fails() {
    for &errno in ALL {
        let script = Script { many: Some(errno), ..Script::default() };
        let socket = socket("127.0.0.1:0", WhenBroken::End, script).await;
        assert_eq!(receive_one_of_two(&socket).await.unwrap(), b"first", "{errno}");
        assert_eq!(receive(&socket).await.unwrap().0, b"other", "{errno}");
        assert_eq!(socket.health.stats().recvmmsg_refused, 1, "{errno}");
        assert_eq!(socket.health.stats().broken, 0, "{errno}");
        // Recvmmsg was not tried again for the second packet.
        assert!(socket.calls.calls() <= 10, "{errno}: {}", socket.calls.calls());
    }
}

#[tokio::test(start_paused = true)]
async fn recvmmsg_is_used_again_once_it_works() {
    let script = Script { many: Some(Errno::ENOSYS), ..Script::default() };
    let socket = socket("127.0.0.1:0", WhenBroken::End, script).await;
    receive_one_of_two(&socket).await.unwrap();
    *socket.calls.script.lock() = Script { one: Some(Errno::EIO), ..Script::default() };
    tokio::time::advance(Duration::from_secs(600)).await;
    assert_eq!(receive(&socket).await.unwrap().0, b"other");
}

#[tokio::test]
async fn packets_that_the_kernel_joined_are_received_one_by_one_with_marks_and_addresses() {
    let alone = Script { many: Some(Errno::ENOSYS), ..Script::default() };
    let families = ["127.0.0.1:0", "[::1]:0"];
    for (address, script) in
        families.into_iter().flat_map(|it| [(it, alone), (it, Script::default())])
    {
        let receiver = socket(address, WhenBroken::End, script).await;
        let sender = socket(address, WhenBroken::End, Script::default()).await;
        let contents: Vec<u8> = (0..4500).map(|at| (at / 1000) as u8).collect();
        let transmit = Transmit {
            destination: receiver.local_addr().unwrap(),
            ecn: Some(EcnCodepoint::Ect0),
            contents: &contents,
            segment_size: Some(1000),
            src_ip: None,
        };
        send(&sender, &transmit).await;
        let before = receiver.calls.calls();
        for (number, size) in [(0, 1000), (1, 1000), (2, 1000), (3, 1000), (4, 500)] {
            let (packet, meta) = receive(&receiver).await.unwrap();
            assert_eq!(packet, vec![number; size]);
            assert_eq!((meta.len, meta.stride), (size, size));
            assert_eq!(meta.ecn, Some(EcnCodepoint::Ect0));
            assert_eq!(meta.addr, sender.local_addr().unwrap());
            assert_eq!(meta.dst_ip, Some(receiver.local_addr().unwrap().ip()));
        }
        let calls = receiver.calls.calls() - before;
        assert!(calls <= 4, "the kernel has joined them: {calls}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_socket_that_receives_nothing_ends_its_endpoint_after_seconds_and_few_calls() {
    for &errno in ALL {
        let script = Script { many: Some(errno), one: Some(errno), ..Script::default() };
        let socket = socket("127.0.0.1:0", WhenBroken::End, script).await;
        let begun = Instant::now();
        let error = receive_one_of_two(&socket).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(errno as i32));
        let after = begun.elapsed();
        assert!(after >= Duration::from_secs(2) && after < Duration::from_secs(5), "{after:?}");
        assert!(socket.calls.calls() < 40, "{errno}: {}", socket.calls.calls());
        let health = socket.health.clone();
        assert_eq!((health.stats().broken, health.stats().receive_refused), (1, 1));
        drop(socket);
        assert_eq!((health.stats().broken, health.stats().receive_refused), (0, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_shared_socket_stays_is_tried_every_second_and_recovers() {
    let script = Script { many: Some(Errno::EPERM), one: Some(Errno::EPERM), ..Script::default() };
    let socket = Arc::new(socket("127.0.0.1:0", WhenBroken::Stay, script).await);
    let receiving = crate::task::owned({
        let socket = socket.clone();
        async move { receive_one_of_two(&socket).await }
    });
    sleep(Duration::from_secs(100)).await;
    assert_eq!(socket.health.stats().broken, 1);
    let calls = socket.calls.calls();
    assert!((90..120).contains(&calls), "{calls}");
    socket.calls.script.lock().one = None;
    assert_eq!(receiving.await.unwrap().unwrap(), b"first");
    assert_eq!(socket.health.stats().broken, 0);
}

#[tokio::test]
async fn one_poll_makes_few_calls() {
    let script = Script { many: Some(Errno::EIO), one: Some(Errno::EIO), ..Script::default() };
    let socket = socket("127.0.0.1:0", WhenBroken::Stay, script).await;
    let sender = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    sender.send_to(b"?", socket.local_addr().unwrap()).await.unwrap();
    socket.io.readable().await.unwrap();
    let (mut buf, mut meta) = ([0; 100], [RecvMeta::default()]);
    let polled = std::future::poll_fn(|cx| {
        Poll::Ready(socket.poll_recv(cx, &mut [IoSliceMut::new(&mut buf)], &mut meta).is_pending())
    });
    assert!(polled.await);
    assert!(socket.calls.calls() <= MAX_CALLS, "{}", socket.calls.calls());
}

fn transmit(destination: SocketAddr, contents: &[u8]) -> Transmit<'_> {
    Transmit { destination, ecn: None, contents, segment_size: Some(1000), src_ip: None }
}

async fn send(socket: &TestSocket, transmit: &Transmit<'_>) {
    socket.io.writable().await.unwrap();
    socket.try_send(transmit).unwrap();
}

/// A socket that only has an address.
async fn peer() -> (UdpSocket, SocketAddr) {
    let peer = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = peer.local_addr().unwrap();
    (peer, address)
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_is_refused_is_sent_as_packets_and_so_are_the_next() {
    for errno in [Errno::EIO, Errno::EINVAL, Errno::EOPNOTSUPP, Errno::ENOSYS] {
        let script = Script { batch: Some((errno, None)), ..Script::default() };
        let socket = socket("127.0.0.1:0", WhenBroken::End, script).await;
        let (peer, address) = peer().await;
        send(&socket, &transmit(address, &[1; 4500])).await;
        for size in [1000, 1000, 1000, 1000, 500] {
            assert_eq!(peer.recv(&mut [0; 2000]).await.unwrap(), size, "{errno}");
        }
        assert_eq!(socket.health.stats().gso_refused, 1);
        // The next is not even tried, until the period is over.
        socket.calls.script.lock().batch = None;
        send(&socket, &transmit(address, &[1; 4000])).await;
        assert_eq!(peer.recv(&mut [0; 2000]).await.unwrap(), 1000);
        assert_eq!(socket.calls.sent.lock().last(), Some(&(address, 1000)));
        tokio::time::advance(Duration::from_secs(600)).await;
        send(&socket, &transmit(address, &[1; 4000])).await;
        assert_eq!(socket.calls.sent.lock().last(), Some(&(address, 4000)));
    }
}

#[tokio::test]
async fn a_peer_that_refuses_batches_costs_the_others_nothing() {
    let refusing: SocketAddr = "127.0.0.2:9".parse().unwrap();
    let script = Script { batch: Some((Errno::EIO, Some(refusing))), ..Script::default() };
    let socket = socket("0.0.0.0:0", WhenBroken::End, script).await;
    let (_peer, address) = peer().await;
    send(&socket, &transmit(refusing, &[1; 4000])).await;
    send(&socket, &transmit(address, &[1; 4000])).await;
    assert_eq!(socket.calls.sent.lock().last(), Some(&(address, 4000)));
    assert_eq!(socket.health.stats().unsegmented_peers, 1);
}

#[tokio::test]
async fn a_batch_is_not_to_blame_where_packets_are_refused_too() {
    let script = Script {
        batch: Some((Errno::EPERM, None)),
        packet: Some(Errno::EPERM),
        ..Script::default()
    };
    let socket = socket("127.0.0.1:0", WhenBroken::End, script).await;
    let (_peer, address) = peer().await;
    send(&socket, &transmit(address, &[1; 4000])).await;
    let stats = socket.health.stats();
    assert_eq!((stats.gso_refused, stats.unsegmented_peers, stats.send_errors), (0, 0, 4));
}

#[tokio::test]
async fn an_error_of_another_peer_delays_no_packet_and_marks_no_peer() {
    for (error, count) in
        [(Errno::ECONNREFUSED, 8), (Errno::EHOSTUNREACH, 8), (Errno::EPERM, 1), (Errno::ENOBUFS, 1)]
    {
        for size in [800, 4000] {
            let script = Script { pending: Some((error, count)), ..Script::default() };
            let socket = socket("127.0.0.1:0", WhenBroken::End, script).await;
            let (_peer, address) = peer().await;
            send(&socket, &transmit(address, &vec![1; size])).await;
            assert_eq!(*socket.calls.sent.lock(), [(address, size)], "{error}");
            let stats = socket.health.stats();
            assert_eq!((stats.unsegmented_peers, stats.send_errors), (0, 0), "{error}");
        }
    }
}

#[tokio::test]
async fn a_batch_that_fails_for_another_reason_is_sent_as_packets_this_time_alone() {
    for errno in [Errno::EPERM, Errno::ENOBUFS, Errno::EMSGSIZE, Errno::ENETUNREACH] {
        let script = Script { batch: Some((errno, None)), ..Script::default() };
        let socket = socket("127.0.0.1:0", WhenBroken::End, script).await;
        let (_peer, address) = peer().await;
        send(&socket, &transmit(address, &[1; 4000])).await;
        assert_eq!(*socket.calls.sent.lock(), [(address, 1000); 4], "{errno}");
        socket.calls.script.lock().batch = None;
        send(&socket, &transmit(address, &[1; 4000])).await;
        assert_eq!(socket.calls.sent.lock().last(), Some(&(address, 4000)), "{errno}");
        assert_eq!(socket.health.stats().unsegmented_peers, 0, "{errno}");
    }
}

#[tokio::test]
async fn a_few_packets_are_no_batch() {
    let socket = socket("127.0.0.1:0", WhenBroken::End, Script::default()).await;
    let (_peer, address) = peer().await;
    send(&socket, &transmit(address, &[1; 3000])).await;
    assert_eq!(*socket.calls.sent.lock(), [(address, 1000); 3]);
}

#[tokio::test]
async fn a_full_buffer_repeats_no_packet() {
    for errno in [Errno::EIO, Errno::EMSGSIZE] {
        let script = Script { batch: Some((errno, None)), room: Some(2), ..Script::default() };
        let socket = socket("127.0.0.1:0", WhenBroken::End, script).await;
        let other = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let stale = (1..=256).map(|port| (other(port), Partial { contents: (0, 0), sent: 0 }));
        socket.partial.lock().extend(stale);
        let (_peer, address) = peer().await;
        let contents = [1; 4500];
        socket.io.writable().await.unwrap();
        let error = socket.try_send(&transmit(address, &contents)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        *socket.calls.script.lock() = Script::default(); // batches are taken again
        send(&socket, &transmit(address, &contents)).await;
        let sizes: Vec<_> = socket.calls.sent.lock().iter().map(|(_, size)| *size).collect();
        assert_eq!(sizes, [1000, 1000, 1000, 1000, 500], "{errno}");
        assert!(socket.partial.lock().is_empty());
    }
}

#[tokio::test]
async fn a_socket_stops_to_receive_while_its_connections_are_behind() {
    const PACKETS: usize = 2000;
    let socket = socket("127.0.0.1:0", WhenBroken::End, Script::default()).await;
    let rounds = socket.receiver.lock().intake.rounds().clone();
    let working = rounds.current();
    rounds.enter(working);
    let sender = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut received = 0;
    for number in 0..PACKETS {
        // Each of another connection.
        let mut packet = vec![0x40; 1200];
        packet[1..9].copy_from_slice(&(number as u64).to_le_bytes());
        sender.send_to(&packet, socket.local_addr().unwrap()).await.unwrap();
        let dropped = socket.health.stats().packets_dropped;
        tokio::select! {
            biased;
            packet = receive(&socket) => { packet.unwrap(); received += 1; }
            () = paused(&socket) => break,
            // It shares a counter with another connection, and little is left of the round.
            () = drops_more_than(&socket, dropped) => {}
        }
    }
    assert!(received > 100 && received < 1000, "{received}");
    assert_eq!(socket.health.stats().receive_pauses, 1);
    let mut reader = std::pin::pin!(receive(&socket));
    assert!(std::future::poll_fn(|cx| Poll::Ready(reader.as_mut().poll(cx).is_pending())).await);
    rounds.leave(working);
    assert_eq!(reader.await.unwrap().0.len(), 1200);
    assert_eq!(socket.health.stats().receive_pauses, 1);
}

/// Waits until the socket has dropped more packets than this number.
async fn drops_more_than(socket: &TestSocket, number: u64) {
    while socket.health.stats().packets_dropped <= number {
        tokio::task::yield_now().await;
    }
}

/// Waits until the socket does not receive.
async fn paused(socket: &TestSocket) {
    while !socket.receiver.lock().intake.is_paused {
        tokio::task::yield_now().await;
    }
}
