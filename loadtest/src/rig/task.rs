//! A part of a rig in a task of its own.

use std::{future::Future, pin::Pin, time::Duration};

use anyhow::Context as _;
use tokio::{sync::oneshot, time::timeout};
use tokio_util::task::AbortOnDropHandle;

/// A part that runs until it is stopped, and is aborted when dropped.
#[derive(Debug)]
pub(super) struct Task {
    stop: Option<oneshot::Sender<()>>,
    handle: AbortOnDropHandle<()>,
}

/// Completes when the part is to stop.
pub(super) type StopFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Task {
    pub(super) fn spawn<F>(run: impl FnOnce(StopFuture) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped: StopFuture = Box::pin(async { drop(stopped.await) });
        Self { stop: Some(stop), handle: culvert_transport::task::owned(run(stopped)) }
    }

    /// Stops the part; completes when it has ended.
    pub(super) async fn stop(&mut self, patience: Duration) -> anyhow::Result<()> {
        self.stop.take();
        let ended = timeout(patience, &mut self.handle).await;
        Ok(ended.context("a part of the rig does not stop")??)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}
