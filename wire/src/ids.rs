//! Names of the parties: checked once, then carried as types.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Maximum length of the name of an agent or a server, in bytes.
///
/// A UUID has 36 and a DNS name at most 253; both fit.
pub const MAX_ID_LEN: usize = 255;

/// A name is empty, too long, or has a character that a gRPC header, which carries the names of
/// Konnectivity peers, cannot hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    /// The name has no characters.
    #[error("a name must not be empty")]
    Empty,
    /// The name has more than [`MAX_ID_LEN`] bytes.
    #[error("a name of {0} bytes is longer than {MAX_ID_LEN}")]
    TooLong(usize),
    /// The name has a character other than printable ASCII.
    #[error("a name must be printable ASCII")]
    NotPrintable,
}

fn check(id: &str) -> Result<(), InvalidId> {
    match id {
        "" => Err(InvalidId::Empty),
        id if id.len() > MAX_ID_LEN => Err(InvalidId::TooLong(id.len())),
        id if !id.bytes().all(|byte| (b' '..=b'~').contains(&byte)) => Err(InvalidId::NotPrintable),
        _ => Ok(()),
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(id: String) -> Result<Self, InvalidId> {
                check(&id)?;
                Ok(Self(id))
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidId;

            fn from_str(id: &str) -> Result<Self, InvalidId> {
                Self::try_from(id.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }
    };
}

id! {
    /// The name of an agent; two tunnels with the same name lead to the same node.
    AgentId
}

id! {
    /// The name of one server replica.
    ServerId
}

/// Distinguishes processes that have the same [`AgentId`]: drawn at random at start.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InstanceId(pub [u8; 16]);

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Names one dial in the logs of both server and agent; drawn at random by the server.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DialId(pub u64);

impl fmt::Display for DialId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for DialId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_checked_once_where_it_enters() {
        assert_eq!("".parse::<AgentId>(), Err(InvalidId::Empty));
        assert_eq!("x".repeat(256).parse::<AgentId>(), Err(InvalidId::TooLong(256)));
        assert_eq!("a\nb".parse::<ServerId>(), Err(InvalidId::NotPrintable));
        assert_eq!("n\u{f6}de".parse::<AgentId>(), Err(InvalidId::NotPrintable));
        assert_eq!("a b~".parse::<AgentId>().unwrap().as_str(), "a b~");
        assert!("x".repeat(255).parse::<AgentId>().is_ok());
        let id: AgentId = "node-1".parse().unwrap();
        assert_eq!(
            (id.as_str(), &*id.to_string(), &*format!("{id:?}")),
            ("node-1", "node-1", "\"node-1\"",)
        );
    }

    #[test]
    fn random_ids_are_shown_in_hexadecimal() {
        let dial = DialId(0xbeef);
        assert_eq!([dial.to_string(), format!("{dial:?}")], ["000000000000beef"; 2]);
        let instance = InstanceId([0x0a; 16]);
        assert_eq!(format!("{instance:?}"), "0a".repeat(16));
    }
}
