//! One dial: choose a backend, open a stream, ask the agent, wait for its answer until the
//! deadline.
//!
//! ```text
//!  dialer        Dialer: the backend, the wait for one, the moves to another, the outcome's record
//!  exchange      one request and its reply on one stream
//!  optimistic    a reply that is taken for granted and read behind the frontend's answer
//!  error         why a dial failed
//! ```

mod dialer;
mod error;
mod exchange;
mod optimistic;

use std::sync::Arc;

use culvert_transport::{
    RecvHalf, SendHalf,
    budget::StreamCost,
    splice::{Cut, Preamble},
};
use culvert_wire::{
    DialId, Target,
    dial::{DialTiming, Network, StreamKind, TraceContext},
};

pub(crate) use dialer::Dialer;
pub(crate) use error::{DialError, KonnectivityFailure};

use crate::backends::StreamPermit;
use optimistic::ExpectedReply;

/// Parameters of a dial, as the frontend's request names them.
#[derive(Clone, Debug)]
pub(crate) struct DialParameters {
    /// Network of the target.
    pub(crate) network: Network,
    /// Target.
    pub(crate) target: Target,
    /// Purpose of the connection, if the request hints at one.
    pub(crate) kind: StreamKind,
    /// Position of the request in a trace, if it names one.
    pub(crate) trace: Option<TraceContext>,
}

/// A stream whose other end is the target.
#[derive(Debug)]
pub(crate) struct Dialed {
    /// Identifies the dial in the logs of both sides.
    pub(crate) id: DialId,
    /// Position of the request in a trace, if it names one.
    pub(crate) trace: Option<TraceContext>,
    /// Target.
    pub(crate) target: Target,
    /// Purpose of the connection, if the request hints at one.
    pub(crate) kind: StreamKind,
    /// The stream; the target's bytes follow the reply.
    pub(crate) stream: (SendHalf, RecvHalf),
    /// Permit that the stream uses.
    pub(crate) permit: StreamPermit,
    /// Memory that the stream costs.
    pub(crate) cost: Arc<StreamCost>,
    /// The agent's reply.
    pub(crate) reply: Reply,
}

/// An agent's positive reply to a dial.
#[derive(Debug)]
pub(crate) enum Reply {
    /// It was received, and says where the agent's time went.
    Received(DialTiming),
    /// It is taken for granted, and still to be read off the stream.
    Expected(Box<ExpectedReply>),
}

impl Reply {
    /// Where the agent's time went, if the reply is here.
    pub(crate) fn timing(&self) -> Option<DialTiming> {
        match self {
            Self::Received(timing) => Some(*timing),
            Self::Expected(_) => None,
        }
    }
}

impl Preamble for Reply {
    async fn read(self, recv: &mut RecvHalf) -> Result<(), Cut> {
        match self {
            Self::Received(_) => Ok(()),
            // Boxed, so that a stream does not keep room for it for as long as it lives.
            Self::Expected(expected) => Box::pin(expected.take(recv)).await,
        }
    }
}

#[cfg(test)]
mod tests;
