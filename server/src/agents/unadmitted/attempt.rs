//! One peer's attempt to join: its place among the peers that are not admitted, and its time.

use culvert_transport::Carrier;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

#[cfg(test)]
use super::UnadmittedTable;
use super::{
    JOIN_TIMEOUT,
    table::{Place, Progress},
};
use crate::agents::join::JoinError;

/// The attempt of one peer to join, from its accept to its admission or its end.
#[derive(Debug)]
pub(in crate::agents) struct Attempt {
    /// When the peer is dropped unless it has joined.
    deadline: Instant,
    /// Cancelled when the peer is to give way to another.
    gives_way: CancellationToken,
    /// Cancelled when the peer is admitted.
    admitted: CancellationToken,
    /// `None` once the peer is admitted.
    place: Mutex<Option<Place>>,
}

impl Attempt {
    /// The attempt of a peer that was accepted just now.
    pub(super) fn new(place: Place) -> Self {
        Self {
            deadline: Instant::now() + JOIN_TIMEOUT,
            gives_way: place.gives_way().clone(),
            admitted: CancellationToken::new(),
            place: Mutex::new(Some(place)),
        }
    }

    /// The attempt of a peer on this host that is connected.
    #[cfg(test)]
    pub(in crate::agents) async fn of_stranger(table: &std::sync::Arc<UnadmittedTable>) -> Self {
        let address = std::net::Ipv4Addr::LOCALHOST.into();
        Self::new(table.enter(address, Carrier::Tcp, Progress::Connected).await.unwrap())
    }

    /// The introduction of an agent that was admitted already: it has a deadline and no place.
    pub(in crate::agents) fn of_admitted() -> Self {
        Self {
            deadline: Instant::now() + JOIN_TIMEOUT,
            gives_way: CancellationToken::new(),
            admitted: CancellationToken::new(),
            place: Mutex::new(None),
        }
    }

    /// When the peer is dropped unless it has joined.
    pub(in crate::agents) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Records what the peer has proved by now.
    pub(super) fn set_progress(&self, progress: Progress) {
        if let Some(place) = &mut *self.place.lock() {
            place.set_progress(progress);
        }
    }

    /// Records what carries the peer, once that is known.
    pub(super) fn set_carrier(&self, carrier: Carrier) {
        if let Some(place) = &mut *self.place.lock() {
            place.set_carrier(carrier);
        }
    }

    /// Records that the peer is admitted: it is a stranger no longer.
    pub(in crate::agents) fn admit(&self) {
        if let Some(place) = self.place.lock().take() {
            place.admitted();
        }
        self.admitted.cancel();
    }

    /// Whether the peer was admitted.
    pub(in crate::agents) fn is_admitted(&self) -> bool {
        self.admitted.is_cancelled()
    }

    /// The outcome of one step, which must come before the deadline and before the peer is to give
    /// way.
    ///
    /// # Errors
    /// With the error of the step, [`JoinError::TimedOut`] or [`JoinError::Evicted`].
    pub(in crate::agents) async fn within<T>(
        &self,
        step: impl Future<Output = Result<T, JoinError>>,
    ) -> Result<T, JoinError> {
        tokio::select! {
            biased;
            outcome = timeout_at(self.deadline, step) => {
                outcome.unwrap_or(Err(JoinError::TimedOut))
            }
            () = self.gives_way.cancelled() => Err(JoinError::Evicted),
        }
    }

    /// Completes with the cause when the peer is at its deadline or is to give way, and was not
    /// admitted before.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(in crate::agents) async fn failed(&self) -> JoinError {
        tokio::select! {
            biased;
            () = self.admitted.cancelled() => std::future::pending().await,
            () = self.gives_way.cancelled() => JoinError::Evicted,
            () = sleep_until(self.deadline) => JoinError::TimedOut,
        }
    }
}
