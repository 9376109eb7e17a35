//! Tasks that a process cannot do without.

use std::{
    convert::Infallible,
    future::poll_fn,
    panic,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::task::JoinError;
use tokio_util::task::AbortOnDropHandle;

/// Panics with the panic of a task, if it panicked.
pub fn propagate_panic(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && let Ok(panic) = error.try_into_panic()
    {
        panic::resume_unwind(panic);
    }
}

/// Panics when one of the tasks panics, and never completes.
///
/// # Cancel safety
/// Cancel safe: the tasks go on.
pub async fn until_panic<'a>(
    tasks: impl IntoIterator<Item = &'a mut AbortOnDropHandle<()>>,
) -> Infallible {
    let mut tasks: Vec<_> = tasks.into_iter().collect();
    let is_running = |task: &mut AbortOnDropHandle<()>, cx: &mut Context<'_>| {
        let ended = match Pin::new(task).poll(cx) {
            Poll::Ready(ended) => ended,
            Poll::Pending => return true,
        };
        propagate_panic(ended);
        false
    };
    poll_fn(|cx| {
        tasks.retain_mut(|task| is_running(task, cx));
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::{future, time::Duration};

    use tokio::time::timeout;

    use super::*;

    fn task(work: impl Future<Output = ()> + Send + 'static) -> AbortOnDropHandle<()> {
        culvert_transport::task::owned(work)
    }

    #[tokio::test(start_paused = true)]
    #[should_panic(expected = "scripted")]
    async fn the_panic_of_any_task_goes_on_in_its_supervisor() {
        let mut tasks =
            [task(async {}), task(future::pending()), task(async { panic!("scripted") })];
        until_panic(&mut tasks).await;
    }

    #[tokio::test(start_paused = true)]
    async fn tasks_that_end_without_a_panic_end_nothing() {
        let mut tasks = [task(async {}), task(future::pending())];
        let waited = timeout(Duration::from_secs(60), until_panic(&mut tasks)).await;
        assert!(waited.is_err());
    }
}
