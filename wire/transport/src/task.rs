//! Tasks with an owner.
//!
//! A task that is spawned and forgotten keeps what it holds for as long as it likes. So
//! `.clippy.toml` forbids the bare spawn, and a task belongs to a [`JoinSet`](tokio::task::JoinSet),
//! to a [`TaskTracker`](tokio_util::task::TaskTracker), or to the handle that [`owned`] returns.

use tokio_util::task::AbortOnDropHandle;

/// A task that is aborted when this is dropped, and whose result is its output.
pub type Owned<T> = AbortOnDropHandle<T>;

/// Spawns a task that is aborted when the handle is dropped.
///
/// # Panics
/// Outside a tokio runtime.
#[expect(clippy::disallowed_methods, reason = "the handle owns the task")]
pub fn owned<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Owned<T> {
    AbortOnDropHandle::new(tokio::spawn(work))
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn a_task_ends_with_its_handle() {
        let (held, ended) = oneshot::channel::<()>();
        let task = owned(async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        drop(task);
        ended.await.unwrap_err();
    }
}
