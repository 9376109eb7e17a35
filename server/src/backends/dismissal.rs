//! The end of a backend that this server wants: its reason, and how the agent learns it.

use std::{sync::OnceLock, time::Duration};

use culvert_wire::CloseCode;
use tokio_util::sync::CancellationToken;

/// Why this server ends a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dismissal {
    /// The agent has more tunnels than it may have, in one process or in all, and this is one of the
    /// oldest.
    Crowded,
    /// An operator sent the agent away.
    Evicted,
    /// The proof of the agent's identity has expired.
    Expired,
    /// kube-apiserver does not accept the agent's token any more.
    Revoked,
}

impl Dismissal {
    /// The code with which the tunnel is closed.
    pub(crate) fn close_code(self) -> CloseCode {
        match self {
            Self::Crowded => CloseCode::SUPERSEDED,
            Self::Evicted => CloseCode::EVICTED,
            Self::Expired | Self::Revoked => CloseCode::UNAUTHENTICATED,
        }
    }

    /// The reason in the close, for people.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Crowded => "the agent has too many newer tunnels",
            Self::Evicted => "an operator sent the agent away",
            Self::Expired => "the proof of the agent's identity has expired",
            Self::Revoked => "the proof of the agent's identity was revoked",
        }
    }

    /// Time for open streams to end.
    pub(crate) fn grace(self) -> Duration {
        match self {
            Self::Crowded => Duration::ZERO,
            Self::Evicted | Self::Expired | Self::Revoked => Duration::from_secs(30),
        }
    }
}

/// Whether a backend was dismissed. The first reason counts.
#[derive(Debug, Default)]
pub(super) struct Dismissed {
    reason: OnceLock<Dismissal>,
    notified: CancellationToken,
}

impl Dismissed {
    pub(super) fn set(&self, dismissal: Dismissal) {
        let _ = self.reason.set(dismissal);
        self.notified.cancel();
    }

    pub(super) async fn get(&self) -> Dismissal {
        self.notified.cancelled().await;
        *self.reason.get().expect("the reason is set before the notification")
    }
}
