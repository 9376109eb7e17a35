//! Texts and lists with a hard limit, so that no message can carry more than it should.

use std::{
    fmt::{self, Write as _},
    marker::PhantomData,
    ops::Deref,
};

use serde::{Deserialize, Deserializer, Serialize, de};

/// A value is longer than its field in the protocol allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{length} is more than the {limit} allowed")]
pub struct TooLong {
    /// Length of the value, in bytes or items.
    pub length: usize,
    /// Maximum length of the field, in bytes or items.
    pub limit: usize,
}

/// UTF-8 text of at most `MAX` bytes, which a peer may have written.
///
/// `Display` escapes what could pretend to be another line or command a terminal, and shows at most
/// `MAX` characters. [`Self::as_str`] is the text itself.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Text<const MAX: usize>(String);

impl<const MAX: usize> Text<MAX> {
    /// The text, cut at the last character boundary that fits.
    pub fn truncated(mut text: String) -> Self {
        text.truncate(text.floor_char_boundary(MAX));
        Self(text)
    }

    /// The text of these bytes, with replacement characters for what is not UTF-8, cut at the last
    /// character boundary that fits.
    pub fn lossy(bytes: &[u8]) -> Self {
        // A character has at most four bytes, so cutting there first loses none that fits.
        let some = &bytes[..bytes.len().min(MAX + 4)];
        Self::truncated(String::from_utf8_lossy(some).into_owned())
    }

    /// The text as a string slice.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<const MAX: usize> TryFrom<String> for Text<MAX> {
    type Error = TooLong;

    fn try_from(text: String) -> Result<Self, TooLong> {
        if text.len() > MAX {
            return Err(TooLong { length: text.len(), limit: MAX });
        }
        Ok(Self(text))
    }
}

impl<const MAX: usize> TryFrom<&str> for Text<MAX> {
    type Error = TooLong;

    fn try_from(text: &str) -> Result<Self, TooLong> {
        Self::try_from(text.to_owned())
    }
}

impl<const MAX: usize> From<Text<MAX>> for String {
    fn from(text: Text<MAX>) -> Self {
        text.0
    }
}

impl<const MAX: usize> Deref for Text<MAX> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<const MAX: usize> fmt::Display for Text<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        escape(&self.0, MAX, f)
    }
}

/// What a peer says for people alone, such as the reason of a close.
pub type PeerText = Text<200>;

/// Text of a peer for people: `Display` escapes control characters, and those that change the
/// direction of the text around them.
#[derive(Clone, Copy, Debug)]
pub struct Escaped<'a>(pub &'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        escape(self.0, usize::MAX, f)
    }
}

/// Writes the text escaped, and an ellipsis for what exceeds `limit` characters.
fn escape(text: &str, limit: usize, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if !text.contains(misleads) && text.len() <= limit {
        return f.write_str(text);
    }
    let mut left = limit;
    for c in text.chars() {
        let escaped = misleads(c).then(|| c.escape_debug());
        match left.checked_sub(escaped.as_ref().map_or(1, ExactSizeIterator::len)) {
            Some(rest) => left = rest,
            None => return f.write_char('…'),
        }
        match escaped {
            Some(escaped) => write!(f, "{escaped}")?,
            None => f.write_char(c)?,
        }
    }
    Ok(())
}

/// Whether a character changes how the text around it is shown: a control character, a separator of
/// lines, or a mark of direction (UAX #9).
pub fn misleads(c: char) -> bool {
    let is_mark = matches!(
        c,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    );
    c.is_control() || is_mark
}

impl<const MAX: usize> fmt::Debug for Text<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// A list of at most `MAX` items.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "Vec<T>", bound = "T: Clone + Serialize")]
pub struct List<T, const MAX: usize>(Vec<T>);

impl<T, const MAX: usize> Default for List<T, MAX> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T, const MAX: usize> TryFrom<Vec<T>> for List<T, MAX> {
    type Error = TooLong;

