//! A frontend's connection whose waits and writes are counted as Konnectivity counts them.

use std::{
    future::poll_fn,
    pin::pin,
    sync::{Arc, atomic::AtomicU64},
    task::Poll,
    time::Instant,
};

use bytes::Bytes;
use culvert_process::metrics::Counted;
use culvert_transport::{
    budget::Holder,
    splice::{LocalFault, LocalRead, LocalWrite},
};

use crate::metrics::Flow;

/// A frontend's reading half. From a read to the next its bytes wait for the tunnel.
pub(super) struct ObservedRead<'a, R> {
    reader: R,
    flow: &'a Flow,
    waiting: Option<Counted>,
}

impl<'a, R> ObservedRead<'a, R> {
    pub(super) fn new(reader: R, flow: &'a Flow) -> Self {
        Self { reader, flow, waiting: None }
    }
}

impl<R: LocalRead> LocalRead for ObservedRead<'_, R> {
    async fn read(&mut self, holder: &Arc<Holder>) -> Result<Option<Bytes>, LocalFault> {
        self.waiting = None;
        let read = self.reader.read(holder).await?;
        self.waiting = read.is_some().then(|| self.flow.waits_for_tunnel());
        Ok(read)
    }

    async fn failed(&mut self) -> LocalFault {
        self.reader.failed().await
    }
}

/// A frontend's writing half.
pub(super) struct ObservedWrite<'a, W> {
    writer: W,
    flow: &'a Flow,
}

impl<'a, W> ObservedWrite<'a, W> {
    pub(super) fn new(writer: W, flow: &'a Flow) -> Self {
        Self { writer, flow }
    }
}

impl<W: LocalWrite> LocalWrite for ObservedWrite<'_, W> {
    async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), LocalFault> {
        let started = Instant::now();
        let mut writing = pin!(self.writer.write(chunks));
        let written = match poll_fn(|cx| Poll::Ready(writing.as_mut().poll(cx))).await {
            Poll::Ready(written) => written,
            Poll::Pending => {
                let _waiting = self.flow.waits_for_frontend();
                writing.await
            }
        };
        self.flow.written(started.elapsed());
        written
    }

    fn progress(&self) -> Option<Arc<AtomicU64>> {
        self.writer.progress()
    }

    async fn finish(&mut self) -> Result<(), LocalFault> {
        self.flow.timed(self.writer.finish()).await
    }

    async fn gone(&mut self) {
        self.writer.gone().await;
    }

    async fn flushed(&mut self) -> bool {
        self.writer.flushed().await
    }
}
