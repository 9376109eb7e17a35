//! Two futures raced, the likelier one with a head start.

use std::{pin::pin, time::Duration};

use tokio::{select, time::sleep};

/// The result of a [`race`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Race<T, E> {
    /// The first succeeded.
    First(T),
    /// The second succeeded, after the first had failed with this error, or before the first was
    /// done.
    Second(T, Option<E>),
    /// Both failed, with these errors.
    Neither(E, E),
}

/// Polls `first` alone until it fails or `head_start` has passed, then `second` as well, until one
/// succeeds or both have failed.
///
/// # Cancel safety
/// Cancel safe if both futures are: dropping the future drops both. The loser is dropped as soon as
/// the other succeeds.
pub(crate) async fn race<T, E>(
    first: impl Future<Output = Result<T, E>>,
    second: impl Future<Output = Result<T, E>>,
    head_start: Duration,
) -> Race<T, E> {
    let (mut first, mut second) = (pin!(first), pin!(second));
    let failed = select! {
        biased;
        done = &mut first => match done {
            Ok(won) => return Race::First(won),
            Err(error) => Some(error),
        },
        () = sleep(head_start) => None,
    };
    let failed = match failed {
        Some(error) => error,
        // After a pause of the process both may be done: prefer the first.
        None => select! {
            biased;
            done = &mut first => match done {
                Ok(won) => return Race::First(won),
                Err(error) => error,
            },
            done = &mut second => return match done {
                Ok(won) => Race::Second(won, None),
                Err(other) => match first.await {
                    Ok(won) => Race::First(won),
                    Err(error) => Race::Neither(error, other),
                },
            },
        },
    };
    match second.await {
        Ok(won) => Race::Second(won, Some(failed)),
        Err(other) => Race::Neither(failed, other),
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    const HEAD_START: Duration = Duration::from_millis(300);

    /// Returns `result` after `millis` milliseconds.
    async fn after(millis: u64, result: Result<u8, char>) -> Result<u8, char> {
        sleep(Duration::from_millis(millis)).await;
        result
    }

    /// The result of a race between two futures, and its duration in milliseconds.
    async fn run(
        first: (u64, Result<u8, char>),
        second: (u64, Result<u8, char>),
    ) -> (Race<u8, char>, u128) {
        let begun = Instant::now();
        let raced = race(after(first.0, first.1), after(second.0, second.1), HEAD_START).await;
        (raced, begun.elapsed().as_millis())
    }

    #[tokio::test(start_paused = true)]
    async fn the_second_starts_after_the_head_start_and_the_first_to_succeed_wins() {
        assert_eq!(run((299, Ok(1)), (0, Ok(2))).await, (Race::First(1), 299));
        assert_eq!(run((400, Ok(1)), (50, Ok(2))).await, (Race::Second(2, None), 350));
        assert_eq!(run((400, Ok(1)), (150, Ok(2))).await, (Race::First(1), 400));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_of_the_first_starts_the_second_at_once() {
        assert_eq!(run((1, Err('a')), (50, Ok(2))).await, (Race::Second(2, Some('a')), 51));
        assert_eq!(run((310, Err('a')), (50, Ok(2))).await, (Race::Second(2, Some('a')), 350));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_does_not_end_the_other() {
        assert_eq!(run((900, Ok(1)), (50, Err('b'))).await, (Race::First(1), 900));
        let neither = Race::Neither('a', 'b');
        assert_eq!(run((900, Err('a')), (50, Err('b'))).await, (neither, 900));
        let neither = Race::Neither('a', 'b');
        assert_eq!(run((10, Err('a')), (50, Err('b'))).await, (neither, 60));
    }
}
