use clap::Parser as _;
use culvert_process::invocation::Invocation;

use super::*;

fn config(args: &[&str]) -> Config {
    let file = tempfile::NamedTempFile::new().unwrap();
    let ca = format!("--ca-cert={}", file.path().display());
    let args = ["culvert-agent", &ca].into_iter().chain(args.iter().copied());
    let flags = crate::config::Flags::try_parse_from(args).unwrap();
    Config::from_flags(flags, Invocation::from_argv0(None)).unwrap()
}

fn plan(transport: Transport) -> (Plan, Instant) {
    let now = Instant::now();
    (Plan::new(&Config { transport, ..config(&[]) }, now), now)
}

fn situation(count: u32, in_use: &[(Rank, bool, Instant)]) -> Situation {
    let tunnel = |(rank, silent, since): &(Rank, bool, Instant)| InUse {
        rank: *rank,
        suspicion: silent.then_some(Suspicion::Silent),
        since: *since,
    };
    Situation { in_use: in_use.iter().map(tunnel).collect(), count }
}

/// A tunnel over whatever QUIC's fate left.
fn arrival(quic: QuicOutcome, found: Found) -> Arrival {
    let rank = if quic == QuicOutcome::Worked { Rank::Quic } else { Rank::Tcp };
    Arrival { quic, rank, found }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_server_is_looked_for_at_once_and_then_less_and_less_often() {
    let (mut plan, mut now) = plan(Transport::Auto);
    let nothing = situation(0, &[]);
    let mut pauses = Vec::new();
    for _ in 0..8 {
        let (goal, at) = plan.next(&nothing, None, now).unwrap();
        assert_eq!(goal, Goal::Look);
        pauses.push((at - now).as_secs_f64());
        now = at;
        plan.on_failed(goal, QuicOutcome::Unknown, now, 1.0);
    }
    assert_eq!(pauses[..4], [0.0, 1.0, 1.5, 2.25]);
    assert_eq!(pauses[7], 10.0);
}

#[test]
fn as_many_servers_are_looked_for_as_there_are_said_to_be() {
    let (mut plan, now) = plan(Transport::Auto);
    plan.on_arrived(Goal::Look, arrival(QuicOutcome::Worked, Found::New), now, 1.0);
    assert_eq!(
        plan.next(&situation(3, &[(Rank::Quic, false, now)]), None, now),
        Some((Goal::Look, now))
    );
    assert_eq!(plan.next(&situation(1, &[(Rank::Quic, false, now)]), None, now), None);
}

#[test]
fn whoever_looks_for_ever_does_so_at_the_interval() {
    let now = Instant::now();
    let mut plan = Plan::new(&config(&["--sync-forever"]), now);
    plan.on_arrived(Goal::Look, arrival(QuicOutcome::Worked, Found::Known), now, 1.0);
    let one = situation(1, &[(Rank::Quic, false, now)]);
    assert_eq!(plan.next(&one, None, now), Some((Goal::Look, now + SECOND)));
}

#[test]
fn a_server_met_again_makes_the_pauses_longer_and_a_new_one_makes_them_short() {
    let (mut plan, now) = plan(Transport::Auto);
    let two = situation(2, &[(Rank::Quic, false, now)]);
    let mut pause = |found| {
        plan.on_arrived(Goal::Look, arrival(QuicOutcome::Worked, found), now, 1.0);
        plan.next(&two, None, now).unwrap().1 - now
    };
    let first = pause(Found::Known);
    assert!(first < SECOND / 20);
    let later = (0..100).map(|_| pause(Found::Known)).last().unwrap();
    assert_eq!(later, 10 * SECOND);
    assert_eq!(pause(Found::New), Duration::ZERO);
    assert_eq!(pause(Found::Known), first);
}

#[test]
fn quic_goes_first_until_it_has_failed_and_is_probed_when_that_is_long_ago() {
    let (mut plan, mut now) = plan(Transport::Auto);
    let nothing = situation(0, &[]);
    let order = |plan: &mut Plan, goal, now| plan.options(goal, &nothing, now, 0.5).order;
    assert_eq!(order(&mut plan, Goal::Look, now), CarrierOrder::QuicFirst);
    plan.on_arrived(Goal::Look, arrival(QuicOutcome::Failed("quic_refused"), Found::New), now, 0.5);
    assert_eq!(order(&mut plan, Goal::Look, now), CarrierOrder::TcpFirst);
    let over_tcp = situation(1, &[(Rank::Tcp, false, now)]);
    let mut pauses = Vec::new();
    for _ in 0..7 {
        let (goal, at) = plan.next(&over_tcp, None, now).unwrap();
        assert_eq!(goal, Goal::Probe);
        pauses.push((at - now).as_secs());
        now = at;
        assert_eq!(order(&mut plan, goal, now), CarrierOrder::Quic);
        plan.on_failed(goal, QuicOutcome::Failed("quic_refused"), now, 0.5);
    }
    assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 600]);
}

