//! Applies the egress policy to the addresses of a target, and reports what it denies.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use culvert_process::rate_limited;
use culvert_transport::tls::Current;
use culvert_wire::{
    Target,
    dial::{DialErrorKind, DialFailure, Network},
};

use super::policy::{Decision, Policy, Rule};
use crate::metrics::AgentMetrics;

/// Minimum time between two log lines about one target.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// The policy in force.
#[derive(Debug)]
pub(crate) struct Gate {
    policy: Current<Policy>,
    /// Whether denials are only counted and logged.
    audit: bool,
    metrics: Arc<AgentMetrics>,
}

impl Gate {
    /// Applies `policy` as it is at each dial. With `audit` it refuses nothing.
    pub(crate) fn new(policy: Current<Policy>, audit: bool, metrics: Arc<AgentMetrics>) -> Self {
        Self { policy, audit, metrics }
    }

    /// Applies this policy for ever, with metrics of its own.
    #[cfg(test)]
    pub(crate) fn open(policy: Policy) -> Self {
        Self::new(Current::fixed(policy), false, Arc::new(AgentMetrics::new().unwrap()))
    }

    /// The addresses of `target` that the agent may connect to; at least one.
    ///
    /// # Errors
    /// When it may connect to none.
    pub(super) fn permitted(
        &self,
        family: Network,
        target: &Target,
        mut addresses: Vec<SocketAddr>,
    ) -> Result<Vec<SocketAddr>, DialFailure> {
        let policy = self.policy.get();
        let mut first = None;
        addresses.retain(|address| match policy.decide(*address) {
            Decision::Allowed => true,
            Decision::Denied(rule) => {
                self.metrics.egress_denied(rule.label(), self.audit);
                first.get_or_insert((*address, rule));
                self.audit
            }
        });
        let Some((address, rule)) = first else { return Ok(addresses) };
        self.log(target, address, rule);
        match addresses.is_empty() {
            true => Err(refusal(family, address, rule)),
            false => Ok(addresses),
        }
    }

    fn log(&self, target: &Target, address: SocketAddr, rule: Rule) {
        let refused = !self.audit;
        rate_limited!(
            LOG_INTERVAL, per dial_target = target, WARN, %address, %rule, refused,
            "the egress policy denies an address"
        );
    }
}

/// A denial in the form of Go's dial errors.
fn refusal(family: Network, address: SocketAddr, rule: Rule) -> DialFailure {
    let family = family.name();
    let text = format!("dial {family} {address}: refused by the agent's egress policy ({rule})");
    DialFailure::new(DialErrorKind::FORBIDDEN, text)
}
