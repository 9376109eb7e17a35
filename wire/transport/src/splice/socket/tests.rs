use std::{
    io::Cursor,
    pin::Pin,
    task::{Context, Poll},
};

use culvert_wire::StreamCode;
use tokio::{
    io::{BufWriter, DuplexStream, duplex},
    join,
    net::TcpListener,
};

use super::*;
use crate::budget::{Held, MemoryBudget, TunnelMemory};

/// Time for what the kernel does at once. Only a test that fails waits for so long.
const PATIENCE: Duration = Duration::from_secs(20);
/// Size of the kernel's buffers in [`tcp`], in bytes, so that they are soon full.
const KERNEL_BUFFER: usize = 16 * 1024;
/// Time of the tests whose clock is paused.
const HOUR: Duration = Duration::from_secs(3600);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("nothing happens")
}

/// A connection with small buffers: the end that is spliced, and its peer.
async fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    // Sockets that are accepted inherit it.
    SockRef::from(&listener).set_send_buffer_size(KERNEL_BUFFER).unwrap();
    let peer = tokio::net::TcpSocket::new_v4().unwrap();
    peer.set_recv_buffer_size(KERNEL_BUFFER as u32).unwrap();
    let peer = peer.connect(listener.local_addr().unwrap()).await.unwrap();
    (listener.accept().await.unwrap().0, peer)
}

/// Closes a TCP socket with a reset, which has arrived when this completes.
async fn reset(peer: TcpStream, socket: &TcpStream) {
    SockRef::from(&peer).set_linger(Some(Duration::ZERO)).unwrap();
    drop(peer);
    soon(socket.readable()).await.unwrap();
}

/// As much as the kernel takes for a peer that does not read: the number of bytes.
fn fill(socket: &impl SpliceSocket) -> usize {
    let mut written = 0;
    loop {
        match socket.try_write(&[IoSlice::new(&[7; 4096])]) {
            Ok(length) => written += length,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                return written;
            }
        }
    }
}

fn read_of(bytes: &'static str) -> Option<Bytes> {
    Some(Bytes::from_static(bytes.as_bytes()))
}

fn holder() -> Arc<Holder> {
    TunnelMemory::new(&MemoryBudget::new(0)).holder(Held::Send)
}

#[tokio::test]
async fn a_socket_is_read_to_its_end_behind_its_prefix() {
    let holder = holder();
    let (socket, mut peer) = tcp().await;
    let mut reader = halves(socket).0.with_prefix(Bytes::from_static(b"read before"));
    assert_eq!(reader.read(&holder).await.unwrap(), read_of("read before"));
    peer.write_all(b"first").await.unwrap();
    assert_eq!(soon(reader.read(&holder)).await.unwrap(), read_of("first"));
    let later = async {
        peer.write_all(b"second").await.unwrap();
    };
    // The read comes first and finds nothing.
    let (second, ()) = soon(async { join!(biased; reader.read(&holder), later) }).await;
    assert_eq!(second.unwrap(), read_of("second"));
    drop(peer);
    assert_eq!(soon(reader.read(&holder)).await.unwrap(), None);
}

#[tokio::test]
async fn a_reset_is_a_fault_of_the_read() {
    let (socket, peer) = tcp().await;
    reset(peer, &socket).await;
    let fault = soon(halves(socket).0.read(&holder())).await.unwrap_err();
    assert_eq!(fault.code, StreamCode::PEER_RESET);
}

#[tokio::test]
async fn a_reset_is_noticed_without_a_read() {
    let (socket, peer) = tcp().await;
    reset(peer, &socket).await;
    assert_eq!(soon(halves(socket).0.failed()).await.code, StreamCode::PEER_RESET);
}

