//! What all agents of one server share.

use std::{sync::Arc, time::Duration};

use culvert_transport::{Settings, budget::MemoryBudget};
use culvert_wire::ServerId;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{admission::Authenticator, sessions::Sessions, unadmitted::UnadmittedTable};
use crate::{
    backends::Backends, config::ExpireAgents, metrics::ServerMetrics, server_set::ServerSet,
};

/// What the connections of all agents of one server share.
#[derive(Debug)]
pub(crate) struct AgentContext {
    /// Backends, among which an agent is registered once it was admitted.
    pub(crate) backends: Backends,
    /// Authenticates agents.
    pub(crate) authenticator: Authenticator,
    /// Peers that are not admitted yet.
    pub(crate) unadmitted: Arc<UnadmittedTable>,
    /// Metrics.
    pub(crate) metrics: Arc<ServerMetrics>,
    /// Name of this server, which agents are sent.
    pub(crate) server_id: ServerId,
    /// Number of servers, which Konnectivity agents are sent.
    pub(crate) server_count: u32,
    /// The set of servers, which Culvert agents are sent.
    pub(crate) server_set: Arc<ServerSet>,
    /// Maximum number of streams that one agent carries at once.
    pub(crate) max_streams: u32,
    /// What the process may hold for its peers.
    pub(crate) memory: Arc<MemoryBudget>,
    /// Bytes per second that one tunnel may send a second time.
    pub(crate) hedge_rate: u32,
    /// The sessions of agents' processes.
    pub(crate) sessions: Sessions,
    /// Time for which draining tunnels are kept.
    pub(crate) drain_timeout: Duration,
    /// Which agents lose their tunnel when their proof has expired.
    pub(crate) expire_agents: ExpireAgents,
    /// Mean time between two reviews of the token of an agent that is connected; `None` for no
    /// reviews.
    pub(crate) recheck_interval: Option<Duration>,
    /// Cancelled when agents are to look for another server.
    pub(crate) draining: CancellationToken,
    /// Cancelled when tunnels are to be closed.
    pub(crate) closing: CancellationToken,
    /// Settings of tunnels.
    pub(crate) settings: Settings,
    /// Idle time after which a Konnectivity agent's connection is pinged; `None` never pings.
    pub(crate) konnectivity_keep_alive_interval: Option<Duration>,
    /// Tasks of all agents.
    pub(crate) tasks: TaskTracker,
}
