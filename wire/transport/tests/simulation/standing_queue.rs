//! The queue that a tunnel keeps on a path that it fills, what keystrokes wait in it, and how soon
//! the tunnel finds that the path has become faster.

use std::time::Duration;

use culvert_transport::congestion::Congestion;

use super::{
    flow::{Flow, Outcome, SLICE, Simulation},
    pipe::Settings,
};

/// Four downloads for half a minute, and twenty typists, as in the scenario `clean-busy`.
fn busy(link: Settings) -> Simulation {
    let flow = Flow {
        typists: 20,
        hedged: true,
        repaired: true,
        answers: false,
        ..Flow::new(Congestion::Model)
    };
    Simulation { flows: vec![flow], measured: Duration::from_secs(27), ..Simulation::new(link) }
}

/// Prints the queue's quantiles, and its longest wait in every tenth of a second of the begin.
fn print_queue(outcome: &Outcome) {
    let quantiles = [0.01, 0.5, 0.9, 0.99, 1.0].map(|share| format!("{:.1}", outcome.queue(share)));
    println!("queue at 1, 50, 90, 99 and 100 %: {} ms", quantiles.join(" / "));
    let mut slices = vec![Duration::ZERO; outcome.slices.len()];
    for (at, wait) in &outcome.waits {
        let slice = &mut slices[(at.as_nanos() / SLICE.as_nanos()) as usize];
        *slice = (*slice).max(*wait);
    }
    let longest: Vec<_> =
        slices.iter().take(80).map(|wait| format!("{:.0}", wait.as_secs_f64() * 1000.0)).collect();
    println!("longest wait in each tenth of a second: {} ms", longest.join(" "));
}

/// 100 Mbit/s carry 97 of data in packets of 1500 bytes, and typists have 0.4 of them. The clock of
/// tokio has milliseconds, and an exchange waits for two of its ticks on average.
#[test]
fn keystrokes_beside_downloads_wait_for_few_packets() {
    for products in [1.0, 4.0] {
        let link = Settings::new(100.0, 50, products);
        let outcome = busy(link).run(&format!("twenty typists, buffer of {products} products"));
        print_queue(&outcome);
        assert!(outcome.total() > 94.0);
        assert!(outcome.queue(0.5) < 3.5 && outcome.queue(0.99) < 6.0);
        assert!(outcome.echo(0.5) < 56.0 && outcome.echo(0.99) < 58.0);
    }
}

/// Time from the change of the rate until the downloads have 85 % of the new one for half a second.
fn time_to_find(from: f64, to: f64, products: f64, loss: f64) -> Duration {
    let change = Some((Duration::from_secs(8), to));
    let link = Settings { change, loss, ..Settings::new(from, 50, products) };
    let simulation = Simulation { warmup: Duration::from_secs(8), ..busy(link) };
    let outcome = simulation
        .run(&format!("{from} to {to} Mbit/s, buffer of {products} products, loss {loss}"));
    let least = (to * 0.85 * 125_000.0 * SLICE.as_secs_f64() * 5.0) as u64;
    let mut halves = outcome.slices.windows(5);
    let found = halves.position(|half| half.iter().sum::<u64>() >= least);
    let found = SLICE * found.expect("the rate is found") as u32;
    println!("found after {} ms", found.as_millis());
    found
}

/// A tenfold rate takes three doublings and as many probes that grow to them. In the small buffer,
/// losses interrupt them.
#[test]
fn a_path_that_becomes_faster_is_found_soon() {
    for (from, to, products, loss, limit) in [
        (50.0, 100.0, 4.0, 0.0, 2000),
        (10.0, 100.0, 1.0, 0.0, 7000),
        (10.0, 100.0, 4.0, 0.0, 4000),
        (10.0, 100.0, 4.0, 0.01, 4000),
        (10.0, 100.0, 4.0, 0.05, 4000),
    ] {
        let found = time_to_find(from, to, products, loss);
        assert!(found < Duration::from_millis(limit));
    }
}

/// Where round-trip times vary by more than a small probe adds, neither its queue nor its rate would
/// be seen.
#[test]
fn a_path_of_much_jitter_is_filled() {
    for (rate, rtt, jitter, least) in
        [(20.0, 200, 20, 15.0), (50.0, 50, 5, 40.0), (100.0, 20, 2, 80.0)]
    {
        let link =
            Settings { jitter: Duration::from_millis(jitter), ..Settings::new(rate, rtt, 1.0) };
        let outcome = busy(link).run(&format!("{rate} Mbit/s, {rtt} ms, jitter of {jitter} ms"));
        assert!(outcome.total() > least);
    }
}
