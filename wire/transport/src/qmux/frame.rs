//! Records and frames as they cross the byte stream (draft-ietf-quic-qmux-02).
//!
//! A record is a length and whole frames. Frames are those of QUIC (RFC 9000 §19) that are of use
//! on a reliable byte stream, and three of QMux's own. Pure: bytes in, frames out.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use culvert_wire::bounded::PeerText;

/// Maximum length of a record, in bytes without its length field: the largest that every peer must
/// accept, and the largest that is accepted here.
pub(super) const MAX_RECORD: usize = 16_382;
/// Maximum length of a STREAM frame before its data, in bytes: type, id, offset, length.
const STREAM_HEAD: usize = 1 + 8 + 8 + 4;
/// Maximum length of the data in one STREAM frame, in bytes.
pub(super) const MAX_DATA_LEN: usize = MAX_RECORD - STREAM_HEAD;

const PADDING: u64 = 0x00;
const RESET_STREAM: u64 = 0x04;
const STOP_SENDING: u64 = 0x05;
const STREAM: u64 = 0x08;
const STREAM_FIN: u64 = 0x01;
const STREAM_LEN: u64 = 0x02;
const STREAM_OFF: u64 = 0x04;
const MAX_DATA: u64 = 0x10;
const MAX_STREAM_DATA: u64 = 0x11;
const MAX_STREAMS_BIDI: u64 = 0x12;
const MAX_STREAMS_UNI: u64 = 0x13;
const DATA_BLOCKED: u64 = 0x14;
const STREAM_DATA_BLOCKED: u64 = 0x15;
const STREAMS_BLOCKED_BIDI: u64 = 0x16;
const STREAMS_BLOCKED_UNI: u64 = 0x17;
const TRANSPORT_CLOSE: u64 = 0x1c;
const APPLICATION_CLOSE: u64 = 0x1d;
const QX_TRANSPORT_PARAMETERS: u64 = 0x3f51_5330_0d0a_0d0a;
const QX_PING: u64 = 0x348c_6752_9ef8_c7bd;
const QX_PONG: u64 = 0x348c_6752_9ef8_c7be;

/// Why bytes are not frames. Every fault ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameFault {
    #[error("a frame is cut short")]
    Short,
    #[error("a frame of the unknown type {0:#x}")]
    Unknown(u64),
    #[error("a record of {0} bytes")]
    LongRecord(u64),
    #[error("a transport parameter that is not a number")]
    Parameter,
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    Stream {
        id: u64,
        offset: u64,
        data: Bytes,
        fin: bool,
    },
    ResetStream {
        id: u64,
        code: u64,
        final_size: u64,
    },
    StopSending {
        id: u64,
        code: u64,
    },
    MaxData(u64),
    MaxStreamData {
        id: u64,
        limit: u64,
    },
    MaxStreams(u64),
    Close {
        application: bool,
        code: u64,
        reason: PeerText,
    },
    Parameters(Parameters),
    Ping(u64),
    Pong(u64),
    /// Padding, a blocked sender, or a limit of streams that are not used: no effect.
    Nothing,
}

/// What a side grants at the start (RFC 9000 §18.2), in bytes, streams and milliseconds. 0 means
/// none, and for the idle time-out that there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Parameters {
    pub(super) max_idle_timeout: u64,
    pub(super) max_data: u64,
    /// For streams that the side itself opens.
    pub(super) max_stream_data_local: u64,
    /// For streams that its peer opens.
    pub(super) max_stream_data_remote: u64,
    pub(super) max_streams: u64,
}

impl Parameters {
    const IDLE_TIMEOUT: u64 = 0x01;
    const DATA: u64 = 0x04;
    const STREAM_DATA_LOCAL: u64 = 0x05;
    const STREAM_DATA_REMOTE: u64 = 0x06;
    const STREAMS: u64 = 0x08;

