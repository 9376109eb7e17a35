//! Why no backend takes a dial, in words for the person who waits behind the frontend.
//!
//! The words name agents and the target that was asked for, never an address of an agent, a text
//! that a peer wrote, or what proves an identity.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::Arc,
    time::Duration,
};

use culvert_transport::{Carrier, TunnelLost};
use culvert_wire::{AgentId, CloseCode};
use tokio::time::Instant;

/// Maximum number of keys whose last backend is remembered.
const MAX_REMEMBERED: usize = 4096;

/// How the last backend of a key has left.
#[derive(Clone, Debug)]
pub(crate) struct Departed {
    /// Whose backend it was.
    pub(crate) agent_id: AgentId,
    /// When it left.
    pub(crate) at: Instant,
    /// Carrier of its tunnel.
    pub(crate) carrier: Carrier,
    /// How its tunnel ended.
    pub(crate) cause: &'static str,
    /// Share of the packets to it that were lost lately, in percent; `None` where that is not known.
    pub(crate) loss_percent: Option<u8>,
}

/// How a tunnel ended, behind the name of its agent.
pub(super) fn cause(lost: &TunnelLost) -> &'static str {
    match lost {
        TunnelLost::ClosedByPeer { code, .. } => match *code {
            CloseCode::DONE | CloseCode::SHUTDOWN => "it was stopped",
            CloseCode::UNRESPONSIVE => "it got no answers from this server",
            _ => "it closed the tunnel",
        },
        TunnelLost::ClosedHere { code, .. } => match *code {
            CloseCode::EVICTED => "evicted by an operator",
            CloseCode::UNAUTHENTICATED => "the proof of its identity had expired",
            CloseCode::UNRESPONSIVE => "it did not answer",
            CloseCode::SHUTDOWN => "this server stops",
            _ => "closed by this server",
        },
        TunnelLost::TimedOut => "timed out",
        TunnelLost::PeerRestarted => "it was restarted",
        TunnelLost::Transport(_) => "the connection failed",
    }
}

impl Departed {
    fn write(&self, f: &mut fmt::Formatter<'_>, now: Instant) -> fmt::Result {
        let ago = Ago(now.saturating_duration_since(self.at));
        let (cause, carrier) = (self.cause, self.carrier.name());
        write!(f, "{} left {ago} ago ({cause} over {carrier}", self.agent_id)?;
        if let Some(percent) = self.loss_percent.filter(|percent| *percent > 0) {
            write!(f, "; {percent} % loss in its last minute")?;
        }
        f.write_str(")")
    }
}

/// A time that has passed, in the largest unit that keeps two digits.
struct Ago(Duration);

impl fmt::Display for Ago {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_secs() {
            0..10 => write!(f, "{:.1} s", self.0.as_secs_f64()),
            seconds @ 10..120 => write!(f, "{seconds} s"),
            seconds @ 120..7200 => write!(f, "{} min", seconds / 60),
            seconds @ 7200..172_800 => write!(f, "{} h", seconds / 3600),
            seconds => write!(f, "{} days", seconds / 86400),
        }
    }
}

/// The last backend of each key that has left. Bounded: the key that was left first is forgotten.
#[derive(Debug, Default)]
pub(super) struct Departures {
    by_key: HashMap<String, Arc<Departed>>,
    order: VecDeque<(String, Instant)>,
    last: Option<Arc<Departed>>,
}

impl Departures {
    /// Remembers that a backend with these keys has left.
    pub(super) fn note(&mut self, keys: Vec<String>, departed: Departed) {
        let departed = Arc::new(departed);
        for key in keys {
            self.order.push_back((key.clone(), departed.at));
            self.by_key.insert(key, departed.clone());
        }
        self.last = Some(departed);
        while self.order.len() > MAX_REMEMBERED
            && let Some((key, at)) = self.order.pop_front()
        {
            // An entry of its own stands for each time that the key was left.
            if self.by_key.get(&key).is_some_and(|departed| departed.at == at) {
                self.by_key.remove(&key);
            }
        }
    }

    /// How the last backend of this key has left.
    pub(super) fn of(&self, key: &str) -> Option<Arc<Departed>> {
        self.by_key.get(key).cloned()
    }

