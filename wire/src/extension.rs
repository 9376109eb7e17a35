//! Typed additions to a message, by which later revisions extend it without breaking older peers.

use serde::{Deserialize, Serialize};

use crate::bounded::{List, Text};

/// Maximum number of extensions in one message.
pub const MAX_EXTENSIONS: usize = 16;
/// Maximum length of an extension's value, in bytes.
pub const MAX_EXTENSION_LEN: usize = 1024;

/// Type of the extension of a welcome that has the name and version of the server's software.
pub const SOFTWARE: u16 = 0x0002;

/// One typed addition to a message.
///
/// A peer that does not know a type ignores the extension if the type is even, and refuses the
/// message if it is odd.
//= docs/protocol.md#4-extensions
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extension {
    /// The type, which says what the value means.
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
    /// The list that has the name and version of the software alone.
    pub fn software_alone(software: &Text<64>) -> Self {
        let value = List::try_from(software.as_bytes().to_vec()).unwrap_or_default();
        Self::try_from(vec![Extension { kind: SOFTWARE, value }]).unwrap_or_default()
    }

    /// Name and version of the peer's software, as it says; `None` if it does not.
    pub fn software(&self) -> Option<Text<64>> {
        let extension = self.iter().find(|extension| extension.kind == SOFTWARE)?;
        Some(Text::lossy(&extension.value))
    }

    /// Checks that no extension in the list must be understood; this build knows none.
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

    #[test]
    fn the_software_is_what_was_written() {
        let software = Text::truncated("culvert-server 1".into());
        let extensions = Extensions::software_alone(&software);
        assert_eq!(extensions.software(), Some(software));
        assert_eq!(extensions.require_known(), Ok(()));
        assert_eq!(Extensions::default().software(), None);
    }
}
