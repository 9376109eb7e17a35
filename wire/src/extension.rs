//! Room for what later revisions add to a message without breaking older peers.

use serde::{Deserialize, Serialize};

use crate::bounded::List;

/// The most extensions one message may carry.
pub const MAX_EXTENSIONS: usize = 16;
/// The most bytes one extension's value may have.
pub const MAX_EXTENSION_LEN: usize = 1024;

/// One typed addition to a message.
///
/// An even type may be ignored by a peer that does not know it; an odd one must be understood, and
/// who does not know it refuses the message.
//= docs/protocol.md#4-extensions
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extension {
    /// What the value means.
    pub kind: u16,
    /// The value, in an encoding of the type's own.
    pub value: List<u8, MAX_EXTENSION_LEN>,
}

/// A message carries an extension that must be understood and is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("extension {0:#06x} must be understood and is unknown")]
pub struct UnknownExtension(pub u16);

/// The extensions of one message, in the order in which they were written.
pub type Extensions = List<Extension, MAX_EXTENSIONS>;

impl Extensions {
    /// Checks that nothing in the list demands to be understood; this build knows no extension.
    ///
    /// # Errors
    /// Names the first extension with an odd type.
    pub fn require_known(&self) -> Result<(), UnknownExtension> {
        match self.iter().find(|extension| extension.kind % 2 == 1) {
            Some(extension) => Err(UnknownExtension(extension.kind)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_odd_extension_must_be_understood_and_an_even_one_may_be_ignored() {
        let one =
            |kind| Extensions::try_from(vec![Extension { kind, value: List::default() }]).unwrap();
        assert_eq!(one(0x10).require_known(), Ok(()));
        assert_eq!(one(0x11).require_known(), Err(UnknownExtension(0x11)));
    }
}
