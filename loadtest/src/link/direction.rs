//! One direction of a link as a pure model: packets go in with a time, and come out later or never.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
    time::Duration,
};

use super::settings::Direction;

/// A packet that can be marked instead of dropped.
pub(super) trait Packet {
    /// Its length in bytes.
    fn len(&self) -> usize;
    /// Marks it with ECN CE if it allows that.
    fn mark(&mut self);
}

/// Counters of one direction since the link's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets that went in.
    pub packets: u64,
    /// Their bytes, with IP headers.
    pub bytes: u64,
    /// Packets lost by chance.
    pub lost: u64,
    /// Packets dropped because the buffer was full.
    pub dropped: u64,
    /// Packets not carried because the link was down, UDP was dropped or rejected, they were larger
    /// than the path's MTU, or their flow was lost.
    pub refused: u64,
}

/// The state of one direction. Times count from any one moment on.
#[derive(Debug)]
pub(super) struct Lane<P> {
    settings: Direction,
    chance: fastrand::Rng,
    /// When the last packet that was taken has left the queue.
    idle_from: Duration,
    /// The latest arrival so far, which jitter does not overtake.
    last_arrival: Duration,
    bad: bool,
    order: u64,
    on_the_way: BinaryHeap<Reverse<OnTheWay<P>>>,
    pub(super) counters: Counters,
}

impl<P: Packet> Lane<P> {
    pub(super) fn new(settings: Direction, seed: u64) -> Self {
        Self {
            settings,
            chance: fastrand::Rng::with_seed(seed),
            idle_from: Duration::ZERO,
            last_arrival: Duration::ZERO,
            bad: false,
            order: 0,
            on_the_way: BinaryHeap::new(),
            counters: Counters::default(),
        }
    }

    /// Changes the settings. Packets on the way keep their time.
    pub(super) fn set(&mut self, settings: Direction) {
        self.settings = settings;
    }

    /// Adds a packet. It waits in the queue, then it may be lost, then it travels; so a lost packet
    /// uses the rate like any other.
    pub(super) fn push(&mut self, now: Duration, mut packet: P) {
        self.counters.packets += 1;
        self.counters.bytes += packet.len() as u64;
        let waiting = self.idle_from.saturating_sub(now);
        let mut left = now;
        if let (Some(rate), Some(buffer)) =
            (self.settings.bytes_per_second(), self.settings.buffer())
        {
            if waiting.as_secs_f64() * rate + packet.len() as f64 > buffer.max(packet.len() as f64)
            {
                self.counters.dropped += 1;
                return;
            }
            left = now + waiting + Duration::from_secs_f64(packet.len() as f64 / rate);
            self.idle_from = left;
        }
        if self.settings.ecn_ms.is_some_and(|limit| waiting > millis(limit)) {
            packet.mark();
        }
        if self.is_lost() {
            self.counters.lost += 1;
            return;
        }
        let arrival = self.arrival(left);
        self.order += 1;
        self.on_the_way.push(Reverse(OnTheWay { arrival, order: self.order, packet }));
    }

    /// The next packet that has arrived by `now`.
    pub(super) fn pop(&mut self, now: Duration) -> Option<P> {
        if self.next()? > now {
            return None;
        }
        self.on_the_way.pop().map(|Reverse(next)| next.packet)
    }

    /// When the next packet arrives.
    pub(super) fn next(&self) -> Option<Duration> {
        self.on_the_way.peek().map(|Reverse(next)| next.arrival)
    }

    /// Loses every packet on the way.
    pub(super) fn clear(&mut self) {
        self.counters.refused += self.on_the_way.len() as u64;
        self.on_the_way.clear();
    }

    fn is_lost(&mut self) -> bool {
        let mut lost = self.happens(self.settings.loss);
        if let Some(bursts) = self.settings.bursts {
            let turns = if self.bad { bursts.end() } else { bursts.begin() };
            self.bad ^= self.happens(turns);
            lost |= self.bad && self.happens(bursts.bad_loss);
        }
        lost
    }

