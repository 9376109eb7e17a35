//! How many packets a socket hands on ahead of its connections.
//!
//! What is handed on is counted by [rounds](Rounds), each of which begins once all packets of the
//! one before the last were processed. A round that is half full, and cannot end, takes no more
//! packets of those connections that have a large part of it: an eighth of what is left of it, so
//! that there is room for others however many connections flood. A full one takes none, so that the
//! kernel's buffer fills and drops what follows. No packet is waited for that is not processed.

use std::{
    net::IpAddr,
    sync::Arc,
    task::{Context, Poll},
};

use crate::quic::rounds::Rounds;

/// Number of counters of connections. Those that share one differ from round to round.
const FLOWS: usize = 512;
/// Bytes that a packet costs beside its own: its event in the queue, and two allocations.
const OVERHEAD: u64 = 384;
/// Part of what is left of a round above which a connection's packets are dropped from a half full
/// one.
const LARGE_PART: u64 = 8;
/// Length of the connection ids of our endpoints, in bytes: quinn's default.
const ID: usize = 8;

/// What a socket hands on ahead of its connections, at most.
#[derive(Debug)]
pub(super) struct Intake {
    rounds: Arc<Rounds>,
    /// Maximum number of bytes of a round.
    limit: u64,
    /// Number of bytes of this round.
    taken: u64,
    /// The same, by connection.
    flows: Box<[u64; FLOWS]>,
    /// What assigns counters to connections in this round.
    key: u64,
    pub(super) is_paused: bool,
}

impl Intake {
    /// `limit` is the maximum number of bytes that wait, which are those of two rounds.
    pub(super) fn new(rounds: Arc<Rounds>, limit: u64) -> Self {
        let (limit, key) = (limit / 2, fastrand::u64(..));
        Self { rounds, limit, taken: 0, flows: Box::new([0; FLOWS]), key, is_paused: false }
    }

    /// Waits until packets may be received.
    pub(super) fn poll_room(&mut self, cx: &Context<'_>) -> Poll<()> {
        self.is_paused = self.taken >= self.limit && !self.begin_round();
        if self.is_paused {
            self.rounds.wake_when_possible(cx.waker());
            // The round may have ended before.
            self.is_paused = !self.begin_round();
        }
        if self.is_paused { Poll::Pending } else { Poll::Ready(()) }
    }

    /// Takes a packet; whether it is to be handed on.
    pub(super) fn admit(&mut self, packet: &[u8], source: IpAddr) -> bool {
        let must_choose = self.taken >= self.limit / 2 && !self.begin_round();
        let taken = &mut self.flows[counter(flow(packet, source), self.key)];
        let left = self.limit.saturating_sub(self.taken);
        if must_choose && *taken > 0 && *taken >= left / LARGE_PART {
            return false;
        }
        let cost = packet.len() as u64 + OVERHEAD;
        *taken += cost;
        self.taken += cost;
        true
    }

    #[cfg(test)]
    pub(super) fn rounds(&self) -> &Arc<Rounds> {
        &self.rounds
    }

    fn begin_round(&mut self) -> bool {
        let begun = self.rounds.begin_next();
        if begun {
            (self.taken, *self.flows, self.key) = (0, [0; FLOWS], fastrand::u64(..));
        }
        begun
    }
}

/// What identifies the connection of a packet: its connection id, which this side has chosen and of
/// which a peer has few. A packet of a handshake has one of the peer's choice, so its source
/// counts.
fn flow(packet: &[u8], source: IpAddr) -> u64 {
    let is_short = packet.first().is_some_and(|first| first & 0x80 == 0);
    match packet.get(1..).and_then(|rest| rest.first_chunk::<ID>()) {
        Some(id) if is_short => u64::from_le_bytes(*id),
        _ => match source.to_canonical() {
            IpAddr::V4(address) => address.to_bits().into(),
            IpAddr::V6(address) => (address.to_bits() >> 64) as u64,
        },
    }
}

