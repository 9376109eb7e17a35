use super::*;
use crate::{connector::quic_outcome::QuicFailure, test_support::config};

fn plan(transport: Transport) -> (Plan, Instant) {
    let now = Instant::now();
    (Plan::new(&Config { transport, ..config(&[]) }, now), now)
}

fn snapshot(server_count: u32, tunnels: &[(Rank, bool, Instant)]) -> Snapshot {
    let tunnel = |(rank, silent, since): &(Rank, bool, Instant)| TunnelState {
        outdated: false,
        rank: *rank,
        suspicion: silent.then_some(Suspicion::Silent),
        since: *since,
    };
    let tunnels = tunnels.iter().map(tunnel).collect();
    Snapshot { tunnels, server_count, promising: 0, proven: 0 }
}

/// A tunnel over QUIC if that worked, and over TCP otherwise.
fn success(quic: QuicOutcome, gain: Gain) -> Success {
    let rank = if quic == QuicOutcome::Worked { Rank::Quic } else { Rank::Tcp };
    Success { quic, rank, gain }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_missing_server_is_looked_for_at_once_and_then_less_and_less_often() {
    let (mut plan, mut now) = plan(Transport::Auto);
    let nothing = snapshot(0, &[]);
    let mut delays = Vec::new();
    for _ in 0..8 {
        let (goal, at) = plan.next(&nothing, None, now).unwrap();
        assert_eq!(goal, Goal::Find);
        delays.push((at - now).as_secs_f64());
        now = at;
        plan.on_failure(goal, QuicOutcome::Unknown, now, 1.0);
    }
    assert_eq!(delays[..4], [0.0, 1.0, 1.5, 2.25]);
    assert_eq!(delays[7], 10.0);
}

#[test]
fn as_many_servers_are_looked_for_as_are_known_to_exist() {
    let (mut plan, now) = plan(Transport::Auto);
    plan.on_success(Goal::Find, success(QuicOutcome::Worked, Gain::Server), now, 1.0);
    assert_eq!(
        plan.next(&snapshot(3, &[(Rank::Quic, false, now)]), None, now),
        Some((Goal::Find, now))
    );
    assert_eq!(plan.next(&snapshot(1, &[(Rank::Quic, false, now)]), None, now), None);
}

#[test]
fn servers_that_will_be_reached_at_their_own_addresses_are_not_looked_for() {
    let (mut plan, now) = plan(Transport::Auto);
    plan.on_success(Goal::Find, success(QuicOutcome::Worked, Gain::Server), now, 1.0);
    let with = |promising, tunnels: &[_]| Snapshot { promising, ..snapshot(3, tunnels) };
    let one = [(Rank::Quic, false, now)];
    assert_eq!(plan.next(&with(2, &one), None, now), None);
    assert_eq!(plan.next(&with(1, &one), None, now), Some((Goal::Find, now)));
    assert_eq!(plan.next(&with(3, &[]), None, now), Some((Goal::Find, now)), "without a tunnel");
}

#[test]
fn a_server_that_was_reached_at_its_own_address_is_rarely_looked_for_elsewhere() {
    let attempts = |proven| {
        let (mut plan, start) = plan(Transport::Auto);
        let of_two = Snapshot { proven, ..snapshot(2, &[(Rank::Quic, false, start)]) };
        let (mut now, mut attempts) = (start, 0);
        loop {
            let (goal, at) = plan.next(&of_two, None, now).unwrap();
            now = at;
            if now > start + 300 * SECOND {
                return attempts;
            }
            plan.options(goal, &of_two, now, 0.5);
            plan.on_success(goal, success(QuicOutcome::Worked, Gain::Nothing), now, 0.5);
            attempts += 1;
        }
    };
    let (unknown, proven) = (attempts(0), attempts(1));
    assert!(unknown > 80 && proven == 6, "{unknown} and {proven}");
}

#[test]
fn an_agent_without_any_tunnel_relies_on_no_address() {
    let (mut plan, now) = plan(Transport::Auto);
    let none = Snapshot { proven: 2, ..snapshot(2, &[]) };
    plan.options(Goal::Find, &none, now, 0.5);
    assert_eq!(plan.next(&none, None, now), Some((Goal::Find, now)));
}

#[test]
fn with_sync_forever_servers_are_looked_for_at_the_interval() {
    let now = Instant::now();
    let mut plan = Plan::new(&config(&["--sync-forever"]), now);
    let one = snapshot(1, &[(Rank::Quic, false, now)]);
    for _ in 0..100 {
        plan.on_success(Goal::Find, success(QuicOutcome::Worked, Gain::Nothing), now, 1.0);
        assert_eq!(plan.next(&one, None, now), Some((Goal::Find, now + SECOND)));
    }
}

#[test]
fn a_longer_sync_interval_slows_the_search_for_missing_servers_down() {
    let attempts = |interval: &str| {
        let start = Instant::now();
        let mut plan = Plan::new(&config(&[interval]), start);
        let two = snapshot(2, &[(Rank::Quic, false, start)]);
        let (mut now, mut attempts) = (start, 0);
        while now < start + 10 * SECOND {
            plan.on_success(Goal::Find, success(QuicOutcome::Worked, Gain::Nothing), now, 1.0);
            now = plan.next(&two, None, now).unwrap().1;
            attempts += 1;
        }
        attempts
    };
    let (default, slow) = (attempts("--sync-interval=1s"), attempts("--sync-interval=5s"));
    assert!(default > 35 && slow < 25, "{default} and {slow}");
}

#[test]
fn delays_grow_with_each_duplicate_and_are_short_again_after_a_new_server() {
    let (mut plan, now) = plan(Transport::Auto);
    let two = snapshot(2, &[(Rank::Quic, false, now)]);
    let mut delay = |gain| {
        plan.on_success(Goal::Find, success(QuicOutcome::Worked, gain), now, 1.0);
        plan.next(&two, None, now).unwrap().1 - now
    };
    let first = delay(Gain::Nothing);
    assert!(first < SECOND / 20);
    let later = (0..100).map(|_| delay(Gain::Nothing)).last().unwrap();
    assert_eq!(later, 10 * SECOND);
    assert_eq!(delay(Gain::Server), Duration::ZERO);
    assert_eq!(delay(Gain::Nothing), first);
}

#[test]
fn quic_goes_first_until_it_has_failed_and_is_then_probed_less_and_less_often() {
    let (mut plan, mut now) = plan(Transport::Auto);
    let nothing = snapshot(0, &[]);
    let order = |plan: &mut Plan, goal, now| plan.options(goal, &nothing, now, 0.5).order;
    assert_eq!(order(&mut plan, Goal::Find, now), CarrierOrder::QuicFirst);
    plan.on_success(
        Goal::Find,
        success(QuicOutcome::Failed(QuicFailure::Refused), Gain::Server),
        now,
        0.5,
    );
    assert_eq!(order(&mut plan, Goal::Find, now), CarrierOrder::TcpFirst);
    let over_tcp = snapshot(1, &[(Rank::Tcp, false, now)]);
    let mut delays = Vec::new();
    for _ in 0..7 {
        let (goal, at) = plan.next(&over_tcp, None, now).unwrap();
        assert_eq!(goal, Goal::Probe);
        delays.push((at - now).as_secs());
        now = at;
        assert_eq!(order(&mut plan, goal, now), CarrierOrder::Quic);
        plan.on_failure(goal, QuicOutcome::Failed(QuicFailure::Refused), now, 0.5);
    }
    assert_eq!(delays, [10, 20, 40, 80, 160, 320, 600]);
}

#[test]
fn once_quic_works_every_tunnel_is_moved_to_it_and_probes_end() {
    let (mut plan, now) = plan(Transport::Auto);
    plan.on_success(
        Goal::Find,
        success(QuicOutcome::Failed(QuicFailure::Silent), Gain::Server),
        now,
        0.5,
    );
    let now = now + 10 * SECOND;
    plan.on_success(Goal::Probe, success(QuicOutcome::Worked, Gain::BetterTunnel), now, 0.5);
    let half = snapshot(2, &[(Rank::Quic, false, now), (Rank::Tcp, false, now)]);
    assert_eq!(plan.next(&half, None, now), Some((Goal::Probe, now)));
    let all = snapshot(2, &[(Rank::Quic, false, now), (Rank::Quic, false, now)]);
    assert_eq!(plan.next(&all, None, now), None);
}

#[test]
fn a_silent_tunnel_is_replaced_first_and_with_small_packets() {
    let (mut plan, then) = plan(Transport::Auto);
    plan.on_success(Goal::Find, success(QuicOutcome::Worked, Gain::Server), then, 0.5);
    let now = then + 2 * YOUNG;
    let silent = snapshot(2, &[(Rank::Quic, true, then)]);
    assert_eq!(plan.next(&silent, None, now), Some((Goal::Replace, now)));
    let options = plan.options(Goal::Replace, &silent, now, 0.5);
    assert_eq!(
        options,
        AttemptOptions { order: CarrierOrder::QuicFirst, large_packets: false, at_once: false }
    );
    // QUIC with small packets worked: packets stay small for a time.
    let small =
        Success { quic: QuicOutcome::Worked, rank: Rank::SmallQuic, gain: Gain::BetterTunnel };
    plan.on_success(Goal::Replace, small, now, 0.5);
    let large = |plan: &mut Plan, now| plan.options(Goal::Find, &silent, now, 0.5).large_packets;
    assert!(!large(&mut plan, now + SMALL_PACKETS - SECOND));
    assert!(large(&mut plan, now + SMALL_PACKETS));
}

#[test]
fn packets_stay_large_unless_small_ones_replaced_a_silent_tunnel() {
    for (goal, rank) in [(Goal::Replace, Rank::Quic), (Goal::Find, Rank::SmallQuic)] {
        let (mut plan, now) = plan(Transport::Auto);
        let success = Success { quic: QuicOutcome::Worked, rank, gain: Gain::Server };
        plan.on_success(goal, success, now, 0.5);
        assert!(plan.options(Goal::Find, &snapshot(2, &[]), now, 0.5).large_packets);
    }
}

#[test]
fn a_tunnel_that_was_not_replaced_is_tried_again_a_little_later() {
    for (goal, gain, later) in [
        (Goal::Replace, Gain::Nothing, REPLACE_INTERVAL),
        (Goal::Replace, Gain::Server, Duration::ZERO),
        (Goal::Find, Gain::Nothing, Duration::ZERO),
    ] {
        let (mut plan, now) = plan(Transport::Auto);
        plan.on_success(goal, success(QuicOutcome::Worked, gain), now, 0.5);
        let silent = snapshot(1, &[(Rank::Quic, true, now)]);
        assert_eq!(plan.next(&silent, None, now), Some((Goal::Replace, now + later)), "{goal:?}");
    }
}

#[test]
fn a_young_tunnel_that_falls_silent_is_replaced_over_tcp_first() {
    let (mut plan, now) = plan(Transport::Auto);
    let silent = snapshot(1, &[(Rank::Quic, true, now)]);
    let mut order = |age| plan.options(Goal::Replace, &silent, now + age, 0.5).order;
    assert_eq!(order(YOUNG), CarrierOrder::QuicFirst, "old enough");
    assert_eq!(order(YOUNG / 2), CarrierOrder::TcpFirst);
}

/// A young tunnel as well: a report of the network does not mean that the path swallows packets.
#[test]
fn a_tunnel_whose_peer_cannot_be_reached_is_replaced_over_both_carriers_at_once() {
    let (mut plan, now) = plan(Transport::Auto);
    let mut refused = snapshot(1, &[(Rank::Quic, true, now)]);
    refused.tunnels[0].suspicion = Some(Suspicion::Refused);
    assert_eq!(plan.next(&refused, None, now), Some((Goal::Replace, now)));
    let options = plan.options(Goal::Replace, &refused, now, 0.5);
    assert_eq!(
        options,
        AttemptOptions { order: CarrierOrder::QuicFirst, large_packets: true, at_once: true }
    );
    // After a false report the next one counts a little later.
    plan.on_answer(now, 0.5);
    assert_eq!(plan.next(&refused, None, now), Some((Goal::Replace, now + REPLACE_INTERVAL)));
}

#[test]
fn a_transport_that_allows_one_carrier_is_kept_to() {
    for (transport, order) in
        [(Transport::Quic, CarrierOrder::Quic), (Transport::Tcp, CarrierOrder::Tcp)]
    {
        let (mut plan, now) = plan(transport);
        plan.on_success(
            Goal::Find,
            success(QuicOutcome::Failed(QuicFailure::Silent), Gain::Server),
            now,
            0.5,
        );
        let one = snapshot(1, &[(Rank::Tcp, false, now)]);
        assert_eq!(plan.options(Goal::Find, &one, now, 0.5).order, order);
        assert_eq!(plan.next(&one, None, now), None);
    }
}

#[test]
fn a_server_that_was_upgraded_is_probed_at_once() {
    let (mut plan, mut now) = plan(Transport::Auto);
    let refused = QuicOutcome::Failed(QuicFailure::Refused);
    let konnectivity = Success { quic: refused, rank: Rank::Grpc, gain: Gain::Server };
    plan.on_success(Goal::Find, konnectivity, now, 0.5);
    for _ in 0..5 {
        let (goal, at) = plan.next(&snapshot(1, &[(Rank::Grpc, false, now)]), None, now).unwrap();
        assert_eq!(goal, Goal::Probe);
        now = at;
        plan.on_failure(goal, refused, now, 0.5);
    }
    let ours = Success { quic: QuicOutcome::Unknown, rank: Rank::Tcp, gain: Gain::Server };
    plan.on_success(Goal::Find, ours, now, 0.5);
    let over_tcp = snapshot(1, &[(Rank::Tcp, false, now)]);
    assert_eq!(plan.next(&over_tcp, None, now), Some((Goal::Probe, now)));
    // Only once.
    plan.on_failure(Goal::Probe, refused, now, 0.5);
    assert!(plan.next(&over_tcp, None, now).unwrap().1 > now);
}

#[test]
fn a_probe_that_shows_nothing_about_quic_is_repeated_with_growing_delays() {
    let (mut plan, mut now) = plan(Transport::Auto);
    // For instance where only a proxy can resolve the server's name.
    plan.on_success(Goal::Find, success(QuicOutcome::Unknown, Gain::Server), now, 0.5);
    let over_tcp = snapshot(1, &[(Rank::Tcp, false, now)]);
    let mut delays = Vec::new();
    for _ in 0..9 {
        let (goal, at) = plan.next(&over_tcp, None, now).unwrap();
        delays.push((at - now).as_secs());
        now = at;
        plan.on_failure(goal, QuicOutcome::Unknown, now, 1.0);
    }
    assert_eq!(delays, [0, 10, 20, 40, 80, 160, 320, 600, 600]);
}

#[test]
fn probes_that_fail_do_not_delay_those_after_a_probe_that_shows_nothing() {
    let (mut plan, mut now) = plan(Transport::Auto);
    let refused = QuicOutcome::Failed(QuicFailure::Refused);
    plan.on_success(Goal::Find, success(refused, Gain::Server), now, 1.0);
    let over_tcp = snapshot(1, &[(Rank::Tcp, false, now)]);
    for _ in 0..5 {
        now = plan.next(&over_tcp, None, now).unwrap().1;
        plan.on_failure(Goal::Probe, refused, now, 1.0);
    }
    now = plan.next(&over_tcp, None, now).unwrap().1;
    plan.on_failure(Goal::Probe, QuicOutcome::Unknown, now, 1.0);
    assert_eq!(plan.next(&over_tcp, None, now), Some((Goal::Probe, now + 10 * SECOND)));
}

#[test]
fn probes_that_reach_a_server_with_quic_already_become_rare() {
    let (mut plan, mut now) = plan(Transport::Auto);
    let mixed = snapshot(2, &[(Rank::Quic, false, now), (Rank::Grpc, false, now)]);
    let mut last = Duration::ZERO;
    for _ in 0..8 {
        let (goal, at) = plan.next(&mixed, None, now).unwrap();
        assert_eq!(goal, Goal::Probe);
        last = at - now;
        now = at;
        plan.on_success(goal, success(QuicOutcome::Worked, Gain::Nothing), now, 1.0);
    }
    assert_eq!(last, QuicHealth::LONGEST);
    // Until one gains something.
    plan.on_success(Goal::Probe, success(QuicOutcome::Worked, Gain::BetterTunnel), now, 1.0);
    assert_eq!(plan.next(&mixed, None, now), Some((Goal::Probe, now)));
}

#[test]
fn a_more_urgent_attempt_does_not_wait_for_a_pending_one() {
    let (plan, now) = plan(Transport::Auto);
    let all = snapshot(3, &[(Rank::Tcp, false, now), (Rank::Quic, true, now)]);
    let next = |pending| plan.next(&all, pending, now).map(|(goal, _)| goal);
    assert_eq!(next(Some(Goal::Probe)), Some(Goal::Replace));
    assert_eq!(next(Some(Goal::Find)), Some(Goal::Replace));
    assert_eq!(next(Some(Goal::Replace)), None);
    let missing = snapshot(3, &[(Rank::Tcp, false, now)]);
    let next = |pending| plan.next(&missing, pending, now).map(|(goal, _)| goal);
    assert_eq!(next(Some(Goal::Probe)), Some(Goal::Find));
    assert_eq!(next(Some(Goal::Find)), None);
}

#[test]
fn after_a_time_with_small_packets_large_ones_are_probed() {
    for transport in [Transport::Auto, Transport::Quic] {
        let (mut plan, now) = plan(transport);
        let small =
            Success { quic: QuicOutcome::Worked, rank: Rank::SmallQuic, gain: Gain::BetterTunnel };
        plan.on_success(Goal::Replace, small, now, 0.5);
        let small = snapshot(1, &[(Rank::SmallQuic, false, now)]);
        let then = now + SMALL_PACKETS;
        assert_eq!(plan.next(&small, None, now), Some((Goal::Probe, then)));
        let options = plan.options(Goal::Probe, &small, then, 0.5);
        assert_eq!(
            options,
            AttemptOptions { order: CarrierOrder::Quic, large_packets: true, at_once: false }
        );
    }
}

#[test]
fn a_duplicate_of_a_konnectivity_server_does_not_make_the_agent_forget_failures() {
    let (mut plan, now) = plan(Transport::Auto);
    let refused = QuicOutcome::Failed(QuicFailure::Refused);
    plan.on_success(Goal::Find, success(refused, Gain::Server), now, 0.5);
    let again = Success { quic: QuicOutcome::Unknown, rank: Rank::Grpc, gain: Gain::Nothing };
    plan.on_success(Goal::Find, again, now, 0.5);
    plan.on_success(Goal::Find, success(QuicOutcome::Unknown, Gain::Nothing), now, 0.5);
    let both = snapshot(2, &[(Rank::Tcp, false, now), (Rank::Grpc, false, now)]);
    assert!(plan.next(&both, None, now).unwrap().1 > now);
}

#[test]
fn a_lost_server_is_looked_for_after_a_delay_and_a_lost_path_at_once() {
    let (mut plan, now) = plan(Transport::Auto);
    let nothing = snapshot(1, &[]);
    plan.on_lost(LossCause::Path, now, 0.0);
    assert_eq!(plan.next(&nothing, None, now), Some((Goal::Find, now)));
    // Another path does not help: from now on there are delays.
    plan.on_failure(Goal::Find, QuicOutcome::Unknown, now, 0.0);
    assert_eq!(plan.next(&nothing, None, now), Some((Goal::Find, now + SECOND / 2)));
    let (mut plan, now) = self::plan(Transport::Auto);
    plan.on_lost(LossCause::Server, now, 0.0);
    assert_eq!(plan.next(&nothing, None, now), Some((Goal::Find, now + SECOND / 2)));
}

#[test]
fn servers_that_are_lost_together_cause_one_delay() {
    let (mut plan, now) = plan(Transport::Auto);
    for _ in 0..20 {
        plan.on_lost(LossCause::Server, now, 1.0);
    }
    let nothing = snapshot(20, &[]);
    assert_eq!(plan.next(&nothing, None, now), Some((Goal::Find, now + SECOND)));
    // A longer delay, after many duplicates, is cut short.
    let known = Success { quic: QuicOutcome::Worked, rank: Rank::Quic, gain: Gain::Nothing };
    for _ in 0..200 {
        plan.on_success(Goal::Find, known, now, 1.0);
    }
    let longest = plan.next(&nothing, None, now).unwrap().1;
    assert!(longest > now + 5 * SECOND, "{:?}", longest - now);
    plan.on_lost(LossCause::Server, now, 1.0);
    assert_eq!(plan.next(&nothing, None, now), Some((Goal::Find, now + SECOND)));
}

#[test]
fn a_tunnel_with_an_old_certificate_is_made_anew_after_a_random_delay() {
    let (mut plan, now) = plan(Transport::Auto);
    plan.on_success(Goal::Find, success(QuicOutcome::Worked, Gain::Server), now, 1.0);
    let mut tunnels = snapshot(1, &[(Rank::Quic, false, now)]);
    tunnels.tunnels[0].outdated = true;
    plan.on_outdated(now, 0.5);
    let due = now + RENEW_INTERVAL / 2;
    assert_eq!(plan.next(&tunnels, None, now), Some((Goal::Renew, due)));
    plan.on_failure(Goal::Renew, QuicOutcome::Unknown, due, 0.5);
    let again = due + RENEW_INTERVAL;
    assert_eq!(plan.next(&tunnels, None, due), Some((Goal::Renew, again)));
    let options = plan.options(Goal::Renew, &tunnels, again, 0.5);
    assert_eq!(options.order, CarrierOrder::QuicFirst);
    assert!(options.large_packets && !options.at_once);
    // Another server behind the same address answered.
    plan.on_success(Goal::Renew, success(QuicOutcome::Worked, Gain::Nothing), again, 0.5);
    assert!(plan.next(&tunnels, None, again).unwrap().1 > again);
    plan.on_success(Goal::Renew, success(QuicOutcome::Worked, Gain::BetterTunnel), again, 0.5);
    assert_eq!(plan.next(&snapshot(1, &[(Rank::Quic, false, now)]), None, again), None);
}
