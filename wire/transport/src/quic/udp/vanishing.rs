//! Finds paths that drop batches of packets while single packets pass.
//!
//! Some network adapters, hypervisors and VPNs lose what the kernel hands them as one batch to be
//! segmented (GSO). Each packet of a batch is lost then, and the packets of small transmits, which
//! are sent one by one, arrive. quinn informs the congestion controller of each transmit and of
//! each acknowledgement, so the detector sits before the controller.
//!
//! It watches one batch at a time. The batch has vanished if no packet of it is acknowledged by the
//! time that one is which was sent at least a round trip later. Several batches in a row that vanish
//! are the finding. Where packets are lost at random, that takes the loss of at least
//! [`MIN_BATCH`] packets out of as many, several times in a row; and an outage, however long, is
//! one batch.

use std::{
    any::Any,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

use super::{health::UdpHealth, socket::MIN_BATCH};

/// Number of batches in a row that vanish, after which the path is found to drop them.
const VANISHED_IN_ROW: u32 = 5;
/// Least time between a batch and the packet whose acknowledgement shows that it has vanished, for
/// paths with short round trips that reorder.
const MIN_DISTANCE: Duration = Duration::from_millis(5);

/// Watches batches, one at a time.
#[derive(Clone, Debug)]
pub(super) struct Detector {
    mtu: u64,
    /// What was sent at one moment by small transmits: the moment, and the number of packets.
    small: Option<(Instant, u64)>,
    batch: Option<Batch>,
    vanished: u32,
}

/// The batch that is watched, with all that was sent at the same moment: acknowledgements name that
/// moment alone.
#[derive(Clone, Copy, Debug)]
struct Batch {
    sent: Instant,
    /// Packets that were sent at the same moment by small transmits.
    small: u64,
    /// Packets of that moment that were acknowledged.
    acked: u64,
    /// Whether a packet was acknowledged that was sent a round trip later.
    passed: bool,
}

impl Detector {
    pub(super) fn new(mtu: u16) -> Self {
        Self { mtu: mtu.into(), small: None, batch: None, vanished: 0 }
    }

    /// Records a transmit of this many bytes, which is one packet or a batch.
    pub(super) fn on_sent(&mut self, now: Instant, bytes: u64) {
        let packets = bytes.div_ceil(self.mtu.max(1));
        let is_batch = packets >= MIN_BATCH as u64;
        let small = self.small.filter(|(at, _)| *at == now).map_or(0, |(_, packets)| packets);
        match &mut self.batch {
            Some(batch) if batch.sent == now && !is_batch => batch.small += packets,
            None if is_batch => {
                self.batch = Some(Batch { sent: now, small, acked: 0, passed: false });
            }
            _ => {}
        }
        if !is_batch {
            self.small = Some((now, small + packets));
        }
    }

    /// Records the acknowledgement of a packet that was sent at `sent`.
    pub(super) fn on_ack(&mut self, sent: Instant, rtt: Duration) {
        let Some(batch) = &mut self.batch else { return };
        if sent == batch.sent {
            batch.acked += 1;
            if batch.acked > batch.small {
                (self.batch, self.vanished) = (None, 0);
            }
        } else if sent >= batch.sent + rtt.max(MIN_DISTANCE) {
            batch.passed = true;
        }
    }

    /// Records that the acknowledgements of one packet are complete; whether batches are found to
    /// vanish.
    pub(super) fn on_end_acks(&mut self) -> bool {
        if self.batch.is_none_or(|batch| !batch.passed) {
            return false;
        }
        self.batch = None;
        self.vanished += 1;
        let found = self.vanished == VANISHED_IN_ROW;
        if found {
            self.vanished = 0;
        }
        found
    }

    /// Records another size of packets. Where it is a smaller one, the path has dropped large
    /// packets, and the batches have vanished for that reason.
    pub(super) fn on_mtu_update(&mut self, mtu: u16) {
        *self = Self::new(mtu);
    }
}

/// Makes controllers that watch batches to one peer.
pub(in crate::quic) struct Watching {
    /// Makes the controllers that set the window.
    pub(in crate::quic) inner: Arc<dyn ControllerFactory + Send + Sync>,
    pub(in crate::quic) peer: IpAddr,
    pub(in crate::quic) health: Arc<UdpHealth>,
}

impl ControllerFactory for Watching {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Watched {
            inner: self.inner.clone().build(now, current_mtu),
            detector: Detector::new(current_mtu),
            factory: self,
        })
    }
}

