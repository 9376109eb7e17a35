//! Sockets as the local side of a splice: TCP and Unix directly, anything else through buffers.

use std::{
    io::{self, IoSlice},
    net::Shutdown,
    os::fd::AsFd,
    sync::Arc,
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, Ready},
    net::{TcpStream, UnixStream},
    time::{Instant, sleep, timeout},
};

use super::{Abort, LocalFault, LocalRead, LocalWrite, outq};
use crate::chunks::advance;

/// First read buffer of a connection: a keystroke or a small request.
const MIN_READ: usize = 2 * 1024;
/// Largest read buffer: beyond 64 KiB the system call is no longer what costs.
const MAX_READ: usize = 64 * 1024;
/// Bytes that a TCP socket takes beyond what its peer's window and the path let out.
const MAX_UNSENT: u32 = 256 * 1024;
/// How often a half-closed Unix socket is asked whether its peer has closed it for good.
const HANGUP_INTERVAL: Duration = Duration::from_secs(1);
/// How soon a closing TCP socket is asked again whether its peer has everything, at first and later.
const FLUSH_PAUSE: Duration = Duration::from_millis(1);
const FLUSH_PAUSE_MAX: Duration = Duration::from_millis(10);
/// How long a closing TCP socket may make no progress before the rest counts as lost.
const FLUSH_LIMIT: Duration = Duration::from_secs(30);

/// A connected stream socket that can be read and written through a shared reference.
pub trait SpliceSocket: AsFd + Send + Sync + 'static {
    /// Waits until one of the interests is ready.
    fn ready(&self, interest: Interest) -> impl Future<Output = io::Result<Ready>> + Send;
    /// Reads into `buf`'s spare room without waiting.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing yet.
    fn try_read(&self, buf: &mut BytesMut) -> io::Result<usize>;
    /// Writes from several buffers without waiting.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room.
    fn try_write(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize>;
    /// Whether the peer has closed its socket for both directions, where the kernel can tell.
    fn is_hung_up(&self) -> bool {
        false
    }
    /// The socket's own error, which taking clears.
    fn take_error(&self) -> io::Result<Option<io::Error>>;
}

impl SpliceSocket for TcpStream {
    fn ready(&self, interest: Interest) -> impl Future<Output = io::Result<Ready>> + Send {
        self.ready(interest)
    }

    fn try_read(&self, buf: &mut BytesMut) -> io::Result<usize> {
        self.try_read_buf(buf)
    }

    fn try_write(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.try_write_vectored(bufs)
    }

    fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.take_error()
    }
}

/// A Unix socket reports a reset when its peer closed without having read everything. That says
/// nothing about what the peer wrote, all of which comes first: to a reader it is an end, to a
/// writer the same as any other close, and no fault by itself.
impl SpliceSocket for UnixStream {
    fn ready(&self, interest: Interest) -> impl Future<Output = io::Result<Ready>> + Send {
        self.ready(interest)
    }

