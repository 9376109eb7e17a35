//! Typed additions to a message, by which later revisions extend it without breaking older peers.

use serde::{Deserialize, Serialize};

use crate::{
    bounded::{List, Text},
    codec::{self, DecodeError},
    resume::SessionInfo,
};

/// Maximum number of extensions in one message.
pub const MAX_EXTENSIONS: usize = 16;
/// Maximum length of an extension's value, in bytes.
pub const MAX_EXTENSION_LEN: usize = 1024;

/// Type of the extension of a welcome that has the name and version of the server's software.
pub const SOFTWARE: u16 = 0x0002;

/// Type of the extension of a welcome that has the [`SessionInfo`].
pub const SESSION: u16 = 0x0004;

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

/// The session of a welcome cannot be read; the welcome is then refused.
//= docs/protocol.md#5-control-stream
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSession {
    /// The value is not the encoding of a [`SessionInfo`].
    #[error("session of the welcome: {0}")]
    Malformed(#[from] DecodeError),
    /// The welcome has several.
    #[error("welcome with several sessions")]
    Repeated,
}

/// The extensions of one message, in the order in which they were written.
pub type Extensions = List<Extension, MAX_EXTENSIONS>;

impl Extensions {
    /// The extensions of a welcome: name and version of the server's software, and the session
    /// where [`Features::RESUME`](crate::version::Features::RESUME) is agreed.
    pub fn of_welcome(software: &Text<64>, session: Option<&SessionInfo>) -> Self {
        let mut extensions = vec![(SOFTWARE, software.as_bytes().to_vec())];
        if let Some(session) = session {
            let mut value = Vec::new();
            // A session takes at most 25 bytes, which fit every limit.
            if codec::encode(session, &mut value).is_ok() {
                extensions.push((SESSION, value));
            }
        }
        let extension =
            |(kind, value)| Extension { kind, value: List::try_from(value).unwrap_or_default() };
        let extensions: Vec<_> = extensions.into_iter().map(extension).collect();
        Self::try_from(extensions).unwrap_or_default()
    }

    /// The session of a welcome; `None` if it has none.
    ///
    /// # Errors
    /// When the value is malformed, or there are several. The welcome is then to be refused.
    pub fn session(&self) -> Result<Option<SessionInfo>, InvalidSession> {
        let mut sessions = self.iter().filter(|extension| extension.kind == SESSION);
        let Some(session) = sessions.next() else { return Ok(None) };
        if sessions.next().is_some() {
            return Err(InvalidSession::Repeated);
        }
        Ok(Some(codec::decode(&session.value)?))
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
    use crate::ids::InstanceId;

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
        let extensions = Extensions::of_welcome(&software, None);
        assert_eq!(extensions.software(), Some(software));
        assert_eq!(extensions.session(), Ok(None));
        assert_eq!(extensions.require_known(), Ok(()));
        assert_eq!(Extensions::default().software(), None);
    }

    #[test]
    fn the_session_is_what_was_written_and_may_be_ignored() {
        let session = SessionInfo { instance: InstanceId([7; 16]), tunnel: u64::MAX };
        let software = Text::truncated("culvert-server 1".into());
        let extensions = Extensions::of_welcome(&software, Some(&session));
        assert_eq!(extensions.session(), Ok(Some(session)));
        assert_eq!(extensions.software(), Some(software));
        assert_eq!(extensions.require_known(), Ok(()));
    }

    #[test]
    fn a_session_that_is_malformed_or_repeated_is_refused() {
        let read = |values: &[&[u8]]| {
            let extension = |value: &&[u8]| Extension {
                kind: SESSION,
                value: List::try_from(value.to_vec()).unwrap(),
            };
            let extensions: Vec<_> = values.iter().map(extension).collect();
            Extensions::try_from(extensions).unwrap().session()
        };
        assert_eq!(read(&[&[1; 17]]).unwrap().unwrap().tunnel, 1);
        for short in 0..17 {
            let refused = read(&[&vec![1; short]]);
            let malformed =
                matches!(refused, Err(InvalidSession::Malformed(DecodeError::Malformed(_))));
            assert!(malformed, "{short} bytes: {refused:?}");
        }
        let trailing = InvalidSession::Malformed(DecodeError::TrailingBytes(1));
        assert_eq!(read(&[&[1; 18]]), Err(trailing));
        assert_eq!(read(&[&[1; 17], &[1; 17]]), Err(InvalidSession::Repeated));
    }
}
