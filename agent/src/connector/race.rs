//! Two ways tried at once, the likelier one a little ahead.

use std::{pin::pin, time::Duration};

use tokio::{select, time::sleep};

/// What two ways came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Race<T, E> {
    /// The first got through.
    First(T),
    /// The second got through; the first had failed for this reason, or was still on its way.
    Second(T, Option<E>),
    /// Both failed, for these reasons.
    Neither(E, E),
}

/// Tries the first way, and the second as well once the first has failed or taken `head_start`. A
/// refusal counts like silence, only quicker.
///
/// # Cancel safety
/// Dropping the future gives both up; the loser is given up as soon as the other has won.
pub async fn race<T, E>(
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
        // Who was away for a while finds both done: the likelier one is meant.
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

    /// A way that gets through, or does not, after so many milliseconds.
    async fn way(millis: u64, result: Result<u8, char>) -> Result<u8, char> {
        sleep(Duration::from_millis(millis)).await;
        result
    }

    /// What comes of two order, and after how many milliseconds.
    async fn run(
        first: (u64, Result<u8, char>),
        second: (u64, Result<u8, char>),
    ) -> (Race<u8, char>, u128) {
        let begun = Instant::now();
        let raced = race(way(first.0, first.1), way(second.0, second.1), HEAD_START).await;
        (raced, begun.elapsed().as_millis())
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_has_the_way_to_itself_for_a_moment() {
        assert_eq!(run((299, Ok(1)), (0, Ok(2))).await, (Race::First(1), 299));
        assert_eq!(run((400, Ok(1)), (50, Ok(2))).await, (Race::Second(2, None), 350));
        assert_eq!(run((400, Ok(1)), (150, Ok(2))).await, (Race::First(1), 400));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_lets_the_second_begin_at_once() {
        assert_eq!(run((1, Err('a')), (50, Ok(2))).await, (Race::Second(2, Some('a')), 51));
        assert_eq!(run((310, Err('a')), (50, Ok(2))).await, (Race::Second(2, Some('a')), 350));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_fails_does_not_end_the_other() {
        assert_eq!(run((900, Ok(1)), (50, Err('b'))).await, (Race::First(1), 900));
        let neither = Race::Neither('a', 'b');
        assert_eq!(run((900, Err('a')), (50, Err('b'))).await, (neither, 900));
        let neither = Race::Neither('a', 'b');
        assert_eq!(run((10, Err('a')), (50, Err('b'))).await, (neither, 60));
    }
}
