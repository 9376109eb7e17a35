//! A local peer that takes no bytes.

use super::{
    bench::{Aborts, Read},
    *,
};

#[tokio::test(start_paused = true)]
async fn a_stuck_peer_is_cut_off_exactly_after_the_timeout() {
    let mut bench = Bench::with_room(3).await;
    bench.send_remote(b"0123456789").await;
    sleep(HOUR).await;
    assert!(!bench.task.is_finished(), "a slow peer is cut only after the other side has closed");
    let closed = Instant::now();
    bench.recv.stop(StreamCode::CLOSED);
    let cut = bench.outcome().await.end.unwrap_err();
    assert!(matches!(cut, Cut::Stuck), "{cut:?}");
    assert_eq!(closed.elapsed(), STUCK_TIMEOUT);
    assert_eq!(bench.send.stopped().await, Ok(Some(StreamCode::IO_ERROR)));
    assert_eq!((bench.received(), bench.aborts()), ("012".into(), 1));
}

/// What was sent before is kept for a while, in which the other side may read it.
#[tokio::test(start_paused = true)]
async fn what_a_peer_sent_that_left_for_good_is_kept_only_while_it_is_taken() {
    let bench = Bench::new().await;
    for _ in 1..LOCAL_CAPACITY {
        bench.local.try_send(Ok(Bytes::from(vec![7; 64 * 1024]))).unwrap();
    }
    sleep(HOUR + Duration::from_secs(1)).await;
    assert!(!bench.task.is_finished(), "the peer may wait for an answer");
    bench.peer.hung_up.set(()).unwrap();
    let mut bench = bench;
    let mut left = STREAM_CAPACITY;
    while left > STREAM_CAPACITY / 2 {
        sleep(STUCK_TIMEOUT / 20).await;
        left -= bench.read().await.unwrap().unwrap().len();
    }
    let begun = Instant::now();
    let cut = bench.outcome().await.end.unwrap_err();
    assert!(matches!(cut, Cut::Stuck), "{cut:?}");
    assert!(begun.elapsed() <= 10 * STUCK_TIMEOUT, "{:?}", begun.elapsed());
    assert_eq!(bench.aborts(), 1);
}

/// A writer with nothing but what a writer must have.
struct Plain;

impl LocalWrite for Plain {
    async fn write(&mut self, _chunks: &mut [Bytes]) -> Result<(), LocalFault> {
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), LocalFault> {
        Ok(())
    }
}

#[test]
fn without_settings_a_stuck_peer_has_a_minute_and_its_writer_counts_nothing() {
    let shared = Arc::<Shared>::default();
    let local = Local::new(Read(mpsc::channel(1).1, shared.clone()), Plain, Aborts(shared));
    assert_eq!(local.stuck_timeout, Duration::from_secs(60));
    assert!(local.writer.progress().is_none(), "a counter that nothing raises looks stuck");
}

/// Lets the peer take a byte a little more often than the time-out demands; all must arrive.
async fn takes_slowly(mut bench: Bench, bytes: &str) {
    for _ in bytes.bytes() {
        sleep(STUCK_TIMEOUT - Duration::from_secs(2)).await;
        bench.peer.room.as_ref().unwrap().add_permits(1);
    }
    bench.peer.flushed.set(true).unwrap();
    let end = bench.outcome().await.end.unwrap();
    assert_eq!(end, (HalfEnd::Stopped(StreamCode::CLOSED), HalfEnd::Finished));
    assert_eq!((bench.received(), bench.aborts()), (bytes.to_owned().into(), 0));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_part_of_a_batch_is_not_stuck() {
    let progress = Some(Arc::default());
    let room = Some(Semaphore::new(0));
    let mut bench = Bench::with((), Shared { room, progress, ..Shared::default() }).await;
    bench.send_remote(b"abcde").await;
    bench.send.finish();
    // The write has begun before the other side closes.
    sleep(HOUR).await;
    bench.recv.stop(StreamCode::CLOSED);
    takes_slowly(bench, "abcde").await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_chunk_after_chunk_is_not_stuck() {
    let mut bench = Bench::with_room(0).await;
    bench.recv.stop(StreamCode::CLOSED);
    sleep(Duration::from_secs(1)).await;
    // Sent at once, they would be one chunk.
    for chunk in [b"a", b"b", b"c", b"d"] {
        bench.send_remote(chunk).await;
        sleep(STUCK_TIMEOUT - Duration::from_secs(2)).await;
        bench.peer.room.as_ref().unwrap().add_permits(1);
    }
    bench.send_remote(b"e").await;
    bench.send.finish();
    takes_slowly(bench, "abcde").await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_still_there_may_wait_for_the_local_peer() {
    let mut bench = Bench::with_room(0).await;
    bench.send_remote(b"taken late").await;
    bench.recv.stop(StreamCode::BROKEN_PIPE);
    sleep(HOUR).await;
    assert!(!bench.task.is_finished());
    bench.peer.room.as_ref().unwrap().add_permits(100);
    bench.peer.flushed.set(true).unwrap();
    bench.send.finish();
    let (to, from) = bench.outcome().await.end.unwrap();
    assert_eq!((to, from), (HalfEnd::Stopped(StreamCode::BROKEN_PIPE), HalfEnd::Finished));
    assert_eq!((bench.received(), bench.aborts()), ("taken late".into(), 1));
}

/// All was handed to the kernel, which would go on to ask a peer with a full buffer for minutes.
#[tokio::test(start_paused = true)]
async fn what_a_peer_does_not_take_after_its_end_is_discarded_by_a_reset() {
    for (is_flushed, aborts) in [(true, 0), (false, 1)] {
        let mut bench = Bench::new().await;
        bench.send_remote(b"an upload").await;
        bench.send.finish();
        bench.peer.ended.wait().await;
        bench.recv.stop(StreamCode::CLOSED);
        sleep(HOUR).await;
        assert!(!bench.task.is_finished(), "it may be on the way");
        bench.peer.flushed.set(is_flushed).unwrap();
        let (to, from) = bench.outcome().await.end.unwrap();
        assert_eq!((to, from), (HalfEnd::Stopped(StreamCode::CLOSED), HalfEnd::Finished));
        assert_eq!(bench.aborts(), aborts);
    }
}

/// Over TLS nothing but the socket below shows it.
#[tokio::test(start_paused = true)]
async fn a_client_that_left_for_good_is_noticed_although_its_writer_does_not_see_it() {
    let mut bench = Bench::new().await;
    bench.send_local(b"an upload");
    bench.end_local();
    while bench.read().await.unwrap().is_some() {}
    sleep(HOUR).await;
    assert!(!bench.task.is_finished(), "the client may wait for an answer");
    bench.peer.hung_up.set(()).unwrap();
    let stopped = timeout(STUCK_TIMEOUT, bench.send.stopped()).await.expect("it is not noticed");
    assert_eq!(stopped, Ok(Some(StreamCode::CLOSED)));
}
