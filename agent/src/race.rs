//! Attempts to connect, raced: each starts when one before has failed or has taken a while, and the
//! first success wins (RFC 8305 §5). Targets, servers and carriers are raced by this code alone.

use std::{
    future::poll_fn,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    select,
    time::{Instant, sleep_until},
};

/// Delay between the starts of two attempts, RFC 8305's recommendation.
pub(crate) const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Maximum number of attempts of one race that run at the same time.
pub(crate) const MAX_RUNNING: usize = 8;

/// The result of a [`race`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Raced<T, E> {
    /// The number of the attempt that succeeded first, from 0, and its result.
    pub(crate) winner: Option<(usize, T)>,
    /// The attempts that failed before, in the order in which they did.
    pub(crate) failures: Vec<(usize, E)>,
}

/// Runs `attempts` until one succeeds or all have ended. The first starts at once, and each other
/// one `delay` after the one before, or as soon as one fails.
///
/// At most [`MAX_RUNNING`] run at the same time: when the next one is due, the oldest gives way. It
/// is in neither part of the result.
///
/// # Cancel safety
/// Cancel safe if the attempts are: dropping the future drops those that run. The losers are
/// dropped as soon as one succeeds.
pub(crate) async fn race<T, E, F>(
    attempts: impl IntoIterator<Item = F>,
    delay: Duration,
) -> Raced<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    let mut waiting = attempts.into_iter().enumerate().peekable();
    let mut running = Vec::new();
    let mut failures = Vec::new();
    loop {
        if let Some((number, attempt)) = waiting.next() {
            if running.len() == MAX_RUNNING {
                running.remove(0);
            }
            running.push((number, Box::pin(attempt)));
        }
        if running.is_empty() {
            return Raced { winner: None, failures };
        }
        let next_at = waiting.peek().map(|_| Instant::now() + delay);
        match ended(&mut running, next_at).await {
            Some((number, Ok(won))) => return Raced { winner: Some((number, won)), failures },
            Some((number, Err(error))) => failures.push((number, error)),
            None => {}
        }
    }
}

/// The attempts that run, oldest first, with their numbers.
type Running<F> = Vec<(usize, Pin<Box<F>>)>;

/// Completes when an attempt has ended, which it takes out, or with `None` at `until`.
async fn ended<F: Future>(
    running: &mut Running<F>,
    until: Option<Instant>,
) -> Option<(usize, F::Output)> {
    let first = poll_fn(|context| poll_first(running, context));
    match until {
        None => Some(first.await),
        Some(until) => select! {
            // After a pause of the process, an attempt that is done comes before a new one.
            biased;
            ended = first => Some(ended),
            () = sleep_until(until) => None,
        },
    }
}

/// Polls the oldest attempt first: after a pause of the process several may be done.
fn poll_first<F: Future>(
    running: &mut Running<F>,
    context: &mut Context<'_>,
) -> Poll<(usize, F::Output)> {
    for position in 0..running.len() {
        let (number, attempt) = &mut running[position];
        if let Poll::Ready(output) = attempt.as_mut().poll(context) {
            let number = *number;
            running.remove(position);
            return Poll::Ready((number, output));
        }
    }
    Poll::Pending
}

