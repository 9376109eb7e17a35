//! What the agent does next about its tunnels, and when. Pure: the caller brings time, randomness and
//! what there is.

use std::time::{Duration, Instant};

use crate::{
    config::{Config, Transport},
    connector::{
        backoff::Backoff,
        options::{AttemptOptions, CarrierOrder, QuicOutcome},
        quic_health::QuicHealth,
    },
    tunnels::{Rank, Suspicion},
};

/// Pause after a tunnel to a server that was known already, behind an address that leads to any of
/// them; a twelfth longer each time, so that twenty servers are found in seconds and a missing one is
/// not asked for by every node every second.
const HUNT: (Duration, f64) = (Duration::from_millis(30), 1.08);
/// Pause between two looks for another way around a tunnel that is silent, give or take a half.
const REPLACE_INTERVAL: Duration = Duration::from_secs(1);
/// Pauses after probes that changed nothing grow by this, up to the time that a failure is believed at
/// most.
const PROBE_GROWTH: f64 = 2.0;
/// A tunnel over QUIC that falls silent when it is younger than this was not worth its handshake: TCP is
/// next, without another try.
const YOUNG: Duration = Duration::from_secs(60);
/// How long packets stay small after a tunnel with large ones had fallen silent.
const SMALL_PACKETS: Duration = Duration::from_secs(600);

/// What an attempt is for, the least urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Goal {
    /// A tunnel could go a better way by now.
    Probe,
    /// A server is missing.
    Look,
    /// The peer of a tunnel may not be there; another way may work.
    Replace,
}

/// One tunnel that is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InUse {
    /// How it goes.
    pub rank: Rank,
    /// Why its peer may not be there, if there is a reason to think so.
    pub suspicion: Option<Suspicion>,
    /// Since when it is there.
    pub since: Instant,
}

/// What there is, and what there should be.
#[derive(Clone, Debug)]
pub struct Situation {
    /// The tunnels, one for each server.
    pub in_use: Vec<InUse>,
    /// How many servers there are said to be; 0 before the first has said so.
    pub count: u32,
}

/// What a successful attempt came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// A server that was missing.
    New,
    /// A better way to a server.
    Better,
    /// Nothing that was not there before.
    Known,
}

/// A tunnel that a server has welcomed the agent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// How QUIC did.
    pub quic: QuicOutcome,
    /// How the tunnel goes.
    pub rank: Rank,
    /// What it is good for.
    pub found: Found,
}

/// What took a tunnel away, as far as the agent can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The server closed it, has restarted, or nothing is known.
    Server,
    /// The network says that nobody is there, and nobody answered.
    Path,
}

/// Remembers what was tried.
#[derive(Clone, Debug)]
pub struct Plan {
    transport: Transport,
    forever: bool,
    interval: Duration,
    memory: QuicHealth,
    /// Pauses after failures, and after servers that were known.
    failures: Backoff,
    hunt: Backoff,
    /// Pauses after probes that changed nothing and say nothing of QUIC.
    probes: Backoff,
    look_at: Instant,
    probe_at: Instant,
    replace_at: Instant,
    small_until: Option<Instant>,
    /// The last server was a Konnectivity one.
    met_konnectivity: bool,
}

impl Plan {
    /// Nothing was tried yet.
    pub fn new(config: &Config, now: Instant) -> Self {
        let sync = &config.sync;
        Self {
            transport: config.transport,
            forever: sync.forever,
            interval: sync.interval,
            memory: QuicHealth::new(config.quic_retry_interval),
            probes: Backoff::growing_by(
                PROBE_GROWTH,
                config.quic_retry_interval,
                QuicHealth::LONGEST,
            ),
            failures: Backoff::new(sync.interval, sync.interval_cap),
            hunt: Backoff::growing_by(HUNT.1, HUNT.0, sync.interval_cap),
            look_at: now,
            probe_at: now,
            replace_at: now,
            small_until: None,
            met_konnectivity: false,
        }
    }

    /// What to do next, and when: what is due first, and of that what matters most. While an attempt
    /// goes on, what is more urgent than that.
    pub fn next(
        &self,
        situation: &Situation,
        pending: Option<Goal>,
        now: Instant,
    ) -> Option<(Goal, Instant)> {
        let Situation { in_use, count } = situation;
        let missing = in_use.len() < (*count).max(1) as usize;
        let silent = in_use.iter().any(|tunnel| tunnel.suspicion.is_some());
        let worst = in_use.iter().map(|tunnel| tunnel.rank).min();
        let improvable = match self.transport {
            Transport::Auto => worst < Some(Rank::Quic),
            Transport::Quic => worst == Some(Rank::SmallQuic),
            Transport::Tcp => false,
        };
        [
            (silent, Goal::Replace, self.replace_at),
            (missing || self.forever, Goal::Look, self.look_at),
            (worst.is_some() && improvable, Goal::Probe, self.probe_due(worst, now)),
        ]
        .into_iter()
        .filter(|(wanted, goal, _)| *wanted && pending.is_none_or(|pending| *goal > pending))
        .map(|(_, goal, at)| (goal, at.max(now)))
        .min_by_key(|(_, at)| *at)
    }

