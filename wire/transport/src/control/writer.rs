//! The sending half of a control stream. Messages wait in a bounded queue until the peer grants
//! credit for them. A caller that is cancelled leaves no message half written.

use std::{collections::VecDeque, fmt, pin::Pin};

use bytes::Bytes;

use crate::{SendHalf, WriteError};

/// Maximum number of messages that wait. A peer that sends pings and takes no pong reaches it.
const MAX_QUEUED: usize = 64;

type Write = dyn Future<Output = (SendHalf, Result<(), WriteError>)> + Send;

/// Writes messages in order.
pub(super) struct Writer {
    state: State,
    queue: VecDeque<Bytes>,
}

enum State {
    Idle(SendHalf),
    Writing(Pin<Box<Write>>),
    /// A write has failed.
    Failed(WriteError),
}

impl Writer {
    /// A writer with nothing to write.
    pub(super) fn new(send: SendHalf) -> Self {
        Self { state: State::Idle(send), queue: VecDeque::new() }
    }

    /// Whether everything was handed to the carrier.
    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && !matches!(self.state, State::Writing(_))
    }

    /// Adds a message, which the next flushes write. Returns whether there was room for it.
    pub(super) fn push(&mut self, frame: Bytes) -> bool {
        let has_room = self.queue.len() < MAX_QUEUED;
        if has_room {
            self.queue.push_back(frame);
        }
        has_room
    }

    /// Hands all messages to the carrier, as soon as the peer grants credit for them.
    ///
    /// # Cancel safety
    /// Cancel safe: the next call goes on.
    pub(super) async fn flush(&mut self) -> Result<(), WriteError> {
        loop {
            match &mut self.state {
                State::Failed(error) => return Err(error.clone()),
                State::Writing(write) => {
                    let (send, written) = write.as_mut().await;
                    self.state = match written {
                        Ok(()) => State::Idle(send),
                        Err(error) => State::Failed(error),
                    };
                }
                State::Idle(_) => {
                    let Some(frame) = self.queue.pop_front() else { return Ok(()) };
                    self.begin(frame);
                }
            }
        }
    }

    fn begin(&mut self, frame: Bytes) {
        let placeholder = State::Failed(WriteError::Ended);
        if let State::Idle(mut send) = std::mem::replace(&mut self.state, placeholder) {
            self.state = State::Writing(Box::pin(async move {
                let written = send.write_chunk(frame).await;
                (send, written)
            }));
        }
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("queued", &self.queue.len()).finish_non_exhaustive()
    }
}
