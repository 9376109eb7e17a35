//! The frames of an HTTP/2 connection: their heads, found in its bytes.
//!
//! Pure: [`Heads`] follows one direction, however its bytes are cut, and changes none of them.

/// Length of the client's connection preface, in bytes (RFC 9113 §3.4).
const PREFACE_LEN: usize = 24;
/// Length of a frame's head, in bytes (RFC 9113 §4.1).
pub(crate) const HEAD_LEN: usize = 9;

/// Types of frames (RFC 9113 §6).
pub(crate) mod kind {
    pub(crate) const DATA: u8 = 0x0;
    pub(crate) const HEADERS: u8 = 0x1;
    pub(crate) const PRIORITY: u8 = 0x2;
    pub(crate) const RST_STREAM: u8 = 0x3;
    pub(crate) const SETTINGS: u8 = 0x4;
    pub(crate) const PUSH_PROMISE: u8 = 0x5;
    pub(crate) const PING: u8 = 0x6;
    pub(crate) const GOAWAY: u8 = 0x7;
    pub(crate) const WINDOW_UPDATE: u8 = 0x8;
    pub(crate) const CONTINUATION: u8 = 0x9;
}

/// Flags of frames (RFC 9113 §6).
pub(crate) mod flag {
    /// Of PING and SETTINGS: it answers one.
    pub(crate) const ACK: u8 = 0x1;
    /// Of DATA and HEADERS: the stream's last frame.
    pub(crate) const END_STREAM: u8 = 0x1;
    /// Of HEADERS, PUSH_PROMISE and CONTINUATION: no more of the fields follow.
    pub(crate) const END_HEADERS: u8 = 0x4;
    /// Of DATA and HEADERS: it begins with the length of the padding at its end.
    pub(crate) const PADDED: u8 = 0x8;
    /// Of HEADERS: it begins with the stream's priority, behind the padding's length.
    pub(crate) const PRIORITY: u8 = 0x20;
}

/// A frame's head, as it crosses the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameHead([u8; HEAD_LEN]);

impl FrameHead {
    /// A head without flags, for a payload of less than 64 KiB.
    pub(crate) fn new(kind: u8, stream_id: u32, payload_len: u16) -> Self {
        let [high, low] = payload_len.to_be_bytes();
        let [a, b, c, d] = stream_id.to_be_bytes();
        Self([0, high, low, kind, 0, a, b, c, d])
    }

    /// A head from its bytes.
    pub(crate) fn from_bytes(bytes: [u8; HEAD_LEN]) -> Self {
        Self(bytes)
    }

    /// The same head with these flags as well.
    pub(crate) fn with_flags(mut self, flags: u8) -> Self {
        self.0[4] |= flags;
        self
    }

    /// The encoded head.
    pub(crate) fn bytes(&self) -> &[u8; HEAD_LEN] {
        &self.0
    }

    /// Length of the frame's payload, in bytes.
    pub(crate) fn payload_len(self) -> usize {
        usize::from(self.0[0]) << 16 | usize::from(self.0[1]) << 8 | usize::from(self.0[2])
    }

    /// The frame's type.
    pub(crate) fn kind(self) -> u8 {
        self.0[3]
    }

    /// Whether a flag is set.
    pub(crate) fn has(self, flag: u8) -> bool {
        self.0[4] & flag != 0
    }

    /// The frame's stream, without the reserved bit; 0 is the connection.
    pub(crate) fn stream_id(self) -> u32 {
        let [.., a, b, c, d] = self.0;
        u32::from_be_bytes([a, b, c, d]) & 0x7fff_ffff
    }
}

/// A part of a connection's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part<'a> {
    /// A whole head.
    Head(FrameHead),
    /// Part of a frame's payload, or of the preface.
    Payload(&'a [u8]),
}

/// Follows the frames of one direction.
#[derive(Debug)]
pub(crate) struct Heads {
    head: [u8; HEAD_LEN],
    next: Next,
    /// Fields are incomplete; only CONTINUATION frames may follow (RFC 9113 §6.10).
    fields_open: bool,
}

#[derive(Debug)]
enum Next {
    /// A head, of which so many bytes have come.
    Head(usize),
    /// The rest of a payload or of the preface, in bytes; never 0.
    Payload(usize),
}

impl Heads {
    /// Follows what a client sends, from its beginning.
    pub(crate) fn of_client() -> Self {
        Self { head: [0; HEAD_LEN], next: Next::Payload(PREFACE_LEN), fields_open: false }
    }

    /// Follows what a server sends, from its beginning.
    pub(crate) fn of_server() -> Self {
        Self { next: Next::Head(0), ..Self::of_client() }
    }