/// The counter of a connection. Other ones share it under each key, whatever the ids have in common
/// (the finalizer of SplitMix64, Steele and others 2014).
fn counter(flow: u64, key: u64) -> usize {
    let mixed = flow ^ key;
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed >> (64 - FLOWS.ilog2())) as usize
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering::Relaxed},
        task::{Wake, Waker},
    };

    use proptest::prelude::*;

    use super::*;

    const LIMIT: u64 = 1 << 20;
    const LENGTH: usize = 1200;
    const COST: u64 = LENGTH as u64 + OVERHEAD;
    const SOURCE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    /// A waker that counts.
    #[derive(Debug, Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    /// A packet of an established connection.
    fn packet(id: u64) -> Vec<u8> {
        let mut packet = vec![0x40; LENGTH];
        packet[1..9].copy_from_slice(&id.to_le_bytes());
        packet
    }

    struct Socket {
        rounds: Arc<Rounds>,
        intake: Intake,
        wakes: Arc<Count>,
    }

    impl Socket {
        fn new() -> Self {
            let (rounds, wakes) = <(Arc<Rounds>, Arc<Count>)>::default();
            Self { intake: Intake::new(rounds.clone(), LIMIT), rounds, wakes }
        }

        fn has_room(&mut self) -> bool {
            let waker = Waker::from(self.wakes.clone());
            self.intake.poll_room(&Context::from_waker(&waker)).is_ready()
        }

        /// Receives packets while there is room, at most `most`; how many were handed on.
        fn receive(&mut self, most: u64, mut id: impl FnMut(u64) -> u64) -> u64 {
            let mut taken = 0;
            for number in 0..most {
                if !self.has_room() {
                    break;
                }
                taken += u64::from(self.intake.admit(&packet(id(number)), SOURCE));
            }
            taken
        }
    }

    #[test]
    fn packets_that_wake_no_connection_are_all_handed_on() {
        let mut socket = Socket::new();
        assert_eq!(socket.receive(10_000, |number| number), 10_000);
        assert_eq!(socket.receive(10_000, |_| 7), 10_000);
        assert!(!socket.intake.is_paused);
        assert_eq!(socket.wakes.0.load(Relaxed), 0);
    }

    #[test]
    fn a_connection_that_is_behind_gets_no_more_and_others_do() {
        let mut socket = Socket::new();
        let working = socket.rounds.current();
        socket.rounds.enter(working);
        let taken = socket.receive(10_000, |_| 7) * COST;
        let expected = LIMIT / 4..=LIMIT / 2 + LIMIT / 4 + COST;
        assert!(expected.contains(&taken), "{taken}");
        assert_eq!(socket.receive(1000, |_| 7), 0);
        // One of them may share the counter of the other.
        assert!(socket.receive(50, |number| number << 32 | 1) >= 45);
        socket.rounds.leave(working);
        assert!(socket.receive(10_000, |_| 7) == 10_000);
    }

    #[test]
    fn connections_that_flood_leave_room_for_others_however_many_they_are() {
        for flooders in [1, 10, 30, 100] {
            let mut socket = Socket::new();
            let working = socket.rounds.current();
            socket.rounds.enter(working);
            // Repeated, as the first of them have rounds of their own.
            let flood = |number: u64| (number % flooders) << 32 | 1;
            socket.receive(20_000, flood);
            assert_eq!(socket.receive(100, flood), 0);
            assert!(!socket.intake.is_paused, "{flooders}");
            // Some share the counter of a flooder.
            let others = socket.receive(30, |number| number << 32 | 2);
            assert!(others >= 15, "{others} beside {flooders}");
        }
    }

    #[test]
    fn a_full_round_takes_nothing_until_it_ends() {
        let mut socket = Socket::new();
        let working = socket.rounds.current();
        socket.rounds.enter(working);
        let taken = socket.receive(10_000, |number| number) * COST;
        assert!((LIMIT / 2..=LIMIT + COST).contains(&taken), "{taken}");
        assert!(socket.intake.is_paused && !socket.has_room());
        assert_eq!(socket.wakes.0.load(Relaxed), 0);
        socket.rounds.leave(working);
        assert_eq!(socket.wakes.0.load(Relaxed), 1);
        assert!(socket.has_room() && !socket.intake.is_paused);
        // Nothing waits for the reader any more.
        socket.rounds.enter(0);
        socket.rounds.leave(0);
        assert_eq!(socket.wakes.0.load(Relaxed), 1);
    }

    #[test]
    fn a_handshake_counts_by_its_source_and_any_packet_may_be_short() {
        let mut handshake = packet(7);
        handshake[0] = 0xc0;
        let mut other = packet(8);
        other[0] = 0xc0;
        assert_eq!(flow(&handshake, SOURCE), flow(&other, SOURCE));
        let mapped = IpAddr::V6("::ffff:192.0.2.1".parse().unwrap());
        assert_eq!(flow(&handshake, SOURCE), flow(&handshake, mapped));
        assert_ne!(flow(&packet(7), SOURCE), flow(&packet(8), SOURCE));
        for length in 0..10 {
            flow(&packet(7)[..length], SOURCE);
        }
    }

    proptest! {
        /// What waits stays within the limit, however connections work.
        #[test]
        fn what_waits_is_bounded(
            steps in prop::collection::vec((any::<bool>(), 0_u64..4, 1_u64..400), 1..200),
        ) {
            let mut socket = Socket::new();
            // One connection: what it was handed since it last emptied its queue.
            let (mut working, mut waits) = (None, 0);
            for (empties, id, count) in steps {
                let taken = socket.receive(1, |_| id) * COST;
                if taken > 0 && working.is_none() {
                    let round = socket.rounds.current();
                    socket.rounds.enter(round);
                    working = Some(round);
                }
                waits += taken;
                if working.is_some() {
                    waits += socket.receive(count, |number| id + number % 9) * COST;
                }
                prop_assert!(waits <= LIMIT + 2 * COST, "{}", waits);
                if empties && let Some(round) = working.take() {
                    socket.rounds.leave(round);
                    waits = 0;
                }
            }
        }
    }
}
