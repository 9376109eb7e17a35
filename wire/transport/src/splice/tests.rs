//! Every way in which a splice ends, in paused time, over a tunnel within the process.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use culvert_wire::StreamCode;
use parking_lot::Mutex;
use tokio::{
    net::TcpStream,
    sync::{Semaphore, SetOnce, mpsc},
    time::{Instant, sleep, timeout},
};

use super::*;
use crate::{
    Carrier, ReadError, Settings, TunnelLost, WriteError,
    qmux::Peer,
    test_util::{Pair, Side, size_of_returned},
};

use bench::{Bench, Shared, fill};

mod bench;
mod memory;
mod preamble;
mod stuck;

const CODE: StreamCode = StreamCode::OVERLOADED;
/// Not the default, so that a setting without effect is noticed.
const STUCK_TIMEOUT: Duration = Duration::from_secs(45);
const HOUR: Duration = Duration::from_secs(3600);
/// Number of bytes that one stream takes without a reader, at most: windows and buffers.
const STREAM_CAPACITY: usize = 4 * 1024 * 1024;
/// Number of chunks that the local peer's connection holds while the splice does not read it.
const LOCAL_CAPACITY: usize = 2 * STREAM_CAPACITY / (64 * 1024);

#[tokio::test(start_paused = true)]
async fn the_end_of_the_local_side_leaves_the_other_direction_open() {
    let mut bench = Bench::new().await;
    bench.send_local(b"a request");
    bench.end_local();
    assert_eq!(bench.read().await, Ok(Some("a request".into())));
    assert_eq!(bench.read().await, Ok(None));
    sleep(HOUR).await;
    bench.send_remote(b"an answer").await;
    bench.send.finish();
    let outcome = bench.outcome().await;
    assert_eq!(outcome.end.unwrap(), (HalfEnd::Finished, HalfEnd::Finished));
    assert_eq!((outcome.to_tunnel, outcome.from_tunnel), (1 + 9, 9));
    assert_eq!((bench.meter.to_tunnel(), bench.meter.from_tunnel()), (1 + 9, 9));
    assert_eq!(bench.received(), "an answer");
    assert!(bench.peer.ended.initialized());
    assert_eq!(bench.aborts(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_other_side_leaves_the_local_side_open() {
    let mut bench = Bench::new().await;
    bench.send_remote(b"a request").await;
    bench.send.finish();
    bench.peer.ended.wait().await;
    assert_eq!(bench.received(), "a request");
    sleep(HOUR).await;
    bench.send_local(b"an answer");
    assert_eq!(bench.read().await, Ok(Some("an answer".into())));
    bench.end_local();
    assert_eq!(bench.read().await, Ok(None));
    let outcome = bench.outcome().await;
    assert_eq!(outcome.end.unwrap(), (HalfEnd::Finished, HalfEnd::Finished));
    assert_eq!(bench.aborts(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_local_fault_resets_both_sides_with_its_code() {
    for (kind, code) in [
        (io::ErrorKind::ConnectionReset, StreamCode::PEER_RESET),
        (io::ErrorKind::TimedOut, StreamCode::IO_ERROR),
    ] {
        let mut bench = Bench::new().await;
        bench.local.try_send(Err(kind.into())).unwrap();
        assert_eq!(bench.read().await, Err(ReadError::Reset(code)));
        assert_eq!(bench.send.stopped().await, Ok(Some(code)));
        let cut = bench.outcome().await.end.unwrap_err();
        assert!(matches!(&cut, Cut::Local(fault) if fault.code == code), "{cut:?}");
        assert_eq!((cut.code(), bench.aborts()), (code, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_local_fault_is_noticed_while_the_stream_takes_no_more() {
    let mut bench = Bench::new().await;
    for _ in 0..STREAM_CAPACITY / (64 * 1024) {
        bench.local.try_send(Ok(Bytes::from(vec![7; 64 * 1024]))).unwrap();
    }
    sleep(HOUR).await;
    assert!(!bench.task.is_finished());
    bench.peer.failed.set(()).unwrap();
    let cut = bench.outcome().await.end.unwrap_err();
    assert_eq!((cut.code(), bench.aborts()), (StreamCode::PEER_RESET, 1));
}

#[tokio::test(start_paused = true)]
async fn a_local_peer_whose_host_is_gone_is_cut_off_while_idle() {
    let mut bench = Bench::new().await;
    sleep(HOUR).await;
    assert!(!bench.task.is_finished());
    bench.peer.vanished.set(()).unwrap();
    assert_eq!(bench.read().await, Err(ReadError::Reset(StreamCode::IO_ERROR)));
    let cut = bench.outcome().await.end.unwrap_err();
    assert!(matches!(&cut, Cut::Local(fault) if fault.code == StreamCode::IO_ERROR), "{cut:?}");
    assert_eq!(bench.aborts(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_reset_of_the_other_side_resets_the_local_side() {
    let mut bench = Bench::new().await;
    bench.send.reset(CODE);
    let cut = bench.outcome().await.end.unwrap_err();
    assert!(matches!(cut, Cut::Reset(CODE)), "{cut:?}");
    assert_eq!(bench.read().await, Err(ReadError::Reset(CODE)));
    assert!(!bench.peer.ended.initialized(), "a reset is not an end");
    assert_eq!(bench.aborts(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_reset_is_noticed_while_the_local_peer_does_not_read() {
    let mut bench = Bench::with_room(0).await;
    bench.send_remote(b"never taken").await;
    sleep(HOUR).await;
    bench.send.reset(CODE);
    let cut = bench.outcome().await.end.unwrap_err();
    assert!(matches!(cut, Cut::Reset(CODE)), "{cut:?}");
    assert_eq!(bench.aborts(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_lost_tunnel_resets_the_local_side() {
    let mut bench = Bench::new().await;
    bench.pair.line.cut();
    let cut = bench.outcome().await.end.unwrap_err();
    assert!(matches!(cut, Cut::Lost(TunnelLost::Transport(_))), "{cut:?}");
    assert_eq!((cut.code(), bench.aborts()), (StreamCode::TUNNEL_LOST, 1));
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_is_lost_before_the_end_is_delivered_is_a_cut() {
    let mut bench = Bench::new().await;
    // The end is sent, and does not arrive.
    bench.pair.line.silence(Side::Server);
    bench.end_local();
    bench.send.finish();
    sleep(HOUR).await;
    assert!(!bench.task.is_finished());
    bench.pair.line.cut();
    assert!(matches!(bench.outcome().await.end, Err(Cut::Lost(_))));
    assert_eq!(bench.aborts(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_idle_stream_is_stopped_when_the_local_reader_is_gone() {
    let mut bench = Bench::new().await;
    bench.end_local();
    assert_eq!(bench.read().await, Ok(None));
    sleep(HOUR).await;
    assert!(!bench.task.is_finished());
    let gone = Instant::now();
    bench.peer.gone.set(()).unwrap();
    assert_eq!(bench.send.stopped().await, Ok(Some(StreamCode::CLOSED)));
    assert_eq!(gone.elapsed(), Duration::ZERO);
    let (to, from) = bench.outcome().await.end.unwrap();
    assert_eq!((to, from), (HalfEnd::Finished, HalfEnd::Stopped(StreamCode::CLOSED)));
    assert_eq!(bench.aborts(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_local_reader_that_closes_stops_its_direction_alone() {
    let mut bench = Bench::with_room(1).await;
    bench.send_remote(b"refused").await;
    bench.peer.room.as_ref().unwrap().close();
    assert_eq!(bench.send.stopped().await, Ok(Some(StreamCode::BROKEN_PIPE)));
    let refused = bench.send.write_chunk(Bytes::from_static(b"more")).await;
    assert_eq!(refused, Err(WriteError::Stopped(StreamCode::BROKEN_PIPE)));
    sleep(HOUR).await;
    bench.send_local(b"still sending");
    assert_eq!(bench.read().await, Ok(Some("still sending".into())));
    bench.end_local();
    assert_eq!(bench.read().await, Ok(None));
    let (to, from) = bench.outcome().await.end.unwrap();
    assert_eq!((to, from), (HalfEnd::Finished, HalfEnd::Stopped(StreamCode::BROKEN_PIPE)));
}

#[tokio::test(start_paused = true)]
async fn a_write_that_fails_otherwise_cuts_both_directions_off() {
    let mut bench = Bench::with_room(1).await;
    bench.peer.fault.set(io::ErrorKind::ConnectionReset).unwrap();
    bench.send_remote(b"lost").await;
    bench.peer.room.as_ref().unwrap().close();
    assert_eq!(bench.read().await, Err(ReadError::Reset(StreamCode::PEER_RESET)));
    let cut = bench.outcome().await.end.unwrap_err();
    assert!(matches!(&cut, Cut::Local(fault) if fault.code == StreamCode::PEER_RESET), "{cut:?}");
    assert_eq!(bench.aborts(), 1);
}

#[tokio::test(start_paused = true)]
async fn all_that_the_local_side_wrote_before_it_closed_arrives() {
    let mut bench = Bench::new().await;
    let chunks = STREAM_CAPACITY / (64 * 1024);
    for number in 0..chunks {
        bench.local.try_send(Ok(Bytes::from(vec![number as u8; 64 * 1024]))).unwrap();
    }
    bench.end_local();
    sleep(HOUR).await;
    let mut arrived = Vec::new();
    while let Some(chunk) = bench.read().await.unwrap() {
        arrived.extend_from_slice(&chunk);
    }
    assert_eq!(arrived.len(), chunks * 64 * 1024);
    let in_order = |(at, byte): (usize, &u8)| *byte == (at / (64 * 1024)) as u8;
    assert!(arrived.iter().enumerate().all(in_order));
    bench.send.finish();
    assert!(bench.outcome().await.end.is_ok());
}

#[tokio::test(start_paused = true)]
async fn all_that_the_other_side_wrote_before_it_closed_arrives() {
    let mut bench = Bench::with_room(0).await;
    let length = fill(&mut bench.send).await;
    bench.recv.stop(StreamCode::CLOSED);
    bench.send.finish();
    bench.peer.room.as_ref().unwrap().add_permits(STREAM_CAPACITY);
    bench.peer.ended.wait().await;
    // Written is not arrived: the connection is closed only once the kernel has delivered it.
    bench.send_local(b"discarded meanwhile");
    sleep(HOUR).await;
    assert!(!bench.task.is_finished());
    bench.peer.flushed.set(true).unwrap();
    let outcome = bench.outcome().await;
    assert_eq!(outcome.from_tunnel, length as u64);
    assert_eq!(bench.received().len(), length);
    assert_eq!(outcome.end.unwrap(), (HalfEnd::Stopped(StreamCode::CLOSED), HalfEnd::Finished));
    assert_eq!(bench.aborts(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_local_side_that_is_refused_may_send_on_until_its_answer_is_delivered() {
    let mut bench = Bench::with_room(1).await;
    bench.recv.stop(StreamCode::BROKEN_PIPE);
    sleep(Duration::from_secs(1)).await;
    // A peer that reads only after it has written everything.
    for _ in 0..2 * LOCAL_CAPACITY {
        let written = bench.local.send(Ok(Bytes::from(vec![7; 64 * 1024])));
        timeout(HOUR, written).await.expect("the connection takes no more").unwrap();
    }
    bench.send_remote(b"an answer").await;
    sleep(HOUR).await;
    assert_eq!(bench.received(), "a");
    bench.peer.room.as_ref().unwrap().add_permits(100);
    bench.send.finish();
    bench.peer.ended.wait().await;
    assert_eq!(bench.received(), "an answer");
    bench.peer.flushed.set(true).unwrap();
    let outcome = bench.outcome().await;
    assert_eq!(outcome.to_tunnel, 1, "discarded bytes are not counted");
    assert!(matches!(outcome.end, Ok((HalfEnd::Stopped(_), HalfEnd::Finished))));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_splice_resets_both_sides() {
    let mut bench = Bench::new().await;
    bench.task.abort();
    assert_eq!(bench.read().await, Err(ReadError::Reset(StreamCode::ABANDONED)));
    assert_eq!(bench.send.stopped().await, Ok(Some(StreamCode::ABANDONED)));
    assert!((&mut bench.task).await.unwrap_err().is_cancelled());
    assert_eq!(bench.aborts(), 1);
}

/// Most splices are idle most of the time: `exec`, `logs -f`, watches.
#[test]
fn a_splice_has_no_room_for_what_it_rarely_does() {
    type Arguments = (SocketLocal<TcpStream>, (SendHalf, RecvHalf), &'static Meter);
    let size = size_of_returned(|(local, stream, meter): Arguments| splice(local, stream, meter));
    assert!(size <= 3600, "{size} bytes");
}