#[test]
fn once_quic_works_every_tunnel_is_moved_to_it_and_then_it_is_not_probed_any_more() {
    let (mut plan, now) = plan(Transport::Auto);
    plan.on_arrived(Goal::Look, arrival(QuicOutcome::Failed("quic_silent"), Found::New), now, 0.5);
    let now = now + 10 * SECOND;
    plan.on_arrived(Goal::Probe, arrival(QuicOutcome::Worked, Found::Better), now, 0.5);
    let half = situation(2, &[(Rank::Quic, false, now), (Rank::Tcp, false, now)]);
    assert_eq!(plan.next(&half, None, now), Some((Goal::Probe, now)));
    let all = situation(2, &[(Rank::Quic, false, now), (Rank::Quic, false, now)]);
    assert_eq!(plan.next(&all, None, now), None);
}

#[test]
fn a_silent_tunnel_comes_before_everything_and_is_replaced_with_small_packets() {
    let (mut plan, then) = plan(Transport::Auto);
    plan.on_arrived(Goal::Look, arrival(QuicOutcome::Worked, Found::New), then, 0.5);
    let now = then + 2 * YOUNG;
    let silent = situation(2, &[(Rank::Quic, true, then)]);
    assert_eq!(plan.next(&silent, None, now), Some((Goal::Replace, now)));
    let options = plan.options(Goal::Replace, &silent, now, 0.5);
    assert_eq!(
        options,
        AttemptOptions { order: CarrierOrder::QuicFirst, large_packets: false, at_once: false }
    );
    // QUIC with small packets worked: they stay small for a while.
    let small = Arrival { quic: QuicOutcome::Worked, rank: Rank::SmallQuic, found: Found::Better };
    plan.on_arrived(Goal::Replace, small, now, 0.5);
    let large = |plan: &mut Plan, now| plan.options(Goal::Look, &silent, now, 0.5).large_packets;
    assert!(!large(&mut plan, now + SMALL_PACKETS - SECOND));
    assert!(large(&mut plan, now + SMALL_PACKETS));
}

#[test]
fn a_tunnel_that_falls_silent_again_soon_gives_way_to_tcp() {
    let (mut plan, now) = plan(Transport::Auto);
    let silent = situation(1, &[(Rank::Quic, true, now)]);
    let options = plan.options(Goal::Replace, &silent, now + YOUNG / 2, 0.5);
    assert_eq!(options.order, CarrierOrder::TcpFirst);
}

/// One that was there for a moment only, too: the network's word is no sign of a path that swallows.
#[test]
fn a_tunnel_whose_peer_cannot_be_reached_is_replaced_by_whatever_gets_through_first() {
    let (mut plan, now) = plan(Transport::Auto);
    let mut refused = situation(1, &[(Rank::Quic, true, now)]);
    refused.in_use[0].suspicion = Some(Suspicion::Refused);
    assert_eq!(plan.next(&refused, None, now), Some((Goal::Replace, now)));
    let options = plan.options(Goal::Replace, &refused, now, 0.5);
    assert_eq!(
        options,
        AttemptOptions { order: CarrierOrder::QuicFirst, large_packets: true, at_once: true }
    );
    // A message that was wrong is believed again a little later.
    plan.on_heard(now, 0.5);
    assert_eq!(plan.next(&refused, None, now), Some((Goal::Replace, now + REPLACE_INTERVAL)));
}

