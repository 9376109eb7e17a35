//! Counts what frontends have sent and their streams have not read: HTTP/2 keeps it.
//!
//! The bytes of a connection pass through here before the HTTP/2 library gets them. Each DATA frame
//! of an open stream counts in the process's memory from its head, when the library allocates it,
//! until the stream reads it, or ends.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use culvert_transport::budget::{Held, Holder, StreamMemory};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, ReadBuf},
    time::Instant,
};

use crate::{
    filtered::{Filtered, ReadFilter},
    http2_frames::{FrameHead, Heads, Part, flag, kind},
};

/// Memory that a frame costs beside its bytes while it waits: its place in the library's queue.
const FRAME_COST: u64 = 256;
/// Length of the buffer that the library shares among short frames, in bytes.
const SHARED_LEN: u64 = 8 * 1024;

/// Memory that the library allocates for a frame of `length` bytes. Only a long frame has a buffer
/// of its own; the end of a shared one may be left over.
fn cost(length: usize) -> u64 {
    let length = length as u64;
    length.max(SHARED_LEN.min(2 * length)) + FRAME_COST
}

/// What the streams of one connection have not read.
#[derive(Debug)]
pub(super) struct Unread {
    memory: Arc<StreamMemory>,
    /// What holds the bytes of each open stream.
    streams: Mutex<HashMap<u32, Arc<Holder>>>,
    begun: Instant,
    /// When the frontend was last heard, in milliseconds after `begun`.
    heard: AtomicU64,
}

impl Unread {
    /// Nothing yet; bytes are held by this memory.
    pub(super) fn new(memory: Arc<StreamMemory>) -> Arc<Self> {
        let (streams, begun, heard) = (Mutex::default(), Instant::now(), AtomicU64::new(0));
        Arc::new(Self { memory, streams, begun, heard })
    }

    /// Begins to count a stream of which so many bytes have arrived.
    pub(super) fn open(&self, stream: u32, arrived: usize) -> Arc<Holder> {
        let holder = self.memory.holder(Held::Send);
        holder.add(arrived as u64);
        self.streams.lock().insert(stream, holder.clone());
        holder
    }

    /// Gives back what the holder of a stream counts for a frame that was read.
    pub(super) fn read(holder: &Holder, length: usize) {
        if length > 0 {
            // A frame that began before the stream was opened was not counted.
            holder.give_back(cost(length).min(holder.held()));
        }
    }

    /// Ends the count of a stream that reads no more.
    pub(super) fn close(&self, stream: u32) {
        if let Some(holder) = self.streams.lock().remove(&stream) {
            holder.give_back(holder.held());
        }
    }

    /// Time for which the frontend was silent.
    pub(super) fn silent_for(&self) -> Duration {
        self.begun.elapsed().saturating_sub(Duration::from_millis(self.heard.load(Relaxed)))
    }

    fn heard(&self) {
        let millis = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard.store(millis, Relaxed);
    }

    fn arrives(&self, stream: u32, length: usize) {
        if length > 0
            && let Some(holder) = self.streams.lock().get(&stream)
        {
            holder.add(cost(length));
            holder.relieve();
        }
    }
}

/// Has the bytes of a connection counted, from its very beginning.
pub(super) fn counted<IO>(io: IO, unread: Arc<Unread>) -> Filtered<IO, CountUnread> {
    Filtered::new(io, CountUnread { heads: Heads::of_client(), padded: None, unread })
}

/// The filter of such a connection. It changes nothing.
#[derive(Debug)]
pub(super) struct CountUnread {
    heads: Heads,
    /// A DATA frame of which only the head has come; its payload begins with the length of the
    /// padding, which the library drops.
    padded: Option<FrameHead>,
    unread: Arc<Unread>,
}

impl CountUnread {
    fn follow(&mut self, mut bytes: &[u8]) {
        while let Some(part) = self.heads.next(&mut bytes) {
            match part {
                Part::Head(head) if head.kind() != kind::DATA => self.padded = None,
                Part::Head(head) if head.has(flag::PADDED) => self.padded = Some(head),
                Part::Head(head) => self.unread.arrives(head.stream_id(), head.payload_len()),
                Part::Payload(payload) => {
                    if let Some(head) = self.padded.take() {
                        let padding = 1 + usize::from(payload[0]);
                        let length = head.payload_len().saturating_sub(padding);
                        self.unread.arrives(head.stream_id(), length);
                    }
                }
            }
        }
    }
}

