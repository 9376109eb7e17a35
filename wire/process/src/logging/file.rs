//! A file that the log goes to: it begins again at its maximum size, and is opened again once its
//! name leads to another file.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Time between two looks at what the name leads to.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// File that the log goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFileConfig {
    /// Its path.
    pub path: PathBuf,
    /// Maximum size, in bytes; 0 is without limit. At this size the file is renamed, with `.1` behind
    /// its name in place of the one before, and a new one begins.
    pub max_size: u64,
    /// Whether the log goes to standard error as well.
    pub also_stderr: bool,
}

/// The open file.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    max_size: u64,
    /// `None` while it cannot be opened.
    file: Option<File>,
    size: u64,
    last_look: Instant,
}

/// Opens a file for appending, and makes it if it is not there.
///
/// # Errors
/// When that fails.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    File::options().append(true).create(true).open(path)
}

impl LogFile {
    /// Opens it.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub(super) fn new(config: &LogFileConfig) -> io::Result<Self> {
        let file = open(&config.path)?;
        let size = file.metadata()?.len();
        Ok(Self {
            path: config.path.clone(),
            max_size: config.max_size,
            file: Some(file),
            size,
            last_look: Instant::now(),
        })
    }

    /// Writes a line; whether all of it was written.
    pub(super) fn write(&mut self, line: &[u8]) -> bool {
        if self.last_look.elapsed() >= LOOK_INTERVAL {
            self.last_look = Instant::now();
            self.look();
        }
        let length = line.len() as u64;
        if self.max_size > 0 && self.size > 0 && self.size + length > self.max_size {
            // A file that cannot be renamed grows on; the next line tries again.
            if fs::rename(&self.path, before(&self.path)).is_ok() {
                self.open();
            }
        }
        let written = self.file.as_mut().is_some_and(|file| file.write_all(line).is_ok());
        self.size += if written { length } else { 0 };
        written
    }

    /// Opens the file again if another program has renamed, replaced or emptied it.
    fn look(&mut self) {
        let open = self.file.as_ref().and_then(|file| file.metadata().ok());
        match (open, fs::metadata(&self.path)) {
            (Some(open), Ok(named)) if (open.dev(), open.ino()) == (named.dev(), named.ino()) => {
                self.size = named.len();
            }
            _ => self.open(),
        }
    }

    fn open(&mut self) {
        self.file = open(&self.path).ok();
        let metadata = self.file.as_ref().and_then(|file| file.metadata().ok());
        self.size = metadata.map_or(0, |metadata| metadata.len());
    }
}

/// The name of the file that was full before.
fn before(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".1");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Setup {
        _folder: tempfile::TempDir,
        path: PathBuf,
        log: LogFile,
    }

    fn setup(max_size: u64) -> Setup {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("culvert.log");
        fs::write(&path, "before\n").unwrap();
        let config = LogFileConfig { path: path.clone(), max_size, also_stderr: false };
        let log = LogFile::new(&config).unwrap();
        Setup { _folder: folder, path, log }
    }

    #[test]
    fn a_file_begins_again_at_its_maximum_size_and_one_before_it_is_kept() {
        let Setup { _folder, path, mut log } = setup(20);
        for line in ["one........\n", "two........\n", "three......\n", "a line that is longer\n"] {
            assert!(log.write(line.as_bytes()));
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "a line that is longer\n");
        assert_eq!(fs::read_to_string(before(&path)).unwrap(), "three......\n");
    }

    #[test]
    fn a_file_without_a_maximum_size_grows() {
        let Setup { _folder, path, mut log } = setup(0);
        for _ in 0..1000 {
            assert!(log.write(b"line\n"));
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 5007);
        assert!(!before(&path).exists());
    }

    #[test]
    fn a_file_that_was_renamed_or_removed_is_made_again() {
        let Setup { _folder, path, mut log } = setup(0);
        fs::rename(&path, path.with_extension("old")).unwrap();
        log.look();
        assert!(log.write(b"one\n"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\n");
        fs::remove_file(&path).unwrap();
        log.look();
        assert!(log.write(b"two\n"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "two\n");
    }

    #[test]
    fn a_file_that_was_emptied_counts_from_there() {
        let Setup { _folder, path, mut log } = setup(20);
        assert!(log.write(b"one........\n"));
        File::create(&path).unwrap();
        log.look();
        assert!(log.write(b"two\n"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "two\n");
        assert!(!before(&path).exists());
    }

    #[test]
    fn a_file_that_cannot_be_opened_costs_its_lines_until_it_can() {
        let Setup { _folder, path, mut log } = setup(0);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        log.look();
        assert!(!log.write(b"lost\n"));
        fs::remove_dir(&path).unwrap();
        log.look();
        assert!(log.write(b"there\n"));
    }
}
