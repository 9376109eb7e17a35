//! The one target of a plan, which serves each connection as its first byte requests.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::{JoinSet, yield_now},
    time::interval,
};

use super::noise::Noise;

/// Size of a write or a read, in bytes.
const CHUNK: usize = 64 * 1024;

/// Size of the two numbers with which a request of an exchange begins, in bytes.
pub(crate) const EXCHANGE_HEADER: u64 = 16;
/// Maximum size of a request of an exchange, in bytes: the client makes it in memory.
pub(crate) const EXCHANGE_REQUEST_LIMIT: u64 = 64 << 20;

/// Line of the target that writes first.
pub(super) const GREETING: &str = "SSH-2.0-greeter\n";

/// What the target has counted since its start.
#[derive(Debug, Default)]
struct Counters {
    uploaded: AtomicU64,
    short: AtomicU64,
    corrupt: AtomicU64,
}

/// A running target. It stops when dropped.
#[derive(Debug)]
pub struct Service {
    address: SocketAddr,
    greeter: SocketAddr,
    counters: Arc<Counters>,
    _tasks: JoinSet<()>,
}

impl Service {
    /// Listens on this address, in the calling task's runtime and host.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn start(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let greeting = TcpListener::bind((address.ip(), 0)).await?;
        let (address, greeter) = (listener.local_addr()?, greeting.local_addr()?);
        let counters = Arc::new(Counters::default());
        let of_connections = Arc::clone(&counters);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    Ok((socket, _)) = greeting.accept() => drop(connections.spawn(greet(socket))),
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    Ok((socket, _)) = listener.accept() => {
                        let counters = Arc::clone(&of_connections);
                        connections.spawn(async move {
                            // The plan counts a session that breaks off.
                            let _ = serve(socket, &counters).await;
                        });
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Ok(Self { address, greeter, counters, _tasks: tasks })
    }

    /// Address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Address at which it writes first.
    pub fn greeter(&self) -> SocketAddr {
        self.greeter
    }

    /// Bytes received from uploads so far.
    pub fn uploaded(&self) -> u64 {
        self.counters.uploaded.load(Ordering::Relaxed)
    }

    /// Messages that were written completely before a close and arrived incomplete.
    pub fn short(&self) -> u64 {
        self.counters.short.load(Ordering::Relaxed)
    }

    /// Checked uploads in which a byte differed from what was written.
    pub fn corrupt(&self) -> u64 {
        self.counters.corrupt.load(Ordering::Relaxed)
    }
}

async fn serve(mut socket: TcpStream, counters: &Counters) -> io::Result<()> {
    socket.set_nodelay(true)?;
    match socket.read_u8().await? {
        b'E' => echo(&mut socket).await,
        b'D' => zeros(&mut socket, u64::MAX).await,
        b'S' => sink(&mut socket, u64::MAX, &counters.uploaded).await.map(drop),
        b'F' => {
            let size = socket.read_u64().await?;
            zeros(&mut socket, size).await
        }
        b'R' => {
            let size = socket.read_u64().await?;
            sink(&mut socket, size, &AtomicU64::new(0)).await?;
            socket.write_all(b"!").await
        }
        b'W' => {
            let size = socket.read_u64().await?;
            let got = sink(&mut socket, size, &AtomicU64::new(0)).await;
            if got.ok() != Some(size) {
                counters.short.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }
        b'A' => {
            let size = socket.read_u64().await?;
            // One byte more than expected: the end has to come before it.
            let got = sink(&mut socket, size + 1, &AtomicU64::new(0)).await?;
            socket.write_u64(got).await
        }
        b'Q' => loop {
            let size = socket.read_u64().await?;
            zeros(&mut socket, size).await?;
        },
        b'P' => {
            let seed = socket.read_u64().await?;
            noise(&mut socket, Noise::new(seed)).await
        }
        b'V' => {
            let seed = socket.read_u64().await?;
            verify(&mut socket, Noise::new(seed), counters).await
        }
        b'X' => exchanges(&mut socket).await,
        b'T' => tail(&mut socket).await,
        _ => sink(&mut socket, u64::MAX, &AtomicU64::new(0)).await.map(drop),
    }
}

/// Writes first and waits for the end.
async fn greet(mut socket: TcpStream) {
    let spoken = async {
        socket.write_all(GREETING.as_bytes()).await?;
        sink(&mut socket, u64::MAX, &AtomicU64::new(0)).await
    };
    // The plan counts a session that breaks off.
    let _ = spoken.await;
}

async fn echo(socket: &mut TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = socket.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        socket.write_all(&buffer[..length]).await?;
    }
}

async fn zeros(socket: &mut TcpStream, size: u64) -> io::Result<()> {
    let chunk = vec![0; CHUNK];
    let mut left = size;
    while left > 0 {
        let length = chunk_of(left);
        socket.write_all(&chunk[..length]).await?;
        left -= length as u64;
    }
    Ok(())
}

/// Reads `size` bytes unless the connection ends before; how many were read.
async fn sink(socket: &mut TcpStream, size: u64, counter: &AtomicU64) -> io::Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let mut got = 0;
    while got < size {
        let length = socket.read(&mut buffer[..chunk_of(size - got)]).await?;
        if length == 0 {
            break;
        }
        got += length as u64;
        counter.fetch_add(length as u64, Ordering::Relaxed);
    }
    Ok(got)
}

async fn noise(socket: &mut TcpStream, mut noise: Noise) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        noise.fill(&mut chunk);
        socket.write_all(&chunk).await?;
        // The bytes are made here, and the socket takes megabytes of them: let others run.
        yield_now().await;
    }
}

/// Reads to the end, or to the first byte that differs.
async fn verify(
    socket: &mut TcpStream,
    mut expected: Noise,
    counters: &Counters,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = socket.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        if !expected.matches(&buffer[..length]) {
            counters.corrupt.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        counters.uploaded.fetch_add(length as u64, Ordering::Relaxed);
    }
}

/// Answers requests that say how long they and their answers are.
async fn exchanges(socket: &mut TcpStream) -> io::Result<()> {
    loop {
        let request = socket.read_u64().await?;
        let answer = socket.read_u64().await?;
        let rest = request.saturating_sub(EXCHANGE_HEADER);
        if sink(socket, rest, &AtomicU64::new(0)).await? < rest {
            return Ok(());
        }
        zeros(socket, answer).await?;
    }
}

async fn tail(socket: &mut TcpStream) -> io::Result<()> {
    let size = usize::try_from(socket.read_u64().await?).unwrap_or(CHUNK).clamp(8, CHUNK);
    let every = Duration::from_micros(socket.read_u64().await?.max(1));
    let mut ticks = interval(every);
    let mut line = vec![b'.'; size];
    loop {
        ticks.tick().await;
        line[..8].copy_from_slice(&unix_nanos().to_be_bytes());
        socket.write_all(&line).await?;
    }
}

fn chunk_of(left: u64) -> usize {
    usize::try_from(left).unwrap_or(CHUNK).min(CHUNK)
}

/// The time in nanoseconds since 1970, which processes of one machine agree on.
pub(super) fn unix_nanos() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
