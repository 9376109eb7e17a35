//! What the server answers to operators.

use std::sync::Arc;

use culvert_process::operator::{
    socket::{Answer, Answers, Refusal, Request, json},
    streams::LiveStreams,
};
use culvert_wire::AgentId;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::agents;
use crate::backends::Backends;

/// The answer to an eviction, or to a drain of an agent.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Concerned {
    /// Number of tunnels that it concerns.
    pub(super) tunnels: usize,
}

/// What operators see, and what they may change.
#[derive(Clone, Debug)]
pub(crate) struct Operated {
    /// The agents.
    pub(crate) backends: Backends,
    /// The spliced streams.
    pub(crate) streams: LiveStreams,
    /// Cancelled when an operator wants the server to drain and to end.
    pub(crate) stop: CancellationToken,
}

impl Operated {
    /// The answers, for the operator's socket.
    pub(crate) fn answers(self) -> Answers {
        Arc::new(move |request| self.answer(request))
    }

    fn answer(&self, request: &Request<'_>) -> Answer {
        match (request.path, request.changes) {
            ("/agents", false) => json(&agents::list(&self.backends)),
            ("/streams", false) => json(&self.streams.answer(request)?),
            ("/evict", true) => self.evict(&agent(request)?),
            ("/drain", true) => match request.parameter("agent") {
                Some(_) => self.drain_agent(&agent(request)?),
                None => self.drain(),
            },
            ("/agents" | "/streams" | "/evict" | "/drain", _) => Err(Refusal::OtherMethod),
            _ => Err(Refusal::NO_SUCH_PATH),
        }
    }

    fn evict(&self, agent_id: &AgentId) -> Answer {
        let tunnels = self.backends.evict(agent_id);
        concerned(tunnels).inspect(|_| info!(%agent_id, tunnels, "an operator evicts an agent"))
    }

    fn drain_agent(&self, agent_id: &AgentId) -> Answer {
        let tunnels = self.backends.drain_agent(agent_id);
        concerned(tunnels).inspect(|_| info!(%agent_id, tunnels, "an operator drains an agent"))
    }

    fn drain(&self) -> Answer {
        let tunnels = self.backends.all().len();
        info!(tunnels, "an operator drains the server");
        self.stop.cancel();
        json(&Concerned { tunnels })
    }
}

fn agent(request: &Request<'_>) -> Result<AgentId, Refusal> {
    let name = request.parameter("agent").and_then(|name| name.parse().ok());
    name.ok_or(Refusal::Invalid("?agent= must name an agent"))
}

fn concerned(tunnels: usize) -> Answer {
    match tunnels {
        0 => Err(Refusal::NotFound(
            "no such agent is connected to this server; see culvert-server agents",
        )),
        tunnels => json(&Concerned { tunnels }),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use culvert_process::operator::streams::Side;
    use tokio::time::timeout;

    use super::*;
    use crate::{
        backends::{Dismissal, Strategy},
        testing::{TestAgent, target},
    };

    fn operated() -> Operated {
        Operated {
            backends: Backends::new(&[Strategy::Default]),
            streams: LiveStreams::new(Side::Server),
            stop: CancellationToken::new(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_eviction_dismisses_every_tunnel_of_the_agent_and_no_other() {
        let operated = operated();
        let one = TestAgent::join(&operated.backends, "a/b c").await;
        let two = TestAgent::join(&operated.backends, "a/b c").await;
        let other = TestAgent::join(&operated.backends, "other").await;
        let ask = |path, changes| operated.answer(&Request::new(path, changes)).map(|_| ());
        assert_eq!(ask("/evict?agent=other", false), Err(Refusal::OtherMethod));
        assert!(matches!(ask("/evict", true), Err(Refusal::Invalid(_))));
        assert!(matches!(ask("/evict?agent=%0a", true), Err(Refusal::Invalid(_))));
        assert!(matches!(ask("/evict?agent=nobody", true), Err(Refusal::NotFound(_))));
        assert_eq!(ask("/evict?agent=a%2Fb+c", true), Ok(()));
        for agent in [&one, &two] {
            assert_eq!(agent.backend.dismissed().await, Dismissal::Evicted);
        }
        let dismissed = timeout(Duration::from_secs(1), other.backend.dismissed()).await;
        assert!(dismissed.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_drained_agent_gets_dials_only_while_there_is_no_other() {
        let operated = operated();
        let backends = &operated.backends;
        let one = TestAgent::join(backends, "one").await;
        let ask = |path, changes| operated.answer(&Request::new(path, changes)).map(|_| ());
        assert!(matches!(ask("/drain?agent=two", true), Err(Refusal::NotFound(_))));
        assert!(matches!(ask("/drain?agent=", true), Err(Refusal::Invalid(_))));
        assert_eq!(ask("/drain?agent=one", true), Ok(()));
        let agent =
            || backends.choose(&target("t:1")).map(|chosen| Arc::ptr_eq(&chosen, &one.backend));
        assert_eq!(agent(), Some(true));
        let _two = TestAgent::join(backends, "two").await;
        assert_eq!(agent(), Some(false));
        assert!(!operated.stop.is_cancelled());
    }

    #[test]
    fn a_drain_of_the_server_stops_it() {
        let operated = operated();
        assert_eq!(operated.answer(&Request::new("/drain", false)), Err(Refusal::OtherMethod));
        assert!(!operated.stop.is_cancelled());
        assert!(operated.answer(&Request::new("/drain", true)).is_ok());
        assert!(operated.stop.is_cancelled());
        assert_eq!(operated.answer(&Request::new("/other", true)), Err(Refusal::NO_SUCH_PATH));
    }
}