/// The addresses in turns of IPv6 and IPv4, each family in the given order, so that a family
/// without a route costs one delay (RFC 8305 §4). The first address stays the first.
pub(crate) fn interleave(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let count = addresses.len();
    let Some(is_ipv4) = addresses.first().map(SocketAddr::is_ipv4) else { return addresses };
    let (preferred, other): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv4() == is_ipv4);
    let (mut preferred, mut other) = (preferred.into_iter(), other.into_iter());
    let mut interleaved = Vec::with_capacity(count);
    while interleaved.len() < count {
        interleaved.extend(preferred.next());
        interleaved.extend(other.next());
    }
    interleaved
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use tokio::time::sleep;

    use super::*;

    /// An attempt that ends after so many milliseconds.
    type Attempt = (u64, Result<char, char>);

    const NEVER: Attempt = (1_000_000, Err('!'));

    /// A race that has ended.
    #[derive(Debug)]
    struct Run {
        raced: Raced<char, char>,
        millis: u128,
        /// When each attempt that was started did so.
        starts: Vec<u128>,
    }

    async fn run(attempts: &[Attempt]) -> Run {
        let (begun, starts) = (Instant::now(), Arc::new(Mutex::new(Vec::new())));
        let attempt = |&(millis, result): &Attempt| {
            let starts = starts.clone();
            async move {
                starts.lock().push(begun.elapsed().as_millis());
                sleep(Duration::from_millis(millis)).await;
                result
            }
        };
        let raced = race(attempts.iter().map(attempt), ATTEMPT_DELAY).await;
        let starts = starts.lock().clone();
        Run { raced, millis: begun.elapsed().as_millis(), starts }
    }

    fn won(number: usize, result: char, failures: &[(usize, char)]) -> Raced<char, char> {
        Raced { winner: Some((number, result)), failures: failures.to_vec() }
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_that_succeeds_within_the_delay_is_the_only_one() {
        let run = run(&[(249, Ok('a')), (0, Ok('b'))]).await;
        assert_eq!((run.raced, run.millis, run.starts), (won(0, 'a', &[]), 249, vec![0]));
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_that_do_not_end_cost_one_delay_each() {
        let run = run(&[NEVER, NEVER, NEVER, NEVER, (5, Ok('e'))]).await;
        assert_eq!((run.raced, run.millis), (won(4, 'e', &[]), 1005));
        assert_eq!(run.starts, [0, 250, 500, 750, 1000]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_to_succeed_wins_and_not_the_first_to_start() {
        let first = run(&[(400, Ok('a')), (100, Ok('b'))]).await;
        assert_eq!((first.raced, first.millis), (won(1, 'b', &[]), 350));
        let first = run(&[(400, Ok('a')), (150, Ok('b'))]).await;
        assert_eq!((first.raced, first.millis), (won(0, 'a', &[]), 400), "both are done at 400");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_starts_the_next_attempt_at_once() {
        let run = run(&[(10, Err('a')), NEVER, (20, Err('c')), (5, Ok('d'))]).await;
        assert_eq!(run.raced, won(3, 'd', &[(0, 'a'), (2, 'c')]));
        assert_eq!(run.starts, [0, 10, 260, 280]);
        assert_eq!(run.millis, 285);
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_failure_of_an_early_attempt_starts_the_next_one_too() {
        let run = run(&[(300, Err('a')), NEVER, (5, Ok('c'))]).await;
        assert_eq!((run.raced, run.starts), (won(2, 'c', &[(0, 'a')]), vec![0, 250, 300]));
    }

    #[tokio::test(start_paused = true)]
    async fn failures_do_not_end_the_attempts_that_still_run() {
        let first = run(&[(900, Ok('a')), (50, Err('b')), (60, Err('c'))]).await;
        assert_eq!((first.raced, first.millis), (won(0, 'a', &[(1, 'b'), (2, 'c')]), 900));
        let none = run(&[(900, Err('a')), (50, Err('b'))]).await;
        let failures = vec![(1, 'b'), (0, 'a')];
        assert_eq!((none.raced, none.millis), (Raced { winner: None, failures }, 900));
    }

    #[tokio::test(start_paused = true)]
    async fn without_attempts_there_is_no_winner() {
        assert_eq!(run(&[]).await.raced, Raced { winner: None, failures: vec![] });
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_attempt_gives_way_to_the_next_one() {
        // The first would succeed at 2100 ms, but the ninth starts at 2000 ms.
        let mut attempts = vec![(2100, Ok('a'))];
        attempts.extend([NEVER; MAX_RUNNING - 1]);
        let result = run(&attempts).await;
        assert_eq!((result.raced, result.millis), (won(0, 'a', &[]), 2100));
        attempts.push((300, Ok('i')));
        let result = run(&attempts).await;
        assert_eq!((result.raced, result.millis), (won(MAX_RUNNING, 'i', &[]), 2300));
    }

    #[tokio::test(start_paused = true)]
    async fn the_losers_are_dropped_at_once() {
        let alive = Arc::new(());
        let attempts = [(500, Err('a')), (10, Ok('b')), (0, Ok('c'))].map(|(millis, result)| {
            let alive = alive.clone();
            async move {
                let _alive = alive;
                sleep(Duration::from_millis(millis)).await;
                result
            }
        });
        assert_eq!(race(attempts, ATTEMPT_DELAY).await, won(1, 'b', &[]));
        assert_eq!(Arc::strong_count(&alive), 1);
    }

    #[test]
    fn families_take_turns_and_each_keeps_its_order() {
        for (given, expected) in [
            ("10.0.0.1 10.0.0.2 fd00::1 fd00::2", "10.0.0.1 fd00::1 10.0.0.2 fd00::2"),
            ("fd00::1 fd00::2 fd00::3 10.0.0.1", "fd00::1 10.0.0.1 fd00::2 fd00::3"),
            ("10.0.0.1 fd00::1 fd00::2 fd00::3", "10.0.0.1 fd00::1 fd00::2 fd00::3"),
            ("10.0.0.2 10.0.0.1", "10.0.0.2 10.0.0.1"),
            ("", ""),
        ] {
            let address = |ip: &str| SocketAddr::new(ip.parse().unwrap(), 80);
            let interleaved = interleave(given.split_whitespace().map(address).collect());
            let shown: Vec<_> = interleaved.iter().map(|it| it.ip().to_string()).collect();
            assert_eq!(shown.join(" "), expected);
        }
    }
}
