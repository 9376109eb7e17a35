//! What agents may say about themselves.

use std::str::FromStr;

use culvert_process::faults::Faults;
use culvert_wire::AgentId;
use ipnet::IpNet;

use super::{AgentIdentity, Flags};

/// What an agent's id and identifiers must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimRules {
    /// The rule for ids, host names and addresses.
    pub identity: AgentIdentity,
    /// Who may have which networks and default routes; counts unless the rule is `any`.
    pub allowed: Vec<AllowedRoute>,
}

/// A network or the default route that an agent may announce.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedRoute {
    /// Id of the agent; `None` for every agent.
    agent_id: Option<String>,
    /// The network, with those within it; `None` for the default route.
    network: Option<IpNet>,
}

impl ClaimRules {
    /// Whether the agent with this id may be a default route.
    pub(crate) fn allow_default_route(&self, agent_id: &AgentId) -> bool {
        self.of(agent_id).any(|allowed| allowed.network.is_none())
    }

    /// Whether the agent with this id may announce this network.
    pub(crate) fn allow_network(&self, agent_id: &AgentId, network: IpNet) -> bool {
        let mut networks = self.of(agent_id).filter_map(|allowed| allowed.network);
        networks.any(|allowed| allowed.contains(&network))
    }

    fn of(&self, agent_id: &AgentId) -> impl Iterator<Item = &AllowedRoute> {
        let is_of = move |allowed: &&AllowedRoute| {
            allowed.agent_id.as_deref().is_none_or(|allowed| allowed == agent_id.as_str())
        };
        self.allowed.iter().filter(is_of)
    }
}

impl FromStr for AllowedRoute {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault = || format!("{text:?} is not AGENT=default-route or AGENT=NETWORK/BITS");
        let (agent_id, route) = text.split_once('=').ok_or_else(fault)?;
        let agent_id = match agent_id {
            "*" => None,
            id => Some(id.parse::<AgentId>().map_err(|_| fault())?.as_str().to_owned()),
        };
        let network = match route {
            "default-route" => None,
            network => Some(network.parse().map_err(|_| fault())?),
        };
        Ok(Self { agent_id, network })
    }
}

/// Checks the list, whose every fault is reported.
pub(super) fn check(flags: &Flags, identity: AgentIdentity, faults: &mut Faults) -> ClaimRules {
    const FLAG: &str = "agent-identity-allow";
    let mut allowed = Vec::new();
    let entries = flags.agent_identity_allow.iter().flat_map(|list| list.split(','));
    for entry in entries.map(str::trim).filter(|entry| !entry.is_empty()) {
        match entry.parse() {
            Ok(route) => allowed.push(route),
            Err(fault) => faults.add(FLAG, fault),
        }
    }
    if identity == AgentIdentity::Any && !allowed.is_empty() {
        faults.warn(FLAG, "has no effect without --agent-identity=node or certificate");
    }
    ClaimRules { identity, allowed }
}