    /// When a tunnel of this rank may be worth another try.
    fn probe_due(&self, worst: Option<Rank>, now: Instant) -> Instant {
        let known = self.memory.fails_until(now);
        let small = self.small_until.filter(|_| worst == Some(Rank::SmallQuic));
        [known, small].into_iter().flatten().fold(self.probe_at, Instant::max)
    }

    /// How to go about it.
    pub fn options(
        &mut self,
        goal: Goal,
        situation: &Situation,
        now: Instant,
        random: f64,
    ) -> AttemptOptions {
        let replaces = |suspicion| {
            let suspected = move |tunnel: &&InUse| tunnel.suspicion == Some(suspicion);
            situation.in_use.iter().filter(suspected).filter(move |_| goal == Goal::Replace)
        };
        let flaps = |tunnel: &InUse| now.saturating_duration_since(tunnel.since) < YOUNG;
        if replaces(Suspicion::Silent).any(flaps) {
            self.memory.on_failed(now, random);
        }
        let order = match (self.transport, goal) {
            (Transport::Quic, _) | (_, Goal::Probe) => CarrierOrder::Quic,
            (Transport::Tcp, _) => CarrierOrder::Tcp,
            (Transport::Auto, _) if self.memory.fails_until(now).is_some() => {
                CarrierOrder::TcpFirst
            }
            (Transport::Auto, _) => CarrierOrder::QuicFirst,
        };
        let silent = replaces(Suspicion::Silent).next().is_some();
        let small = silent || self.small_until.is_some_and(|until| now < until);
        // QUIC is a round trip quicker where it works, and here it most likely does not.
        let at_once = replaces(Suspicion::Refused).next().is_some();
        AttemptOptions { order, large_packets: !small, at_once }
    }

    /// A server has welcomed the agent on a tunnel of this rank.
    pub fn on_arrived(&mut self, goal: Goal, arrival: Arrival, now: Instant, random: f64) {
        let Arrival { quic, rank, found } = arrival;
        self.note(quic, now, random);
        self.failures.reset();
        match found {
            Found::Known if goal == Goal::Probe => {
                self.probe_at = now + self.probes.next(random);
            }
            Found::Known => self.look_at = now + self.hunt.next(random),
            Found::New | Found::Better => {
                // A Konnectivity server was upgraded: what was found out about the one before is over.
                if self.met_konnectivity && rank == Rank::Tcp {
                    self.memory.forget();
                }
                self.met_konnectivity = rank == Rank::Grpc;
                if goal == Goal::Replace && rank == Rank::SmallQuic {
                    self.small_until = Some(now + SMALL_PACKETS);
                }
                self.hunt.reset();
                self.probes.reset();
                (self.look_at, self.probe_at, self.replace_at) = (now, now, now);
            }
        }
        if found == Found::Known && goal == Goal::Replace {
            self.replace_at = now + REPLACE_INTERVAL.mul_f64(0.5 + random);
        }
        if self.forever {
            self.look_at = self.look_at.max(now + self.interval);
        }
    }

    /// The peer of a tunnel that was to be replaced was heard after all. Whoever can make the network
    /// say otherwise shall not have a handshake each time.
    pub fn on_heard(&mut self, now: Instant, random: f64) {
        self.replace_at = now + REPLACE_INTERVAL.mul_f64(0.5 + random);
    }

    /// Nobody did.
    pub fn on_failed(&mut self, goal: Goal, quic: QuicOutcome, now: Instant, random: f64) {
        self.note(quic, now, random);
        match goal {
            Goal::Look => self.look_at = now + self.failures.next(random),
            // Of a failure of QUIC the memory says how long it is believed.
            Goal::Probe if quic != QuicOutcome::Unknown => {}
            Goal::Probe => self.probe_at = now + self.probes.next(random),
            Goal::Replace => self.replace_at = now + REPLACE_INTERVAL.mul_f64(0.5 + random),
        }
    }

    /// A tunnel was lost. Many agents may have lost theirs in the same moment, to the same server, so they
    /// come back one by one; but where the way is gone and not the server, another is tried at once. An
    /// agent that loses several tunnels together waits as long as for one.
    pub fn on_lost(&mut self, cause: Cause, now: Instant, random: f64) {
        let look_at = match cause {
            Cause::Server => now + self.failures.now(random),
            Cause::Path => now,
        };
        self.look_at = match self.look_at > now {
            true => self.look_at.min(look_at),
            false => look_at,
        };
    }

    fn note(&mut self, quic: QuicOutcome, now: Instant, random: f64) {
        match quic {
            QuicOutcome::Unknown => {}
            QuicOutcome::Worked => self.memory.on_worked(now),
            QuicOutcome::Failed(_) => self.memory.on_failed(now, random),
        }
    }
}

#[cfg(test)]
mod tests;