    fn encode(self) -> BytesMut {
        let mut buf = BytesMut::new();
        for (id, value) in [
            (Self::IDLE_TIMEOUT, self.max_idle_timeout),
            (Self::DATA, self.max_data),
            (Self::STREAM_DATA_LOCAL, self.max_stream_data_local),
            (Self::STREAM_DATA_REMOTE, self.max_stream_data_remote),
            (Self::STREAMS, self.max_streams),
        ] {
            let mut encoded = BytesMut::new();
            put_varint(&mut encoded, value);
            put_varint(&mut buf, id);
            put_varint(&mut buf, encoded.len() as u64);
            buf.put_slice(&encoded);
        }
        buf
    }

    fn decode(mut buf: Bytes) -> Result<Self, FrameFault> {
        let mut parameters = Self::default();
        while buf.has_remaining() {
            let id = get_varint(&mut buf)?;
            let mut value = get_bytes(&mut buf)?;
            let field = match id {
                Self::IDLE_TIMEOUT => &mut parameters.max_idle_timeout,
                Self::DATA => &mut parameters.max_data,
                Self::STREAM_DATA_LOCAL => &mut parameters.max_stream_data_local,
                Self::STREAM_DATA_REMOTE => &mut parameters.max_stream_data_remote,
                Self::STREAMS => &mut parameters.max_streams,
                // Not used here.
                _ => continue,
            };
            *field = get_varint(&mut value).map_err(|_| FrameFault::Parameter)?;
        }
        Ok(parameters)
    }
}

impl Frame {
    /// Appends the frame.
    pub(super) fn encode(&self, buf: &mut BytesMut) {
        let mut numbers = |numbers: &[u64]| numbers.iter().for_each(|n| put_varint(buf, *n));
        match self {
            Self::Stream { id, offset, data, fin } => {
                let kind = STREAM | STREAM_OFF | STREAM_LEN | if *fin { STREAM_FIN } else { 0 };
                numbers(&[kind, *id, *offset, data.len() as u64]);
                buf.put_slice(data);
            }
            Self::ResetStream { id, code, final_size } => {
                numbers(&[RESET_STREAM, *id, *code, *final_size]);
            }
            Self::StopSending { id, code } => numbers(&[STOP_SENDING, *id, *code]),
            Self::MaxData(limit) => numbers(&[MAX_DATA, *limit]),
            Self::MaxStreamData { id, limit } => numbers(&[MAX_STREAM_DATA, *id, *limit]),
            Self::MaxStreams(limit) => numbers(&[MAX_STREAMS_BIDI, *limit]),
            Self::Close { application, code, reason } => {
                match application {
                    true => numbers(&[APPLICATION_CLOSE, *code]),
                    // The code is followed by the type of the frame at fault, 0 if unknown.
                    false => numbers(&[TRANSPORT_CLOSE, *code, 0]),
                }
                put_varint(buf, reason.len() as u64);
                buf.put_slice(reason.as_bytes());
            }
            Self::Parameters(parameters) => {
                let encoded = parameters.encode();
                numbers(&[QX_TRANSPORT_PARAMETERS, encoded.len() as u64]);
                buf.put_slice(&encoded);
            }
            Self::Ping(sequence) => numbers(&[QX_PING, *sequence]),
            Self::Pong(sequence) => numbers(&[QX_PONG, *sequence]),
            Self::Nothing => numbers(&[PADDING]),
        }
    }

