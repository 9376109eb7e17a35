//! Versions of the agents, as labels: what agents call themselves, and bounded all the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use culvert_process::metrics::Labels;
use parking_lot::Mutex;

use crate::backends::{Backend, registry::Candidate as _};

/// Maximum number of versions that have a series of their own for as long as the server runs.
const MAX_VERSIONS: usize = 32;
/// The version of all others.
const OTHER: &str = "other";

/// The versions that have a series.
#[derive(Debug, Default)]
pub(super) struct KnownVersions(Mutex<BTreeSet<String>>);

impl KnownVersions {
    /// Number of agent processes of each known version, of those that live now or lived before.
    pub(super) fn count(&self, tunnels: &[Arc<Backend>]) -> Vec<(Labels, usize)> {
        let processes: BTreeMap<_, _> = tunnels
            .iter()
            .map(|backend| ((backend.agent_id(), backend.instance().0), backend.software()))
            .collect();
        let mut known = self.0.lock();
        let mut counts: BTreeMap<String, usize> =
            known.iter().map(|version| (version.clone(), 0)).collect();
        for software in processes.into_values() {
            let version = match &**software {
                "" => "unknown",
                software => software,
            };
            let is_new = !known.contains(version);
            let version = match is_new && known.len() >= MAX_VERSIONS {
                true => OTHER,
                false => version,
            };
            if is_new && version != OTHER {
                known.insert(version.to_owned());
            }
            *counts.entry(version.to_owned()).or_default() += 1;
        }
        let label = |version| Labels::from([("version", version)]);
        counts.into_iter().map(|(version, count)| (label(version), count)).collect()
    }
}

#[cfg(test)]
mod tests {
    use culvert_wire::bounded::Text;

    use super::*;
    use crate::{
        backends::{Backends, Strategy},
        testing::TestAgent,
    };

    #[tokio::test(start_paused = true)]
    async fn versions_beyond_the_bound_are_one() {
        let backends = Backends::new(&[Strategy::Default]);
        let known = KnownVersions::default();
        let value = |version: &str| {
            let counts = known.count(&backends.all());
            counts.into_iter().find(|(labels, _)| labels[0].1 == version).map(|(_, count)| count)
        };
        let version = |number: usize| Text::truncated(format!("sample {number}"));
        let mut agents = Vec::new();
        for number in 0..MAX_VERSIONS {
            let name = format!("agent-{number}");
            agents.push(TestAgent::join_with(&backends, &name, version(number)).await);
            assert_eq!(value(&format!("sample {number}")), Some(1));
        }
        assert_eq!(value("other"), None);
        agents.push(TestAgent::join_with(&backends, "late", version(MAX_VERSIONS)).await);
        assert_eq!(value("other"), Some(1));
        agents.remove(0);
        assert_eq!((value("sample 0"), value("other")), (Some(0), Some(1)));
        agents.push(TestAgent::join_with(&backends, "again", version(1)).await);
        assert_eq!(value("sample 1"), Some(2));
    }
}
