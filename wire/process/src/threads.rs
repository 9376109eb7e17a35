//! Blocking work on threads of its own.
//!
//! tokio's pool panics where no thread can be started, as at the limit of a container's processes;
//! here that is an error like any other.

use std::{io, thread};

use tokio::sync::oneshot;

/// Does blocking work on a thread with this name, which lives as long as the work.
///
/// # Errors
/// The kernel's where no thread can be started, and an error of its own if the work panics.
///
/// # Cancel safety
/// Cancel safe: work that has begun is completed.
pub(crate) async fn on_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (sender, done) = oneshot::channel();
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Without effect when the caller has gone.
        let _ = sender.send(work());
    })?;
    done.await.map_err(|_| io::Error::other("the thread panicked"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_is_done_on_a_thread_of_that_name_and_a_panic_is_an_error() {
        let name = on_thread("worker", || thread::current().name().map(str::to_owned)).await;
        assert_eq!(name.unwrap().as_deref(), Some("worker"));
        let panicked = on_thread("worker", || panic!("scripted")).await;
        assert_eq!(panicked.unwrap_err().to_string(), "the thread panicked");
    }
}