impl ReadFilter for CountUnread {
    fn poll_read<IO: AsyncRead + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(io).poll_read(cx, buf))?;
        let read = &buf.filled()[before..];
        if !read.is_empty() {
            self.unread.heard();
            self.follow(read);
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use culvert_transport::budget::MemoryBudget;
    use proptest::prelude::*;

    use super::*;

    const DATA: u8 = kind::DATA;
    const HEADERS: u8 = kind::HEADERS;
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let head = FrameHead::new(kind, stream, payload.len().try_into().unwrap());
        let mut frame = [&head.bytes()[..], payload].concat();
        frame[4] = flags;
        frame
    }

    struct Counting {
        budget: Arc<MemoryBudget>,
        unread: Arc<Unread>,
        filter: CountUnread,
    }

    fn counting() -> Counting {
        let budget = MemoryBudget::new(0);
        let unread = Unread::new(StreamMemory::of(&budget));
        let mut filter = counted((), unread.clone()).into_filter();
        filter.follow(PREFACE);
        Counting { budget, unread, filter }
    }

    impl Counting {
        fn held(&self) -> u64 {
            self.budget.held(Held::Send)
        }
    }

    #[test]
    fn a_frame_counts_from_its_head_until_it_is_read() {
        let mut counting = counting();
        let holder = counting.unread.open(1, 0);
        let data = frame(DATA, 0, 1, &[7; 10_000]);
        counting.filter.follow(&frame(HEADERS, 0, 1, b"fields"));
        assert_eq!(counting.held(), 0);
        counting.filter.follow(&data[..20]);
        assert_eq!(counting.held(), 10_000 + FRAME_COST);
        counting.filter.follow(&data[20..]);
        counting.filter.follow(&frame(DATA, 0, 1, b""));
        counting.filter.follow(&frame(DATA, 0, 3, b"another stream"));
        assert_eq!(counting.held(), 10_000 + FRAME_COST);
        counting.filter.follow(&frame(DATA, 0, 1, b"short"));
        assert_eq!(counting.held(), 10_000 + 2 * 5 + 2 * FRAME_COST);
        Unread::read(&holder, 10_000);
        Unread::read(&holder, 0);
        assert_eq!(counting.held(), 2 * 5 + FRAME_COST);
    }

    #[test]
    fn what_came_before_the_stream_was_opened_is_counted_once() {
        let counting = counting();
        let holder = counting.unread.open(1, 300);
        assert_eq!(counting.held(), 300);
        Unread::read(&holder, 300);
        Unread::read(&holder, 20);
        assert_eq!(counting.held(), 0);
    }

    #[test]
    fn a_stream_that_ends_gives_back_what_it_has_not_read() {
        let mut counting = counting();
        drop(counting.unread.open(1, 0));
        counting.filter.follow(&frame(DATA, 0, 1, b"unread"));
        counting.unread.close(1);
        assert_eq!(counting.held(), 0);
        counting.filter.follow(&frame(DATA, 0, 1, b"late"));
        assert_eq!(counting.held(), 0);
    }

    proptest! {
        /// Padding is not counted, however the bytes are cut.
        #[test]
        fn the_bytes_of_data_are_counted_wherever_they_are_cut(
            frames in prop::collection::vec((0_usize..300, prop::option::of(0_u8..40)), 0..10),
            cut in 1_usize..50,
        ) {
            let mut counting = counting();
            let holder = counting.unread.open(1, 0);
            let (mut bytes, mut expected) = (Vec::new(), 0);
            for (length, padding) in &frames {
                expected += if *length > 0 { cost(*length) } else { 0 };
                let data = vec![7; *length];
                bytes.extend(match *padding {
                    None => frame(DATA, 0, 1, &data),
                    Some(padding) => {
                        let after = vec![0; padding.into()];
                        frame(DATA, flag::PADDED, 1, &[&[padding], &data[..], &after].concat())
                    }
                });
            }
            bytes.chunks(cut).for_each(|piece| counting.filter.follow(piece));
            prop_assert_eq!(counting.held(), expected);
            frames.iter().for_each(|(length, _)| Unread::read(&holder, *length));
            prop_assert_eq!(counting.held(), 0);
        }
    }
}
