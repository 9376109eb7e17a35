//! The congestion controller on simulated networks: bounds on the rate it reaches, the packets it
//! loses, and the time that keystrokes take beside it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod simulation;

use std::time::Duration;

use culvert_transport::congestion::{Congestion, Resumption};

use simulation::{Bursts, Flow, Policer, Reconnecting, Settings, Simulation};

/// 100 Mbit/s, 50 ms, with a buffer of this many bandwidth-delay products.
fn wan(products: f64) -> Settings {
    Settings::new(100.0, 50, products)
}

#[test]
fn one_seed_gives_one_run() {
    let simulation = Simulation {
        measured: Duration::from_secs(2),
        ..Simulation::new(Settings { loss: 0.01, ..wan(1.0) })
    };
    let (once, again) = (simulation.run("once"), simulation.run("again"));
    assert_eq!(once.rates, again.rates);
    assert_eq!(once.echoes, again.echoes);
}

#[test]
fn a_clean_link_is_filled_and_its_queue_stays_short() {
    let outcome = Simulation::new(wan(1.0)).run("clean");
    assert!(outcome.total() > 90.0);
    assert!(outcome.echo(0.5) < 60.0 && outcome.echo(0.99) < 80.0);
}

#[test]
fn random_loss_is_not_congestion() {
    for (loss, least, p99) in [(0.01, 88.0, 130.0), (0.05, 80.0, 200.0)] {
        let outcome = Simulation::new(Settings { loss, ..wan(1.0) }).run(&format!("loss {loss}"));
        assert!(outcome.total() > least);
        assert!(outcome.echo(0.5) < 62.0 && outcome.echo(0.99) < p99);
    }
}

#[test]
fn the_bandwidth_of_a_lossy_path_is_found_within_two_seconds() {
    for seed in 1..=20 {
        let simulation = Simulation {
            warmup: Duration::from_secs(2),
            measured: Duration::from_secs(2),
            seed,
            ..Simulation::new(Settings { loss: 0.05, ..wan(1.0) })
        };
        assert!(simulation.run("found").total() > 75.0);
    }
}

#[test]
fn bursts_of_loss_are_not_congestion() {
    let bursts = Some(Bursts { begin: 0.002, end: 0.2 });
    let outcome = Simulation::new(Settings { bursts, ..wan(1.0) }).run("bursts of 5");
    assert!(outcome.total() > 80.0);
    assert!(outcome.echo(0.5) < 62.0);
}

#[test]
fn a_shallow_buffer_drops_little_and_a_deep_one_stays_empty() {
    let shallow = Simulation::new(wan(0.1)).run("buffer of 0.1 products");
    assert!(shallow.total() > 80.0 && shallow.dropped() < 0.04);
    let deep = Simulation::new(wan(4.0)).run("buffer of 4 products");
    assert!(deep.total() > 90.0 && deep.dropped() < 0.01);
    assert!(deep.echo(0.5) < 60.0 && deep.echo(0.99) < 80.0);
}

#[test]
fn a_gigabit_is_filled() {
    let simulation = Simulation {
        measured: Duration::from_secs(3),
        ..Simulation::new(Settings::new(1000.0, 20, 1.0))
    };
    let outcome = simulation.run("1 Gbit/s");
    assert!(outcome.total() > 800.0);
    assert!(outcome.echo(0.5) < 30.0);
}

#[test]
fn a_satellite_is_filled() {
    let link = Settings { loss: 0.005, ..Settings::new(20.0, 600, 1.0) };
    let simulation = Simulation {
        warmup: Duration::from_secs(15),
        measured: Duration::from_secs(30),
        ..Simulation::new(link)
    };
    let outcome = simulation.run("satellite");
    assert!(outcome.total() > 16.0);
    assert!(outcome.echo(0.5) < 700.0);
}

#[test]
fn a_policer_drops_little() {
    let policer = Some(Policer { rate: 20.0, burst: 100_000.0 });
    let outcome = Simulation::new(Settings { policer, ..wan(1.0) }).run("policed to 20 Mbit/s");
    assert!(outcome.total() > 14.0);
    assert!(outcome.dropped() < 0.1);
}

#[test]
fn a_rate_that_swings_is_followed() {
    let link = Settings {
        swing: 0.5,
        jitter: Duration::from_millis(5),
        buffer: 2_000_000.0,
        ..Settings::new(30.0, 60, 1.0)
    };
    let simulation = Simulation { measured: Duration::from_secs(20), ..Simulation::new(link) };
    let outcome = simulation.run("cellular");
    assert!(outcome.total() > 22.0);
    assert!(outcome.echo(0.5) < 120.0 && outcome.echo(0.99) < 400.0);
}

