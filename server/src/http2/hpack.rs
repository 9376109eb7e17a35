//! Header fields as HTTP/2 compresses them (RFC 7541).
//!
//! The decoder has a dynamic table, because a client may use one before it has read any setting. The
//! encoder has none: answers are a few fields, once for each stream.

use std::collections::VecDeque;

use http::HeaderMap;

use super::{huffman, static_table::STATIC};

/// Maximum size of the dynamic table, which is the standard's default, in bytes.
const MAX_TABLE: usize = 4096;
/// Maximum length of a block's fields once they are decoded, as the table counts them, in bytes. A
/// block may name an entry of the table with each of its bytes.
const MAX_DECODED: usize = 64 * 1024;
/// What an entry costs beside its bytes (RFC 7541 §4.1).
const ENTRY_COST: usize = 32;
/// Prefix of a string without Huffman's code.
const RAW: u8 = 0;

/// The bytes are no header block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the header block cannot be decoded")]
pub(super) struct Undecodable;

/// A field of the dynamic table: the name, then the value.
#[derive(Debug)]
struct Entry {
    bytes: Box<[u8]>,
    name_len: usize,
}

impl Entry {
    fn size(&self) -> usize {
        self.bytes.len() + ENTRY_COST
    }

    fn field(&self) -> (&[u8], &[u8]) {
        self.bytes.split_at(self.name_len)
    }
}

/// Decodes the header blocks of one direction, in their order.
#[derive(Debug)]
pub(super) struct Decoder {
    /// The latest entry first.
    entries: VecDeque<Entry>,
    size: usize,
    limit: usize,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self { entries: VecDeque::new(), size: 0, limit: MAX_TABLE }
    }

    /// Decodes one block and hands on each of its fields, in their order.
    pub(super) fn decode(
        &mut self,
        block: &[u8],
        mut field: impl FnMut(&[u8], &[u8]),
    ) -> Result<(), Undecodable> {
        let mut rest = block;
        let (mut name, mut value) = (Vec::new(), Vec::new());
        let (mut has_fields, mut decoded) = (false, 0);
        let mut field = |name: &[u8], value: &[u8]| {
            decoded += name.len() + value.len() + ENTRY_COST;
            field(name, value);
            if decoded > MAX_DECODED { Err(Undecodable) } else { Ok(()) }
        };
        while let Some(&first) = rest.first() {
            if first & 0x80 != 0 {
                let index = integer(&mut rest, 7)?;
                let (name, value) = self.get(index)?;
                field(name, value)?;
            } else if first & 0xe0 == 0x20 {
                let limit = integer(&mut rest, 5)?;
                if has_fields || limit > MAX_TABLE {
                    return Err(Undecodable);
                }
                self.limit = limit;
                self.evict();
                continue;
            } else {
                let is_kept = first & 0x40 != 0;
                name.clear();
                value.clear();
                match integer(&mut rest, if is_kept { 6 } else { 4 })? {
                    0 => string(&mut rest, &mut name)?,
                    index => name.extend_from_slice(self.get(index)?.0),
                }
                string(&mut rest, &mut value)?;
                field(&name, &value)?;
                if is_kept {
                    self.keep(&name, &value);
                }
            }
            has_fields = true;
        }
        Ok(())
    }

    fn get(&self, index: usize) -> Result<(&[u8], &[u8]), Undecodable> {
        let place = index.checked_sub(1).ok_or(Undecodable)?;
        if let Some((name, value)) = STATIC.get(place) {
            return Ok((name.as_bytes(), value.as_bytes()));
        }
        self.entries.get(place - STATIC.len()).map(Entry::field).ok_or(Undecodable)
    }

    fn keep(&mut self, name: &[u8], value: &[u8]) {
        let entry = Entry { bytes: [name, value].concat().into(), name_len: name.len() };
        self.size += entry.size();
        self.entries.push_front(entry);
        self.evict();
    }

    fn evict(&mut self) {
        while self.size > self.limit
            && let Some(oldest) = self.entries.pop_back()
        {
            self.size -= oldest.size();
        }
    }
}

/// Takes an integer with this many bits in its first byte (RFC 7541 §5.1).
fn integer(rest: &mut &[u8], prefix: u32) -> Result<usize, Undecodable> {
    let (&first, after) = rest.split_first().ok_or(Undecodable)?;
    *rest = after;
    let limit = (1 << prefix) - 1;
    let mut value = usize::from(first) & limit;
    if value < limit {
        return Ok(value);
    }
    // Four more bytes reach 2^28, beyond any block.
    for shift in [0, 7, 14, 21] {
        let (&byte, after) = rest.split_first().ok_or(Undecodable)?;
        *rest = after;
        value += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Undecodable)
}

/// Takes a string (RFC 7541 §5.2) and appends it.
fn string(rest: &mut &[u8], out: &mut Vec<u8>) -> Result<(), Undecodable> {
    let is_encoded = rest.first().ok_or(Undecodable)? & 0x80 != 0;
    let length = integer(rest, 7)?;
    let (text, after) = rest.split_at_checked(length).ok_or(Undecodable)?;
    *rest = after;
    if is_encoded {
        return huffman::decode(text, out).ok_or(Undecodable);
    }
    out.extend_from_slice(text);
    Ok(())
}

