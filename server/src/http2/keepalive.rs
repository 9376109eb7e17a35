//! Pings to a peer that is silent.

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use tokio::time::{sleep, timeout};

use super::{
    frames::{FrameHead, kind},
    shared::Shared,
};

impl Shared {
    /// Records that the peer has sent something.
    pub(super) fn heard(&self) {
        let millis = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard.store(millis, Relaxed);
    }

    /// Time for which the peer was silent.
    fn silent_for(&self) -> Duration {
        self.begun.elapsed().saturating_sub(Duration::from_millis(self.heard.load(Relaxed)))
    }

    /// Completes when the peer was silent for `interval`, and then for another `patience` although it
    /// was sent a ping; never without an interval.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn until_dead(&self, interval: Option<Duration>, patience: Duration) {
        let Some(interval) = interval else { return std::future::pending().await };
        loop {
            match interval.checked_sub(self.silent_for()) {
                Some(left) if !left.is_zero() => sleep(left).await,
                _ => {
                    if timeout(patience, self.ping()).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Asks the peer for a sign of life, and waits for it.
    ///
    /// # Cancel safety
    /// Cancel safe; the ping is sent in any case.
    pub(super) async fn ping(&self) {
        let answered = self.pong.notified();
        {
            let mut state = self.lock();
            state.push(FrameHead::new(kind::PING, 0, 8), &[0; 8]);
            state.wake();
        }
        answered.await;
    }
}
