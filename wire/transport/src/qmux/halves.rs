//! The two halves of a QMux stream.

use std::sync::Arc;

use bytes::Bytes;
use culvert_wire::code::StreamCode;
use tokio::select;

use super::{
    Owner, Shared,
    mux::Mux,
    stream::{Found, Room, Wakers},
};
use crate::{ReadError, TunnelLost, WriteError};

/// One stream of a connection.
#[derive(Clone)]
pub(super) struct Handle {
    id: u64,
    wakers: Arc<Wakers>,
    owner: Arc<Owner>,
}

impl Handle {
    pub(super) fn new(id: u64, wakers: Arc<Wakers>, owner: Arc<Owner>) -> Self {
        Self { id, wakers, owner }
    }

    fn shared(&self) -> &Shared {
        &self.owner.0
    }

    /// Changes the stream, and lets what follows from it be sent.
    fn change<T>(&self, change: impl FnOnce(&mut Mux) -> T) -> T {
        let mut mux = self.shared().lock();
        let result = change(&mut mux);
        let has_work = mux.has_work();
        drop(mux);
        if has_work {
            self.shared().work.notify_one();
        }
        result
    }
}

/// The half of a QMux stream that this side writes.
pub(crate) struct SendStream(Handle);

impl SendStream {
    pub(super) fn new(handle: Handle) -> Self {
        Self(handle)
    }

    pub(crate) async fn write_chunk(&self, mut chunk: Bytes) -> Result<(), WriteError> {
        loop {
            if let Some(written) = self.try_write_chunk(&mut chunk) {
                return written;
            }
            select! {
                () = self.0.wakers.room.notified() => {}
                _ = self.0.shared().lost.wait() => {}
            }
        }
    }

    /// Takes the chunk whole, if that needs no wait for room.
    pub(crate) fn try_write_chunk(&self, chunk: &mut Bytes) -> Option<Result<(), WriteError>> {
        if let Some(lost) = self.0.shared().lost.get() {
            return Some(Err(WriteError::Lost(lost.clone())));
        }
        match self.0.change(|mux| mux.write(self.0.id, chunk)) {
            Room::Taken => Some(Ok(())),
            Room::Stopped(code) => Some(Err(WriteError::Stopped(code))),
            Room::Ended => Some(Err(match self.0.wakers.end.get() {
                Some(Some(code)) => WriteError::Stopped(*code),
                _ => WriteError::Ended,
            })),
            Room::None => None,
        }
    }

    pub(crate) fn finish(&self) {
        self.0.change(|mux| mux.finish(self.0.id));
    }

    pub(crate) fn reset(&self, code: StreamCode) {
        self.0.change(|mux| mux.reset(self.0.id, code.as_u32().into()));
    }

    pub(crate) fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<StreamCode>, TunnelLost>> + Send + Sync + 'static {
        let (wakers, owner) = (self.0.wakers.clone(), self.0.owner.clone());
        async move {
            select! {
                biased;
                end = wakers.end.wait() => Ok(*end),
                lost = owner.0.closed() => Err(lost),
            }
        }
    }

    /// Bytes per second that the byte stream has carried lately, while there was something to send.
    pub(crate) fn path_rate(&self) -> Option<u64> {
        self.0.shared().sent_rate()
    }

    pub(crate) fn set_priority(&self, priority: i32) {
        self.0.change(|mux| mux.set_priority(self.0.id, priority));
    }
}

/// The half of a QMux stream that this side reads.
pub(crate) struct RecvStream(Handle);

impl RecvStream {
    pub(super) fn new(handle: Handle) -> Self {
        Self(handle)
    }

    pub(crate) async fn read_chunks(
        &self,
        chunks: &mut [Bytes],
    ) -> Result<Option<usize>, ReadError> {
        loop {
            if let Some(read) = self.try_read_chunks(chunks) {
                return read;
            }
            select! {
                biased;
                () = self.0.wakers.arrived.notified() => {}
                lost = self.0.shared().closed() => return Err(ReadError::Lost(lost)),
            }
        }
    }

    /// Reads what has arrived, or the end, if that needs no wait.
    pub(crate) fn try_read_chunks(
        &self,
        chunks: &mut [Bytes],
    ) -> Option<Result<Option<usize>, ReadError>> {
        match self.0.change(|mux| mux.read(self.0.id, chunks)) {
            Found::Chunks(count) => Some(Ok(Some(count))),
            Found::End => Some(Ok(None)),
            Found::Reset(code) => Some(Err(ReadError::Reset(code))),
            Found::Stopped => Some(Err(ReadError::Ended)),
            Found::Nothing => None,
        }
    }

    pub(crate) fn stop(&self, code: StreamCode) {
        self.0.change(|mux| mux.stop(self.0.id, code.as_u32().into()));
    }

    pub(crate) async fn failed(&self) -> ReadError {
        let Handle { id, wakers, .. } = &self.0;
        loop {
            if let Some(code) = self.0.change(|mux| mux.reset_of(*id)) {
                return ReadError::Reset(code);
            }
            select! {
                biased;
                lost = self.0.shared().closed() => return ReadError::Lost(lost),
                () = wakers.arrived.notified() => {}
            }
        }
    }
}
