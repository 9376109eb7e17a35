//! What one QMux stream knows.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use culvert_wire::code::StreamCode;
use tokio::sync::{Notify, SetOnce};

/// The wakers and the end of one stream.
#[derive(Debug, Default)]
pub(super) struct Wakers {
    /// There may be room to write.
    pub(super) room: Notify,
    /// There may be something to read.
    pub(super) arrived: Notify,
    /// How the sending half ended: with the peer's code, or with everything delivered.
    pub(super) end: SetOnce<Option<StreamCode>>,
}

/// A stream, both halves.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) wakers: Arc<Wakers>,
    pub(super) send: Send,
    pub(super) recv: Recv,
}

#[derive(Debug)]
pub(super) struct Send {
    pub(super) priority: i32,
    pub(super) queue: VecDeque<Bytes>,
    pub(super) queued: usize,
    /// Bytes sent, and bytes that may be.
    pub(super) offset: u64,
    pub(super) limit: u64,
    pub(super) finished: bool,
    /// It waits for its turn.
    pub(super) scheduled: bool,
    /// Nothing more will be sent: the end or a reset is out.
    pub(super) over: bool,
    /// And the peer has everything, or what it has does not matter.
    pub(super) settled: bool,
}

#[derive(Debug)]
pub(super) struct Recv {
    pub(super) queue: VecDeque<Bytes>,
    /// Bytes that came, were read, and may come.
    pub(super) offset: u64,
    pub(super) read: u64,
    pub(super) limit: u64,
    pub(super) finished: bool,
    pub(super) reset: Option<StreamCode>,
    /// Nobody reads here any more: what comes is thrown away.
    pub(super) stopped: bool,
}

impl Send {
    /// Of a stream of which so many bytes may be sent.
    pub(super) fn new(limit: u64) -> Self {
        Self {
            priority: 0,
            queue: VecDeque::new(),
            queued: 0,
            offset: 0,
            limit,
            finished: false,
            scheduled: false,
            over: false,
            settled: false,
        }
    }
}

impl Recv {
    /// Of a stream of which so many bytes may come.
    pub(super) fn new(limit: u64) -> Self {
        Self {
            queue: VecDeque::new(),
            offset: 0,
            read: 0,
            limit,
            finished: false,
            reset: None,
            stopped: false,
        }
    }

    /// The end or a reset has come.
    pub(super) fn is_over(&self) -> bool {
        self.finished || self.reset.is_some()
    }
}

/// What a reader finds.
pub(super) enum Found {
    /// So many chunks.
    Chunks(usize),
    /// The clean end.
    End,
    /// The peer's reset.
    Reset(StreamCode),
    /// This side has stopped the half.
    Stopped,
    /// Nothing yet.
    Nothing,
}

/// What a writer finds.
pub(super) enum Room {
    /// The bytes are taken.
    Taken,
    /// The peer refuses them.
    Stopped(StreamCode),
    /// The half has ended here.
    Ended,
    /// No room yet.
    None,
}
