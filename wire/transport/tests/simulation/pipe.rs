//! One direction of the network.

use std::time::Duration;

use tokio::time::Instant;

/// IPv4 and UDP headers, which the link carries too.
const HEADERS: usize = 28;

/// Properties of a direction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// Mbit/s.
    pub(crate) rate: f64,
    /// Capacity of the queue, in bytes.
    pub(crate) buffer: f64,
    pub(crate) delay: Duration,
    pub(crate) jitter: Duration,
    /// Share of packets that are lost, each independently.
    pub(crate) loss: f64,
    pub(crate) bursts: Option<Bursts>,
    pub(crate) policer: Option<Policer>,
    /// An outage in which everything is lost: its begin since the start, and its length.
    pub(crate) outage: Option<(Duration, Duration)>,
    /// A rate in Mbit/s that the link has from a moment on, as time since the start.
    pub(crate) change: Option<(Duration, f64)>,
    /// Share of the rate by which it swings, up and down, once in `swing_period`.
    pub(crate) swing: f64,
    pub(crate) swing_period: Duration,
}

/// Gilbert–Elliott model: probabilities per packet that a burst of losses begins and ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bursts {
    pub(crate) begin: f64,
    pub(crate) end: f64,
}

/// A token bucket without a queue: it drops what exceeds the rate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policer {
    /// Mbit/s.
    pub(crate) rate: f64,
    /// Bytes.
    pub(crate) burst: f64,
}

impl Settings {
    /// A link of this rate in Mbit/s and round trip in milliseconds, whose buffer holds this many
    /// bandwidth-delay products.
    pub(crate) fn new(rate: f64, rtt_millis: u64, products: f64) -> Self {
        let rtt = Duration::from_millis(rtt_millis);
        Self {
            rate,
            buffer: rate * 125_000.0 * rtt.as_secs_f64() * products,
            delay: rtt / 2,
            jitter: Duration::ZERO,
            loss: 0.0,
            bursts: None,
            policer: None,
            outage: None,
            change: None,
            swing: 0.0,
            swing_period: Duration::from_secs(4),
        }
    }
}

/// Numbers of packets sent, lost on the link, and dropped by the buffer or the policer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) packets: u64,
    pub(crate) lost: u64,
    pub(crate) dropped: u64,
}

pub(super) struct Pipe {
    settings: Settings,
    chance: fastrand::Rng,
    start: Instant,
    idle_from: Instant,
    last_arrival: Instant,
    bad: bool,
    tokens: f64,
    tokens_at: Instant,
    pub(super) counters: Counters,
    /// When packets came into the queue, and how long each waits in it.
    pub(super) waits: Vec<(Instant, Duration)>,
}

impl Pipe {
    pub(super) fn new(settings: Settings, seed: u64) -> Self {
        let now = Instant::now();
        Self {
            settings,
            chance: fastrand::Rng::with_seed(seed),
            start: now,
            idle_from: now,
            last_arrival: now,
            bad: false,
            tokens: settings.policer.map_or(0.0, |policer| policer.burst),
            tokens_at: now,
            counters: Counters::default(),
            waits: Vec::new(),
        }
    }

    /// Arrival time of a packet that is sent now, if it arrives.
    pub(super) fn push(&mut self, payload: usize) -> Option<Instant> {
        let (now, length) = (Instant::now(), (payload + HEADERS) as f64);
        self.counters.packets += 1;
        if !self.is_within_policy(now, length) {
            self.counters.dropped += 1;
            return None;
        }
        let rate = self.rate(now);
        let waiting = self.idle_from.saturating_duration_since(now);
        if waiting.as_secs_f64() * rate + length > self.settings.buffer.max(length) {
            self.counters.dropped += 1;
            return None;
        }
        self.waits.push((now, waiting));
        let left = now + waiting + Duration::from_secs_f64(length / rate);
        self.idle_from = left;
        if self.is_lost() || self.is_out(now) {
            self.counters.lost += 1;
            return None;
        }
        let arrival = left + self.settings.delay + self.settings.jitter.mul_f64(self.chance.f64());
        self.last_arrival = self.last_arrival.max(arrival);
        Some(self.last_arrival)
    }

    /// Bytes per second at this moment.
    fn rate(&self, now: Instant) -> f64 {
        let since = now - self.start;
        let rate = match self.settings.change {
            Some((from, rate)) if since >= from => rate,
            _ => self.settings.rate,
        };
        let turns = since.as_secs_f64() / self.settings.swing_period.as_secs_f64();
        let swing = 1.0 + self.settings.swing * (turns * std::f64::consts::TAU).sin();
        rate * 125_000.0 * swing
    }

    fn is_within_policy(&mut self, now: Instant, length: f64) -> bool {
        let Some(policer) = self.settings.policer else { return true };
        let earned = (now - self.tokens_at).as_secs_f64() * policer.rate * 125_000.0;
        self.tokens = (self.tokens + earned).min(policer.burst);
        self.tokens_at = now;
        if self.tokens < length {
            return false;
        }
        self.tokens -= length;
        true
    }

    fn is_out(&self, now: Instant) -> bool {
        let since = now - self.start;
        self.settings.outage.is_some_and(|(from, length)| since >= from && since < from + length)
    }

    fn is_lost(&mut self) -> bool {
        let mut lost = self.chance.f64() < self.settings.loss;
        if let Some(bursts) = self.settings.bursts {
            let turns = if self.bad { bursts.end } else { bursts.begin };
            self.bad ^= self.chance.f64() < turns;
            lost |= self.bad;
        }
        lost
    }
}
