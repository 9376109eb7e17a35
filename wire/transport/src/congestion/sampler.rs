//! Samples of the delivery rate, from acknowledgements (draft-ietf-ccwg-bbr, "Delivery Rate
//! Samples").
//!
//! quinn reports to a controller when packets are sent, and when the acknowledged ones were. So the
//! sampler keeps, for each moment of sending, what had been delivered by then.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Maximum number of moments of sending that are kept: more than a window of single packets at
/// 10 Gbit/s over a millisecond, or of batches at 1 Gbit/s over a satellite.
const MAX_FLIGHTS: usize = 16_384;

/// Measures the delivery rate. The names are the draft's.
#[derive(Clone, Debug)]
pub(super) struct Sampler {
    /// Number of bytes delivered.
    delivered: u64,
    /// When the last of them were acknowledged.
    delivered_at: Instant,
    /// When the newest packet that has been acknowledged was sent.
    first_sent: Instant,
    /// Until more bytes than this are delivered, samples show less than the path can do: what is
    /// sent from idle too.
    app_limited_until: Option<u64>,
    /// Whether nothing was in flight after the last acknowledgement and nothing was sent since.
    idle: bool,
    flights: VecDeque<Flight>,
    batch: Batch,
}

/// Packets sent at one moment, and the sampler's state then.
#[derive(Clone, Copy, Debug)]
struct Flight {
    sent: Instant,
    delivered: u64,
    delivered_at: Instant,
    first_sent: Instant,
    app_limited: bool,
}

/// The packets that one acknowledgement covers.
#[derive(Clone, Copy, Debug, Default)]
struct Batch {
    bytes: u64,
    newest: Option<Instant>,
}

/// What an acknowledgement shows of the path.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// Number of bytes acknowledged.
    pub(super) bytes: u64,
    /// Time since the newest of its packets was sent.
    pub(super) rtt: Duration,
    /// Number of bytes delivered when that packet was sent.
    pub(super) delivered_before: u64,
    /// Delivery rate in bytes per second, unless the time was too short to measure it.
    pub(super) rate: Option<f64>,
    /// Whether the application had nothing to send, so that the path may deliver more.
    pub(super) app_limited: bool,
}

impl Sampler {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            delivered: 0,
            delivered_at: now,
            first_sent: now,
            app_limited_until: None,
            idle: true,
            flights: VecDeque::new(),
            batch: Batch::default(),
        }
    }

    /// Number of bytes delivered so far.
    pub(super) fn delivered(&self) -> u64 {
        self.delivered
    }

    pub(super) fn on_sent(&mut self, now: Instant) {
        if self.idle {
            self.idle = false;
            (self.first_sent, self.delivered_at) = (now, now);
        }
        if self.flights.back().is_some_and(|flight| flight.sent == now) {
            return;
        }
        if self.flights.len() == MAX_FLIGHTS {
            self.flights.pop_front();
        }
        self.flights.push_back(Flight {
            sent: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            first_sent: self.first_sent,
            app_limited: self.app_limited_until.is_some_and(|until| until >= self.delivered),
        });
    }

    /// Takes one packet of an acknowledgement.
    pub(super) fn on_ack(&mut self, sent: Instant, bytes: u64) {
        self.batch.bytes += bytes;
        self.batch.newest = self.batch.newest.max(Some(sent));
    }

    /// Ends an acknowledgement; what it shows, unless its packets are no longer known.
    pub(super) fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        min_rtt: Duration,
    ) -> Option<Sample> {
        let Batch { bytes, newest } = std::mem::take(&mut self.batch);
        self.idle = in_flight == 0;
        if app_limited {
            self.app_limited_until = Some(self.delivered + bytes + in_flight);
        }
        let newest = newest?;
        self.delivered += bytes;
        self.delivered_at = now;
        let index = self.flights.partition_point(|flight| flight.sent < newest);
        let flight = *self.flights.get(index).filter(|flight| flight.sent == newest)?;
        // A later acknowledgement of an older packet would show less than this one.
        self.flights.drain(..index);
        self.first_sent = newest;
        let acked_for = now.saturating_duration_since(flight.delivered_at);
        let sent_for = newest.saturating_duration_since(flight.first_sent);
        let interval = acked_for.max(sent_for);
        // Over less than a round trip, acknowledgements were compressed ("Upon receiving an ACK").
        let rate = (interval >= min_rtt && !interval.is_zero())
            .then(|| (self.delivered - flight.delivered) as f64 / interval.as_secs_f64());
        Some(Sample {
            bytes,
            rtt: now.saturating_duration_since(newest),
            delivered_before: flight.delivered,
            rate,
            app_limited: flight.app_limited,
        })
    }
}
