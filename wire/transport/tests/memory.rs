//! What streams leave behind in memory once they have ended.
//!
//! A binary of its own, with one test: what a process has allocated is counted.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(unsafe_code)] // A counting allocator is the only witness of what quinn keeps.

mod carriers;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicIsize, Ordering::Relaxed},
    time::Duration,
};

use bytes::Bytes;
use culvert_transport::{Carrier, Settings};
use culvert_wire::{CloseCode, StreamCode};
use tokio::time::{sleep, timeout};

use carriers::{Pair, within};

/// Number of bytes that are allocated.
static ALLOCATED: AtomicIsize = AtomicIsize::new(0);

/// The system's allocator, counting what the process has allocated.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator unchanged, and counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size() as isize, Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size() as isize, Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// The peer fills the window of each stream, which is then stopped. The peer does not reset it.
#[tokio::test]
async fn a_stream_that_was_stopped_leaves_little_behind() {
    const STREAMS: usize = 50;
    const WINDOW: usize = 512 * 1024;
    /// Number of bytes that are left of each at most. quinn's list of a full window's pieces has
    /// 28 KiB with such packets.
    const LEFT: isize = 4 * 1024;
    let settings =
        Settings { mtu_cap: 1452, stream_receive_window: WINDOW as u32, ..Settings::default() };
    within(async {
        let pair = Pair::with(Carrier::Quic, &settings).await;
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            let (mut send, unused) = pair.server.open().await.unwrap();
            send.write_chunk(Bytes::from_static(b"first")).await.unwrap();
            streams.push(((send, unused), pair.agent.accept().await.unwrap()));
        }
        let before = ALLOCATED.load(Relaxed);
        let chunk = Bytes::from(vec![7; WINDOW - 5]);
        for ((send, _), _) in &mut streams {
            send.write_chunk(chunk.clone()).await.unwrap();
        }
        let all = (STREAMS * WINDOW) as u64;
        while pair.agent.stats().received_bytes < all {
            sleep(Duration::from_millis(10)).await;
        }
        drop(chunk);
        let full = ALLOCATED.load(Relaxed) - before;
        assert!(full > all as isize, "{full} bytes of {all}");
        for (_, (_, recv)) in &mut streams {
            recv.stop(StreamCode::CLOSED);
        }
        let left = || (ALLOCATED.load(Relaxed) - before) / STREAMS as isize;
        let gone = async {
            while left() > LEFT {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let is_gone = timeout(Duration::from_secs(5), gone).await.is_ok();
        println!("{} bytes are left of a stream", left());
        assert!(is_gone, "{} bytes are left of a stream", left());
        pair.server.close(CloseCode::DONE, "");
        drop(streams);
    })
    .await;
}