#[test]
fn a_flow_that_was_idle_fills_the_link_at_once() {
    let flow = Flow { begin: Duration::from_secs(3), ..Flow::new(Congestion::Model) };
    let simulation = Simulation {
        flows: vec![flow],
        warmup: Duration::from_secs(4),
        measured: Duration::from_secs(4),
        ..Simulation::new(wan(1.0))
    };
    assert!(simulation.run("after idling").total() > 85.0);
}

#[test]
fn a_flow_that_has_little_to_send_sends_it_without_a_queue() {
    let flow = Flow { downloads: 2, limit: Some(2_500_000.0), ..Flow::new(Congestion::Model) };
    let simulation = Simulation { flows: vec![flow], ..Simulation::new(wan(1.0)) };
    let outcome = simulation.run("application-limited");
    assert!(outcome.total() > 38.0);
    assert!(outcome.echo(0.99) < 65.0);
}

#[test]
fn two_flows_of_the_model_share_equally() {
    let flows = vec![
        Flow::new(Congestion::Model),
        Flow { begin: Duration::from_secs(2), ..Flow::new(Congestion::Model) },
    ];
    let simulation = Simulation {
        flows,
        warmup: Duration::from_secs(15),
        measured: Duration::from_secs(20),
        ..Simulation::new(wan(1.0))
    };
    let outcome = simulation.run("two of the model");
    let [one, other] = outcome.rates[..] else { panic!() };
    assert!(outcome.total() > 88.0);
    assert!(one.min(other) >= 0.8 * one.max(other));
}

#[test]
fn the_model_and_cubic_leave_each_other_a_quarter() {
    for products in [1.0, 4.0] {
        let flows = vec![Flow::new(Congestion::Model), Flow::new(Congestion::Cubic)];
        let simulation = Simulation {
            flows,
            warmup: Duration::from_secs(10),
            measured: Duration::from_secs(30),
            ..Simulation::new(wan(products))
        };
        let outcome = simulation.run(&format!("ours and cubic, {products} products"));
        let share = outcome.rates[0] / outcome.total();
        assert!((0.25..=0.75).contains(&share), "{share}");
    }
}

#[test]
fn thin_writes_that_are_sent_twice_do_not_wait_for_a_retransmission() {
    for (loss, downloads, least, p98) in
        [(0.01, 0, None, 56.0), (0.01, 4, Some(88.0), 80.0), (0.05, 4, Some(80.0), 90.0)]
    {
        let flow = Flow { downloads, hedged: true, ..Flow::new(Congestion::Model) };
        let link = Settings { loss, ..wan(1.0) };
        let simulation = Simulation { flows: vec![flow], ..Simulation::new(link) };
        let outcome = simulation.run(&format!("hedged, {downloads} downloads, loss {loss}"));
        if let Some(least) = least {
            assert!(outcome.total() >= least);
        }
        // A keystroke of which both copies are lost delays the next one or two.
        assert!(outcome.echo(0.5) < 60.0 && outcome.echo(0.98) < p98);
    }
}

#[test]
fn keystrokes_and_short_answers_overtake_forty_downloads() {
    let [plain, scheduled] = [false, true].map(|scheduled| {
        let flow = Flow { downloads: 40, scheduled, ..Flow::new(Congestion::Model) };
        let simulation = Simulation { flows: vec![flow], ..Simulation::new(wan(1.0)) };
        simulation.run(if scheduled { "forty downloads" } else { "forty downloads, one class" })
    });
    assert!(scheduled.total() > 88.0, "the downloads go on");
    assert!(scheduled.echo(0.5) < 60.0 && scheduled.echo(0.99) < 80.0);
    // 25 ms of delay, 5 ms at the bandwidth, and what waits in front.
    assert!(scheduled.answer(0.5) < 50.0);
    assert!(
        plain.answer(0.5) > 2.0 * scheduled.answer(0.5),
        "without classes, answers wait behind downloads"
    );
}

#[test]
fn keystrokes_go_on_soon_after_an_outage() {
    for (typists, downloads, millis) in [(1, 0, 300), (1, 4, 300), (1, 0, 1000), (40, 0, 500)] {
        // Keystrokes alone have round trips so even that QUIC finds persistent congestion.
        let answers = typists == 1;
        let flow =
            Flow { typists, downloads, hedged: true, answers, ..Flow::new(Congestion::Model) };
        let outage = Some((Duration::from_secs(6), Duration::from_millis(millis)));
        let link = Settings { outage, ..wan(1.0) };
        let simulation = Simulation { flows: vec![flow], ..Simulation::new(link) };
        let beside = format!("{typists} typists, {downloads} downloads");
        let outcome = simulation.run(&format!("gone for {millis} ms, {beside}"));
        assert!(outcome.echo(1.0) < millis as f64 + 250.0);
    }
}