    fn try_from(items: Vec<T>) -> Result<Self, TooLong> {
        if items.len() > MAX {
            return Err(TooLong { length: items.len(), limit: MAX });
        }
        Ok(Self(items))
    }
}

impl<T, const MAX: usize> From<List<T, MAX>> for Vec<T> {
    fn from(list: List<T, MAX>) -> Self {
        list.0
    }
}

impl<T, const MAX: usize> Deref for List<T, MAX> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

/// Refuses a list by the length it announces, before an item is read or memory is allocated for it.
impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for List<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Items(PhantomData))
    }
}

struct Items<T, const MAX: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> de::Visitor<'de> for Items<T, MAX> {
    type Value = List<T, MAX>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MAX} items")
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut sequence: A) -> Result<Self::Value, A::Error> {
        let too_long = |length| de::Error::custom(TooLong { length, limit: MAX });
        let announced = sequence.size_hint().unwrap_or(0);
        if announced > MAX {
            return Err(too_long(announced));
        }
        let mut items = Vec::with_capacity(announced);
        while let Some(item) = sequence.next_element()? {
            if items.len() == MAX {
                return Err(too_long(MAX + 1));
            }
            items.push(item);
        }
        Ok(List(items))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_refuses_one_byte_more_than_its_limit() {
        assert!(Text::<4>::try_from("four").is_ok());
        assert_eq!(Text::<4>::try_from("fives").unwrap_err(), TooLong { length: 5, limit: 4 });
    }

    #[test]
    fn text_is_cut_at_a_character_boundary() {
        assert_eq!(Text::<4>::truncated("aé€".to_owned()).as_str(), "aé");
    }

    #[test]
    fn text_is_shown_escaped_and_cut() {
        for (text, shown) in [
            ("é: a \"b\"", "é: a \"b\""),
            ("a\r\nINFO", "a\\r\\nINFO"),
            ("\u{1b}[2J", "\\u{1b}[2J"),
            ("\u{202e}abc", "\\u{202e}abc"),
            ("\u{61c}a", "\\u{61c}a"),
            ("\u{85}a", "\\u{85}a"),
            ("\n\n\n\n\n\n\n", "\\n\\n\\n\\n\\n\\n…"),
        ] {
            assert_eq!(Text::<12>::try_from(text).unwrap().to_string(), shown);
        }
        assert_eq!(Escaped("\n\n\n\n\n\n\n").to_string(), "\\n".repeat(7));
        assert_eq!(format!("{:?}", Text::<8>::try_from("a\nb").unwrap()), "\"a\\nb\"");
    }

    #[test]
    fn bytes_of_a_peer_are_text_whatever_they_are() {
        assert_eq!(Text::<8>::lossy(b"a\xffb").as_str(), "a\u{fffd}b");
        assert_eq!(Text::<4>::lossy("aé€".as_bytes()).as_str(), "aé");
        assert_eq!(Text::<4>::lossy(&[b'x'; 1000]).as_str(), "xxxx");
    }

    #[test]
    fn list_refuses_one_item_more_than_its_limit() {
        assert!(List::<u8, 2>::try_from(vec![1, 2]).is_ok());
        assert!(List::<u8, 2>::try_from(vec![1, 2, 3]).is_err());
    }

    #[test]
    fn list_is_refused_while_it_is_read_whether_or_not_its_length_is_announced() {
        type Fault = de::value::Error;
        let read = |items: &mut dyn Iterator<Item = u8>| {
            List::<u8, 2>::deserialize(de::value::SeqDeserializer::<_, Fault>::new(items))
        };
        assert_eq!(read(&mut [1, 2].into_iter()), Ok(List(vec![1, 2])));
        let too_long = read(&mut [1, 2, 3].into_iter()).unwrap_err();
        assert_eq!(too_long.to_string(), "3 is more than the 2 allowed");
        assert_eq!(read(&mut [1, 2].into_iter().filter(|_| true)), Ok(List(vec![1, 2])));
        let too_long = read(&mut (1..).filter(|_| true)).unwrap_err();
        assert_eq!(too_long.to_string(), "3 is more than the 2 allowed");
    }
}
