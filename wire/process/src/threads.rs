//! Blocking work on threads of its own.
//!
//! tokio's pool panics where no thread can be started, as at the limit of a container's processes;
//! here that is an error like any other.

use std::{io, thread};

use tokio::{
    runtime::Handle,
    sync::{oneshot, oneshot::error::RecvError},
};

/// Does blocking work on a thread with this name, which lives as long as the work. As in tokio's
/// pool, the work may spawn tasks of the runtime. Panics outside a tokio runtime.
///
/// # Errors
/// The kernel's where no thread can be started, and an error of its own if the work panics.
///
/// # Cancel safety
/// Cancel safe: work that has begun is completed.
pub async fn on_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (sender, done) = oneshot::channel();
    let runtime = Handle::current();
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        let _entered = runtime.enter();
        // Without effect when the caller has gone.
        let _ = sender.send(work());
    })?;
    wait(done).await.map_err(|_| io::Error::other("the thread panicked"))
}

#[cfg(not(any(test, feature = "test-util")))]
async fn wait<T>(done: oneshot::Receiver<T>) -> Result<T, RecvError> {
    done.await
}

/// A paused clock does not advance while a thread of tokio's pool is at work, and this one is for
/// as long as the other.
#[cfg(any(test, feature = "test-util"))]
async fn wait<T: Send + 'static>(done: oneshot::Receiver<T>) -> Result<T, RecvError> {
    let waiting = tokio::task::spawn_blocking(|| done.blocking_recv());
    waiting.await.expect("nothing panics while it waits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_has_a_named_thread_and_the_runtime_and_a_panic_is_an_error() {
        let name = on_thread("worker", || thread::current().name().map(str::to_owned)).await;
        assert_eq!(name.unwrap().as_deref(), Some("worker"));
        let spawned =
            on_thread("worker", || culvert_transport::task::owned(async { 7 })).await.unwrap();
        assert_eq!(spawned.await.unwrap(), 7);
        let panicked = on_thread("worker", || panic!("scripted")).await;
        assert_eq!(panicked.unwrap_err().to_string(), "the thread panicked");
    }
}