#[test]
fn whoever_may_use_one_carrier_uses_that_one() {
    for (transport, order) in
        [(Transport::Quic, CarrierOrder::Quic), (Transport::Tcp, CarrierOrder::Tcp)]
    {
        let (mut plan, now) = plan(transport);
        plan.on_arrived(
            Goal::Look,
            arrival(QuicOutcome::Failed("quic_silent"), Found::New),
            now,
            0.5,
        );
        let one = situation(1, &[(Rank::Tcp, false, now)]);
        assert_eq!(plan.options(Goal::Look, &one, now, 0.5).order, order);
        assert_eq!(plan.next(&one, None, now), None);
    }
}

#[test]
fn a_server_that_was_upgraded_is_probed_at_once() {
    let (mut plan, mut now) = plan(Transport::Auto);
    let refused = QuicOutcome::Failed("quic_refused");
    let konnectivity = Arrival { quic: refused, rank: Rank::Grpc, found: Found::New };
    plan.on_arrived(Goal::Look, konnectivity, now, 0.5);
    for _ in 0..5 {
        let (goal, at) = plan.next(&situation(1, &[(Rank::Grpc, false, now)]), None, now).unwrap();
        assert_eq!(goal, Goal::Probe);
        now = at;
        plan.on_failed(goal, refused, now, 0.5);
    }
    let ours = Arrival { quic: QuicOutcome::Unknown, rank: Rank::Tcp, found: Found::New };
    plan.on_arrived(Goal::Look, ours, now, 0.5);
    let over_tcp = situation(1, &[(Rank::Tcp, false, now)]);
    assert_eq!(plan.next(&over_tcp, None, now), Some((Goal::Probe, now)));
    // Once.
    plan.on_failed(Goal::Probe, refused, now, 0.5);
    assert!(plan.next(&over_tcp, None, now).unwrap().1 > now);
}

#[test]
fn a_probe_that_says_nothing_of_quic_is_not_made_again_at_once() {
    let (mut plan, mut now) = plan(Transport::Auto);
    // Behind a proxy that alone can look the server up, for instance.
    plan.on_arrived(Goal::Look, arrival(QuicOutcome::Unknown, Found::New), now, 0.5);
    let over_tcp = situation(1, &[(Rank::Tcp, false, now)]);
    let mut pauses = Vec::new();
    for _ in 0..9 {
        let (goal, at) = plan.next(&over_tcp, None, now).unwrap();
        pauses.push((at - now).as_secs());
        now = at;
        plan.on_failed(goal, QuicOutcome::Unknown, now, 1.0);
    }
    assert_eq!(pauses, [0, 10, 20, 40, 80, 160, 320, 600, 600]);
}

#[test]
fn probes_that_meet_a_server_that_has_quic_already_become_rare() {
    let (mut plan, mut now) = plan(Transport::Auto);
    let mixed = situation(2, &[(Rank::Quic, false, now), (Rank::Grpc, false, now)]);
    let mut last = Duration::ZERO;
    for _ in 0..8 {
        let (goal, at) = plan.next(&mixed, None, now).unwrap();
        assert_eq!(goal, Goal::Probe);
        last = at - now;
        now = at;
        plan.on_arrived(goal, arrival(QuicOutcome::Worked, Found::Known), now, 1.0);
    }
    assert_eq!(last, QuicHealth::LONGEST);
    // Until one was of use.
    plan.on_arrived(Goal::Probe, arrival(QuicOutcome::Worked, Found::Better), now, 1.0);
    assert_eq!(plan.next(&mixed, None, now), Some((Goal::Probe, now)));
}

