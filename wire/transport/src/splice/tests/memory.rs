//! What a splice holds for a peer that does not read.

use super::*;
use crate::budget::{Held, MemoryBudget};
use culvert_wire::CloseCode;

/// A quarter of it is less than a stream's queue over TCP, 128 KiB.
const LIMIT: u64 = 256 * 1024;

/// Sends 16 KiB at a time for as long as the splice takes it.
async fn send_all(bench: &Bench) {
    let chunk = Bytes::from(vec![7; 16 * 1024]);
    let sending = async { while bench.local.send(Ok(chunk.clone())).await.is_ok() {} };
    assert!(timeout(HOUR, sending).await.is_err(), "the splice takes all");
}

#[tokio::test(start_paused = true)]
async fn the_local_side_waits_while_the_stream_holds_its_share() {
    let budget = MemoryBudget::new(LIMIT);
    let mut bench = Bench::with_budget((), Shared::default(), &budget).await;
    // The peer's window is used up, so that no more is sent.
    send_all(&bench).await;
    let held = budget.held(Held::Send);
    assert!(held <= LIMIT / 4 + 32 * 1024, "{held}");
    assert!(held >= LIMIT / 8, "{held}");
    assert_eq!((budget.waits() > 0, budget.cuts()), (true, 0));
    // It goes on when the peer reads.
    while bench.local.capacity() < LOCAL_CAPACITY {
        assert!(matches!(bench.read().await, Ok(Some(_))));
    }
    bench.pair.server.close(CloseCode::DONE, "");
    bench.task.await.unwrap();
    assert_eq!(budget.held(Held::Send), 0);
}

#[tokio::test(start_paused = true)]
async fn a_splice_that_holds_most_when_memory_is_used_up_is_cut() {
    let budget = MemoryBudget::new(LIMIT);
    let mut bench = Bench::with_budget((), Shared::default(), &budget).await;
    send_all(&bench).await;
    let outcome = {
        let other = bench.pair.server.memory().holder(Held::Konnectivity);
        // Less than the splice holds, and nothing is left.
        let mut others = Vec::new();
        while budget.held(Held::Konnectivity) + budget.held(Held::Send) < LIMIT {
            let holder = bench.pair.server.memory().holder(Held::Konnectivity);
            holder.add(16 * 1024);
            others.push(holder);
        }
        timeout(HOUR, other.wait_for_room()).await.unwrap();
        (&mut bench.task).await.unwrap()
    };
    assert!(matches!(outcome.end, Err(Cut::Memory)), "{outcome:?}");
    assert_eq!((outcome.end.unwrap_err().code(), budget.cuts()), (StreamCode::OVERLOADED, 1));
    let end = loop {
        match bench.read().await {
            Ok(Some(_)) => {}
            end => break end,
        }
    };
    assert_eq!(end, Err(ReadError::Reset(StreamCode::OVERLOADED)));
    assert_eq!(budget.held(Held::Send), 0);
}

/// Window of the streams in these tests; [`Bench`] does not set one.
fn window() -> u64 {
    Settings::default().stream_receive_window.into()
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_a_local_peer_that_stalls_is_counted_and_arrives_in_order() {
    let budget = MemoryBudget::new(64 * LIMIT);
    let peer = Shared { room: Some(Semaphore::new(0)), ..Shared::default() };
    let mut bench = Bench::with_budget((), peer, &budget).await;
    let mut sent = Vec::new();
    // Exactly, but for the chunk that is being written, until more waits than is taken.
    let steps = [
        (1, 1000..=1200),
        (20, 21_000..=21_200),
        (100, 121_000..=121_200),
        (300, window()..=u64::MAX),
    ];
    for (count, counted) in steps {
        for _ in 0..count {
            let chunk: Vec<u8> = (0..1000).map(|at| (at + sent.len()) as u8).collect();
            sent.extend_from_slice(&chunk);
            bench.send.write_chunk(chunk.into()).await.unwrap();
        }
        sleep(Duration::from_secs(1)).await;
        let held = budget.held(Held::Receive);
        assert!(counted.contains(&held), "{held} after {} bytes", sent.len());
    }
    bench.peer.room.as_ref().unwrap().add_permits(sent.len());
    bench.send.finish();
    bench.peer.ended.wait().await;
    assert!(bench.received() == sent);
    assert_eq!((budget.held(Held::Receive), budget.cuts()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_splice_whose_local_peer_stalls_is_cut_when_memory_is_used_up() {
    let budget = MemoryBudget::new(window());
    let peer = Shared { room: Some(Semaphore::new(0)), ..Shared::default() };
    let mut bench = Bench::with_budget((), peer, &budget).await;
    bench.send.write_chunk(Bytes::from(vec![7; 512 * 1024])).await.unwrap();
    let outcome = timeout(Duration::from_secs(1), &mut bench.task).await.unwrap().unwrap();
    assert!(matches!(outcome.end, Err(Cut::Memory)), "{outcome:?}");
    assert_eq!((budget.held(Held::Receive), budget.cuts()), (0, 1));
}
