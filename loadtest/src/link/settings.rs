//! Settings of a link. Plain data, written in scenarios.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A link between the control plane and the node.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkSettings {
    /// Settings of each direction that has none of its own.
    pub each_way: Direction,
    /// The direction to the node, where it differs.
    pub to_node: Option<Direction>,
    /// The direction to the server, where it differs.
    pub to_server: Option<Direction>,
    /// Largest IP packet in bytes that the devices send: 576 to 9000.
    pub mtu: u16,
}

impl Default for LinkSettings {
    fn default() -> Self {
        Self { each_way: Direction::default(), to_node: None, to_server: None, mtu: 1500 }
    }
}

/// One direction of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Direction {
    /// Rate in Mbit/s, with IP headers; without one there is no queue.
    pub rate_mbit: Option<f64>,
    /// Size of the queue, in milliseconds at the rate. Without any limit: 100 ms.
    pub buffer_ms: Option<f64>,
    /// The same in bytes, which counts where both are given.
    pub buffer_bytes: Option<u64>,
    /// Delay in milliseconds, without the queue.
    pub delay_ms: f64,
    /// Each packet's delay is up to this many milliseconds longer, evenly distributed.
    pub jitter_ms: f64,
    /// The share of packets that take the delay alone and so overtake those that jitter holds:
    /// 0 to 1. Without any, jitter never changes the order.
    pub reorder: f64,
    /// The share of packets that are lost, each independently of the others (Bernoulli): 0 to 1.
    pub loss: f64,
    /// Losses in bursts, in addition to those of `loss`.
    pub bursts: Option<Bursts>,
    /// Packets that waited longer than this many milliseconds and allow it are marked with ECN CE.
    pub ecn_ms: Option<f64>,
}

/// The Gilbert–Elliott model: a link that is good or bad, and changes with each packet by chance.
/// A good link loses nothing. Lengths of bursts have a geometric distribution.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bursts {
    /// The share of all packets that are lost: 0 to 1, and less than `bad_loss`.
    pub mean_loss: f64,
    /// Mean number of packets for which the link stays bad: at least 1.
    pub mean_length: f64,
    /// The share of packets lost while it is bad: 0 to 1. All of them by default, and then the mean
    /// length is that of runs of lost packets.
    #[serde(default = "whole")]
    pub bad_loss: f64,
}

impl Bursts {
    /// Chance with each packet that a bad link turns good.
    pub(super) fn end(&self) -> f64 {
        1.0 / self.mean_length
    }

    /// Chance with each packet that a good link turns bad.
    pub(super) fn begin(&self) -> f64 {
        // The link is bad for this share of the packets.
        let bad = self.mean_loss / self.bad_loss;
        self.end() * bad / (1.0 - bad)
    }

    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if !(0.0..=1.0).contains(&self.bad_loss) {
            faults.push(format!("bursts.bad_loss is {} and must be 0 to 1", self.bad_loss));
        }
        if !(0.0..self.bad_loss).contains(&self.mean_loss) {
            faults.push(format!(
                "bursts.mean_loss is {} and must be 0 or more, and less than bad_loss",
                self.mean_loss
            ));
        }
        if !(1.0..=1e6).contains(&self.mean_length) {
            faults.push(format!(
                "bursts.mean_length is {} and must be 1 to 1000000",
                self.mean_length
            ));
        }
        if faults.is_empty() && self.begin() > 1.0 {
            faults.push("bursts of this mean_length are too short for this mean_loss".into());
        }
        faults
    }
}

fn whole() -> f64 {
    1.0
}

impl LinkSettings {
    /// Settings of the direction to the node.
    pub fn to_node(&self) -> Direction {
        self.to_node.unwrap_or(self.each_way)
    }

    /// Settings of the direction to the server.
    pub fn to_server(&self) -> Direction {
        self.to_server.unwrap_or(self.each_way)
    }

    /// Every impossible setting, as text.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if !(576..=9000).contains(&self.mtu) {
            faults.push(format!("link.mtu is {} and must be 576 to 9000", self.mtu));
        }
        let named = [
            ("each_way", Some(self.each_way)),
            ("to_node", self.to_node),
            ("to_server", self.to_server),
        ];
        for (name, direction) in named {
            let direction = direction.unwrap_or_default();
            faults
                .extend(direction.faults().into_iter().map(|fault| format!("link.{name}.{fault}")));
        }
        faults
    }
}

impl Direction {
    /// Size of the queue in bytes, if there is a rate.
    pub fn buffer(&self) -> Option<f64> {
        let rate = self.bytes_per_second()?;
        let bytes = self.buffer_bytes.map(|bytes| bytes as f64);
        Some(bytes.unwrap_or_else(|| rate * self.buffer_ms.unwrap_or(100.0) / 1000.0))
    }

    /// The rate in bytes per second, if there is one.
    pub fn bytes_per_second(&self) -> Option<f64> {
        self.rate_mbit.map(|rate| rate * 1e6 / 8.0)
    }

    fn faults(&self) -> Vec<String> {
        let mut faults: Vec<_> = self.bursts.iter().flat_map(Bursts::faults).collect();
        let shares = [("loss", self.loss), ("reorder", self.reorder)];
        for (name, share) in shares {
            if !(0.0..=1.0).contains(&share) {
                faults.push(format!("{name} is {share} and must be 0 to 1"));
            }
        }
        let spans = [
            ("delay_ms", Some(self.delay_ms)),
            ("jitter_ms", Some(self.jitter_ms)),
            ("buffer_ms", self.buffer_ms),
            ("ecn_ms", self.ecn_ms),
        ];
        for (name, span) in spans {
            if span.is_some_and(|span| !(0.0..=60_000.0).contains(&span)) {
                faults
                    .push(format!("{name} is {} and must be 0 to 60000", span.unwrap_or_default()));
            }
        }
        if self.rate_mbit.is_some_and(|rate| !(0.01..=100_000.0).contains(&rate)) {
            faults.push("rate_mbit must be 0.01 to 100000".into());
        }
        faults
    }
}

impl fmt::Display for LinkSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.to_node(), self.to_server()) {
            (to_node, to_server) if to_node == to_server => write!(f, "each way {to_node}")?,
            (to_node, to_server) => write!(f, "to the node {to_node}; to the server {to_server}")?,
        }
        if self.mtu == 1500 { Ok(()) } else { write!(f, "; MTU {}", self.mtu) }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms", self.delay_ms)?;
        if self.jitter_ms > 0.0 {
            write!(f, " + up to {} ms", self.jitter_ms)?;
        }
        if self.reorder > 0.0 {
            write!(f, ", {} % overtake", self.reorder * 100.0)?;
        }
        if let (Some(rate), Some(buffer)) = (self.rate_mbit, self.buffer()) {
            write!(f, ", {rate} Mbit/s, buffer {:.0} KB", buffer / 1000.0)?;
        }
        write!(f, ", loss {} %", self.loss * 100.0)?;
        if let Some(bursts) = self.bursts {
            let (loss, length) = (bursts.mean_loss * 100.0, bursts.mean_length);
            write!(f, " and {loss} % in bursts of {length} packets")?;
            if bursts.bad_loss < 1.0 {
                write!(f, " that lose {} %", bursts.bad_loss * 100.0)?;
            }
        }
        if let Some(ecn) = self.ecn_ms {
            write!(f, ", ECN above {ecn} ms")?;
        }
        Ok(())
    }
}