    /// Splits one frame off the front of a record.
    pub(super) fn decode(buf: &mut Bytes) -> Result<Self, FrameFault> {
        let kind = get_varint(buf)?;
        Ok(match kind {
            0x08..=0x0f => {
                let id = get_varint(buf)?;
                let offset = if kind & STREAM_OFF == 0 { 0 } else { get_varint(buf)? };
                let data = match kind & STREAM_LEN {
                    0 => buf.split_to(buf.len()),
                    _ => get_bytes(buf)?,
                };
                Self::Stream { id, offset, data, fin: kind & STREAM_FIN != 0 }
            }
            RESET_STREAM => Self::ResetStream {
                id: get_varint(buf)?,
                code: get_varint(buf)?,
                final_size: get_varint(buf)?,
            },
            STOP_SENDING => Self::StopSending { id: get_varint(buf)?, code: get_varint(buf)? },
            MAX_DATA => Self::MaxData(get_varint(buf)?),
            MAX_STREAM_DATA => {
                Self::MaxStreamData { id: get_varint(buf)?, limit: get_varint(buf)? }
            }
            MAX_STREAMS_BIDI => Self::MaxStreams(get_varint(buf)?),
            PADDING => Self::Nothing,
            MAX_STREAMS_UNI | DATA_BLOCKED | STREAMS_BLOCKED_BIDI | STREAMS_BLOCKED_UNI => {
                get_varint(buf)?;
                Self::Nothing
            }
            STREAM_DATA_BLOCKED => {
                get_varint(buf)?;
                get_varint(buf)?;
                Self::Nothing
            }
            TRANSPORT_CLOSE | APPLICATION_CLOSE => {
                let code = get_varint(buf)?;
                let application = kind == APPLICATION_CLOSE;
                if !application {
                    get_varint(buf)?;
                }
                let reason = PeerText::lossy(&get_bytes(buf)?);
                Self::Close { application, code, reason }
            }
            QX_TRANSPORT_PARAMETERS => Self::Parameters(Parameters::decode(get_bytes(buf)?)?),
            QX_PING => Self::Ping(get_varint(buf)?),
            QX_PONG => Self::Pong(get_varint(buf)?),
            kind => return Err(FrameFault::Unknown(kind)),
        })
    }
}

/// Splits a whole record off the front of what was read; `None` while part of it is missing.
pub(super) fn split_record(input: &mut BytesMut) -> Result<Option<Bytes>, FrameFault> {
    let Some(first) = input.first() else { return Ok(None) };
    let head = 1 << (first >> 6);
    if input.len() < head {
        return Ok(None);
    }
    let length = get_varint(&mut &input[..head])?;
    if length > MAX_RECORD as u64 {
        return Err(FrameFault::LongRecord(length));
    }
    // At most MAX_RECORD, as checked.
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if input.len() < head + length {
        return Ok(None);
    }
    input.advance(head);
    Ok(Some(input.split_to(length).freeze()))
}

/// A record under construction at the end of a buffer.
pub(super) struct Record<'a> {
    output: &'a mut BytesMut,
    start: usize,
}

impl<'a> Record<'a> {
    /// Length of a record's length field, in bytes: two hold every length.
    const HEAD: usize = 2;

    pub(super) fn begin(output: &'a mut BytesMut) -> Self {
        let start = output.len();
        output.put_u16(0);
        Self { output, start }
    }

    fn len(&self) -> usize {
        self.output.len() - self.start - Self::HEAD
    }

    /// Number of bytes that still fit.
    pub(super) fn room(&self) -> usize {
        MAX_RECORD - self.len()
    }

    /// Appends a frame, which must fit.
    pub(super) fn put(&mut self, frame: &Frame) {
        frame.encode(self.output);
    }

    /// Writes the length. Without frames nothing is left of the record, and it returns false.
    pub(super) fn end(self) -> bool {
        let length = self.len();
        if length == 0 {
            self.output.truncate(self.start);
            return false;
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a record has at most MAX_RECORD bytes"
        )]
        let head = length as u16 | 0x4000;
        self.output[self.start..self.start + Self::HEAD].copy_from_slice(&head.to_be_bytes());
        true
    }
}

/// A variable-length integer (RFC 9000 §16), at most 2^62 - 1.
fn put_varint(buf: &mut BytesMut, value: u64) {
    #[expect(clippy::cast_possible_truncation, reason = "each range fits its type")]
    match value {
        0..=0x3f => buf.put_u8(value as u8),
        0x40..=0x3fff => buf.put_u16(value as u16 | 0x4000),
        0x4000..=0x3fff_ffff => buf.put_u32(value as u32 | 0x8000_0000),
        _ => buf.put_u64(value | 0xc000_0000_0000_0000),
    }
}

fn get_varint(buf: &mut impl Buf) -> Result<u64, FrameFault> {
    let short = |_| FrameFault::Short;
    let first = buf.try_get_u8().map_err(short)?;
    let mut value = u64::from(first & 0x3f);
    for _ in 1..1 << (first >> 6) {
        value = value << 8 | u64::from(buf.try_get_u8().map_err(short)?);
    }
    Ok(value)
}