/// A congestion controller, and the detector of the same path.
struct Watched {
    inner: Box<dyn Controller>,
    detector: Detector,
    factory: Arc<Watching>,
}

impl Controller for Watched {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.detector.on_sent(now, bytes);
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.detector.on_ack(sent, rtt.get());
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        if self.detector.on_end_acks() {
            self.factory.health.batches_vanish(self.factory.peer);
        }
        self.inner.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.inner.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.detector.on_mtu_update(new_mtu);
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.inner.window()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            inner: self.inner.clone_box(),
            detector: self.detector.clone(),
            factory: self.factory.clone(),
        })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self.inner.into_any()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MTU: u16 = 1200;
    const RTT: Duration = Duration::from_millis(20);

    /// A path on which transmits are sent, one every two round trips, and acknowledged.
    struct Path {
        detector: Detector,
        now: Instant,
        found: bool,
    }

    impl Path {
        fn new() -> Self {
            Self { detector: Detector::new(MTU), now: Instant::now(), found: false }
        }

        /// Sends `packets` at once, of which `acked` arrive.
        fn send(&mut self, packets: u64, acked: u64) {
            self.send_at_once(&[packets], acked);
        }

        /// Sends several transmits at one moment.
        fn send_at_once(&mut self, transmits: &[u64], acked: u64) {
            self.now += RTT * 2;
            for packets in transmits {
                self.detector.on_sent(self.now, packets * u64::from(MTU));
            }
            for _ in 0..acked {
                self.detector.on_ack(self.now, RTT);
            }
            if acked > 0 {
                self.found |= self.detector.on_end_acks();
            }
        }
    }

    #[test]
    fn batches_that_vanish_are_found_after_a_few() {
        let mut path = Path::new();
        for number in 1..=VANISHED_IN_ROW {
            path.send(10, 0);
            path.send(2, 2);
            assert_eq!(path.found, number == VANISHED_IN_ROW, "{number}");
        }
    }

    #[test]
    fn small_transmits_of_the_same_moment_do_not_hide_it() {
        let mut path = Path::new();
        for _ in 0..VANISHED_IN_ROW {
            path.send_at_once(&[1, 10, 2], 3);
            path.send(1, 1);
        }
        assert!(path.found);
    }

    #[test]
    fn a_batch_of_which_a_packet_arrives_starts_the_count_again() {
        let mut path = Path::new();
        for _ in 0..20 {
            for _ in 1..VANISHED_IN_ROW {
                path.send(10, 0);
                path.send(1, 1);
            }
            path.send(10, 1);
        }
        assert!(!path.found);
    }

    #[test]
    fn an_outage_is_one_batch() {
        let mut path = Path::new();
        for _ in 0..100 {
            path.send(10, 0);
            path.send(1, 0);
        }
        path.send(1, 1);
        assert!(!path.found);
        assert_eq!(path.detector.vanished, 1);
    }

    #[test]
    fn packets_that_overtake_a_batch_within_a_round_trip_do_not_count() {
        let mut detector = Detector::new(MTU);
        let mut now = Instant::now();
        for _ in 0..100 {
            now += RTT * 2;
            detector.on_sent(now, 10 * u64::from(MTU));
            detector.on_ack(now + RTT / 2, RTT);
            assert!(!detector.on_end_acks());
            detector.on_ack(now, RTT);
            assert!(!detector.on_end_acks());
        }
    }

    #[test]
    fn a_path_that_drops_large_packets_is_another_fault() {
        let mut path = Path::new();
        for _ in 1..VANISHED_IN_ROW {
            path.send(10, 0);
            path.send(1, 1);
        }
        path.detector.on_mtu_update(1200);
        path.send(10, 0);
        path.send(1, 1);
        assert!(!path.found);
    }

    #[test]
    fn random_loss_is_never_taken_for_it() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for loss in [0.01, 0.05, 0.2] {
            let mut path = Path::new();
            let mut arrived =
                |packets: u64| (0..packets).filter(|_| random.f64() >= loss).count() as u64;
            // An hour of batches.
            for _ in 0..90_000 {
                let (batch, single) = (arrived(4), arrived(1));
                path.send(4, batch);
                path.send(1, single);
            }
            assert!(!path.found, "{loss}");
        }
    }
}