/// Encodes the fields of an answer: its status, unless they are trailers, and the others.
pub(super) fn encode(status: Option<http::StatusCode>, fields: &HeaderMap) -> Vec<u8> {
    let mut block = Vec::new();
    match status {
        Some(http::StatusCode::OK) => block.push(0x88), // the static table's entry
        Some(status) => {
            block.push(0x08); // without indexing; the name is the static table's
            append_string(status.as_str().as_bytes(), &mut block);
        }
        None => {}
    }
    for (name, value) in fields {
        block.push(0x00);
        append_string(name.as_str().as_bytes(), &mut block);
        append_string(value.as_bytes(), &mut block);
    }
    block
}

fn append_string(text: &[u8], out: &mut Vec<u8>) {
    const LIMIT: usize = 0x7f;
    match u8::try_from(text.len()) {
        Ok(length) if usize::from(length) < LIMIT => out.push(RAW | length),
        _ => {
            out.push(RAW | 0x7f);
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

#[cfg(test)]
mod tests {
    use http::{HeaderValue, StatusCode, header::HeaderName};
    use proptest::prelude::*;

    use super::*;

    type Fields = Vec<(Vec<u8>, Vec<u8>)>;

    fn decoded(decoder: &mut Decoder, block: &[u8]) -> Result<Fields, Undecodable> {
        let mut fields = Vec::new();
        decoder.decode(block, |name, value| fields.push((name.to_vec(), value.to_vec())))?;
        Ok(fields)
    }

    #[test]
    fn a_table_keeps_what_fits() {
        let mut decoder = Decoder::new();
        let mut block = vec![0x20 | 0x1f, 60 - 31]; // a limit of 60 bytes
        block.extend(b"\x40\x01a\x01b\x40\x01c\x01d");
        assert_eq!(decoded(&mut decoder, &block).unwrap().len(), 2);
        // Each costs 34, so the second evicted the first.
        assert_eq!(decoded(&mut decoder, &[0xbe]).unwrap(), [(b"c".to_vec(), b"d".to_vec())]);
        assert_eq!(decoded(&mut decoder, &[0xbf]), Err(Undecodable));
        assert_eq!(decoded(&mut decoder, &[0x20]).unwrap(), []);
        assert_eq!(decoded(&mut decoder, &[0xbe]), Err(Undecodable));
    }

    #[test]
    fn blocks_that_are_none_are_refused() {
        for block in [
            &[0x80][..],                           // index 0
            &[0xbe],                               // beyond both tables
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0x01], // an endless integer
            &[0x82, 0x20],                         // a limit after a field
            &[0x3f, 0xe2, 0x1f],                   // a limit of 4097
            &[0x40, 0x05, b'a'],                   // a string that is cut
            &[0x40],                               // no string
        ] {
            assert_eq!(decoded(&mut Decoder::new(), block), Err(Undecodable), "{block:x?}");
        }
    }

    #[test]
    fn a_block_that_grows_when_it_is_decoded_is_refused() {
        let mut decoder = Decoder::new();
        // A name of 4000 bytes, which the table keeps.
        let mut block = vec![0x40, 0x7f, 0xa1, 0x1e];
        block.extend([b'a'; 4000]);
        block.push(0);
        assert_eq!(decoded(&mut decoder, &block).unwrap().len(), 1);
        assert_eq!(decoded(&mut decoder, &[0xbe; 16]).unwrap().len(), 16);
        for bomb in [&[0xbe][..], &[0x0f, 0x2f, 0], &[0x7e, 0]] {
            assert_eq!(decoded(&mut decoder, &bomb.repeat(1000)), Err(Undecodable), "{bomb:x?}");
        }
    }

    proptest! {
        /// What another implementation encodes, with its own table, is decoded.
        #[test]
        fn blocks_of_another_encoder_are_decoded(
            blocks in prop::collection::vec(
                prop::collection::vec(("[a-d]{1,4}", "[a-z]{0,300}"), 0..10), 1..6),
        ) {
            let (mut encoder, mut decoder) = (loona_hpack::Encoder::new(), Decoder::new());
            for fields in blocks {
                let fields: Fields =
                    fields.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
                let block = encoder.encode(fields.iter().map(|(name, value)| (&name[..], &value[..])));
                prop_assert_eq!(decoded(&mut decoder, &block).unwrap(), fields);
            }
        }

        #[test]
        fn what_is_encoded_is_decoded(
            status in 200_u16..600, fields in prop::collection::vec(("[a-z]{1,200}", "[a-z]{0,300}"), 0..5),
        ) {
            let mut map = HeaderMap::new();
            for (name, value) in &fields {
                map.insert(HeaderName::try_from(name).unwrap(), HeaderValue::try_from(value).unwrap());
            }
            let status = StatusCode::from_u16(status).unwrap();
            let fields = decoded(&mut Decoder::new(), &encode(Some(status), &map)).unwrap();
            prop_assert_eq!(&fields[0], &(b":status".to_vec(), status.as_str().as_bytes().to_vec()));
            prop_assert_eq!(fields.len(), map.len() + 1);
            for (name, value) in &fields[1..] {
                prop_assert_eq!(map.get(std::str::from_utf8(name).unwrap()).unwrap().as_bytes(), &value[..]);
            }
        }

        /// No bytes make it panic, or keep more than the table's limit.
        #[test]
        fn any_bytes_are_decoded_or_refused(blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..5)) {
            let mut decoder = Decoder::new();
            for block in blocks {
                let _ = decoder.decode(&block, |_, _| {});
                let kept: usize = decoder.entries.iter().map(Entry::size).sum();
                prop_assert!(kept == decoder.size && kept <= MAX_TABLE);
            }
        }
    }
}