#[tokio::test]
async fn a_reset_is_a_fault_of_a_write_and_not_of_the_end() {
    let (socket, peer) = tcp().await;
    reset(peer, &socket).await;
    let (_reader, mut writer, _abort) = halves(socket);
    for code in [StreamCode::PEER_RESET, StreamCode::BROKEN_PIPE] {
        let fault = soon(writer.write(&mut [Bytes::from_static(b"late")])).await.unwrap_err();
        assert_eq!(fault.code, code);
    }
    // The reader has reported it.
    writer.finish().await.unwrap();
}

#[tokio::test]
async fn more_than_the_kernel_takes_is_written_in_order_as_the_peer_reads() {
    let (socket, mut peer) = tcp().await;
    let (_reader, mut writer, _abort) = halves(socket);
    let taken = writer.progress().unwrap();
    let mut chunks = [const { Bytes::new() }; CHUNKS];
    for (number, chunk) in chunks.iter_mut().enumerate() {
        *chunk = vec![number as u8; KERNEL_BUFFER].into();
    }
    let expected = chunks.concat();
    let write = async {
        writer.write(&mut chunks).await.unwrap();
        writer.finish().await.unwrap();
    };
    let mut read = Vec::new();
    let ((), length) = soon(async { join!(write, peer.read_to_end(&mut read)) }).await;
    assert_eq!((length.unwrap(), taken.load(Ordering::Relaxed)), (read.len(), read.len() as u64));
    assert!(read == expected);
}

