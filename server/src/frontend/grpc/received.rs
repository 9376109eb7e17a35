//! The body of a call, and the windows that its frontend is granted.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use culvert_transport::budget::Holder;
use http_body::{Body, Frame};
use tokio::sync::Notify;

use crate::http2::{Reason, RecvStream};

/// Number of bytes that a stream may be ahead of its target at first, and while memory is short. A
/// stream that is stalled from its beginning takes no more than what it costs without bytes.
pub(super) const FIRST_WINDOW: u32 = 32 * 1024;
/// The same for streams whose targets read, while memory is left. Not less: a round trip on loopback
/// takes as long as 64 KiB, and what a frontend has written and the window holds back is lost when
/// its target ends first.
const WINDOW: u32 = 512 * 1024;
/// Number of windows that a stream must have room for before it gets a larger one.
const PLENTY: u64 = 8;
/// The same, below which it gets the first window again.
const SHORT: u64 = 2;

/// The window of the streams of one connection. HTTP/2 has one for all of them; mostly there is one
/// stream.
#[derive(Debug)]
pub(super) struct StreamWindow {
    /// The window that was chosen; 0 when it is to be chosen again.
    wanted: AtomicU32,
    changed: Notify,
}

impl StreamWindow {
    /// The window of a connection that has begun.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { wanted: AtomicU32::new(FIRST_WINDOW), changed: Notify::new() })
    }

    /// The window that the streams are to have; `None` if it is to be chosen again.
    pub(super) fn wanted(&self) -> Option<u32> {
        Some(self.wanted.load(Relaxed)).filter(|wanted| *wanted > 0)
    }

    /// Records that the window could not be set.
    pub(super) fn not_set(&self) {
        self.wanted.store(0, Relaxed);
    }

    /// Completes when another window is to be set.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Chooses the window by the room of a stream whose target reads.
    fn choose(&self, room: u64) {
        let chosen = match room / u64::from(WINDOW) {
            PLENTY.. => WINDOW,
            ..SHORT => FIRST_WINDOW,
            _ => return,
        };
        if self.wanted.swap(chosen, Relaxed) != chosen {
            self.changed.notify_one();
        }
    }
}

/// What a frontend sends on one stream. Reading grants the frontend as much again.
pub(super) struct Received {
    stream: RecvStream,
    window: Arc<StreamWindow>,
    /// Number of bytes that were read.
    read: usize,
}

impl Received {
    /// The body of a stream that was accepted.
    pub(super) fn new(stream: RecvStream, window: Arc<StreamWindow>) -> Self {
        Self { stream, window, read: 0 }
    }

    /// What holds the bytes that were not read.
    pub(super) fn holder(&self) -> &Arc<Holder> {
        self.stream.holder()
    }
}

impl Body for Received {
    type Data = Bytes;
    type Error = Reason;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Reason>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.stream).poll_frame(cx));
        if let Some(Ok(frame)) = &frame {
            this.read = this.read.saturating_add(frame.data_ref().map_or(0, Bytes::len));
            // What streams have read and peers have not acknowledged is at most half of the limit. So
            // are the windows of those that have read one.
            if this.read >= WINDOW as usize {
                this.window.choose(this.holder().room());
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }
}

impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Received").field("stream", &self.stream).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{pin::pin, task::Waker};

    use super::*;

    #[test]
    fn the_window_follows_the_room_and_is_set_only_when_it_changes() {
        let window = StreamWindow::new();
        let chosen = |room: u64| {
            window.choose(room);
            let changed = pin!(window.changed()).poll(&mut Context::from_waker(Waker::noop()));
            changed.is_ready().then(|| window.wanted()).flatten()
        };
        let windows = u64::from(WINDOW);
        assert_eq!(chosen(SHORT * windows - 1), None);
        assert_eq!(chosen(PLENTY * windows - 1), None);
        assert_eq!(chosen(PLENTY * windows), Some(WINDOW));
        assert_eq!(chosen(PLENTY * windows), None);
        assert_eq!(chosen(SHORT * windows), None);
        assert_eq!(chosen(SHORT * windows - 1), Some(FIRST_WINDOW));
        window.not_set();
        assert_eq!(window.wanted(), None);
        window.choose(0);
        assert_eq!(window.wanted(), Some(FIRST_WINDOW));
    }
}
