//! What the agent answers to operators.

use std::sync::Arc;

use culvert_process::operator::{
    socket::{Answer, Answers, Refusal, Request, json},
    streams::LiveStreams,
};
use culvert_transport::{
    budget::MemoryBudget,
    tls::{Current, Identity},
};
use culvert_wire::{AgentId, control::Secret};
use tokio::time::Instant;

use super::status::status;
use crate::{
    config::{Policy, Transport},
    tunnels::ServerTunnels,
};

/// What operators see.
#[derive(Debug)]
pub(crate) struct Operated {
    /// The agent's name.
    pub(crate) agent_id: AgentId,
    /// When the agent started.
    pub(crate) since: Instant,
    /// Carriers that tunnels may have.
    pub(crate) transport: Transport,
    /// The tunnels.
    pub(crate) tunnels: Arc<ServerTunnels>,
    /// The spliced streams.
    pub(crate) streams: LiveStreams,
    /// The agent's certificate, if it has one.
    pub(crate) certificate: Option<Current<Identity>>,
    /// The agent's token, if it has one.
    pub(crate) token: Option<Current<Secret>>,
    /// Rules for targets.
    pub(crate) policy: Current<Policy>,
    /// Where the rules come from.
    pub(crate) policy_source: String,
    /// Whether denials are only counted and logged.
    pub(crate) audit: bool,
    /// What the process may hold for its peers.
    pub(crate) memory: Arc<MemoryBudget>,
}

impl Operated {
    /// The answers, for the operator's socket.
    pub(crate) fn answers(self) -> Answers {
        Arc::new(move |request| self.answer(request))
    }

    fn answer(&self, request: &Request<'_>) -> Answer {
        match (request.path, request.changes) {
            ("/status", false) => json(&status(self)),
            ("/streams", false) => json(&self.streams.answer(request)?),
            ("/status" | "/streams", true) => Err(Refusal::OtherMethod),
            _ => Err(Refusal::NO_SUCH_PATH),
        }
    }
}
