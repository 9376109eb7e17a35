//! What carries a tunnel: one set of names for QUIC and for QMux.
//!
//! What waits for QMux is boxed, so that an idle stream over QUIC has no room for it.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use culvert_wire::code::{CloseCode, StreamCode};
use rustls_pki_types::CertificateDer;
use tokio_util::either::Either;

use super::{
    ReadError, RecvHalf, SendHalf, TunnelLost, TunnelStats, Unreachable, WriteError, qmux, quic,
};

/// One connection between two peers.
#[derive(Clone)]
pub(super) enum Connection {
    Quic(quic::Connection),
    Qmux(qmux::Connection),
}

/// Calls the same method of whichever carrier it is.
macro_rules! either {
    ($carrier:expr, $inner:ident => $call:expr) => {
        match $carrier {
            Self::Quic($inner) => $call,
            Self::Qmux($inner) => $call,
        }
    };
}

impl Connection {
    pub(super) async fn open(&self) -> Result<(SendHalf, RecvHalf), TunnelLost> {
        either!(self, carrier => carrier.open().await)
    }

    pub(super) async fn accept(&self) -> Result<(SendHalf, RecvHalf), TunnelLost> {
        either!(self, carrier => carrier.accept().await)
    }

    pub(super) fn close(&self, code: CloseCode, reason: &str) {
        either!(self, carrier => carrier.close(code, reason));
    }

    pub(super) async fn closed(&self) -> TunnelLost {
        either!(self, carrier => carrier.closed().await)
    }

    pub(super) async fn flushed(&self, limit: Duration) {
        either!(self, carrier => carrier.flushed(limit).await);
    }

    /// TCP tells of a peer that is gone by itself, and then the connection is lost.
    pub(super) async fn unreachable(&self) -> Unreachable {
        match self {
            Self::Quic(carrier) => carrier.unreachable().await,
            Self::Qmux(_) => std::future::pending().await,
        }
    }

    /// A lost packet delays everything on TCP, and a second copy with it.
    pub(super) fn hedge(&self, rate: u32) {
        if let Self::Quic(carrier) = self {
            carrier.hedge(rate);
        }
    }

    pub(super) fn set_max_streams(&self, count: u32) {
        either!(self, carrier => carrier.set_max_streams(count));
    }

    pub(super) fn remote_address(&self) -> SocketAddr {
        either!(self, carrier => carrier.remote_address())
    }

    pub(super) fn peer_certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        either!(self, carrier => carrier.peer_certificates())
    }

    pub(super) fn stats(&self) -> TunnelStats {
        either!(self, carrier => carrier.stats())
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Quic(_) => "quic",
            Self::Qmux(carrier) => carrier.name(),
        }
    }
}

/// The half of a stream that this side writes.
pub(super) enum SendStream {
    Quic(quic::SendStream),
    Qmux(qmux::SendStream),
}

impl SendStream {
    pub(super) async fn write_chunk(
        &mut self,
        chunk: Bytes,
        interactive: bool,
    ) -> Result<(), WriteError> {
        match self {
            Self::Quic(stream) => stream.write_chunk(chunk, interactive).await,
            Self::Qmux(stream) => Box::pin(stream.write_chunk(chunk)).await,
        }
    }

    pub(super) fn finish(&mut self) {
        either!(self, stream => stream.finish());
    }

    pub(super) fn reset(&mut self, code: StreamCode) {
        either!(self, stream => stream.reset(code));
    }

    pub(super) fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<StreamCode>, TunnelLost>> + Send + Sync + 'static {
        match self {
            Self::Quic(stream) => Either::Left(stream.stopped()),
            Self::Qmux(stream) => Either::Right(Box::pin(stream.stopped())),
        }
    }

    pub(super) fn set_priority(&self, priority: i32) {
        either!(self, stream => stream.set_priority(priority));
    }
}

/// The half of a stream that this side reads.
pub(super) enum RecvStream {
    Quic(quic::RecvStream),
    Qmux(qmux::RecvStream),
}

impl RecvStream {
    pub(super) async fn read_chunks(
        &mut self,
        chunks: &mut [Bytes],
    ) -> Result<Option<usize>, ReadError> {
        match self {
            Self::Quic(stream) => stream.read_chunks(chunks).await,
            Self::Qmux(stream) => Box::pin(stream.read_chunks(chunks)).await,
        }
    }

    pub(super) async fn read(&mut self, buf: &mut [u8]) -> Result<Option<usize>, ReadError> {
        match self {
            Self::Quic(stream) => stream.read(buf).await,
            Self::Qmux(stream) => Box::pin(stream.read(buf)).await,
        }
    }

    pub(super) fn stop(&mut self, code: StreamCode) {
        either!(self, stream => stream.stop(code));
    }

    pub(super) async fn failed(&mut self) -> ReadError {
        match self {
            Self::Quic(stream) => stream.failed().await,
            Self::Qmux(stream) => Box::pin(stream.failed()).await,
        }
    }
}

/// Makes each carrier's own type the one that both share, so that carriers need not know of it.
macro_rules! carried {
    ($($kind:ident),+) => {
        $(
            impl From<quic::$kind> for $kind {
                fn from(carrier: quic::$kind) -> Self {
                    Self::Quic(carrier)
                }
            }

            impl From<qmux::$kind> for $kind {
                fn from(carrier: qmux::$kind) -> Self {
                    Self::Qmux(carrier)
                }
            }
        )+
    };
}

carried!(Connection, SendStream, RecvStream);
