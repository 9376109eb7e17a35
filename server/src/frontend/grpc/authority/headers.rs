//! The `:authority` of one HEADERS frame, made legal.
//!
//! HPACK (RFC 7541) has state: later blocks refer to what one block adds to the dynamic table. So
//! nothing is decoded and encoded again here; only the bytes of the value are replaced, by as many
//! others. The entry keeps its size, and both peers evict the same entries at the same time.

use std::borrow::Cow;

use http::uri::Authority;

use crate::http2_frames::HEAD_LEN;

/// The payload begins with the length of the padding at its end (RFC 9113 §6.2).
const FLAG_PADDED: u8 = 0x8;
/// The payload has five bytes of priority before the fields (RFC 9113 §6.2).
const FLAG_PRIORITY: u8 = 0x20;
/// `:authority` in HPACK's static table (RFC 7541 appendix A).
const STATIC_AUTHORITY: usize = 1;
/// `:authority`, for encoders that write names as literals.
const AUTHORITY: &[u8] = b":authority";

/// The frame with a legal `:authority`. It is unchanged when its own is legal, when it has none,
/// and when it cannot be parsed.
pub(super) fn legalized(frame: &[u8]) -> Cow<'_, [u8]> {
    match rewrite(frame) {
        Some(rewritten) => Cow::Owned(rewritten),
        None => Cow::Borrowed(frame),
    }
}

fn rewrite(frame: &[u8]) -> Option<Vec<u8>> {
    let flags = frame[4];
    let has = |flag| usize::from(flags & flag == flag);
    let start = HEAD_LEN + has(FLAG_PADDED) + 5 * has(FLAG_PRIORITY);
    let padding = has(FLAG_PADDED) * usize::from(*frame.get(HEAD_LEN)?);
    let end = frame.len().checked_sub(padding)?;
    let fields = frame.get(start..end)?;
    let found = find_authority(fields)?;
    let legal = legal(&found.text)?;

    let mut rewritten = frame[..start].to_vec();
    rewritten.extend_from_slice(&fields[..found.start]);
    append_string(&legal, &mut rewritten);
    rewritten.extend_from_slice(&fields[found.end..]);
    rewritten.extend_from_slice(&frame[end..]);
    let payload = u32::try_from(rewritten.len() - HEAD_LEN).ok().filter(|len| *len < 1 << 24)?;
    rewritten[..3].copy_from_slice(&payload.to_be_bytes()[1..]);
    Some(rewritten)
}

/// The value of an `:authority`: its position among the fields, and its text.
struct AuthorityField {
    start: usize,
    end: usize,
    text: Vec<u8>,
}

/// Finds the first `:authority` whose value is a literal (RFC 7541 §6). One that refers to the
/// dynamic table was made legal when it was added.
fn find_authority(fields: &[u8]) -> Option<AuthorityField> {
    let mut at = 0;
    while let Some(&first) = fields.get(at) {
        let prefix = match first {
            0x80.. => {
                at = integer(fields, at, 7)?.1; // indexed
                continue;
            }
            0x20..=0x3f => {
                at = integer(fields, at, 5)?.1; // table size
                continue;
            }
            0x40..=0x7f => 6, // literal, to be indexed
            0x00..=0x1f => 4, // literal, not to be indexed
        };
        let (name, after) = integer(fields, at, prefix)?;
        at = after;
        let mut is_authority = name == STATIC_AUTHORITY;
        if name == 0 {
            let end = string(fields, at)?;
            is_authority = decode(&fields[at..end])? == AUTHORITY;
            at = end;
        }
        let end = string(fields, at)?;
        if is_authority {
            return Some(AuthorityField { start: at, end, text: decode(&fields[at..end])? });
        }
        at = end;
    }
    None
}

/// An integer with this many bits in its first byte, and where it ends (RFC 7541 §5.1).
fn integer(bytes: &[u8], at: usize, prefix: u32) -> Option<(usize, usize)> {
    let limit = (1 << prefix) - 1;
    let value = usize::from(*bytes.get(at)?) & limit;
    if value < limit {
        return Some((value, at + 1));
    }
    let mut value = value;
    // Four more bytes reach 2^28, beyond any frame.
    for (index, byte) in bytes.get(at + 1..)?.iter().take(4).enumerate() {
        value += usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some((value, at + index + 2));
        }
    }
    None
}

/// Where a string ends (RFC 7541 §5.2).
fn string(bytes: &[u8], at: usize) -> Option<usize> {
    let (length, start) = integer(bytes, at, 7)?;
    let end = start.checked_add(length)?;
    (end <= bytes.len()).then_some(end)
}

/// The bytes of a string. The HPACK library decodes Huffman's code, given the string as the value
/// of a field that is made up for it.
fn decode(string: &[u8]) -> Option<Vec<u8>> {
    let field = [&[0x00, 0x01, b'x'], string].concat();
    let mut text = None;
    let mut decoder = loona_hpack::Decoder::new();
    decoder.decode_with_cb(&field, |_, value| text = Some(value.into_owned())).ok()?;
    text
}

/// A legal authority of the same length; `None` when the text is legal.
fn legal(text: &[u8]) -> Option<Vec<u8>> {
    if text.is_empty() || Authority::try_from(text).is_ok() {
        return None;
    }
    let harmless =
        |byte: &u8| if byte.is_ascii_alphanumeric() || *byte == b'.' { *byte } else { b'-' };
    Some(text.iter().map(harmless).collect())
}

/// Appends a string without Huffman's code (RFC 7541 §5.2).
fn append_string(text: &[u8], out: &mut Vec<u8>) {
    const LIMIT: usize = 0x7f;
    match u8::try_from(text.len()) {
        Ok(length) if usize::from(length) < LIMIT => out.push(length),
        _ => {
            out.push(0x7f);
            let mut rest = text.len() - LIMIT;
            while rest >= 0x80 {
                out.push(0x80 | u8::try_from(rest & 0x7f).unwrap_or(0));
                rest >>= 7;
            }
            out.push(u8::try_from(rest).unwrap_or(0));
        }
    }
    out.extend_from_slice(text);
}