    /// Takes the next part off `bytes`; `None` when none are left, possibly within a head.
    pub(crate) fn next<'a>(&mut self, bytes: &mut &'a [u8]) -> Option<Part<'a>> {
        if bytes.is_empty() {
            return None;
        }
        match self.next {
            Next::Payload(left) => {
                let (part, rest) = bytes.split_at(bytes.len().min(left));
                *bytes = rest;
                self.next = Self::behind(left - part.len());
                Some(Part::Payload(part))
            }
            Next::Head(seen) => {
                let (part, rest) = bytes.split_at(bytes.len().min(HEAD_LEN - seen));
                *bytes = rest;
                let seen_now = seen + part.len();
                self.head[seen..seen_now].copy_from_slice(part);
                if seen_now < HEAD_LEN {
                    self.next = Next::Head(seen_now);
                    return None;
                }
                let head = FrameHead(self.head);
                self.next = Self::behind(head.payload_len());
                if matches!(head.kind(), kind::HEADERS | kind::PUSH_PROMISE | kind::CONTINUATION) {
                    self.fields_open = !head.has(flag::END_HEADERS);
                }
                Some(Part::Head(head))
            }
        }
    }

    fn behind(payload_left: usize) -> Next {
        match payload_left {
            0 => Next::Head(0),
            left => Next::Payload(left),
        }
    }

    /// Number of bytes to write before another frame may be inserted, as far as it is known: the
    /// rest of a frame, or of a head whose frame is still to come. 0 where one may be inserted.
    pub(crate) fn under_way(&self) -> usize {
        match self.next {
            Next::Head(0) if !self.fields_open => 0,
            Next::Head(seen) => HEAD_LEN - seen,
            Next::Payload(left) => left,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, stream_id: u32, payload: &[u8]) -> Vec<u8> {
        let head = FrameHead::new(kind, stream_id, u16::try_from(payload.len()).unwrap());
        let mut frame = [&head.bytes()[..], payload].concat();
        frame[4] = flags;
        frame
    }

    fn heads(heads: &mut Heads, mut bytes: &[u8]) -> Vec<FrameHead> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            if let Some(Part::Head(head)) = heads.next(&mut bytes) {
                found.push(head);
            }
        }
        found
    }

    fn of_client() -> Vec<u8> {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        let frames = [
            frame(0x4, 0, 0, &[0; 12]),
            frame(kind::HEADERS, 0, 1, b"fields"),
            frame(kind::CONTINUATION, flag::END_HEADERS, 1, b""),
            frame(kind::PING, flag::ACK, 0, &[6; 8]),
            frame(kind::DATA, 0, 1, &[kind::PING; 300]),
        ];
        [preface, frames.concat()].concat()
    }

    #[test]
    fn a_head_is_parsed_and_encoded() {
        let head = FrameHead([0x01, 0x02, 0x03, 0x06, 0x05, 0x80, 0, 0x01, 0x03]);
        assert_eq!((head.payload_len(), head.kind(), head.stream_id()), (0x1_0203, 6, 0x103));
        assert!(head.has(flag::ACK) && head.has(flag::END_HEADERS) && !head.has(0x8));
        let head = FrameHead::new(kind::GOAWAY, 7, 300);
        assert_eq!(head.bytes(), &[0, 1, 44, 7, 0, 0, 0, 0, 7]);
    }

    #[test]
    fn heads_are_found_wherever_the_bytes_are_cut() {
        let bytes = of_client();
        let whole = heads(&mut Heads::of_client(), &bytes);
        assert_eq!(whole.iter().map(|head| head.kind()).collect::<Vec<_>>(), [4, 1, 9, 6, 0]);
        for cut in 0..=bytes.len() {
            let (before, after) = bytes.split_at(cut);
            let mut follower = Heads::of_client();
            let found = [heads(&mut follower, before), heads(&mut follower, after)].concat();
            assert_eq!(found, whole, "cut at {cut}");
        }
        let mut follower = Heads::of_client();
        let found: Vec<_> = bytes.iter().flat_map(|byte| heads(&mut follower, &[*byte])).collect();
        assert_eq!(found, whole, "byte by byte");
    }

    #[test]
    fn a_frame_may_be_inserted_between_frames_but_not_between_fields() {
        let frames = [
            frame(kind::DATA, 0, 1, &[0; 3]),
            frame(kind::HEADERS, 0, 1, b"f"),
            frame(kind::CONTINUATION, flag::END_HEADERS, 1, b"f"),
            frame(kind::HEADERS, flag::END_HEADERS, 3, b""),
        ];
        let mut follower = Heads::of_server();
        assert_eq!(follower.under_way(), 0);
        let mut under_way = Vec::new();
        for byte in frames.concat() {
            heads(&mut follower, &[byte]);
            under_way.push(follower.under_way());
        }
        let head = [8, 7, 6, 5, 4, 3, 2, 1];
        let expected =
            [&head[..], &[3, 2, 1, 0], &head, &[1, 9], &head, &[1, 0], &head, &[0]].concat();
        assert_eq!(under_way, expected);
    }

    proptest! {
        #[test]
        fn every_byte_is_in_one_part(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let mut follower = Heads::of_server();
            let (mut rest, mut seen) = (&bytes[..], Vec::new());
            while let Some(part) = follower.next(&mut rest) {
                match part {
                    Part::Head(head) => seen.extend_from_slice(head.bytes()),
                    Part::Payload(payload) => seen.extend_from_slice(payload),
                }
            }
            prop_assert!(rest.is_empty());
            prop_assert!(bytes.starts_with(&seen) && bytes.len() - seen.len() < HEAD_LEN);
        }
    }
}
