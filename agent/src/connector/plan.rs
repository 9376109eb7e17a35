//! What the agent does next about its tunnels, and when. Pure: the caller brings time, randomness
//! and the state of the tunnels.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    config::{Config, Transport},
    connector::{
        backoff::Backoff,
        options::{AttemptOptions, CarrierOrder},
        quic_health::QuicHealth,
        quic_outcome::QuicOutcome,
    },
    tunnels::{Rank, Suspicion},
};

/// Delay after an attempt that reached a server with a tunnel already, where one address leads to
/// any of several servers, as a part of `--sync-interval` (30 ms of 1 s), and the ratio of each delay
/// to the one before. Twenty servers are found in seconds, and a missing one does not get an attempt
/// from every node every second. A longer interval slows the search down as much as Konnectivity's.
const DUPLICATE_DELAY: (f64, f64) = (0.03, 1.08);
/// Interval of the attempts to replace a tunnel whose peer is suspect, give or take a half.
const REPLACE_INTERVAL: Duration = Duration::from_secs(1);
/// Interval of the attempts to make a tunnel anew with a new certificate, give or take a half.
const RENEW_INTERVAL: Duration = Duration::from_secs(30);
/// Interval of the attempts to find a server at the address of all that was reached at its own
/// before, give or take a half.
const SPARE_SEARCH_INTERVAL: Duration = Duration::from_mins(1);
/// Ratio of each delay after a probe without a result to the one before, up to
/// [`QuicHealth::LONGEST`].
const PROBE_GROWTH: f64 = 2.0;
/// A tunnel over QUIC that falls silent at a younger age counts as a failure of QUIC: TCP goes
/// first next time.
const YOUNG: Duration = Duration::from_secs(60);
/// Time for which packets stay small after a tunnel with large ones fell silent.
const SMALL_PACKETS: Duration = Duration::from_secs(600);

/// The purpose of an attempt, the least urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Goal {
    /// Move a tunnel to a better carrier.
    Probe,
    /// Make a tunnel anew whose certificate was replaced.
    Renew,
    /// Find a server that is missing.
    Find,
    /// Replace a tunnel whose peer is suspected to be gone.
    Replace,
}

impl Goal {
    /// Name in log lines.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Probe => "probe",
            Self::Renew => "renew",
            Self::Find => "find",
            Self::Replace => "replace",
        }
    }
}

/// The state of one tunnel in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TunnelState {
    /// The tunnel's rank.
    pub(crate) rank: Rank,
    /// Why the peer is suspected to be gone; `None` while it answers.
    pub(crate) suspicion: Option<Suspicion>,
    /// Whether it was made with a certificate that was replaced since.
    pub(crate) outdated: bool,
    /// When the server welcomed the agent.
    pub(crate) since: Instant,
}

/// The tunnels that the agent has, and how many it should have.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    /// The tunnels in use, one for each server.
    pub(crate) tunnels: Vec<TunnelState>,
    /// Number of servers; 0 before it is known.
    pub(crate) server_count: u32,
    /// Number of servers without a tunnel that are likely to be reached soon at their own addresses.
    pub(crate) promising: usize,
    /// Number of servers without a tunnel that were reached at their own addresses before.
    pub(crate) proven: usize,
}

impl Snapshot {
    /// Whether each missing server was reached at its own address before. It is most likely down,
    /// and reached there again: a search at the address of all servers meets the others.
    fn has_proven_addresses(&self) -> bool {
        !self.tunnels.is_empty() && self.tunnels.len() + self.proven >= self.server_count as usize
    }
}

/// What a new tunnel added to those in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gain {
    /// A server that was missing.
    Server,
    /// A better tunnel to a server.
    BetterTunnel,
    /// Nothing: the server has a tunnel that is as good.
    Nothing,
}

/// A successful attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Success {
    /// What the attempt shows about QUIC.
    pub(crate) quic: QuicOutcome,
    /// The tunnel's rank.
    pub(crate) rank: Rank,
    /// What the tunnel added.
    pub(crate) gain: Gain,
}

/// What ended a tunnel, as far as the agent knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LossCause {
    /// The server closed it or was restarted, or the cause is unknown.
    Server,
    /// The network reported that the server cannot be reached, and the server did not answer.
    Path,
}

/// When which attempt is due, from the results of those before.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    transport: Transport,
    /// Whether to look for servers although none is missing, and the interval.
    forever: bool,
    interval: Duration,
    quic: QuicHealth,
    failures: Backoff,
    duplicates: Backoff,
    /// Delays after probes that show nothing about QUIC and gain nothing.
    probes: Backoff,
    find_at: Instant,
    /// When the search for servers with proven addresses goes on.
    spare_find_at: Instant,
    probe_at: Instant,
    renew_at: Instant,
    replace_at: Instant,
    small_packets_until: Option<Instant>,
    /// Whether the last server to welcome the agent was a Konnectivity server.
    last_was_konnectivity: bool,
}

