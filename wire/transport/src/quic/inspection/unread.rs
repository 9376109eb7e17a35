//! How much of the streams of a connection has arrived and was not read.

use std::collections::{HashMap, hash_map::Entry};

use quinn::Side;

/// Bits of a stream's id: the side that opened it, and its kind (RFC 9000 §2.1).
const OPENED_BY_SERVER: u64 = 1;
const ONE_WAY: u64 = 2;

/// The streams that are open, by id.
#[derive(Debug)]
pub(super) struct Streams {
    by_id: HashMap<u64, Stream>,
    side: Side,
    /// Maximum number of bytes ahead of a stream's reader. quinn closes a connection that has more.
    window: u64,
    /// Id of the stream of the peer that is accepted next.
    next: u64,
    /// Number of bytes that have arrived and were not read.
    bytes: u64,
}

#[derive(Debug, Default)]
struct Stream {
    received: u64,
    read: u64,
}

impl Streams {
    pub(super) fn new(side: Side, window: u32) -> Self {
        let next = if side.is_client() { OPENED_BY_SERVER } else { 0 };
        Self { by_id: HashMap::new(), side, window: window.into(), next, bytes: 0 }
    }

    /// Number of bytes that have arrived and were not read.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Number of bytes of a stream that have arrived and were not read.
    pub(super) fn unread_of(&self, id: u64) -> u64 {
        self.by_id.get(&id).map_or(0, Stream::unread)
    }

    /// A stream that was opened or accepted.
    pub(super) fn begin(&mut self, id: u64) {
        self.by_id.entry(id).or_default();
        if self.is_of_peer(id) {
            self.next = id + 4;
        }
    }

    /// The end of bytes that have arrived; how many of them are new.
    pub(super) fn receive(&mut self, id: u64, end: u64) -> u64 {
        let may_begin = self.is_of_peer(id) && id & ONE_WAY == 0 && id >= self.next;
        let stream = match self.by_id.entry(id) {
            Entry::Occupied(stream) => stream.into_mut(),
            Entry::Vacant(stream) if may_begin => stream.insert(Stream::default()),
            // It has ended, or quinn closes the connection.
            Entry::Vacant(_) => return 0,
        };
        let received = end.min(stream.read + self.window).max(stream.received);
        let new = received - std::mem::replace(&mut stream.received, received);
        self.bytes += new;
        new
    }

    /// Bytes of a stream that were read; how many of them count no more.
    pub(super) fn read(&mut self, id: u64, count: u64) -> u64 {
        let Some(stream) = self.by_id.get_mut(&id) else { return 0 };
        let before = stream.unread();
        stream.read += count;
        let gone = before.saturating_sub(stream.unread());
        self.bytes -= gone;
        gone
    }

    /// A stream that has ended; how many bytes of it were not read.
    pub(super) fn end(&mut self, id: u64) -> u64 {
        let unread = self.by_id.remove(&id).map_or(0, |stream| stream.unread());
        self.bytes -= unread;
        unread
    }

    fn is_of_peer(&self, id: u64) -> bool {
        (id & OPENED_BY_SERVER != 0) == self.side.is_client()
    }
}

impl Stream {
    fn unread(&self) -> u64 {
        self.received.saturating_sub(self.read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: u64 = 1000;

    fn server() -> Streams {
        Streams::new(Side::Server, 1000)
    }

    #[test]
    fn bytes_count_once_until_they_are_read() {
        let mut streams = server();
        streams.begin(1);
        assert_eq!(streams.receive(1, 300), 300);
        assert_eq!(streams.receive(1, 300), 0, "it is a repetition");
        assert_eq!(streams.receive(1, 200), 0, "it fills a gap");
        assert_eq!(streams.receive(1, 400), 100);
        assert_eq!((streams.read(1, 150), streams.bytes()), (150, 250));
        assert_eq!((streams.end(1), streams.bytes()), (250, 0));
        assert_eq!(streams.receive(1, 500), 0, "the stream has ended");
        assert_eq!((streams.read(1, 1), streams.end(1)), (0, 0));
    }

    #[test]
    fn a_stream_of_the_peer_counts_before_it_is_accepted_and_not_after_its_end() {
        let mut streams = server();
        assert_eq!(streams.receive(4, 10), 10);
        assert_eq!(streams.receive(0, 20), 20);
        streams.begin(0);
        assert_eq!(streams.end(0), 20);
        assert_eq!(streams.receive(0, 30), 0);
        streams.begin(4);
        assert_eq!((streams.end(4), streams.bytes()), (10, 0));
        for unknown in [1, 2, 3, 6] {
            assert_eq!(streams.receive(unknown, 30), 0, "{unknown}");
        }
        let mut client = Streams::new(Side::Client, 1000);
        assert_eq!((client.receive(1, 10), client.receive(0, 10)), (10, 0));
    }

    #[test]
    fn a_stream_counts_at_most_its_window() {
        let mut streams = server();
        streams.begin(1);
        assert_eq!(streams.receive(1, 1 << 60), WINDOW);
        assert_eq!(streams.read(1, 400), 400);
        assert_eq!(streams.receive(1, 1 << 61), 400);
        assert_eq!(streams.bytes(), WINDOW);
    }
}