/// One typist and nothing else: no packets follow a lost one that would show the loss soon. A
/// single copy waits for a probe time-out; two copies wait for none, but for the few that are both
/// lost.
#[test]
fn a_lone_keystroke_that_is_sent_twice_does_not_wait_for_a_time_out() {
    // Bounds of the 99th percentile: two round trips and 10 ms, or a time-out and its round trip.
    for (loss, hedged, least, most) in [
        (0.01, false, 110.0, 250.0),
        (0.01, true, 50.0, 110.0),
        (0.05, false, 110.0, 400.0),
        (0.05, true, 50.0, 110.0),
    ] {
        let flow = Flow { downloads: 0, hedged, answers: false, ..Flow::new(Congestion::Model) };
        let link = Settings { loss, ..wan(1.0) };
        let measured = Duration::from_secs(100);
        let simulation = Simulation { flows: vec![flow], measured, ..Simulation::new(link) };
        let copies = if hedged { "twice" } else { "once" };
        let outcome = simulation.run(&format!("one typist, sent {copies}, loss {loss}"));
        let p99 = outcome.echo(0.99);
        assert!((least..most).contains(&p99), "{p99} ms");
    }
}

/// Milliseconds.
fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Keystrokes show nothing of a path's bandwidth: they neither end the search for it, nor does the
/// tunnel forget what it has found.
#[test]
fn a_large_answer_takes_no_longer_after_keystrokes() {
    let [first, second] = Reconnecting::new(1).answer_twice("no keystrokes", wan(1.0));
    let mut typed = Reconnecting::new(1);
    typed.keystrokes = Duration::from_secs(30);
    let [first_typed, second_typed] = typed.answer_twice("30 s of keystrokes", wan(1.0));
    assert!(millis(first_typed) < 1.1 * millis(first));
    assert!(millis(second_typed) < 1.1 * millis(second));
}

#[test]
fn an_answer_after_a_reconnection_over_the_same_path_takes_three_round_trips_less() {
    // With loss the last retransmissions decide, and differ by chance.
    for (loss, saved) in [(0.0, 150.0), (0.01, 50.0), (0.05, 50.0)] {
        let agent = Reconnecting::new(1);
        let link = Settings { loss, ..wan(1.0) };
        let first = agent.answer(&format!("loss {loss}, first"), link, false);
        for _ in 0..2 {
            let again = agent.answer(&format!("loss {loss}, again"), link, false);
            assert!(millis(first.took) - millis(again.took) > saved);
        }
        assert_eq!(agent.count(Resumption::Confirmed), 2);
    }
}

#[test]
fn a_path_that_shrank_to_a_tenth_is_left_to_its_rate_at_once() {
    for products in [1.0, 4.0] {
        let agent = Reconnecting::new(1);
        agent.answer("before", wan(products), false);
        let shrunk = Settings::new(10.0, 50, products);
        let again = agent.answer("shrunk, again", shrunk, false);
        let new = Reconnecting::new(1).answer("shrunk, new", shrunk, false);
        assert_eq!(agent.count(Resumption::Retreated), 1);
        assert!(millis(again.took) < 1.05 * millis(new.took));
        assert!(again.dropped < 0.05);
        // What was found out is that of the smaller path.
        let third = agent.answer("shrunk, third", shrunk, false);
        assert!(third.dropped < 0.04 && millis(third.took) < 1.02 * millis(new.took));
    }
}

#[test]
fn a_path_with_another_round_trip_time_is_a_new_one() {
    for rtt in [20, 80, 200] {
        let agent = Reconnecting::new(1);
        agent.answer("before", wan(1.0), false);
        let other = Settings::new(100.0, rtt, 1.0);
        let again = agent.answer(&format!("{rtt} ms, again"), other, false);
        let new = Reconnecting::new(1).answer(&format!("{rtt} ms, new"), other, false);
        assert_eq!(agent.count(Resumption::OtherPath), 1);
        assert_eq!(again.took, new.took);
    }
}

/// In a shallow buffer the round trip is the known one although the path is shared, so the answer
/// begins with half of the rate that it has had alone. In a deeper one the queue keeps it from that.
/// The moment in CUBIC's cycle decides what a single answer costs it, so several are added up.
#[test]
fn an_answer_after_a_reconnection_leaves_cubic_its_share() {
    let link = Settings::new(40.0, 50, 0.2);
    let (mut beside_again, mut beside_new) = (0, 0);
    for seed in 1..=3 {
        let agent = Reconnecting::new(seed);
        agent.answer("before", link, false);
        beside_again += agent.answer("beside cubic, again", link, true).beside;
        beside_new += Reconnecting::new(seed).answer("beside cubic, new", link, true).beside;
        let counted = [Resumption::Confirmed, Resumption::Retreated].map(|it| agent.count(it));
        assert_eq!(counted.iter().sum::<u64>(), 1, "{counted:?}");
    }
    assert!(beside_again as f64 > 0.9 * beside_new as f64, "{beside_again} and {beside_new}");
}
