//! One peer's attempt to join: its place among the peers that are not admitted, its time, and what
//! it may send.

use culvert_transport::Carrier;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

#[cfg(test)]
use super::UnadmittedTable;
use super::{
    JOIN_TIMEOUT,
    allowance::{Limited, limited},
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
    /// Cancelled when the peer has sent more than an introduction before.
    exceeded: CancellationToken,
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
            exceeded: CancellationToken::new(),
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
            exceeded: CancellationToken::new(),
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

    /// Lets the peer send no more than an introduction on its byte stream until it is admitted.
    pub(in crate::agents) fn limit<IO>(&self, io: IO) -> Limited<IO> {
        limited(io, self.admitted.clone(), self.exceeded.clone())
    }

    /// Records that the peer has sent more than an introduction.
    pub(in crate::agents) fn exceed(&self) {
        self.exceeded.cancel();
    }

    /// The outcome of one step, which must come before the deadline, before the peer is to give way
    /// and before it has sent more than an introduction.
    ///
    /// # Errors
    /// With the error of the step, [`JoinError::TimedOut`], [`JoinError::Evicted`] or
    /// [`JoinError::Excess`].
    pub(in crate::agents) async fn within<T>(
        &self,
        step: impl Future<Output = Result<T, JoinError>>,
    ) -> Result<T, JoinError> {
        tokio::select! {
            biased;
            () = self.exceeded.cancelled() => Err(JoinError::Excess),
            outcome = timeout_at(self.deadline, step) => {
                outcome.unwrap_or(Err(JoinError::TimedOut))
            }
            () = self.gives_way.cancelled() => Err(JoinError::Evicted),
        }
    }

    /// Completes with the cause when the peer is at its deadline, is to give way, or has sent more
    /// than an introduction, and was not admitted before.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(in crate::agents) async fn failed(&self) -> JoinError {
        tokio::select! {
            biased;
            () = self.exceeded.cancelled() => JoinError::Excess,
            () = self.admitted.cancelled() => std::future::pending().await,
            () = self.gives_way.cancelled() => JoinError::Evicted,
            () = sleep_until(self.deadline) => JoinError::TimedOut,
        }
    }
}
