//! Network namespaces, which a process may not make everywhere.

use std::{io::Write as _, path::Path};

use culvert_loadtest::link::{Host, Link, LinkError, LinkSettings};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// Skips the tests that need network namespaces.
const WITHOUT_NETNS: &str = "CULVERT_WITHOUT_NETNS";

/// A link with these settings; `None` when tests with namespaces are skipped.
pub(crate) fn link(settings: &LinkSettings) -> Option<Link> {
    unless_skipped(|| Link::start(settings, 1))
}

/// Whether tests with network namespaces are to run.
pub(crate) fn has_namespaces() -> bool {
    unless_skipped(Host::new).is_some()
}

/// A network namespace; `None` when tests with namespaces are skipped.
pub(crate) fn namespace() -> Option<Host> {
    unless_skipped(Host::new)
}

fn unless_skipped<T>(make: impl FnOnce() -> Result<T, LinkError>) -> Option<T> {
    if super::skips(WITHOUT_NETNS) {
        return None;
    }
    match make() {
        Ok(made) => Some(made),
        Err(LinkError::NotPermitted(error)) => panic!(
            "this process may not make network namespaces ({error}); \
             {WITHOUT_NETNS}=1 skips the tests that need them"
        ),
        Err(error) => panic!("{error}"),
    }
}

/// Gives this thread, and the threads and processes that it starts, a file of their own in place of
/// one of the system's.
pub(crate) fn replace_file(path: &str, contents: &str) -> std::io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&Path>, "/", None::<&Path>, private, None::<&Path>)?;
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(contents.as_bytes())?;
    mount(Some(file.path()), path, None::<&Path>, MsFlags::MS_BIND, None::<&Path>)?;
    Ok(())
}
