//! Congestion control for tunnels on lossy links.
//!
//! A tunnel shares one congestion window among keystrokes and downloads, so two things count:
//! that random loss does not close the window, and that the window is no larger than the path, for
//! every byte beyond that waits in a queue which keystrokes share. [`Congestion::Model`] keeps a
//! model of the path, bandwidth × minimum RTT, in the manner of BBRv3
//! (draft-ietf-ccwg-bbr). quinn's controllers cannot set a pacing rate: its pacer sends at 1.25
//! windows per smoothed RTT. So where BBR changes its pacing gain, this one changes the window.

mod filter;
mod model;
mod sampler;

use std::{fmt, str::FromStr, sync::Arc};

use quinn::congestion::{ControllerFactory, CubicConfig};

use model::ModelConfig;

/// Congestion window at start: 32 packets, so that a dial and its first answer fit without waiting.
const INITIAL_WINDOW: u64 = 32 * 1200;

/// Which congestion control a tunnel sends with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Congestion {
    /// What measures best: today that is the model.
    #[default]
    Auto,
    /// The model of the path.
    Model,
    /// CUBIC (RFC 9438), for paths where every loss means congestion.
    Cubic,
}

impl Congestion {
    /// What quinn makes a controller of for each path.
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

/// A word that names no congestion control.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of auto, model, cubic")]
pub struct UnknownCongestion(String);

impl FromStr for Congestion {
    type Err = UnknownCongestion;

    fn from_str(word: &str) -> Result<Self, UnknownCongestion> {
        let known = [Self::Auto, Self::Model, Self::Cubic];
        let found = known.into_iter().find(|congestion| congestion.to_string() == word);
        found.ok_or_else(|| UnknownCongestion(word.into()))
    }
}
