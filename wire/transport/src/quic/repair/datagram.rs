//! What datagrams carry: second copies of a stream's bytes, and repair shards of a burst.
//= docs/protocol.md#10-hedging-and-repair

use bytes::{BufMut, Bytes, BytesMut};

use super::code::{Division, Malformed};

/// First byte of a datagram with a copy of a stream's bytes.
const COPY: u8 = 0x20;
/// First byte of a datagram with repair shards.
const SHARDS: u8 = 0x21;
/// First byte of a datagram with a copy of a stream's last bytes, or of its end alone.
const LAST: u8 = 0x22;

/// Number of bytes before those of a copy: kind, stream, offset.
pub(super) const COPY_HEAD: usize = 1 + 8 + 8;
/// Number of bytes before repair shards: kind, stream, offset, length, size, count, index.
pub(super) const SHARDS_HEAD: usize = 1 + 8 + 8 + 2 + 1 + 2 + 2;
/// The unit of a shard's size, in bytes.
const SIZE_UNIT: usize = 64;
/// Bound of stream ids and offsets (RFC 9000 §16).
const MAX_INT: u64 = 1 << 62;

/// Bytes of a stream that are sent a second time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Copy<'a> {
    pub(super) stream: u64,
    /// Position of the first byte in the stream.
    pub(super) offset: u64,
    pub(super) bytes: &'a [u8],
    /// Whether the stream ends after them.
    pub(super) is_last: bool,
}

/// Some of the repair shards of a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shards<'a> {
    pub(super) stream: u64,
    /// Position of the burst's first byte in the stream.
    pub(super) offset: u64,
    pub(super) division: Division,
    /// Number of the first shard among the burst's repair shards.
    pub(super) first: usize,
    /// The shards, one after another.
    pub(super) bytes: &'a [u8],
}

/// A datagram that was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Datagram<'a> {
    Copy(Copy<'a>),
    Shards(Shards<'a>),
    /// Of a later revision, or of bytes that no stream can have.
    Other,
}

impl Copy<'_> {
    pub(super) fn encode(&self) -> Bytes {
        let mut datagram = BytesMut::with_capacity(COPY_HEAD + self.bytes.len());
        datagram.put_u8(if self.is_last { LAST } else { COPY });
        datagram.put_u64(self.stream);
        datagram.put_u64(self.offset);
        datagram.put_slice(self.bytes);
        datagram.freeze()
    }
}

impl Shards<'_> {
    pub(super) fn encode(&self) -> Bytes {
        let Division { length, size, count } = self.division;
        let mut datagram = BytesMut::with_capacity(SHARDS_HEAD + self.bytes.len());
        datagram.put_u8(SHARDS);
        datagram.put_u64(self.stream);
        datagram.put_u64(self.offset);
        // A division has no more than these fields hold.
        datagram.put_u16(u16::try_from(length - 1).unwrap_or(u16::MAX));
        datagram.put_u8(u8::try_from(size / SIZE_UNIT).unwrap_or(u8::MAX));
        datagram.put_u16(u16::try_from(count).unwrap_or(u16::MAX));
        datagram.put_u16(u16::try_from(self.first).unwrap_or(u16::MAX));
        datagram.put_slice(self.bytes);
        datagram.freeze()
    }
}

impl<'a> Datagram<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut head = Head(bytes);
        let kind = u8::from_be_bytes(head.take()?);
        if !(COPY..=LAST).contains(&kind) {
            return Ok(Self::Other);
        }
        let stream = u64::from_be_bytes(head.take()?);
        let offset = u64::from_be_bytes(head.take()?);
        if kind != SHARDS {
            let bytes = head.0;
            let is_possible = stream < MAX_INT && ends_in_time(offset, bytes.len());
            let copy = Copy { stream, offset, bytes, is_last: kind == LAST };
            return Ok(if is_possible { Self::Copy(copy) } else { Self::Other });
        }
        let length = usize::from(u16::from_be_bytes(head.take()?)) + 1;
        let size = usize::from(u8::from_be_bytes(head.take()?)) * SIZE_UNIT;
        let count = usize::from(u16::from_be_bytes(head.take()?));
        let first = usize::from(u16::from_be_bytes(head.take()?));
        let division = Division::new(length, size, count)?;
        let bytes = head.0;
        if bytes.is_empty() || !bytes.len().is_multiple_of(size) {
            return Err(Malformed::Ragged);
        }
        if first + bytes.len() / size > count {
            return Err(Malformed::Index);
        }
        let is_possible = stream < MAX_INT && ends_in_time(offset, length);
        let shards = Shards { stream, offset, division, first, bytes };
        Ok(if is_possible { Self::Shards(shards) } else { Self::Other })
    }
}

/// Whether so many bytes end before the last position that a stream can have.
fn ends_in_time(offset: u64, length: usize) -> bool {
    offset.checked_add(length as u64).is_some_and(|end| end < MAX_INT)
}

/// The rest of a datagram, whose head is read.
struct Head<'a>(&'a [u8]);

impl Head<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(*taken)
    }
}

