//! Network namespaces, which a process may not make everywhere.

use culvert_loadtest::link::{Host, Link, LinkError, LinkSettings};

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
