//! The frames of a decrypted packet (RFC 9000 §19), as far as they are of interest.

/// RETIRE_CONNECTION_ID.
const RETIRE: u64 = 0x19;

/// A frame of a received packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::quic) enum Frame<'a> {
    /// Bytes of a stream from this position on.
    Stream { id: u64, offset: u64, bytes: &'a [u8] },
    /// A datagram (RFC 9221).
    Datagram { bytes: &'a [u8] },
    /// Bytes of TLS.
    Crypto,
    /// A run of PADDING.
    Padding,
    /// Retires a connection id that the receiver has given.
    Retirement,
    /// Another one.
    Other,
    /// What cannot be parsed, to the end of the packet, with the number of retirements that it could
    /// be at most. quinn closes the connection for it, unless it can parse it.
    Unknown { retirements: usize },
}

impl Frame<'_> {
    /// Whether quinn keeps bytes of the packet for such a frame, whose length it counts as held.
    pub(super) fn has_data(self) -> bool {
        matches!(self, Self::Stream { .. } | Self::Crypto | Self::Datagram { .. })
    }
}

/// The frames of a packet, in order.
#[derive(Clone, Debug)]
pub(in crate::quic) struct Frames<'a>(&'a [u8]);

impl<'a> Frames<'a> {
    pub(in crate::quic) fn of(payload: &'a [u8]) -> Self {
        Self(payload)
    }

    /// Number of bytes behind the frame that came last.
    pub(in crate::quic) fn left(&self) -> usize {
        self.0.len()
    }

    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// A variable-length integer (RFC 9000 §16).
    fn int(&mut self) -> Option<u64> {
        let first = self.byte()?;
        (1..1 << (first >> 6)).try_fold(u64::from(first & 0x3f), |value, _| {
            Some(value << 8 | u64::from(self.byte()?))
        })
    }

    fn ints(&mut self, count: u64) -> Option<Frame<'a>> {
        (0..count).try_for_each(|_| self.int().map(drop)).map(|()| Frame::Other)
    }

    fn bytes(&mut self, count: u64) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(usize::try_from(count).ok()?)?;
        self.0 = rest;
        Some(bytes)
    }

    fn skip(&mut self, count: u64) -> Option<Frame<'a>> {
        self.bytes(count).map(|_| Frame::Other)
    }

    /// Skips what has its length before it.
    fn skip_counted(&mut self) -> Option<Frame<'a>> {
        let length = self.int()?;
        self.skip(length)
    }

    /// A datagram of so many bytes.
    fn datagram(&mut self, length: u64) -> Option<Frame<'a>> {
        self.bytes(length).map(|bytes| Frame::Datagram { bytes })
    }

    fn frame(&mut self) -> Option<Frame<'a>> {
        match self.int()? {
            0x00 => self.padding(),
            // PING, HANDSHAKE_DONE, IMMEDIATE_ACK
            0x01 | 0x1e | 0x1f => Some(Frame::Other),
            kind @ 0x02..=0x03 => self.ack(kind == 0x03),
            // RESET_STREAM, STOP_SENDING, MAX_STREAM_DATA, STREAM_DATA_BLOCKED
            0x04 => self.ints(3),
            0x05 | 0x11 | 0x15 => self.ints(2),
            // MAX_DATA, MAX_STREAMS, DATA_BLOCKED, STREAMS_BLOCKED
            0x10 | 0x12..=0x14 | 0x16 | 0x17 => self.ints(1),
            // CRYPTO
            0x06 => self.ints(1).and_then(|_| self.skip_counted()).map(|_| Frame::Crypto),
            // NEW_TOKEN
            0x07 => self.skip_counted(),
            kind @ 0x08..=0x0f => self.stream(kind),
            // NEW_CONNECTION_ID, with a token
            0x18 => {
                self.ints(2)?;
                let length = self.byte()?;
                self.skip(u64::from(length) + 16)
            }
            RETIRE => self.ints(1).map(|_| Frame::Retirement),
            // PATH_CHALLENGE, PATH_RESPONSE
            0x1a | 0x1b => self.skip(8),
            // CONNECTION_CLOSE
            0x1c => self.ints(2).and_then(|_| self.skip_counted()),
            0x1d => self.ints(1).and_then(|_| self.skip_counted()),
            // DATAGRAM
            0x30 => self.datagram(self.0.len() as u64),
            0x31 => {
                let length = self.int()?;
                self.datagram(length)
            }
            // ACK_FREQUENCY
            0xaf => self.ints(4),
            _ => None,
        }
    }

    /// A run of PADDING as one frame: a probe of the path's MTU is tens of thousands of them.
    fn padding(&mut self) -> Option<Frame<'a>> {
        let length = self.0.iter().position(|byte| *byte != 0).unwrap_or(self.0.len());
        self.skip(length as u64).map(|_| Frame::Padding)
    }

    fn ack(&mut self, has_counts: bool) -> Option<Frame<'a>> {
        self.ints(2)?;
        let ranges = self.int()?;
        // More than there are bytes end at the end of the packet.
        self.ints(ranges.checked_mul(2)?.checked_add(1)?)?;
        self.ints(if has_counts { 3 } else { 0 })
    }

    fn stream(&mut self, kind: u64) -> Option<Frame<'a>> {
        let id = self.int()?;
        let offset = if kind & 4 == 0 { 0 } else { self.int()? };
        let length = if kind & 2 == 0 { self.0.len() as u64 } else { self.int()? };
        self.bytes(length).map(|bytes| Frame::Stream { id, offset, bytes })
    }
}