impl Plan {
    /// A plan for an agent that has tried nothing yet.
    pub(crate) fn new(config: &Config, now: Instant) -> Self {
        let sync = &config.sync;
        let retry_interval = config.quic_retry_interval;
        Self {
            transport: config.transport,
            forever: sync.forever,
            interval: sync.interval,
            quic: QuicHealth::new(retry_interval),
            probes: Backoff::growing_by(PROBE_GROWTH, retry_interval, QuicHealth::LONGEST),
            failures: Backoff::new(sync.interval, sync.interval_cap),
            duplicates: Backoff::growing_by(
                DUPLICATE_DELAY.1,
                sync.interval.mul_f64(DUPLICATE_DELAY.0),
                // A search that never ends keeps its interval, as in Konnectivity.
                if sync.forever { sync.interval } else { sync.interval_cap },
            ),
            find_at: now,
            spare_find_at: now,
            probe_at: now,
            renew_at: now,
            replace_at: now,
            small_packets_until: None,
            last_was_konnectivity: false,
        }
    }

    /// The next attempt and its time: the earliest one, and among those that are due the most
    /// urgent one. While an attempt is pending, only more urgent ones count.
    pub(crate) fn next(
        &self,
        snapshot: &Snapshot,
        pending: Option<Goal>,
        now: Instant,
    ) -> Option<(Goal, Instant)> {
        let Snapshot { tunnels, server_count, promising, .. } = snapshot;
        // Without any tunnel the agent relies on no address that it was sent before.
        let expected = if tunnels.is_empty() { 0 } else { tunnels.len() + promising };
        let missing = expected < (*server_count).max(1) as usize;
        let suspect = tunnels.iter().any(|tunnel| tunnel.suspicion.is_some());
        let outdated = tunnels.iter().any(|tunnel| tunnel.outdated);
        let find_at = match !self.forever && snapshot.has_proven_addresses() {
            true => self.find_at.max(self.spare_find_at),
            false => self.find_at,
        };
        let probe_at = self.next_probe(snapshot, now);
        [
            (suspect, Goal::Replace, self.replace_at),
            (missing || self.forever, Goal::Find, find_at),
            (outdated, Goal::Renew, self.renew_at),
            (probe_at.is_some(), Goal::Probe, probe_at.unwrap_or(now)),
        ]
        .into_iter()
        .filter(|(wanted, goal, _)| *wanted && pending.is_none_or(|pending| *goal > pending))
        .map(|(_, goal, at)| (goal, at.max(now)))
        .min_by_key(|(_, at)| *at)
    }

    /// The time of the next attempt to move a tunnel to a better carrier; `None` while each has the
    /// best.
    pub(crate) fn next_probe(&self, snapshot: &Snapshot, now: Instant) -> Option<Instant> {
        let worst = snapshot.tunnels.iter().map(|tunnel| tunnel.rank).min();
        let improvable = match self.transport {
            Transport::Auto => worst < Some(Rank::Quic),
            Transport::Quic => worst == Some(Rank::SmallQuic),
            Transport::Tcp => false,
        };
        (worst.is_some() && improvable).then(|| self.probe_due(worst, now))
    }

    /// The time of the next probe, where `worst` is the lowest rank in use.
    fn probe_due(&self, worst: Option<Rank>, now: Instant) -> Instant {
        let failing = self.quic.fails_until(now);
        let small = self.small_packets_until.filter(|_| worst == Some(Rank::SmallQuic));
        [failing, small].into_iter().flatten().fold(self.probe_at, Instant::max)
    }

    /// The options for an attempt that starts now.
    pub(crate) fn options(
        &mut self,
        goal: Goal,
        snapshot: &Snapshot,
        now: Instant,
        random: f64,
    ) -> AttemptOptions {
        if goal == Goal::Find {
            self.spare_find_at = now + SPARE_SEARCH_INTERVAL.mul_f64(0.5 + random);
        }
        let suspects = |suspicion| {
            let matches = move |tunnel: &&TunnelState| tunnel.suspicion == Some(suspicion);
            snapshot.tunnels.iter().filter(matches).filter(move |_| goal == Goal::Replace)
        };
        // The silence of a tunnel over TCP shows nothing about QUIC.
        let silent_quic = || suspects(Suspicion::Silent).filter(|tunnel| tunnel.rank.is_quic());
        let young = |tunnel: &TunnelState| now.saturating_duration_since(tunnel.since) < YOUNG;
        if silent_quic().any(young) {
            self.quic.on_failed(now, random);
        }
        let order = match (self.transport, goal) {
            (Transport::Quic, _) | (_, Goal::Probe) => CarrierOrder::Quic,
            (Transport::Tcp, _) => CarrierOrder::Tcp,
            (Transport::Auto, _) if self.quic.fails_until(now).is_some() => CarrierOrder::TcpFirst,
            (Transport::Auto, _) => CarrierOrder::QuicFirst,
        };
        let small = silent_quic().next().is_some()
            || self.small_packets_until.is_some_and(|until| now < until);
        // A head start for QUIC saves a round trip where QUIC works, and here it most likely does
        // not.
        let at_once = suspects(Suspicion::Refused).next().is_some();
        AttemptOptions { order, large_packets: !small, at_once }
    }