    fn arrival(&mut self, left: Duration) -> Duration {
        let soonest = left + millis(self.settings.delay_ms);
        if self.settings.jitter_ms == 0.0 {
            return soonest;
        }
        if self.happens(self.settings.reorder) {
            return soonest;
        }
        let arrival = soonest + millis(self.settings.jitter_ms * self.chance.f64());
        self.last_arrival = self.last_arrival.max(arrival);
        self.last_arrival
    }

    fn happens(&mut self, share: f64) -> bool {
        share > 0.0 && self.chance.f64() < share
    }
}

fn millis(millis: f64) -> Duration {
    Duration::from_secs_f64(millis / 1000.0)
}

#[derive(Debug)]
struct OnTheWay<P> {
    arrival: Duration,
    order: u64,
    packet: P,
}

impl<P> OnTheWay<P> {
    fn key(&self) -> (Duration, u64) {
        (self.arrival, self.order)
    }
}

impl<P> PartialEq for OnTheWay<P> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<P> Eq for OnTheWay<P> {}

impl<P> PartialOrd for OnTheWay<P> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<P> Ord for OnTheWay<P> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::settings::Bursts;

    #[derive(Debug, PartialEq)]
    struct Probe {
        number: usize,
        length: usize,
        marked: bool,
    }

    impl Packet for Probe {
        fn len(&self) -> usize {
            self.length
        }

        fn mark(&mut self) {
            self.marked = true;
        }
    }

    fn probe(number: usize) -> Probe {
        Probe { number, length: 1250, marked: false }
    }

    /// Pushes `count` packets, one every `gap`, and gives each one's number and time on the way.
    fn run(
        settings: Direction,
        count: usize,
        gap: Duration,
    ) -> (Vec<(usize, Duration)>, Lane<Probe>) {
        let mut lane = Lane::new(settings, 1);
        let mut arrived = Vec::new();
        let sent = |number: usize| gap * u32::try_from(number).unwrap();
        for number in 0..count {
            lane.push(sent(number), probe(number));
        }
        while let Some(at) = lane.next() {
            let packet = lane.pop(at).unwrap();
            arrived.push((packet.number, at - sent(packet.number)));
        }
        (arrived, lane)
    }

    #[test]
    fn a_packet_waits_for_those_before_it_and_then_travels() {
        // 1250 bytes at 10 Mbit/s take 1 ms.
        let settings = Direction { rate_mbit: Some(10.0), delay_ms: 5.0, ..Direction::default() };
        let (arrived, _) = run(settings, 3, Duration::ZERO);
        let expected = [6, 7, 8].map(Duration::from_millis);
        assert_eq!(arrived.iter().map(|(_, took)| *took).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_does_not_fit_the_buffer_is_dropped() {
        let settings =
            Direction { rate_mbit: Some(10.0), buffer_ms: Some(4.0), ..Direction::default() };
        let (arrived, lane) = run(settings, 10, Duration::ZERO);
        assert_eq!(arrived.len(), 4);
        assert_eq!(lane.counters.dropped, 6);
        let settings = Direction { buffer_bytes: Some(2500), ..settings };
        assert_eq!(run(settings, 10, Duration::ZERO).0.len(), 2);
    }

    #[test]
    fn losses_come_at_their_share() {
        let settings = Direction { loss: 0.05, ..Direction::default() };
        let (arrived, lane) = run(settings, 100_000, Duration::from_micros(10));
        assert_eq!(arrived.len() as u64 + lane.counters.lost, 100_000);
        assert!((4700..5300).contains(&lane.counters.lost), "{}", lane.counters.lost);
    }

    /// Lengths of the runs of lost packets, of 400 000 packets.
    fn lost_runs(bursts: Bursts) -> Vec<usize> {
        let settings = Direction { bursts: Some(bursts), ..Direction::default() };
        let (arrived, _) = run(settings, 400_000, Duration::from_micros(10));
        let gaps = arrived.windows(2).map(|pair| pair[1].0 - pair[0].0 - 1);
        gaps.filter(|lost| *lost > 0).collect()
    }

    /// The seed is fixed. The bounds are five standard deviations: with 1 % and 4 packets there are
    /// about 1000 bursts, of 4 packets with a deviation of 3.5.
    #[test]
    fn bursts_come_at_their_mean_loss_and_mean_length() {
        for (mean_loss, mean_length, of_loss, of_length) in
            [(0.01, 4.0, 0.25, 0.14), (0.05, 3.0, 0.09, 0.06), (0.02, 1.0, 0.06, 0.01)]
        {
            let runs = lost_runs(Bursts { mean_loss, mean_length, bad_loss: 1.0 });
            let lost = runs.iter().sum::<usize>() as f64;
            let near = |value: f64, mean: f64, share: f64| (value / mean - 1.0).abs() < share;
            assert!(near(lost / 400_000.0, mean_loss, of_loss), "{mean_loss}: {lost}");
            let length = lost / runs.len() as f64;
            // Two bursts of one packet can be neighbours.
            let of_length = of_length + mean_loss * 1.5;
            assert!(near(length, mean_length, of_length), "{mean_length}: {length}");
        }
    }

    /// A burst goes on with the same chance after each packet.
    #[test]
    fn lengths_of_bursts_have_a_geometric_distribution() {
        let runs = lost_runs(Bursts { mean_loss: 0.05, mean_length: 4.0, bad_loss: 1.0 });
        for length in 1..=8 {
            let [reached, passed] =
                [length, length + 1].map(|least| runs.iter().filter(|run| **run >= least).count());
            let goes_on = passed as f64 / reached as f64;
            let deviation = (0.75 * 0.25 / reached as f64).sqrt();
            assert!((goes_on - 0.75).abs() < 5.0 * deviation, "{length}: {goes_on} of {reached}");
        }
    }

    #[test]
    fn a_burst_that_loses_a_part_has_the_same_mean_loss() {
        let bursts = Bursts { mean_loss: 0.05, mean_length: 10.0, bad_loss: 0.5 };
        let runs = lost_runs(bursts);
        let lost = runs.iter().sum::<usize>() as f64 / 400_000.0;
        assert!((lost - 0.05).abs() < 0.005, "{lost}");
        // Half of the packets of a burst arrive, so a run of losses is about two packets.
        let length = lost * 400_000.0 / runs.len() as f64;
        assert!((1.6..2.1).contains(&length), "{length}");
    }

    #[test]
    fn jitter_keeps_the_order_unless_packets_may_overtake() {
        let settings = Direction { delay_ms: 10.0, jitter_ms: 5.0, ..Direction::default() };
        let numbers = |settings| {
            let (arrived, _) = run(settings, 1000, Duration::from_micros(100));
            arrived.iter().map(|(number, _)| *number).collect::<Vec<_>>()
        };
        assert!(numbers(settings).is_sorted());
        assert!(!numbers(Direction { reorder: 0.1, ..settings }).is_sorted());
    }

    #[test]
    fn packets_that_waited_long_are_marked() {
        let settings =
            Direction { rate_mbit: Some(10.0), ecn_ms: Some(2.5), ..Direction::default() };
        let mut lane = Lane::new(settings, 1);
        (0..5).for_each(|number| lane.push(Duration::ZERO, probe(number)));
        let marked: Vec<_> =
            std::iter::from_fn(|| lane.pop(Duration::MAX)).map(|p| p.marked).collect();
        assert_eq!(marked, [false, false, false, true, true]);
    }

    #[test]
    fn one_seed_gives_one_run() {
        let settings = Direction { loss: 0.5, jitter_ms: 3.0, ..Direction::default() };
        let once = run(settings, 100, Duration::from_millis(1)).0;
        assert_eq!(once, run(settings, 100, Duration::from_millis(1)).0);
    }
}
