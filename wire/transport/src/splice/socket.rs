//! Sockets as the local side of a splice: TCP and Unix directly, other byte streams through
//! buffers.

use std::{
    io::{self, IoSlice},
    net::Shutdown,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, Ready},
    net::{TcpStream, UnixStream},
    time::{Instant, sleep, timeout},
};

use super::{
    Abort, LocalFault, LocalRead, LocalWrite, outq,
    pumps::CHUNKS,
    tcp_info::{is_closed, vanished},
};
use crate::{
    budget::{Holder, MINIMUM},
    chunks::advance,
    socket::{KEEP_ALIVE, send_at_once},
};

/// Size of a connection's first read buffer, in bytes: a keystroke or a small request.
const MIN_READ: usize = 2 * 1024;
/// Maximum size of a read buffer, in bytes: beyond it the system call is no longer what costs.
const MAX_READ: usize = 64 * 1024;
/// Maximum number of bytes that wait in a TCP socket and have not been sent.
const MAX_UNSENT: u32 = 256 * 1024;
/// Interval at which a half-closed Unix socket is checked for a peer that has closed it.
const HANGUP_INTERVAL: Duration = Duration::from_secs(1);
/// First interval at which a closing TCP socket is checked for bytes that have not arrived; it
/// doubles.
const FLUSH_PAUSE: Duration = Duration::from_millis(1);
/// Maximum of that interval.
const FLUSH_PAUSE_MAX: Duration = Duration::from_millis(10);
/// Maximum time that a closing TCP socket may make no progress before the rest counts as lost.
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
    /// Whether the peer has closed its socket for both directions, where the kernel knows.
    fn is_hung_up(&self) -> bool {
        false
    }
    /// Takes the socket's pending error, which clears it.
    ///
    /// # Errors
    /// When the kernel does not report it.
    fn take_error(&self) -> io::Result<Option<io::Error>>;
    /// Completes once the peer's host is known to be gone, which the kernel alone would report much
    /// later.
    fn vanished(&self) -> impl Future<Output = io::Error> + Send {
        std::future::pending()
    }
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

    /// A peer that has closed answers the next packet with a reset, or a keep-alive after a minute.
    fn is_hung_up(&self) -> bool {
        is_closed(self)
    }

    /// A reset by a peer that had ended its output before is EPIPE (tcp(7)): all that it sent is in
    /// the socket and can be read, and writing fails by itself.
    fn take_error(&self) -> io::Result<Option<io::Error>> {
        let error = self.take_error()?;
        Ok(error.filter(|error| error.kind() != io::ErrorKind::BrokenPipe))
    }

    fn vanished(&self) -> impl Future<Output = io::Error> + Send {
        vanished(self)
    }
}

