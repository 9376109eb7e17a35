//! The name by which a process was started, which decides its default ports.

use std::{ffi::OsStr, path::Path};

/// The set of default ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Invocation {
    /// Konnectivity's ports, for a process that was started as `proxy-server` or `proxy-agent` by
    /// Konnectivity's manifests.
    Konnectivity,
    /// For any other name: the ports of Kubernetes' manifests for the server (8132, 8133, 8134), and
    /// others for the agent (8135, 8136), so that both run on one host.
    Culvert,
}

impl Invocation {
    /// The defaults for `argv[0]`, of which only the last path component counts.
    pub fn from_argv0(argv0: Option<&OsStr>) -> Self {
        let name = argv0.and_then(|argv0| Path::new(argv0).file_name()).and_then(OsStr::to_str);
        match name {
            Some(name) if name.starts_with("proxy-") => Self::Konnectivity,
            _ => Self::Culvert,
        }
    }

    /// The one of two defaults that applies.
    pub fn choose<T>(self, konnectivity: T, culvert: T) -> T {
        match self {
            Self::Konnectivity => konnectivity,
            Self::Culvert => culvert,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_component_of_the_path_decides() {
        for (argv0, invocation) in [
            ("/proxy-server", Invocation::Konnectivity),
            ("proxy-agent", Invocation::Konnectivity),
            ("./bin/proxy-agent", Invocation::Konnectivity),
            ("/proxy-server/culvert-server", Invocation::Culvert),
            ("culvert-agent", Invocation::Culvert),
            ("", Invocation::Culvert),
        ] {
            assert_eq!(Invocation::from_argv0(Some(OsStr::new(argv0))), invocation, "{argv0}");
        }
        assert_eq!(Invocation::from_argv0(None), Invocation::Culvert);
    }
}