/// The head of a STREAM frame with these bytes (RFC 9000 §19.8), whose id and offset have eight bytes.
/// It names the number of bytes unless they reach to the end of the packet.
pub(super) fn put_stream_head(frame: &mut BytesMut, copy: &Copy<'_>, is_counted: bool) {
    const STREAM_WITH_OFFSET: u8 = 0x0c;
    let kind = STREAM_WITH_OFFSET | u8::from(is_counted) << 1 | u8::from(copy.is_last);
    frame.put_u8(kind);
    frame.put_u64(copy.stream | 3 << 62);
    frame.put_u64(copy.offset | 3 << 62);
    match u32::try_from(copy.bytes.len()) {
        _ if !is_counted => {}
        #[expect(
            clippy::cast_possible_truncation,
            reason = "they are below the bounds of the arms"
        )]
        Ok(length @ ..0x40) => frame.put_u8(length as u8),
        #[expect(
            clippy::cast_possible_truncation,
            reason = "they are below the bounds of the arms"
        )]
        Ok(length @ ..0x4000) => frame.put_u16(length as u16 | 1 << 14),
        // No packet and no burst is longer.
        length => frame.put_u32(length.unwrap_or(0) | 2 << 30),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn division(length: usize, size: usize, count: usize) -> Division {
        Division::new(length, size, count).unwrap()
    }

    #[test]
    fn a_copy_and_shards_have_the_layout_of_the_protocol() {
        let copy = Copy { stream: 4, offset: 0x0102, bytes: b"ab", is_last: false };
        let head = [0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 1, 2];
        assert_eq!(copy.encode(), [&[0x20][..], &head, b"ab"].concat());
        let last = Copy { is_last: true, ..copy };
        assert_eq!(last.encode(), [&[0x22][..], &head, b"ab"].concat());
        let shards = Shards {
            stream: 4,
            offset: 0x0102,
            division: division(65_536, 128, 300),
            first: 258,
            bytes: &[7; 256],
        };
        let rest = [0xff, 0xff, 2, 1, 0x2c, 1, 2];
        assert_eq!(shards.encode(), [&[0x21][..], &head, &rest, &[7; 256]].concat());
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_parsed(
            stream in 0..MAX_INT, offset in 0..MAX_INT / 2, is_last: bool, bytes: Vec<u8>,
            (length, size, count) in (1_usize..=65_536, 1_usize..20, 1_usize..=1024),
            (first, number) in (0_usize..1024, 1_usize..3),
        ) {
            let copy = Copy { stream, offset, bytes: &bytes, is_last };
            let encoded = copy.encode();
            prop_assert_eq!(Datagram::parse(&encoded), Ok(Datagram::Copy(copy)));
            let Ok(division) = Division::new(length, size * SIZE_UNIT, count) else { return Ok(()) };
            let bytes = vec![9; size * SIZE_UNIT * number];
            let shards = Shards { stream, offset, division, first, bytes: &bytes };
            let parsed = shards.encode();
            let parsed = Datagram::parse(&parsed);
            if first + number <= count {
                prop_assert_eq!(parsed, Ok(Datagram::Shards(shards)));
            } else {
                prop_assert_eq!(parsed, Err(Malformed::Index));
            }
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes: Vec<u8>, kind in 0x1f_u8..0x24) {
            let _ = Datagram::parse(&bytes);
            let _ = Datagram::parse(&[&[kind][..], &bytes].concat());
        }
    }

    #[test]
    fn what_is_too_short_ragged_or_impossible_is_refused() {
        let fault = |bytes: &[u8]| Datagram::parse(bytes).unwrap_err();
        assert_eq!(fault(&[]), Malformed::Short);
        assert_eq!(fault(&[0x20; 16]), Malformed::Short);
        assert_eq!(fault(&[0x21; 23]), Malformed::Short);
        let shards = |length: [u8; 2], size, count: [u8; 2], bytes: usize| {
            [&[0x21][..], &[0; 16], &length, &[size], &count, &[0; 2], &vec![0; bytes]].concat()
        };
        assert_eq!(fault(&shards([0, 1], 0, [0, 9], 64)), Malformed::Size);
        assert_eq!(fault(&shards([0, 1], 1, [0, 0], 64)), Malformed::Count);
        assert_eq!(fault(&shards([0, 1], 1, [4, 1], 64)), Malformed::Count);
        assert_eq!(fault(&shards([0, 1], 1, [0, 9], 0)), Malformed::Ragged);
        assert_eq!(fault(&shards([0, 1], 1, [0, 9], 65)), Malformed::Ragged);
        assert_eq!(fault(&shards([0, 1], 1, [0, 1], 128)), Malformed::Index);
    }

    #[test]
    fn other_kinds_and_positions_that_no_stream_has_are_ignored() {
        for (kind, number) in [(0x1f, 0), (0x23, 0), (0x20, 0xff), (0x22, 0x40)] {
            let datagram = [&[kind][..], &[number; 16], b"bytes"].concat();
            assert_eq!(Datagram::parse(&datagram), Ok(Datagram::Other), "{kind:x} {number:x}");
        }
    }
}
