//! Congestion control for tunnels on lossy links.
//!
//! Keystrokes and downloads of a tunnel share one congestion window, so two things count: random
//! loss must not close the window, and the window must not exceed the path, for every byte beyond
//! waits in a queue that keystrokes share. [`Congestion::Model`] keeps a model of the path,
//! bandwidth and shortest round-trip time, in the manner of BBRv3 (draft-ietf-ccwg-bbr). quinn's
//! controllers cannot set a pacing rate: its pacer sends 1.25 windows per smoothed round-trip time.
//! So where BBR changes its pacing gain, this controller changes the window.
//!
//! ```text
//!  sampler   acknowledgements ─▶ delivery rate and round-trip time
//!  filter    maximum of the last rounds
//!  model     both ─▶ congestion window
//!  known     what earlier connections to a peer have found out
//! ```

mod filter;
mod known;
mod model;
mod sampler;

use std::{fmt, str::FromStr, sync::Arc};

use quinn::congestion::{Controller, ControllerFactory, CubicConfig};

pub(crate) use known::Memory;
pub use known::{KnownPath, KnownPaths, Resumption};
use model::ModelConfig;

/// Congestion window at the start, in bytes: 32 packets, so that a dial and its first answer fit.
const INITIAL_WINDOW: u64 = 32 * 1200;

/// The memory of a connection's controller; `None` for one that resumes nothing.
pub(crate) fn memory(controller: Box<dyn Controller>) -> Option<Arc<Memory>> {
    model::memory(controller)
}

/// Which congestion control a tunnel sends with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Congestion {
    /// The one that measures best: now [`Congestion::Model`].
    #[default]
    Auto,
    /// The model of the path.
    Model,
    /// CUBIC (RFC 9438), for paths where every loss means congestion.
    Cubic,
}

impl Congestion {
    /// What makes quinn's controller for each path.
    pub(crate) fn factory(self) -> Arc<dyn ControllerFactory + Send + Sync> {
        match self {
            Self::Auto | Self::Model => Arc::new(ModelConfig),
            Self::Cubic => {
                let mut cubic = CubicConfig::default();
                cubic.initial_window(INITIAL_WINDOW);
                Arc::new(cubic)
            }
        }
    }
}

impl fmt::Display for Congestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Model => "model",
            Self::Cubic => "cubic",
        })
    }
}

/// Text that names no congestion control.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of auto, model, cubic")]
pub struct UnknownCongestion(String);

impl FromStr for Congestion {
    type Err = UnknownCongestion;

    fn from_str(name: &str) -> Result<Self, UnknownCongestion> {
        let known = [Self::Auto, Self::Model, Self::Cubic];
        let found = known.into_iter().find(|congestion| congestion.to_string() == name);
        found.ok_or_else(|| UnknownCongestion(name.into()))
    }
}