    fn try_read(&self, buf: &mut BytesMut) -> io::Result<usize> {
        match self.try_read_buf(buf) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(0),
            result => result,
        }
    }

    fn try_write(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self.try_write_vectored(bufs) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            result => result,
        }
    }

    /// A Unix socket refuses even nothing once its peer is closed, and sends nothing by it.
    fn is_hung_up(&self) -> bool {
        matches!(self.try_write(&[]), Err(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    fn take_error(&self) -> io::Result<Option<io::Error>> {
        let error = self.take_error()?;
        Ok(error.filter(|error| error.kind() != io::ErrorKind::ConnectionReset))
    }
}

/// Sets up a TCP socket that is to be spliced: keystrokes do not wait for one another's
/// acknowledgement, and what a slow peer has not been sent yet waits in its stream, where it can still
/// be taken back, and not in megabytes of kernel buffer.
pub fn prepare(socket: &TcpStream) {
    // A socket that is gone already shows it at the first read.
    let _ = socket.set_nodelay(true);
    let _ = SockRef::from(socket).set_tcp_notsent_lowat(MAX_UNSENT);
}

/// The three parts of a socket that a splice needs.
pub fn halves<S: SpliceSocket>(socket: S) -> (SocketRead<S>, SocketWrite<S>, SocketAbort<S>) {
    let socket = Arc::new(socket);
    let reader =
        SocketRead { socket: socket.clone(), prefix: Bytes::new(), size: ReadSize(MIN_READ) };
    (reader, SocketWrite(socket.clone()), SocketAbort(socket))
}

/// How much room the next read gets: grows while reads fill it, shrinks while they do not, so
/// that a busy connection costs few system calls and an idle one little memory.
#[derive(Debug)]
struct ReadSize(usize);

impl ReadSize {
    fn buffer(&self) -> BytesMut {
        BytesMut::with_capacity(self.0)
    }

    fn learn(&mut self, read: usize) {
        if read >= self.0 {
            self.0 = (self.0 * 2).min(MAX_READ);
        } else if read < self.0 / 4 {
            self.0 = (self.0 / 2).max(MIN_READ);
        }
    }
}

/// Reads a socket in buffers that exist only while there is something to read.
#[derive(Debug)]
pub struct SocketRead<S> {
    socket: Arc<S>,
    prefix: Bytes,
    size: ReadSize,
}

impl<S> SocketRead<S> {
    /// Yields `prefix` before the socket's own bytes: what a frontend had read ahead.
    #[must_use]
    pub fn with_prefix(mut self, prefix: Bytes) -> Self {
        self.prefix = prefix;
        self
    }
}

impl<S: SpliceSocket> LocalRead for SocketRead<S> {
    async fn read(&mut self) -> Result<Option<Bytes>, LocalFault> {
        if self.prefix.has_remaining() {
            return Ok(Some(std::mem::take(&mut self.prefix)));
        }
        loop {
            self.socket.ready(Interest::READABLE).await?;
            let mut buf = self.size.buffer();
            match self.socket.try_read(&mut buf) {
                Ok(0) => return Ok(None),
                Ok(read) => {
                    self.size.learn(read);
                    return Ok(Some(buf.freeze()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn failed(&mut self) -> LocalFault {
        loop {
            if let Err(error) = self.socket.ready(Interest::ERROR).await {
                return error.into();
            }
            match self.socket.take_error() {
                Ok(Some(error)) | Err(error) => return error.into(),
                // Readiness without an error is stale; there is no way to clear it but to read,
                // which the pump will do.
                Ok(None) => std::future::pending().await,
            }
        }
    }
}

/// Writes a socket with as few system calls as the chunks allow.
#[derive(Debug)]
pub struct SocketWrite<S>(Arc<S>);

impl<S: SpliceSocket> LocalWrite for SocketWrite<S> {
    async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), LocalFault> {
        let mut first = 0;
        while first < chunks.len() {
            let mut slices = [IoSlice::new(&[]); super::CHUNKS];
            let count = chunks.len() - first;
            for (slice, chunk) in slices.iter_mut().zip(&chunks[first..]) {
                *slice = IoSlice::new(chunk);
            }
            match self.0.try_write(&slices[..count]) {
                Ok(written) => first += advance(&mut chunks[first..], written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.0.ready(Interest::WRITABLE).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), LocalFault> {
        match SockRef::from(&*self.0).shutdown(Shutdown::Write) {
            // The peer is gone already, which the other direction tells in its own way.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            result => Ok(result?),
        }
    }

    async fn gone(&mut self) {
        while !self.0.is_hung_up() {
            sleep(HANGUP_INTERVAL).await;
        }
    }

    async fn flushed(&mut self) {
        let mut progress = (usize::MAX, Instant::now());
        let mut pause = FLUSH_PAUSE;
        loop {
            // Most often nothing is left, and then not even a timer's granularity is waited for.
            match outq::unacknowledged(&*self.0) {
                Ok(0) | Err(_) => return,
                Ok(left) if left < progress.0 => progress = (left, Instant::now()),
                Ok(_) if progress.1.elapsed() > FLUSH_LIMIT => return,
                Ok(_) => {}
            }
            sleep(pause).await;
            pause = (pause * 2).min(FLUSH_PAUSE_MAX);
        }
    }
}

/// Makes the close of a TCP socket a reset. A Unix socket knows no reset: its close shows as an
/// end, or as a reset where the peer's last bytes were not read.
#[derive(Debug)]
pub struct SocketAbort<S>(Arc<S>);

impl<S> SocketAbort<S> {
    /// Resets this socket, whoever else holds it.
    pub fn new(socket: Arc<S>) -> Self {
        Self(socket)
    }
}

impl<S: SpliceSocket> Abort for SocketAbort<S> {
    fn abort(&self) {
        // Fails only on a socket that is not connected any more.
        let _ = SockRef::from(&*self.0).set_linger(Some(Duration::ZERO));
    }
}

/// The halves of any byte stream, such as TLS, as the local side of a splice.
pub fn buffered<R, W>(reader: R, writer: W) -> (BufferedRead<R>, BufferedWrite<W>)
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    (BufferedRead { reader, prefix: Bytes::new(), size: ReadSize(MIN_READ) }, BufferedWrite(writer))
}

/// Reads a byte stream in buffers of its own.
#[derive(Debug)]
pub struct BufferedRead<R> {
    reader: R,
    prefix: Bytes,
    size: ReadSize,
}

impl<R> BufferedRead<R> {
    /// Yields `prefix` before the stream's own bytes: what a frontend had read ahead.
    #[must_use]
    pub fn with_prefix(mut self, prefix: Bytes) -> Self {
        self.prefix = prefix;
        self
    }
}

impl<R: AsyncRead + Unpin + Send> LocalRead for BufferedRead<R> {
    async fn read(&mut self) -> Result<Option<Bytes>, LocalFault> {
        if self.prefix.has_remaining() {
            return Ok(Some(std::mem::take(&mut self.prefix)));
        }
        let mut buf = self.size.buffer();
        let read = self.reader.read_buf(&mut buf).await?;
        self.size.learn(read);
        Ok(buf.has_remaining().then(|| buf.freeze()))
    }
}

/// Writes a byte stream and flushes it behind every batch.
#[derive(Debug)]
pub struct BufferedWrite<W>(W);

impl<W: AsyncWrite + Unpin + Send> LocalWrite for BufferedWrite<W> {
    async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), LocalFault> {
        for chunk in chunks {
            self.0.write_all(chunk).await?;
        }
        Ok(self.0.flush().await?)
    }

    async fn finish(&mut self) -> Result<(), LocalFault> {
        // A peer that does not read its end for this long will not do so later.
        match timeout(FLUSH_LIMIT, self.0.shutdown()).await {
            Ok(result) => Ok(result?),
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_prepared_socket_waits_for_nothing_and_keeps_little() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        prepare(&socket);
        let socket = SockRef::from(&socket);
        assert!(socket.tcp_nodelay().unwrap());
        assert_eq!(socket.tcp_notsent_lowat().unwrap(), MAX_UNSENT);
    }
}
