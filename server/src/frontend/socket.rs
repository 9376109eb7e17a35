//! The sockets that frontends are served on.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use culvert_transport::splice::{
    Abort, Local, LocalRead, LocalWrite, SocketAbort, SocketRead, SocketWrite, SpliceSocket, halves,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

/// A connection that a frontend is served on and then spliced with.
pub(super) trait FrontendSocket: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Reading half in a splice.
    type Read: LocalRead;
    /// Writing half in a splice.
    type Write: LocalWrite;
    /// Resets the connection.
    type Abort: Abort;

    /// Hands the connection over to a splice, which yields the bytes in `read_ahead` first.
    fn into_local(self, read_ahead: Bytes) -> Local<Self::Read, Self::Write, Self::Abort>;

    /// Whether the peer is known to have closed the connection in both directions.
    fn is_hung_up(&self) -> bool;
}

impl FrontendSocket for UnixStream {
    type Read = SocketRead<Self>;
    type Write = SocketWrite<Self>;
    type Abort = SocketAbort<Self>;

    fn into_local(self, read_ahead: Bytes) -> Local<Self::Read, Self::Write, Self::Abort> {
        let (reader, writer, abort) = halves(self);
        Local::new(reader.with_prefix(read_ahead), writer, abort)
    }

    fn is_hung_up(&self) -> bool {
        SpliceSocket::is_hung_up(self)
    }
}

/// A TCP socket with several owners: TLS reads and writes it, and a splice can reset it.
#[derive(Clone, Debug)]
pub(super) struct SharedTcp(Arc<TcpStream>);

impl SharedTcp {
    pub(super) fn new(socket: TcpStream) -> Self {
        Self(Arc::new(socket))
    }

    /// Resets the socket when it is closed.
    pub(super) fn abort(&self) -> SocketAbort<TcpStream> {
        SocketAbort::new(self.0.clone())
    }
}

impl AsyncRead for SharedTcp {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buf.initialize_unfilled()) {
                Ok(read) => {
                    buf.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl SharedTcp {
    fn poll_try(
        &self,
        cx: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match write(&self.0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }
}

impl AsyncWrite for SharedTcp {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_try(cx, |socket| socket.try_write(buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_try(cx, |socket| socket.try_write_vectored(bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(socket2::SockRef::from(&*self.0).shutdown(std::net::Shutdown::Write))
    }
}
