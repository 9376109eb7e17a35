//! Strategies: by which keys a backend is found, and by which key a target looks for one.

use super::registry::Candidate;

/// Rule that chooses an agent for a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// Any agent.
    Default,
    /// The agent that announced the target's host.
    DestHost,
    /// An agent that announced the default route.
    DefaultRoute,
}

impl Strategy {
    /// The strategy of this name in flags; `None` if there is no such strategy.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::Default, Self::DestHost, Self::DefaultRoute]
            .into_iter()
            .find(|strategy| strategy.name() == name)
    }

    /// The strategy's name in flags and metric labels.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::DestHost => "destHost",
            Self::DefaultRoute => "defaultRoute",
        }
    }

    /// The keys under which this strategy finds a backend; none if it never would.
    pub(super) fn keys<B: Candidate>(self, backend: &B) -> Vec<String> {
        let agent_id = || vec![backend.agent_id().as_str().to_owned()];
        match self {
            Self::Default => agent_id(),
            Self::DefaultRoute if backend.identifiers().is_default_route() => agent_id(),
            Self::DefaultRoute => Vec::new(),
            Self::DestHost => {
                let mut hosts: Vec<_> = backend.identifiers().hosts().map(str::to_owned).collect();
                hosts.sort_unstable();
                hosts.dedup();
                hosts
            }
        }
    }
}
