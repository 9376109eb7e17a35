use proptest::prelude::*;
use tokio::{join, time::timeout};

use super::*;

const LIMIT: u64 = 1024 * 1024;

fn buffer(length: u64) -> BytesMut {
    BytesMut::from(&*vec![7; length as usize])
}

/// Reads as much as there is room for, in buffers of at most `most` bytes, and keeps it.
fn fill(holder: &Arc<Holder>, most: u64) -> Vec<Bytes> {
    let mut chunks = Vec::new();
    while holder.room() > 0 {
        chunks.push(holder.hold(buffer(holder.room().min(most))));
    }
    chunks
}

#[test]
fn a_chunk_is_held_until_its_last_reference_is_dropped() {
    let budget = MemoryBudget::new(LIMIT);
    let holder = TunnelMemory::new(&budget).holder(Held::Send);
    let mut chunk = holder.hold(buffer(1000));
    assert_eq!(&chunk[..], &[7; 1000]);
    let held = 1000 + CHUNK_COST;
    assert_eq!(
        (holder.held(), budget.held(Held::Send), budget.held(Held::Receive)),
        (held, held, 0)
    );
    let part = chunk.split_to(1);
    drop(chunk);
    assert_eq!(holder.held(), held, "the part keeps the whole alive");
    drop(part);
    assert_eq!((holder.held(), budget.held(Held::Send)), (0, 0));
    assert_eq!(budget.held.load(Relaxed), 0);
}

#[test]
fn a_short_read_into_a_long_buffer_costs_its_own_length() {
    let holder = TunnelMemory::new(&MemoryBudget::new(LIMIT)).holder(Held::Send);
    let mut long = BytesMut::with_capacity(64 * 1024);
    long.extend_from_slice(b"short");
    let chunk = holder.hold(long);
    assert_eq!((&chunk[..], holder.held()), (&b"short"[..], 5 + CHUNK_COST));
}

#[test]
fn one_stream_has_a_quarter_and_one_tunnel_half_and_the_next_has_room() {
    let budget = MemoryBudget::new(LIMIT);
    let tunnel = TunnelMemory::new(&budget);
    let first = tunnel.holder(Held::Send);
    let mut held = vec![(fill(&first, 512), first.clone())];
    assert!((LIMIT / 5..LIMIT / 4 + 1024).contains(&first.held()), "{}", first.held());
    for _ in 0..20 {
        let holder = tunnel.holder(Held::Send);
        held.push((fill(&holder, 512), holder));
    }
    let of_tunnel = tunnel.held.load(Relaxed);
    assert!(of_tunnel <= LIMIT / 2 + 20 * (MINIMUM + 1024), "{of_tunnel}");
    let other = TunnelMemory::new(&budget).holder(Held::Send);
    assert!(other.room() > LIMIT / 10, "{}", other.room());
}

#[test]
fn without_a_limit_a_stream_holds_the_maximum() {
    let budget = MemoryBudget::new(0);
    assert_eq!(budget.limit(), None);
    let holder = TunnelMemory::new(&budget).holder(Held::Send);
    let chunks = fill(&holder, 1024 * 1024);
    assert!((MAXIMUM..MAXIMUM + 2 * CHUNK_COST).contains(&holder.held()), "{}", holder.held());
    drop(chunks);
    assert_eq!(holder.room(), MAXIMUM);
}

#[tokio::test(start_paused = true)]
async fn a_stream_without_room_waits_until_something_of_its_own_is_given_back() {
    let budget = MemoryBudget::new(LIMIT);
    let holder = TunnelMemory::new(&budget).holder(Held::Send);
    let mut chunks = fill(&holder, 64 * 1024);
    assert!(timeout(Duration::from_secs(3600), holder.wait_for_room()).await.is_err());
    assert_eq!(budget.waits(), 1);
    let give_back = async {
        tokio::task::yield_now().await;
        chunks.pop();
        chunks.remove(0);
    };
    join!(holder.wait_for_room(), give_back);
    assert_eq!(budget.cuts(), 0);
}

#[tokio::test(start_paused = true)]
async fn at_the_limit_the_largest_holder_is_cut_and_the_others_go_on() {
    let budget = MemoryBudget::new(LIMIT);
    let tunnel = TunnelMemory::new(&budget);
    let (small, large) = (tunnel.holder(Held::Send), tunnel.holder(Held::Receive));
    small.add(LIMIT / 4);
    large.add(LIMIT);
    let waiting = tunnel.holder(Held::Send);
    assert_eq!(waiting.room(), 0, "not even the minimum");
    let cut = async {
        large.cut().await;
        large.give_back(LIMIT);
    };
    timeout(Duration::from_secs(1), async { join!(waiting.wait_for_room(), cut) }).await.unwrap();
    assert_eq!((budget.cuts(), small.is_cut()), (1, false));
}

/// The order of holders is that of one moment: sorting by what changes meanwhile panics.
#[test]
fn holders_are_cut_while_what_they_hold_changes() {
    for _ in 0..300 {
        let budget = MemoryBudget::new(LIMIT);
        let tunnel = TunnelMemory::new(&budget);
        let holders: Vec<_> = (0..200).map(|_| tunnel.holder(Held::Receive)).collect();
        for (holder, count) in holders.iter().zip(1..) {
            holder.add(LIMIT / 200 + count);
        }
        std::thread::scope(|scope| {
            let changing = scope.spawn(|| {
                for at in 0..20_000 {
                    let holder = &holders[at % holders.len()];
                    holder.add(at as u64 % 7 * 1000);
                    holder.give_back(at as u64 % 7 * 1000);
                }
            });
            loop {
                let is_last = changing.is_finished();
                budget.holders.lock().cut_at = None;
                budget.relieve();
                if is_last {
                    break;
                }
            }
        });
        assert!(budget.cuts() > 0);
    }
}

proptest! {
    /// However many streams there are and whatever they read, they stay below the limit, but for
    /// one read of the minimum each; and each has room as long as the limit is not reached.
    #[test]
    fn holders_together_stay_below_the_limit(
        reads in prop::collection::vec((0_usize..60, 1_u64..64 * 1024), 1..600),
    ) {
        let budget = MemoryBudget::new(LIMIT);
        let tunnels: Vec<_> = (0..3).map(|_| TunnelMemory::new(&budget)).collect();
        let holders: Vec<_> = (0..60).map(|at| tunnels[at % 3].holder(Held::Send)).collect();
        let mut held = Vec::new();
        for (stream, length) in reads {
            let room = holders[stream].room();
            prop_assert!(room > 0 || holders[stream].held() >= MINIMUM || budget.left() == 0);
            if room > 0 {
                held.push(holders[stream].hold(buffer(room.min(length))));
            }
            prop_assert!(budget.held(Held::Send) <= LIMIT + MINIMUM + CHUNK_COST);
        }
        drop(held);
        prop_assert_eq!(budget.held(Held::Send), 0);
    }
}