    /// Records that an attempt has led to a server's welcome.
    pub(crate) fn on_success(&mut self, goal: Goal, success: Success, now: Instant, random: f64) {
        let Success { quic, rank, gain } = success;
        self.record_quic(quic, now, random);
        self.failures.reset();
        match gain {
            Gain::Nothing if goal == Goal::Probe => {
                self.probe_at = now + self.probes.next(random);
            }
            Gain::Nothing if goal == Goal::Renew => {
                self.renew_at = now + self.duplicates.next(random);
            }
            Gain::Nothing => self.find_at = now + self.duplicates.next(random),
            Gain::Server | Gain::BetterTunnel => {
                // A Konnectivity server was upgraded: that it had no QUIC means nothing any more.
                if self.last_was_konnectivity && rank == Rank::Tcp {
                    self.quic.forget();
                }
                self.last_was_konnectivity = rank == Rank::Grpc;
                if goal == Goal::Replace && rank == Rank::SmallQuic {
                    self.small_packets_until = Some(now + SMALL_PACKETS);
                }
                self.duplicates.reset();
                self.probes.reset();
                (self.find_at, self.probe_at, self.replace_at) = (now, now, now);
                self.renew_at = now;
            }
        }
        if gain == Gain::Nothing && goal == Goal::Replace {
            self.delay_replacement(now, random);
        }
        if self.forever {
            self.find_at = self.find_at.max(now + self.interval);
        }
    }

    /// Records that a dial of one server at its own address has led to a welcome.
    pub(crate) fn on_dialed(&mut self, success: Success, now: Instant, random: f64) {
        match success.gain {
            // The search at the address of all servers goes on as it was.
            Gain::Nothing => self.record_quic(success.quic, now, random),
            Gain::Server | Gain::BetterTunnel => {
                self.on_success(Goal::Find, success, now, random);
            }
        }
    }

    /// Records that the peer of a tunnel that was to be replaced has answered. The next suspicion
    /// does not lead to an attempt at once: a third party can forge the network's reports, and must
    /// not cause one handshake per report.
    pub(crate) fn on_answer(&mut self, now: Instant, random: f64) {
        self.delay_replacement(now, random);
    }

    /// Records that the certificate of the tunnels was replaced. All agents may have been given new
    /// ones at the same time, so each waits for a random time.
    pub(crate) fn on_outdated(&mut self, now: Instant, random: f64) {
        self.renew_at = now + RENEW_INTERVAL.mul_f64(random);
    }

    /// Records that an attempt has failed.
    pub(crate) fn on_failure(&mut self, goal: Goal, quic: QuicOutcome, now: Instant, random: f64) {
        self.record_quic(quic, now, random);
        match goal {
            Goal::Find => self.find_at = now + self.failures.next(random),
            // The tunnel goes on: there is time.
            Goal::Renew => self.renew_at = now + RENEW_INTERVAL.mul_f64(0.5 + random),
            // `QuicHealth` sets the time of the next probe.
            Goal::Probe if quic != QuicOutcome::Unknown => {}
            Goal::Probe => self.probe_at = now + self.probes.next(random),
            Goal::Replace => self.delay_replacement(now, random),
        }
    }

    /// Records that a tunnel was lost. Many agents may lose theirs to the same server at the same
    /// time, so each comes back after a random delay; but where the path failed and not the server,
    /// the agent tries another path at once. Several tunnels that are lost together cause one
    /// delay.
    pub(crate) fn on_lost(&mut self, cause: LossCause, now: Instant, random: f64) {
        let find_at = match cause {
            LossCause::Server => now + self.failures.now(random),
            LossCause::Path => now,
        };
        self.find_at = if self.find_at > now { self.find_at.min(find_at) } else { find_at };
    }

    fn delay_replacement(&mut self, now: Instant, random: f64) {
        self.replace_at = now + REPLACE_INTERVAL.mul_f64(0.5 + random);
    }

    fn record_quic(&mut self, quic: QuicOutcome, now: Instant, random: f64) {
        match quic {
            QuicOutcome::Unknown => {}
            QuicOutcome::Worked => self.quic.on_worked(now),
            QuicOutcome::Failed(_) => self.quic.on_failed(now, random),
        }
    }
}

#[cfg(test)]
mod tests;