/// A Unix socket reports a reset when its peer closed without having read everything. All that the
/// peer wrote comes first, so to a reader the reset is an end, to a writer it is a close like any
/// other, and by itself it is no fault.
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

    /// Writes no bytes, which a Unix socket refuses once its peer has closed.
    fn is_hung_up(&self) -> bool {
        matches!(self.try_write(&[]), Err(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    fn take_error(&self) -> io::Result<Option<io::Error>> {
        let error = self.take_error()?;
        Ok(error.filter(|error| error.kind() != io::ErrorKind::ConnectionReset))
    }
}

/// Sets up a TCP socket that is to be spliced: keystrokes do not wait for one another's
/// acknowledgement, and bytes for a slow peer wait in its stream, where they can still be taken
/// back, instead of in megabytes of kernel buffer. A peer whose host is gone is noticed after two
/// and a half minutes.
pub fn prepare(socket: &TcpStream) {
    send_at_once(socket, MAX_UNSENT);
    KEEP_ALIVE.set(socket);
}

/// Completes once `is_hung_up` says so of a socket that has been read to its end. The kernel
/// reports by no event that a half-closed socket was closed for good, so it is checked every
/// second.
///
/// # Cancel safety
/// Cancel safe.
pub async fn until_hung_up(mut is_hung_up: impl FnMut() -> bool) {
    while !is_hung_up() {
        sleep(HANGUP_INTERVAL).await;
    }
}

/// The three parts of a socket that a splice needs.
pub fn halves<S: SpliceSocket>(socket: S) -> (SocketRead<S>, SocketWrite<S>, SocketAbort<S>) {
    let socket = Arc::new(socket);
    let reader =
        SocketRead { socket: socket.clone(), prefix: Bytes::new(), size: ReadSize(MIN_READ) };
    let writer = SocketWrite { socket: socket.clone(), taken: Arc::default() };
    (reader, writer, SocketAbort(socket))
}

/// Size of the next read buffer, in bytes. It grows while reads fill it and shrinks while they do
/// not, so that a busy connection costs few system calls and an idle one little memory.
#[derive(Debug)]
struct ReadSize(usize);

impl ReadSize {
    fn buffer(&self, holder: &Holder) -> BytesMut {
        let room = usize::try_from(holder.room().max(MINIMUM)).unwrap_or(MAX_READ);
        BytesMut::with_capacity(self.0.min(room))
    }

    fn learn(&mut self, read: usize) {
        if read >= self.0 {
            self.0 = (self.0 * 2).min(MAX_READ);
        } else if read < self.0 / 4 {
            self.0 = (self.0 / 2).max(MIN_READ);
        }
    }
}

/// Reads a socket. Its buffers exist only while there is something to read.
#[derive(Debug)]
pub struct SocketRead<S> {
    socket: Arc<S>,
    prefix: Bytes,
    size: ReadSize,
}

impl<S> SocketRead<S> {
    /// Returns `prefix` before the socket's own bytes: what was read from it already.
    #[must_use]
    pub fn with_prefix(mut self, prefix: Bytes) -> Self {
        self.prefix = prefix;
        self
    }
}

impl<S: SpliceSocket> LocalRead for SocketRead<S> {
    async fn read(&mut self, holder: &Arc<Holder>) -> Result<Option<Bytes>, LocalFault> {
        if self.prefix.has_remaining() {
            return Ok(Some(std::mem::take(&mut self.prefix)));
        }
        loop {
            self.socket.ready(Interest::READABLE).await?;
            let mut buf = self.size.buffer(holder);
            match self.socket.try_read(&mut buf) {
                Ok(0) => return Ok(None),
                Ok(read) => {
                    self.size.learn(read);
                    return Ok(Some(holder.hold(buf)));
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
                // Readiness without an error is stale. Only a read clears it, which the pump does.
                Ok(None) => std::future::pending().await,
            }
        }
    }
}

/// Writes a socket with as few system calls as the chunks allow.
#[derive(Debug)]
pub struct SocketWrite<S> {
    socket: Arc<S>,
    /// Number of bytes that the kernel has taken.
    taken: Arc<AtomicU64>,
}

impl<S: SpliceSocket> SocketWrite<S> {
    /// Writes from these chunks what the kernel takes; the number of bytes. Its own function, so that
    /// a future that waits has no room for the list.
    fn try_write(&self, chunks: &[Bytes]) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); CHUNKS];
        for (slice, chunk) in slices.iter_mut().zip(chunks) {
            *slice = IoSlice::new(chunk);
        }
        self.socket.try_write(&slices[..chunks.len().min(CHUNKS)])
    }
}

