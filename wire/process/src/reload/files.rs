//! What a set of files holds, and which files it was made of.

use std::{
    io,
    path::{Path, PathBuf},
};

use culvert_transport::tls::{TlsError, read_file};
use culvert_wire::control::Secret;
use nix::unistd::{getegid, geteuid};

use super::{
    certificates::Validity,
    expiry::{Expiries, Life},
};
use crate::descriptors::is_shortage;

/// Why a set of files cannot be used, with the name of the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LoadError(String);

impl LoadError {
    /// An error with this text, which names the file.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl From<TlsError> for LoadError {
    fn from(error: TlsError) -> Self {
        Self(error.to_string())
    }
}

/// Reads the files of a set, and remembers what it was made of.
#[derive(Debug, Default)]
pub struct Files {
    seen: Vec<Seen>,
    warnings: Vec<String>,
    unfit: Vec<String>,
    certificates: Vec<Validity>,
    /// When the token of the set is valid, if it has one with dates.
    token: Option<Life>,
    /// When the certificate that this process presents is valid.
    presented: Option<Validity>,
    /// Why the files could not be looked at, which says nothing about them.
    shortage: Option<io::Error>,
}

/// A file, and what was found there.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    path: PathBuf,
    found: Found,
}

/// What was found at a path.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// SHA-256 of the contents, so that keys are not kept.
    Contents(Vec<u8>),
    Error(String),
}

impl Files {
    /// Reads a file of at most 4 MiB. It blocks.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(&mut self, path: &Path) -> Result<Vec<u8>, LoadError> {
        let (found, contents) = look_at(path);
        self.seen.push(Seen { path: path.into(), found });
        contents.map_err(|error| {
            let who = match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    format!("; this process is user {} and group {}", geteuid(), getegid())
                }
                _ => String::new(),
            };
            let text = format!("cannot read {}: {error}{who}", path.display());
            self.shortage = Some(error).filter(is_shortage).or_else(|| self.shortage.take());
            LoadError(text)
        })
    }

    /// Why the files could not be looked at: no descriptor was left.
    pub(super) fn shortage(&mut self) -> Option<io::Error> {
        self.shortage.take()
    }

    /// Reads a token, without the white space around it.
    ///
    /// # Errors
    /// When the file cannot be read, or holds no token.
    pub fn token(&mut self, path: &Path) -> Result<Secret, LoadError> {
        let fault = |reason: String| LoadError(format!("{}: {reason}", path.display()));
        let contents = self.read(path)?;
        let text = str::from_utf8(&contents).map_err(|_| fault("holds no text".into()))?.trim();
        if text.is_empty() {
            return Err(fault("holds no token".into()));
        }
        self.record_token(text);
        Secret::new(text).map_err(|error| fault(error.to_string()))
    }

    /// Reads a secret of any form.
    ///
    /// # Errors
    /// When the file cannot be read, or is empty.
    pub fn secret(&mut self, path: &Path) -> Result<Vec<u8>, LoadError> {
        let contents = self.read(path)?;
        match contents.trim_ascii().is_empty() {
            true => Err(LoadError(format!("{}: holds no secret", path.display()))),
            false => Ok(contents),
        }
    }

    /// Records a fault that does not keep the set from being used.
    pub fn warn(&mut self, text: impl Into<String>) {
        self.warnings.push(text.into());
    }

    /// Records why a certificate does not fit its use, which peers may or may not accept.
    pub(super) fn warn_of_use(&mut self, text: String) {
        self.unfit.push(text);
    }

    /// Records until when a certificate of the set is valid.
    pub(super) fn record(&mut self, validity: Validity) {
        self.certificates.push(validity);
    }

    /// Records until when the token of the set is valid, if it says so.
    pub(crate) fn record_token(&mut self, token: &str) {
        self.token = Life::of_token(token);
    }

    /// Records the certificate that this process presents.
    pub(super) fn record_presented(&mut self, validity: Validity) {
        self.presented = Some(validity);
    }

    /// Whether every file is as it was when it was read.
    ///
    /// # Errors
    /// When no descriptor is left to look at them.
    pub(crate) fn are_unchanged(&self) -> io::Result<bool> {
        for seen in &self.seen {
            match look_at(&seen.path) {
                (_, Err(error)) if is_shortage(&error) => return Err(error),
                (found, _) if found != seen.found => return Ok(false),
                _ => {}
            }
        }
        Ok(true)
    }

    /// Whether the same was found in the same files.
    pub(super) fn found_the_same(&self, other: &Self) -> bool {
        self.seen == other.seen
    }

    /// The faults that do not keep the set from being used.
    pub(super) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Why certificates of the set do not fit their use.
    pub(super) fn unfit(&self) -> &[String] {
        &self.unfit
    }

    /// The certificate that this process presents, if the set has one.
    pub(super) fn presented(&self) -> Option<&Validity> {
        self.presented.as_ref()
    }

    /// The certificates and the token of the set.
    pub(super) fn expiries(&self) -> Expiries {
        Expiries::new(&self.certificates, self.token)
    }

    /// When the token of the set is valid.
    pub(super) fn token_life(&self) -> Option<Life> {
        self.token
    }

    /// Whether the set has a certificate.
    pub(super) fn certificates(&self) -> &[Validity] {
        &self.certificates
    }
}

fn look_at(path: &Path) -> (Found, io::Result<Vec<u8>>) {
    let read = read_file(path);
    let found = match &read {
        Ok(contents) => Found::Contents(digest(contents)),
        Err(error) => Found::Error(error.to_string()),
    };
    (found, read)
}

fn digest(contents: &[u8]) -> Vec<u8> {
    use aws_lc_rs::digest::{SHA256, digest};
    digest(&SHA256, contents).as_ref().to_vec()
}
