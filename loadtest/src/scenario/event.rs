//! Events of a run.

use std::fmt;

use serde::Deserialize;

use crate::{carrier::Carrier, link::settings::Direction, process::Signal};

/// An event of link or processes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// Time.
    pub at: When,
    /// Event of the link.
    pub link: Option<LinkEvent>,
    /// Path MTU from now on, in bytes.
    pub mtu: Option<u16>,
    /// Whether larger packets are dropped without ICMP.
    #[serde(default)]
    pub silent: bool,
    /// Settings of each direction from now on.
    pub set: Option<Direction>,
    /// Event of the server's process.
    pub server: Option<Signal>,
    /// Event of the agent's process.
    pub agent: Option<Signal>,
    /// The carrier that Culvert's tunnels are to get because of it; see the goal `switch_seconds`.
    pub switches_to: Option<Carrier>,
}

/// Time of an event.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(from = "Written")]
pub enum When {
    /// Before server and agent are started.
    Start,
    /// Seconds after the measured part's start; before it when negative.
    Second(f64),
}

/// The time in a file: a number, or `"start"`.
#[derive(Deserialize)]
#[serde(untagged, expecting = "`at` must be seconds, or \"start\"")]
enum Written {
    Second(f64),
    Word(Word),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    Start,
}

impl From<Written> for When {
    fn from(written: Written) -> Self {
        match written {
            Written::Second(second) => Self::Second(second),
            Written::Word(Word::Start) => Self::Start,
        }
    }
}

/// An event of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkEvent {
    /// It loses everything.
    Down,
    /// It carries packets again.
    Up,
    /// It drops UDP silently.
    DropUdp,
    /// It answers UDP with ICMP.
    RejectUdp,
    /// It carries UDP again.
    PassUdp,
    /// The node's NAT forgets its mappings.
    RebindNat,
    /// Every flow so far is dead both ways and for ever, without a report of the network; those of
    /// new sockets pass.
    LoseFlows,
    /// The node gets another address.
    ChangeAddress,
}

impl Event {
    /// Whether it changes the link.
    pub fn is_of_link(&self) -> bool {
        self.link.is_some() || self.mtu.is_some() || self.set.is_some()
    }

    /// The faults, as text.
    pub(super) fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let of_process = self.server.is_some() || self.agent.is_some();
        if !self.is_of_link() && !of_process {
            faults.push("an event in which nothing happens".into());
        }
        if self.at == When::Start && of_process {
            faults.push("an event at the start happens to a process, and there is none yet".into());
        }
        if self.at == When::Start && self.switches_to.is_some() {
            faults.push("an event at the start switches nothing; see ready_seconds".into());
        }
        faults
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if let Some(link) = self.link {
            parts.push(link.to_string());
        }
        if let Some(mtu) = self.mtu {
            parts.push(format!("MTU {mtu}{}", if self.silent { ", silently" } else { "" }));
        }
        if let Some(set) = self.set {
            parts.push(format!("link: {set}"));
        }
        for (side, signal) in [("server", self.server), ("agent", self.agent)] {
            if let Some(signal) = signal {
                parts.push(format!("{side}: {}", format!("{signal:?}").to_lowercase()));
            }
        }
        f.write_str(&parts.join(", "))?;
        if self.at == When::Start { f.write_str(" from the start") } else { Ok(()) }
    }
}

impl fmt::Display for LinkEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Down => "link down",
            Self::Up => "link up",
            Self::DropUdp => "UDP dropped",
            Self::RejectUdp => "UDP rejected",
            Self::PassUdp => "UDP passes",
            Self::RebindNat => "NAT rebinds",
            Self::LoseFlows => "NAT loses its flows",
            Self::ChangeAddress => "node's address changes",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(text: &str) -> Result<Event, toml::de::Error> {
        toml::from_str(text)
    }

    #[test]
    fn an_event_is_at_a_second_or_at_the_start() {
        for (at, when) in
            [("3", When::Second(3.0)), ("-0.5", When::Second(-0.5)), ("\"start\"", When::Start)]
        {
            let event = event(&format!("at = {at}\nlink = \"drop-udp\"")).unwrap();
            assert_eq!(event.at, when);
            assert!(event.faults().is_empty(), "{:?}", event.faults());
        }
        let error = event("at = \"noon\"\nlink = \"up\"").unwrap_err().to_string();
        assert!(error.contains("seconds, or \"start\""), "{error}");
    }

    #[test]
    fn an_event_says_what_happens_and_from_when_on() {
        let dropped = event("at = \"start\"\nlink = \"drop-udp\"").unwrap();
        assert_eq!(dropped.to_string(), "UDP dropped from the start");
        let smaller = event("at = 3\nmtu = 1300\nsilent = true").unwrap();
        assert_eq!(smaller.to_string(), "MTU 1300, silently");
        let lost = event("at = 3\nlink = \"lose-flows\"").unwrap();
        assert_eq!(lost.to_string(), "NAT loses its flows");
        assert!(lost.is_of_link());
    }

    #[test]
    fn what_an_event_leads_to_is_a_carrier() {
        let dropped = event("at = 3\nlink = \"drop-udp\"\nswitches_to = \"tcp\"").unwrap();
        assert_eq!(dropped.switches_to, Some(Carrier::Tcp));
        assert!(event("at = 3\nlink = \"drop-udp\"\nswitches_to = \"pigeon\"").is_err());
    }

    #[test]
    fn what_cannot_happen_at_the_start_is_a_fault() {
        for text in [
            "at = \"start\"\nagent = \"kill\"",
            "at = \"start\"\nlink = \"drop-udp\"\nswitches_to = \"tcp\"",
            "at = 3",
        ] {
            assert_eq!(event(text).unwrap().faults().len(), 1, "{text}");
        }
    }
}
