//! How a backend has left, and for how long it is expected back.

use std::time::Duration;

use culvert_transport::TunnelLost;
use culvert_wire::CloseCode;

/// Time for which an agent that left in order is expected back: one that is updated may be started
/// again within a second, and one whose node is removed does not return.
pub const RETURN_LIMIT: Duration = Duration::from_millis(1500);
/// Time for which an agent whose tunnel was lost is expected back. It is alive, or it is started
/// again: an agent whose path fell silent notices that within 7 s at the default keep-alive
/// interval, and has another tunnel a few round trips later.
pub const LOST_RETURN_LIMIT: Duration = Duration::from_secs(10);
/// Time after the start of the server for which any agent is expected: those of the server before
/// it have lost their tunnels when that one ended, at most so long ago.
pub(crate) const START_LIMIT: Duration = LOST_RETURN_LIMIT;

/// How a backend has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// The agent closed its tunnel because it was done or stopped.
    InOrder,
    /// The tunnel was lost: the path, the agent's process or the node failed.
    Lost,
}

impl Departure {
    /// The departure of a backend whose tunnel ended for this reason.
    pub(crate) fn of(lost: &TunnelLost) -> Self {
        match lost {
            TunnelLost::ClosedByPeer { code: CloseCode::DONE | CloseCode::SHUTDOWN, .. } => {
                Self::InOrder
            }
            _ => Self::Lost,
        }
    }

    /// Time for which the backend is expected back.
    pub(crate) fn return_limit(self) -> Duration {
        match self {
            Self::InOrder => RETURN_LIMIT,
            Self::Lost => LOST_RETURN_LIMIT,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_agent_that_closes_its_tunnel_because_it_stops_leaves_in_order() {
        let by_peer = |code| TunnelLost::ClosedByPeer {
            code,
            reason: culvert_wire::bounded::PeerText::default(),
        };
        let here = |code| TunnelLost::ClosedHere { code, reason: String::new() };
        for (lost, departure) in [
            (by_peer(CloseCode::DONE), Departure::InOrder),
            (by_peer(CloseCode::SHUTDOWN), Departure::InOrder),
            (by_peer(CloseCode::UNRESPONSIVE), Departure::Lost),
            (by_peer(CloseCode::ABANDONED), Departure::Lost),
            (here(CloseCode::UNRESPONSIVE), Departure::Lost),
            (TunnelLost::TimedOut, Departure::Lost),
            (TunnelLost::PeerRestarted, Departure::Lost),
        ] {
            assert_eq!(Departure::of(&lost), departure, "{lost}");
        }
    }
}
