//! The lines between the threads that log and the one that writes: bounded, so that no sink,
//! however slow, delays the process or takes its memory.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

/// Maximum size of the lines that wait, in bytes: the burst of some ten thousand lines.
const MAX_BYTES: usize = 4 << 20;
/// Memory of a waiting line besides its text, in bytes.
const LINE_OVERHEAD: usize = 64;

/// Lines that wait for the writer.
#[derive(Debug)]
pub(super) struct Queue {
    max_bytes: usize,
    state: Mutex<State>,
    /// Signals the writer.
    filled: Condvar,
    /// Signals those that wait for [`Queue::flush`].
    drained: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug)]
struct State {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Whether the writer has a line that it has not written yet.
    writing: bool,
    woken: bool,
}

impl Queue {
    pub(super) const fn new() -> Self {
        Self::with_limit(MAX_BYTES)
    }

    const fn with_limit(max_bytes: usize) -> Self {
        Self {
            max_bytes,
            state: Mutex::new(State {
                lines: VecDeque::new(),
                bytes: 0,
                writing: false,
                woken: false,
            }),
            filled: Condvar::new(),
            drained: Condvar::new(),
            dropped: AtomicU64::new(0),
        }
    }

    /// Adds a line, or counts it as dropped where there is no room. Never waits for the writer.
    pub(super) fn push(&self, line: Vec<u8>) {
        let size = line.len() + LINE_OVERHEAD;
        let mut state = self.state.lock();
        if state.bytes + size > self.max_bytes {
            drop(state);
            return self.count_dropped();
        }
        state.bytes += size;
        state.lines.push_back(line);
        drop(state);
        self.filled.notify_one();
    }

    /// Counts a line that is lost.
    pub(super) fn count_dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// Number of lines that were lost since the start.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// The next line, for the writer alone. `None` after `limit`, or after [`Self::wake`].
    pub(super) fn next(&self, limit: Option<Duration>) -> Option<Vec<u8>> {
        let end = limit.map(|limit| Instant::now() + limit);
        let mut state = self.state.lock();
        state.writing = false;
        loop {
            if let Some(line) = state.lines.pop_front() {
                state.bytes -= line.len() + LINE_OVERHEAD;
                state.writing = true;
                return Some(line);
            }
            self.drained.notify_all();
            if std::mem::take(&mut state.woken) {
                return None;
            }
            match end {
                None => self.filled.wait(&mut state),
                Some(end) if self.filled.wait_until(&mut state, end).timed_out() => return None,
                Some(_) => {}
            }
        }
    }

    /// Ends the writer's wait.
    pub(super) fn wake(&self) {
        self.state.lock().woken = true;
        self.filled.notify_one();
    }

    /// Waits until all lines are written, at most `limit`. Blocks the thread.
    pub(super) fn flush(&self, limit: Duration) {
        let end = Instant::now() + limit;
        let mut state = self.state.lock();
        while state.writing || !state.lines.is_empty() {
            if self.drained.wait_until(&mut state, end).timed_out() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn line(text: &str) -> Vec<u8> {
        text.as_bytes().to_vec()
    }

    #[test]
    fn lines_come_in_order_and_those_without_room_are_counted() {
        let queue = Queue::with_limit(2 * (LINE_OVERHEAD + 1));
        for text in ["a", "b", "c"] {
            queue.push(line(text));
        }
        assert_eq!(queue.dropped(), 1);
        assert_eq!(queue.next(None), Some(line("a")));
        queue.push(line("d"));
        queue.push(line("e"));
        assert_eq!(queue.dropped(), 2);
        assert_eq!(queue.next(None), Some(line("b")));
        assert_eq!(queue.next(None), Some(line("d")));
        assert_eq!(queue.next(Some(Duration::ZERO)), None);
    }

    #[test]
    fn a_flush_waits_for_the_line_that_is_being_written() {
        let queue = Arc::new(Queue::new());
        queue.push(line("a"));
        assert!(queue.next(None).is_some());
        let begun = Instant::now();
        queue.flush(Duration::from_millis(20));
        assert!(begun.elapsed() >= Duration::from_millis(20), "the line is not written yet");
        let writer = std::thread::spawn({
            let queue = queue.clone();
            move || queue.next(None)
        });
        queue.flush(Duration::from_secs(600)); // ends when the writer asks for the next line
        queue.wake();
        assert_eq!(writer.join().unwrap(), None);
    }
}