#[tokio::test]
async fn a_socket_is_closed_with_a_reset_only_if_it_is_aborted() {
    let (socket, mut peer) = tcp().await;
    drop(halves(socket));
    assert_eq!(soon(peer.read(&mut [0])).await.unwrap(), 0);
    let (socket, mut peer) = tcp().await;
    let (reader, writer, abort) = halves(socket);
    abort.abort();
    drop((reader, writer, abort));
    let error = soon(peer.read(&mut [0])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_tcp_socket_is_flushed_once_its_peer_has_everything() {
    let (socket, mut peer) = tcp().await;
    let length = fill(&socket);
    let left = outq::unacknowledged(&socket).unwrap();
    assert!((1..=length).contains(&left), "{left} of {length} bytes");
    let (_reader, mut writer, _abort) = halves(socket);
    let socket = writer.socket.clone();
    let flushed = async {
        writer.flushed().await;
        outq::unacknowledged(&*socket).unwrap()
    };
    let mut read = vec![0; length];
    let (left, read) = soon(async { join!(biased; flushed, peer.read_exact(&mut read)) }).await;
    assert_eq!((left, read.unwrap()), (0, length));
}

/// How long, in milliseconds, a socket is waited for of which so much is left after each time.
async fn waited(left: impl Fn(Duration) -> io::Result<usize>) -> u128 {
    let started = Instant::now();
    timeout(HOUR, until_acknowledged(|| left(started.elapsed()))).await.unwrap();
    started.elapsed().as_millis()
}

#[tokio::test(start_paused = true)]
async fn a_closing_tcp_socket_is_waited_for_while_it_makes_progress() {
    const PROGRESS: Duration = Duration::from_secs(20);
    assert_eq!(waited(|_| Ok(0)).await, 0);
    assert_eq!(waited(|_| Err(io::ErrorKind::NotConnected.into())).await, 0);
    // Pauses of 1, 2, 4, 8 and then of 10 ms.
    assert_eq!(waited(|elapsed| Ok(usize::from(elapsed.as_millis() < 40))).await, 45);
    assert_eq!(waited(|_| Ok(7)).await, 30_005, "the first check behind half a minute");
    assert_eq!(waited(|elapsed| Ok(if elapsed < PROGRESS { 7 } else { 6 })).await, 50_015);
}

#[tokio::test]
async fn a_socket_that_is_spliced_sends_at_once_and_keeps_little() {
    let (socket, _peer) = tcp().await;
    prepare(&socket);
    let socket = SockRef::from(&socket);
    assert!(socket.tcp_nodelay().unwrap());
    assert_eq!(socket.tcp_notsent_lowat().unwrap(), 256 * 1024);
}

#[test]
fn read_buffers_grow_while_they_are_filled_and_shrink_while_they_are_not() {
    let (mut size, holder) = (ReadSize(MIN_READ), holder());
    let mut next = |read| {
        size.learn(read);
        size.buffer(&holder).capacity()
    };
    assert_eq!(
        [2048, 4095, 4096, 8191, 2048, 2047].map(&mut next),
        [4096, 4096, 8192, 8192, 8192, 4096]
    );
    assert_eq!([1023, 1, 0].map(&mut next), [2048, 2048, 2048], "the smallest");
    for _ in 0..10 {
        next(usize::MAX);
    }
    assert_eq!(next(65_536), 65_536, "the largest");
}

#[test]
fn a_read_buffer_is_no_longer_than_there_is_room() {
    let budget = MemoryBudget::new(64 * 1024);
    let holder = TunnelMemory::new(&budget).holder(Held::Send);
    let size = ReadSize(MAX_READ);
    assert_eq!(size.buffer(&holder).capacity(), 32 * 1024);
    holder.add(64 * 1024);
    assert_eq!(size.buffer(&holder).capacity(), 4 * 1024, "the minimum");
}

#[tokio::test(start_paused = true)]
async fn a_half_closed_socket_is_checked_every_second() {
    let started = Instant::now();
    until_hung_up(|| started.elapsed() >= Duration::from_millis(2500)).await;
    assert_eq!(started.elapsed(), Duration::from_secs(3));
}

#[tokio::test(start_paused = true)]
async fn a_unix_socket_is_hung_up_once_its_peer_has_closed_it_for_good() {
    let (socket, peer) = UnixStream::pair().unwrap();
    let (_reader, writer, abort) = halves(socket);
    writer.socket.writable().await.unwrap();
    SockRef::from(&peer).shutdown(Shutdown::Write).unwrap();
    let hung_up = || until_hung_up(|| abort.is_hung_up());
    assert!(timeout(HOUR, hung_up()).await.is_err(), "it still reads");
    drop(peer);
    timeout(HOUR, hung_up()).await.unwrap();
}

#[tokio::test]
async fn a_tcp_socket_is_hung_up_once_its_peer_has_answered_with_a_reset() {
    let (socket, peer) = tcp().await;
    assert!(!socket.is_hung_up());
    SockRef::from(&peer).shutdown(Shutdown::Write).unwrap();
    soon(socket.readable()).await.unwrap();
    assert!(!socket.is_hung_up(), "it still reads");
    reset(peer, &socket).await;
    soon(until_hung_up(|| socket.is_hung_up())).await;
}

/// A target may close when it has written all, while its client reads slowly.
#[tokio::test]
async fn what_a_tcp_peer_sent_before_its_end_is_read_after_its_reset() {
    let (socket, mut peer) = tcp().await;
    let (mut reader, mut writer, abort) = halves(socket);
    peer.write_all(b"all of it").await.unwrap();
    drop(peer);
    // The peer's host answers it with a reset.
    soon(async {
        while writer.write(&mut [Bytes::from_static(b"late")]).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(abort.is_hung_up());
    assert!(timeout(Duration::from_millis(20), reader.failed()).await.is_err());
    assert_eq!(soon(reader.read(&holder())).await.unwrap(), read_of("all of it"));
    assert_eq!(soon(reader.read(&holder())).await.unwrap(), None);
}

/// A Unix socket whose peer has closed it with a byte unread.
async fn closed_unread() -> UnixStream {
    let (socket, peer) = UnixStream::pair().unwrap();
    socket.writable().await.unwrap();
    socket.try_write(b"!").unwrap();
    drop(peer);
    soon(socket.readable()).await.unwrap();
    socket
}

#[tokio::test]
async fn a_unix_socket_that_was_closed_unread_is_at_its_end_and_takes_no_more() {
    assert_eq!(soon(halves(closed_unread().await).0.read(&holder())).await.unwrap(), None);
    let mut writer = halves(closed_unread().await).1;
    let fault = soon(writer.write(&mut [Bytes::from_static(b"late")])).await.unwrap_err();
    assert_eq!(fault.code, StreamCode::BROKEN_PIPE);
    let error = SpliceSocket::take_error(&closed_unread().await).unwrap();
    assert!(error.is_none(), "{error:?}");
}

#[tokio::test]
async fn a_unix_socket_without_bytes_or_room_is_waited_for() {
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let error = SpliceSocket::try_read(&socket, &mut BytesMut::with_capacity(1)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    socket.writable().await.unwrap();
    let length = fill(&socket);
    let (mut reader, mut writer, _abort) = halves(socket);
    let mut chunks = [Bytes::from_static(b"more")];
    let mut read = vec![0; length + 4];
    let (written, read) =
        soon(async { join!(biased; writer.write(&mut chunks), peer.read_exact(&mut read)) }).await;
    written.unwrap();
    assert_eq!(read.unwrap(), length + 4);
    peer.write_all(b"an answer").await.unwrap();
    assert_eq!(soon(reader.read(&holder())).await.unwrap(), read_of("an answer"));
}

/// Halves of a byte stream that buffers what is written, and the stream's other end.
fn stream() -> (impl LocalRead, impl LocalWrite, DuplexStream) {
    let (stream, peer) = duplex(1024);
    let (reader, writer) = tokio::io::split(stream);
    let (reader, writer) = buffered(reader, BufWriter::new(writer));
    (reader.with_prefix(Bytes::from_static(b"read before")), writer, peer)
}

#[tokio::test(start_paused = true)]
async fn a_byte_stream_is_read_to_its_end_behind_its_prefix() {
    let (mut reader, _writer, mut peer) = stream();
    peer.write_all(b"then this").await.unwrap();
    drop(peer);
    assert_eq!(reader.read(&holder()).await.unwrap(), read_of("read before"));
    assert_eq!(reader.read(&holder()).await.unwrap(), read_of("then this"));
    assert_eq!(reader.read(&holder()).await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn what_is_written_to_a_byte_stream_is_flushed_and_counted_before_the_end() {
    let (_reader, mut writer, mut peer) = stream();
    let taken = writer.progress().unwrap();
    writer.write(&mut [Bytes::from_static(b"one "), Bytes::from_static(b"two")]).await.unwrap();
    let mut read = [0; 7];
    timeout(HOUR, peer.read_exact(&mut read)).await.unwrap().unwrap();
    assert_eq!((&read, taken.load(Ordering::Relaxed)), (b"one two", 7));
    writer.finish().await.unwrap();
    assert_eq!(timeout(HOUR, peer.read(&mut read)).await.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn a_byte_stream_that_takes_no_more_is_a_fault() {
    let mut writer = buffered(tokio::io::empty(), Cursor::new(Box::from([0; 3]))).1;
    let fault = writer.write(&mut [Bytes::from_static(b"abcd")]).await.unwrap_err();
    assert_eq!((fault.code, fault.source.kind()), (StreamCode::IO_ERROR, io::ErrorKind::WriteZero));
    assert_eq!(writer.progress().unwrap().load(Ordering::Relaxed), 3);
}

/// A byte stream whose end is never taken.
struct Endless;

impl AsyncWrite for Endless {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, b: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(b.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_byte_stream_is_given_up_after_half_a_minute() {
    let started = Instant::now();
    let mut writer = buffered(tokio::io::empty(), Endless).1;
    let fault = timeout(HOUR, writer.finish()).await.unwrap().unwrap_err();
    assert_eq!(fault.source.kind(), io::ErrorKind::TimedOut);
    assert_eq!(started.elapsed(), Duration::from_secs(30));
}