/// Bytes that are preceded by their length.
fn get_bytes(buf: &mut Bytes) -> Result<Bytes, FrameFault> {
    let length = get_varint(buf)?;
    match usize::try_from(length) {
        Ok(length) if length <= buf.len() => Ok(buf.split_to(length)),
        _ => Err(FrameFault::Short),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![0_u64..64, 0_u64..16_384, 0_u64..(1 << 30), 0_u64..(1 << 62)]
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let data = prop::collection::vec(any::<u8>(), 0..100).prop_map(Bytes::from);
        prop_oneof![
            (number(), number(), data, any::<bool>())
                .prop_map(|(id, offset, data, fin)| Frame::Stream { id, offset, data, fin }),
            (number(), number(), number()).prop_map(|(id, code, final_size)| Frame::ResetStream {
                id,
                code,
                final_size
            }),
            (number(), number()).prop_map(|(id, code)| Frame::StopSending { id, code }),
            (number(), number()).prop_map(|(id, limit)| Frame::MaxStreamData { id, limit }),
            number().prop_map(Frame::MaxData),
            number().prop_map(Frame::MaxStreams),
            number().prop_map(Frame::Ping),
            number().prop_map(Frame::Pong),
            (any::<bool>(), number(), ".{0,40}").prop_map(|(application, code, reason)| {
                let reason = PeerText::truncated(reason);
                Frame::Close { application, code, reason }
            }),
            prop::array::uniform5(number()).prop_map(|[idle, data, local, remote, streams]| {
                Frame::Parameters(Parameters {
                    max_idle_timeout: idle,
                    max_data: data,
                    max_stream_data_local: local,
                    max_stream_data_remote: remote,
                    max_streams: streams,
                })
            }),
        ]
    }

    proptest! {
        #[test]
        fn an_encoded_frame_decodes_to_itself(frames in prop::collection::vec(frame(), 0..20)) {
            let mut encoded = BytesMut::new();
            frames.iter().for_each(|frame| frame.encode(&mut encoded));
            let mut record = encoded.freeze();
            for frame in frames {
                prop_assert_eq!(Frame::decode(&mut record), Ok(frame));
            }
            prop_assert!(record.is_empty());
        }

        #[test]
        fn a_frame_cut_short_is_refused(frame in frame(), cut in any::<prop::sample::Index>()) {
            let mut encoded = BytesMut::new();
            frame.encode(&mut encoded);
            let cut = cut.index(encoded.len());
            let result = Frame::decode(&mut encoded.freeze().slice(..cut));
            prop_assert!(matches!(result, Err(FrameFault::Short | FrameFault::Parameter)));
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut input = BytesMut::from(&bytes[..]);
            while let Ok(Some(mut record)) = split_record(&mut input) {
                while !record.is_empty() && Frame::decode(&mut record).is_ok() {}
            }
        }
    }

    #[test]
    fn records_are_found_however_the_bytes_are_cut() {
        let mut stream = BytesMut::new();
        for length in [3, 300] {
            let data = Bytes::from(vec![7; length]);
            let mut record = Record::begin(&mut stream);
            record.put(&Frame::Stream { id: 0, offset: 0, data, fin: false });
            assert!(record.end());
        }
        assert!(!Record::begin(&mut stream).end(), "no frames, no record");
        for cut in 0..stream.len() {
            let mut input = BytesMut::new();
            let mut lengths = Vec::new();
            for part in [&stream[..cut], &stream[cut..]] {
                input.extend_from_slice(part);
                while let Some(record) = split_record(&mut input).unwrap() {
                    lengths.push(record.len());
                }
            }
            assert_eq!(lengths, [3 + 4, 300 + 5], "cut at {cut}");
        }
    }

    #[test]
    fn a_record_that_is_too_long_is_refused_before_it_arrives() {
        let mut input = BytesMut::new();
        put_varint(&mut input, MAX_RECORD as u64 + 1);
        assert_eq!(split_record(&mut input), Err(FrameFault::LongRecord(16_383)));
    }
}