#[test]
fn what_is_more_urgent_does_not_wait_for_an_attempt_that_goes_on() {
    let (plan, now) = plan(Transport::Auto);
    let all = situation(3, &[(Rank::Tcp, false, now), (Rank::Quic, true, now)]);
    let next = |pending| plan.next(&all, pending, now).map(|(goal, _)| goal);
    assert_eq!(next(Some(Goal::Probe)), Some(Goal::Replace));
    assert_eq!(next(Some(Goal::Look)), Some(Goal::Replace));
    assert_eq!(next(Some(Goal::Replace)), None);
    let missing = situation(3, &[(Rank::Tcp, false, now)]);
    let next = |pending| plan.next(&missing, pending, now).map(|(goal, _)| goal);
    assert_eq!(next(Some(Goal::Probe)), Some(Goal::Look));
    assert_eq!(next(Some(Goal::Look)), None);
}

#[test]
fn packets_that_were_made_small_are_tried_large_again() {
    for transport in [Transport::Auto, Transport::Quic] {
        let (mut plan, now) = plan(transport);
        let small =
            Arrival { quic: QuicOutcome::Worked, rank: Rank::SmallQuic, found: Found::Better };
        plan.on_arrived(Goal::Replace, small, now, 0.5);
        let small = situation(1, &[(Rank::SmallQuic, false, now)]);
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
fn a_konnectivity_server_met_again_does_not_make_failures_forgotten() {
    let (mut plan, now) = plan(Transport::Auto);
    let refused = QuicOutcome::Failed("quic_refused");
    plan.on_arrived(Goal::Look, arrival(refused, Found::New), now, 0.5);
    let again = Arrival { quic: QuicOutcome::Unknown, rank: Rank::Grpc, found: Found::Known };
    plan.on_arrived(Goal::Look, again, now, 0.5);
    plan.on_arrived(Goal::Look, arrival(QuicOutcome::Unknown, Found::Known), now, 0.5);
    let both = situation(2, &[(Rank::Tcp, false, now), (Rank::Grpc, false, now)]);
    assert!(plan.next(&both, None, now).unwrap().1 > now);
}

#[test]
fn a_lost_server_is_looked_for_after_a_moment_and_a_lost_way_is_replaced_at_once() {
    let (mut plan, now) = plan(Transport::Auto);
    let nothing = situation(1, &[]);
    plan.on_lost(Cause::Path, now, 0.0);
    assert_eq!(plan.next(&nothing, None, now), Some((Goal::Look, now)));
    // Nobody is there either way: from now on it takes longer.
    plan.on_failed(Goal::Look, QuicOutcome::Unknown, now, 0.0);
    assert_eq!(plan.next(&nothing, None, now), Some((Goal::Look, now + SECOND / 2)));
    let (mut plan, now) = self::plan(Transport::Auto);
    plan.on_lost(Cause::Server, now, 0.0);
    assert_eq!(plan.next(&nothing, None, now), Some((Goal::Look, now + SECOND / 2)));
}

#[test]
fn servers_that_are_lost_together_are_looked_for_as_soon_as_one() {
    let (mut plan, now) = plan(Transport::Auto);
    for _ in 0..20 {
        plan.on_lost(Cause::Server, now, 1.0);
    }
    let nothing = situation(20, &[]);
    assert_eq!(plan.next(&nothing, None, now), Some((Goal::Look, now + SECOND)));
    // A pause that is longer, after servers that were known, is cut short.
    let known = Arrival { quic: QuicOutcome::Worked, rank: Rank::Quic, found: Found::Known };
    for _ in 0..200 {
        plan.on_arrived(Goal::Look, known, now, 1.0);
    }
    let longest = plan.next(&nothing, None, now).unwrap().1;
    assert!(longest > now + 5 * SECOND, "{:?}", longest - now);
    plan.on_lost(Cause::Server, now, 1.0);
    assert_eq!(plan.next(&nothing, None, now), Some((Goal::Look, now + SECOND)));
}
