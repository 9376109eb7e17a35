//! Agents that share an id: several live processes, which a cloned machine or a fixed `--agent-id`
//! leads to. Dials for one of them reach the other.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use culvert_process::rate_limited;
use culvert_wire::AgentId;

use super::{Backend, Backends, registry::Candidate};

/// Time for which two processes must both have been heard: one that is started again leaves a
/// tunnel behind for as long as it takes to notice.
const BOTH_HEARD: Duration = Duration::from_secs(5);
/// Minimum time between two log lines about one id.
const LOG_INTERVAL: Duration = Duration::from_secs(600);

/// Ids of which several live processes have a tunnel that does not drain.
pub(crate) fn duplicates(backends: &[Arc<Backend>]) -> BTreeSet<AgentId> {
    let mut by_id: BTreeMap<&AgentId, Vec<&Arc<Backend>>> = BTreeMap::new();
    for backend in backends.iter().filter(|backend| !backend.is_draining()) {
        by_id.entry(backend.agent_id()).or_default().push(backend);
    }
    by_id
        .into_iter()
        .filter(|(_, tunnels)| are_several(tunnels))
        .map(|(id, _)| id.clone())
        .collect()
}

/// Whether tunnels, in the order of arrival, are of several live processes.
fn are_several(tunnels: &[&Arc<Backend>]) -> bool {
    let Some(newest) = tunnels.last() else { return false };
    tunnels.iter().any(|older| {
        older.instance() != newest.instance() && older.is_heard_since(newest, BOTH_HEARD)
    })
}

impl Backends {
    /// Logs the ids that several live agents have.
    pub(super) fn report_duplicates(&self) {
        let all = self.all();
        for agent_id in duplicates(&all) {
            let remotes: Vec<_> = all
                .iter()
                .filter(|backend| *backend.agent_id() == agent_id)
                .map(|backend| backend.tunnel.remote_address().to_string())
                .take(8)
                .collect();
            rate_limited!(
                LOG_INTERVAL, per agent_id = agent_id, WARN, remotes = remotes.join(","),
                "several live agents have one id"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;
    use crate::{backends::Strategy, testing::TestAgent};

    #[tokio::test(start_paused = true)]
    async fn an_id_is_shared_once_an_older_process_is_heard_long_after_a_newer_one_came() {
        let backends = Backends::new(&[Strategy::Default]);
        let ids = || duplicates(&backends.all()).len();
        let one = TestAgent::join_as(&backends, "a", 1).await;
        let two = TestAgent::join_as(&backends, "a", 2).await;
        let _other = TestAgent::join(&backends, "b").await;
        assert_eq!(ids(), 0);
        advance(BOTH_HEARD + Duration::from_secs(1)).await;
        assert_eq!(ids(), 0, "the older one may be gone");
        one.backend.heard.hear();
        assert_eq!(ids(), 1);
        backends.drain(&one.backend);
        assert_eq!(ids(), 0, "it leaves");
        drop(two);
    }
}