impl<S: SpliceSocket> LocalWrite for SocketWrite<S> {
    async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), LocalFault> {
        let mut first = 0;
        while first < chunks.len() {
            match self.try_write(&chunks[first..]) {
                Ok(written) => {
                    self.taken.fetch_add(written as u64, Ordering::Relaxed);
                    first += advance(&mut chunks[first..], written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.socket.ready(Interest::WRITABLE).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn progress(&self) -> Option<Arc<AtomicU64>> {
        Some(self.taken.clone())
    }

    async fn finish(&mut self) -> Result<(), LocalFault> {
        match SockRef::from(&*self.socket).shutdown(Shutdown::Write) {
            // The peer is gone already, which the other direction reports.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            result => Ok(result?),
        }
    }

    async fn flushed(&mut self) -> bool {
        until_acknowledged(|| outq::unacknowledged(&*self.socket)).await
    }
}

/// Completes once the peer has acknowledged everything. `left` returns the number of bytes that it
/// has not acknowledged yet; if that does not fall for [`FLUSH_LIMIT`], they are lost: `false`.
async fn until_acknowledged(mut left: impl FnMut() -> io::Result<usize>) -> bool {
    let mut progress = (usize::MAX, Instant::now());
    let mut pause = FLUSH_PAUSE;
    loop {
        // Most often nothing is left, and then there is no pause at all.
        match left() {
            Ok(0) | Err(_) => return true,
            Ok(left) if left < progress.0 => progress = (left, Instant::now()),
            Ok(_) if progress.1.elapsed() > FLUSH_LIMIT => return false,
            Ok(_) => {}
        }
        sleep(pause).await;
        pause = (pause * 2).min(FLUSH_PAUSE_MAX);
    }
}

/// Turns the close of a TCP socket into a reset. A Unix socket cannot send one: its close shows as
/// an end, or as a reset where the peer's last bytes were not read.
#[derive(Debug)]
pub struct SocketAbort<S>(Arc<S>);

impl<S> SocketAbort<S> {
    /// Resets this socket when it is closed.
    pub fn new(socket: Arc<S>) -> Self {
        Self(socket)
    }
}

impl<S: SpliceSocket> Abort for SocketAbort<S> {
    fn abort(&self) {
        // Fails only on a socket that is not connected any more.
        let _ = SockRef::from(&*self.0).set_linger(Some(Duration::ZERO));
    }

    fn is_hung_up(&self) -> bool {
        self.0.is_hung_up()
    }

    async fn vanished(&self) -> LocalFault {
        self.0.vanished().await.into()
    }
}

/// The halves of any byte stream, such as TLS, as the local side of a splice.
pub fn buffered<R, W>(reader: R, writer: W) -> (BufferedRead<R>, BufferedWrite<W>)
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    (
        BufferedRead { reader, prefix: Bytes::new(), size: ReadSize(MIN_READ) },
        BufferedWrite { writer, taken: Arc::default() },
    )
}

/// Reads a byte stream into buffers.
#[derive(Debug)]
pub struct BufferedRead<R> {
    reader: R,
    prefix: Bytes,
    size: ReadSize,
}

impl<R> BufferedRead<R> {
    /// Returns `prefix` before the stream's own bytes: what was read from it already.
    #[must_use]
    pub fn with_prefix(mut self, prefix: Bytes) -> Self {
        self.prefix = prefix;
        self
    }
}

impl<R: AsyncRead + Unpin + Send> LocalRead for BufferedRead<R> {
    async fn read(&mut self, holder: &Arc<Holder>) -> Result<Option<Bytes>, LocalFault> {
        if self.prefix.has_remaining() {
            return Ok(Some(std::mem::take(&mut self.prefix)));
        }
        let mut buf = self.size.buffer(holder);
        let read = self.reader.read_buf(&mut buf).await?;
        self.size.learn(read);
        Ok((!buf.is_empty()).then(|| holder.hold(buf)))
    }
}

/// Writes a byte stream and flushes it after every batch.
#[derive(Debug)]
pub struct BufferedWrite<W> {
    writer: W,
    /// Number of bytes that the stream has taken.
    taken: Arc<AtomicU64>,
}

impl<W: AsyncWrite + Unpin + Send> LocalWrite for BufferedWrite<W> {
    fn progress(&self) -> Option<Arc<AtomicU64>> {
        Some(self.taken.clone())
    }

    async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), LocalFault> {
        for chunk in chunks {
            while chunk.has_remaining() {
                let written = self.writer.write_buf(chunk).await?;
                if written == 0 {
                    return Err(io::Error::from(io::ErrorKind::WriteZero).into());
                }
                self.taken.fetch_add(written as u64, Ordering::Relaxed);
            }
        }
        Ok(self.writer.flush().await?)
    }

    async fn finish(&mut self) -> Result<(), LocalFault> {
        // A peer that has not read its end by then will not.
        match timeout(FLUSH_LIMIT, self.writer.shutdown()).await {
            Ok(result) => Ok(result?),
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        }
    }
}

#[cfg(test)]
mod tests;
