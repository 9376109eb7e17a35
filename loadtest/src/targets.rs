//! TCP servers to dial on loopback, well-behaved and not. Each ends when it is dropped.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_util::task::AbortOnDropHandle;

/// A TCP server that treats each connection the same way.
#[derive(Debug)]
pub struct Target {
    address: SocketAddr,
    task: AbortOnDropHandle<()>,
}

impl Target {
    /// Listens on a free port and gives each connection to `serve`.
    ///
    /// # Errors
    /// When no port can be bound.
    pub async fn start<F, S>(serve: S) -> io::Result<Self>
    where
        S: Fn(TcpStream) -> F + Send + Sync + 'static,
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let task = culvert_transport::task::owned(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let _ = socket.set_nodelay(true);
                connections.spawn(serve(socket));
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self { address, task })
    }

    /// Address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Echoes until the peer ends.
///
/// # Errors
/// When no port can be bound.
pub async fn echo() -> io::Result<Target> {
    Target::start(|mut socket| async move {
        let (mut reader, mut writer) = socket.split();
        tokio::io::copy_buf(
            &mut tokio::io::BufReader::with_capacity(65_536, &mut reader),
            &mut writer,
        )
        .await?;
        writer.shutdown().await
    })
    .await
}

/// Writes `banner` first, then echoes.
///
/// # Errors
/// When no port can be bound.
pub async fn banner(banner: &'static str) -> io::Result<Target> {
    Target::start(move |mut socket| async move {
        socket.write_all(banner.as_bytes()).await?;
        let (mut reader, mut writer) = socket.split();
        tokio::io::copy(&mut reader, &mut writer).await?;
        writer.shutdown().await
    })
    .await
}

/// Sends `bytes` zeros as soon as it is connected, then ends.
///
/// # Errors
/// When no port can be bound.
pub async fn source(bytes: u64) -> io::Result<Target> {
    Target::start(move |mut socket| async move {
        let chunk = vec![0; 65_536];
        let mut left = bytes;
        while left > 0 {
            let length = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
            socket.write_all(&chunk[..length]).await?;
            left -= length as u64;
        }
        socket.shutdown().await
    })
    .await
}

/// Sends a line of text every `interval`, as a log would.
///
/// # Errors
/// When no port can be bound.
pub async fn log(interval: Duration) -> io::Result<Target> {
    Target::start(move |mut socket| async move {
        let mut ticks = tokio::time::interval(interval);
        for line in 0_u64.. {
            ticks.tick().await;
            socket.write_all(format!("line {line} of a container's log\n").as_bytes()).await?;
        }
        Ok(())
    })
    .await
}

/// Answers each HTTP request on a connection with `body` bytes of text; HTTP/1.0 only once.
///
/// # Errors
/// When no port can be bound.
pub async fn http(body: usize) -> io::Result<Target> {
    Target::start(move |mut socket| async move {
        let line = "hello from a target behind the tunnel\n";
        let text = line.repeat(body.div_ceil(line.len()));
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {body}\r\n\r\n{}",
            &text[..body]
        );
        let mut request = Vec::new();
        while socket.read_buf(&mut request).await? > 0 {
            if request.ends_with(b"\r\n\r\n") {
                socket.write_all(answer.as_bytes()).await?;
                if request.windows(8).any(|version| version == b"HTTP/1.0") {
                    break;
                }
                request.clear();
            }
        }
        socket.shutdown().await
    })
    .await
}

/// One connection of a [`recorder`].
#[derive(Debug, PartialEq, Eq)]
pub struct Record {
    /// Every byte that was read.
    pub bytes: Vec<u8>,
    /// How it ended: by a FIN, or an error.
    pub end: Result<(), io::ErrorKind>,
}

/// Reads each connection to its end, reports it, answers `answer` and ends.
///
/// # Errors
/// When no port can be bound.
pub async fn recorder(
    answer: &'static str,
) -> io::Result<(Target, mpsc::UnboundedReceiver<Record>)> {
    let (records, recorded) = mpsc::unbounded_channel();
    let target = Target::start(move |mut socket| {
        let records = records.clone();
        async move {
            let mut bytes = Vec::new();
            let end = socket.read_to_end(&mut bytes).await.map(drop).map_err(|e| e.kind());
            let _ = records.send(Record { bytes, end });
            socket.write_all(answer.as_bytes()).await?;
            socket.shutdown().await
        }
    })
    .await?;
    Ok((target, recorded))
}

/// Sends each connection to the caller.
///
/// # Errors
/// When no port can be bound.
pub async fn handed_over() -> io::Result<(Target, mpsc::UnboundedReceiver<TcpStream>)> {
    let (sockets, accepted) = mpsc::unbounded_channel();
    let sockets = Arc::new(sockets);
    let target = Target::start(move |socket| {
        let sockets = sockets.clone();
        async move {
            let _ = sockets.send(socket);
            Ok(())
        }
    })
    .await?;
    Ok((target, accepted))
}

/// Resets a connection: its close is a RST, and bytes that were not read are lost.
pub fn reset(socket: TcpStream) {
    // Fails only on a socket that is not connected any more.
    let _ = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
}
