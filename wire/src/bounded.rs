//! Texts and lists with a hard limit, so that no message can carry more than it should.

use std::{fmt, marker::PhantomData, ops::Deref};

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

/// UTF-8 text of at most `MAX` bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Text<const MAX: usize>(String);

impl<const MAX: usize> Text<MAX> {
    /// The text, cut at the last character boundary that fits.
    pub fn truncated(mut text: String) -> Self {
        text.truncate(text.floor_char_boundary(MAX));
        Self(text)
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
        f.write_str(&self.0)
    }
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
    fn text_is_shown_as_it_is() {
        let text = Text::<8>::try_from("a\nb").unwrap();
        assert_eq!((&*text.to_string(), &*format!("{text:?}")), ("a\nb", "\"a\\nb\""));
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