    /// How the last backend of all has left.
    pub(super) fn last(&self) -> Option<Arc<Departed>> {
        self.last.clone()
    }
}

/// Why there is no backend for a target.
#[derive(Clone, Debug)]
pub(crate) struct Absence {
    /// The host that was asked for, if agents are chosen by it alone.
    pub(super) host: Option<String>,
    /// The backend that would have been chosen, and has left.
    pub(super) departed: Option<Arc<Departed>>,
    /// Number of agents that are connected.
    pub(super) connected: usize,
    /// Time since the server started, if that was lately.
    pub(super) started: Option<Duration>,
    /// When the backend was asked for.
    pub(super) now: Instant,
}

impl fmt::Display for Absence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.departed, &self.host) {
            (Some(departed), _) => departed.write(f, self.now)?,
            (None, Some(host)) => write!(f, "no agent has announced {host}")?,
            (None, None) => f.write_str("none has joined this server")?,
        }
        match (self.connected, &self.host, &self.departed) {
            (0, None, _) | (0, Some(_), None) => f.write_str("; no agent is connected")?,
            (0, Some(_), Some(_)) => f.write_str("; no other agent is connected")?,
            (1, _, _) => f.write_str("; 1 other agent is connected")?,
            (connected, _, _) => write!(f, "; {connected} other agents are connected")?,
        }
        if let Some(started) = self.started {
            write!(f, "; this server started {} ago", Ago(started))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn departed(agent: &str, at: Instant) -> Departed {
        Departed {
            agent_id: agent.parse().unwrap(),
            at,
            carrier: Carrier::Quic,
            cause: cause(&TunnelLost::TimedOut),
            loss_percent: Some(31),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_absence_names_who_left_how_and_who_is_there() {
        let now = Instant::now() + Duration::from_secs(42);
        let at = now - Duration::from_secs(42);
        let absence = Absence {
            host: Some("node-17".into()),
            departed: Some(Arc::new(departed("node-17", at))),
            connected: 41,
            started: None,
            now,
        };
        assert_eq!(
            absence.to_string(),
            "node-17 left 42 s ago (timed out over quic; 31 % loss in its last minute); \
             41 other agents are connected"
        );
        let never = Absence { departed: None, connected: 1, ..absence.clone() };
        let text = "no agent has announced node-17; 1 other agent is connected";
        assert_eq!(never.to_string(), text);
        let started = Some(Duration::from_secs(3));
        let nobody = Absence { host: None, departed: None, connected: 0, started, now };
        let text = "none has joined this server; no agent is connected; \
                    this server started 3.0 s ago";
        assert_eq!(nobody.to_string(), text);
    }

    #[test]
    fn a_time_has_the_unit_that_a_person_would_use() {
        for (seconds, text) in [
            (0.25, "0.2 s"),
            (9.9, "9.9 s"),
            (119.0, "119 s"),
            (120.0, "2 min"),
            (7199.0, "119 min"),
            (7200.0, "2 h"),
            (200_000.0, "2 days"),
        ] {
            assert_eq!(Ago(Duration::from_secs_f64(seconds)).to_string(), text);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_departures_that_are_remembered_are_bounded_and_the_latest_counts() {
        let mut departures = Departures::default();
        let start = Instant::now();
        for number in 0..=MAX_REMEMBERED as u64 {
            let at = start + Duration::from_secs(number);
            departures.note(vec![format!("node-{number}")], departed(&format!("a{number}"), at));
        }
        assert!(departures.of("node-0").is_none());
        assert!(departures.of("node-1").is_some());
        assert_eq!(departures.by_key.len(), MAX_REMEMBERED);
        for repeat in 0..2 * MAX_REMEMBERED as u64 {
            let at = start + Duration::from_secs(10_000 + repeat);
            departures.note(vec!["node-1".into()], departed("again", at));
        }
        assert_eq!(departures.of("node-1").unwrap().agent_id.as_str(), "again");
        assert_eq!((departures.by_key.len(), departures.order.len()), (1, MAX_REMEMBERED));
    }
}
