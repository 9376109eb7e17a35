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
    /// Packets not carried because the link was down, UDP was dropped or rejected, or they were
    /// larger than the path's MTU.
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
            let turns = if self.bad { bursts.end } else { bursts.begin };
            self.bad ^= self.happens(turns);
            lost |= self.bad && self.happens(bursts.loss);
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

    #[test]
    fn bursts_come_at_their_share_and_length() {
        let bursts = Bursts { begin: 0.01, end: 0.25, loss: 1.0 };
        let settings = Direction { bursts: Some(bursts), ..Direction::default() };
        let (arrived, lane) = run(settings, 100_000, Duration::from_micros(10));
        // Bad for begin / (begin + end) of the time.
        assert!((3500..4200).contains(&lane.counters.lost), "{}", lane.counters.lost);
        let gaps = arrived.windows(2).filter(|pair| pair[1].0 > pair[0].0 + 1).count();
        let length = lane.counters.lost as f64 / gaps as f64;
        assert!((3.6..4.4).contains(&length), "{length}");
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