impl<'a> Iterator for Frames<'a> {
    type Item = Frame<'a>;

    fn next(&mut self) -> Option<Frame<'a>> {
        if self.0.is_empty() {
            return None;
        }
        let all = self.0;
        Some(self.frame().unwrap_or_else(|| {
            self.0 = &[];
            // Each encoding of the frame's type ends with this byte.
            let retirements = all.iter().filter(|byte| u64::from(**byte) == RETIRE).count();
            Frame::Unknown { retirements }
        }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames(payload: &[u8]) -> Vec<Frame<'_>> {
        Frames::of(payload).collect()
    }

    #[test]
    fn each_kind_of_frame_ends_where_the_next_begins() {
        let kinds: &[&[u8]] = &[
            &[0x01],
            &[0x02, 9, 0, 1, 3, 0, 2],
            &[0x03, 9, 0, 0, 3, 1, 2, 3],
            &[0x04, 1, 2, 3],
            &[0x05, 1, 2],
            &[0x07, 1, 0x19],
            &[0x10, 0x40, 0x19],
            &[0x11, 1, 2],
            &[0x12, 1],
            &[0x13, 1],
            &[0x14, 1],
            &[0x15, 1, 2],
            &[0x16, 1],
            &[0x17, 1],
            &[&[0x18, 1, 0, 4][..], &[0x19; 20]].concat(),
            &[0x1a, 1, 2, 3, 4, 5, 6, 7, 8],
            &[0x1b, 1, 2, 3, 4, 5, 6, 7, 8],
            &[0x1c, 1, 2, 1, 0x19],
            &[0x1d, 1, 1, 0x19],
            &[0x1e],
            &[0x1f],
            &[0x40, 0xaf, 1, 2, 3, 4],
        ];
        for kind in kinds {
            let payload = [kind, &[0x19, 0][..]].concat();
            assert_eq!(frames(&payload), [Frame::Other, Frame::Retirement], "{kind:x?}");
        }
        let datagram = Frame::Datagram { bytes: &[0x19, 0x19] };
        assert_eq!(frames(&[0x30, 0x19, 0x19]), [datagram]);
        assert_eq!(frames(&[0x31, 2, 0x19, 0x19, 1]), [datagram, Frame::Other]);
        assert_eq!(frames(&[0x06, 0, 2, 0x19, 0x19, 1]), [Frame::Crypto, Frame::Other]);
    }

    #[test]
    fn a_run_of_padding_is_one_frame() {
        let payload = [&[0; 60_000][..], &[0x19, 7], &[0; 9]].concat();
        assert_eq!(frames(&payload), [Frame::Padding, Frame::Retirement, Frame::Padding]);
    }

    #[test]
    fn bytes_of_a_stream_have_a_position_and_a_length_or_reach_to_the_end() {
        let to_the_end = Frame::Stream { id: 4, offset: 0, bytes: &[0x19, 1, 2] };
        assert_eq!(frames(&[0x08, 4, 0x19, 1, 2]), [to_the_end]);
        let counted = Frame::Stream { id: 5, offset: 0x100, bytes: &[0x19, 1] };
        assert_eq!(frames(&[0x0f, 5, 0x41, 0, 2, 0x19, 1, 0x01]), [counted, Frame::Other]);
    }

    #[test]
    fn a_retirement_is_found_in_each_encoding_and_behind_what_is_unknown() {
        for payload in [&[0x19, 0][..], &[0x40, 0x19, 0], &[0xc0, 0, 0, 0, 0, 0, 0, 0x19, 0]] {
            assert_eq!(frames(payload), [Frame::Retirement]);
        }
        assert_eq!(frames(&[0x3f, 0x19, 0, 0x19, 0]), [Frame::Unknown { retirements: 2 }]);
        assert_eq!(frames(&[0x19]), [Frame::Unknown { retirements: 1 }]);
    }

    proptest! {
        #[test]
        fn any_bytes_end(payload: Vec<u8>) {
            prop_assert!(frames(&payload).len() <= payload.len());
        }
    }
}
