//! Sessions of each kind.

use std::{
    convert::Infallible,
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    net::{TcpStream, UnixStream},
    task::{JoinSet, yield_now},
    time::{sleep, sleep_until},
};
use tokio_util::either::Either;

use super::{
    Exchange, Kind, Workload,
    noise::Noise,
    record::{Gap, Pending, Record},
    service::GREETING,
};
use crate::frontend::connect;

/// Size of a write or a read, in bytes.
const CHUNK: usize = 64 * 1024;
/// Error of bytes that came back, or arrived, in another order or with other values.
const DIFFERS: &str = "the bytes differ from what was sent";
/// Maximum number of pending dials of an open-loop session.
const UNDER_WAY: usize = 256;

/// A connection to the target, through a tunnel or not.
pub(super) type Connection = Either<UnixStream, TcpStream>;

/// The target, and the frontend to dial it through, if any.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) socket: Option<PathBuf>,
    pub(super) target: String,
}

impl Route {
    async fn dial(&self) -> io::Result<Connection> {
        match &self.socket {
            Some(socket) => {
                let dialed = connect::dial(socket, &self.target).await;
                dialed
                    .map(Either::Left)
                    .map_err(|error| io::Error::other(brief(&error.to_string())))
            }
            None => {
                let socket = TcpStream::connect(&self.target).await?;
                socket.set_nodelay(true)?;
                Ok(Either::Right(socket))
            }
        }
    }
}

/// First line of an error, so that equal errors count as equal.
fn brief(error: &str) -> &str {
    error.lines().next().unwrap_or_default()
}

/// One session of a workload.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) route: Arc<Route>,
    pub(super) record: Arc<Record>,
    pub(super) workload: Arc<Workload>,
    /// Index of the workload in the plan.
    pub(super) index: usize,
    /// Offset of its schedule in the interval: 0 to 1.
    pub(super) phase: f64,
}

impl Session {
    /// Dials, and requests its service.
    pub(super) async fn begin(&self) -> io::Result<Connection> {
        let mut connection = self.route.dial().await?;
        let size = self.workload.size;
        let command = match self.workload.kind {
            Kind::Echo | Kind::Dial => vec![b'E'],
            Kind::Download | Kind::Stall | Kind::Abandon => vec![b'D'],
            Kind::Upload => vec![b'S'],
            // They choose a seed first.
            Kind::CheckedDownload | Kind::CheckedUpload => Vec::new(),
            Kind::Fetch => with(b'F', &[size]),
            Kind::Send => with(b'R', &[size]),
            Kind::WriteClose => with(b'W', &[size]),
            Kind::HalfClose => with(b'A', &[size]),
            Kind::Request => vec![b'Q'],
            Kind::Exchange => vec![b'X'],
            Kind::Tail => {
                let interval = self.workload.interval().as_micros();
                with(b'T', &[size, u64::try_from(interval).unwrap_or(u64::MAX)])
            }
            Kind::Idle => vec![b'H'],
            // The first request carries it.
            Kind::ShortConnection => Vec::new(),
            Kind::Greeting => Vec::new(),
        };
        connection.write_all(&command).await?;
        Ok(connection)
    }

    fn pending(&self) -> Pending {
        Pending::new(&self.record, self.index)
    }

    /// Time at which message `number` is due, for a session that began then.
    fn due(&self, begun: Instant, number: u32) -> Instant {
        let interval = self.workload.interval();
        begun + interval.mul_f64(self.phase) + interval * number
    }

    /// The first message after `number` that is due in the future, or that is the next one.
    fn next_due(&self, begun: Instant, number: u32) -> u32 {
        let late = self.due(begun, number + 1).elapsed();
        let left_out = late.as_secs_f64() / self.workload.interval().as_secs_f64();
        // A cast of a number that is none, or too large, is no panic.
        number.saturating_add(1).saturating_add(left_out.ceil() as u32)
    }
}

fn with(command: u8, numbers: &[u64]) -> Vec<u8> {
    let numbers = numbers.iter().flat_map(|number| number.to_be_bytes());
    std::iter::once(command).chain(numbers).collect()
}

/// Runs a session that stays until it breaks; the error.
pub(super) async fn run(session: &Session, gap: &Arc<Gap>, connection: Connection) -> io::Error {
    let (reader, writer) = tokio::io::split(connection);
    let pending = Pending::of_session(gap);
    let (Ok(never) | Err(never)) = match session.workload.kind {
        Kind::Echo => echo(session, &pending, reader, writer).await,
        Kind::Request => request(session, &pending, reader, writer).await,
        Kind::Exchange => exchange(session, &pending, reader, writer).await,
        Kind::Download => download(session, reader).await,
        Kind::Upload => upload(writer).await,
        Kind::CheckedDownload => checked_download(session, reader, writer).await,
        Kind::CheckedUpload => checked_upload(reader, writer).await,
        Kind::Tail => tail(session, reader).await,
        // Keeps both halves open, unused.
        _ => std::future::pending().await,
    }
    .map(|never| match never {});
    if session.workload.kind.asks() {
        gap.begin(&pending);
    }
    never
}

type Reader = ReadHalf<Connection>;
type Writer = WriteHalf<Connection>;

async fn echo(
    session: &Session,
    pending: &Pending,
    mut reader: Reader,
    writer: Writer,
) -> io::Result<Infallible> {
    let size = usize::try_from(session.workload.size).unwrap_or(CHUNK).max(8);
    // The messages of a connection are one stream of bytes, and each connection has another: an echo
    // of an earlier message, or of another connection, is none of this one.
    let mut sent = Noise::new(fastrand::u64(..));
    let mut expected = Noise::new(sent.seed());
    let reading = async {
        let mut got = vec![0; size];
        loop {
            reader.read_exact(&mut got).await?;
            if !expected.matches(&got) {
                return Err(io::Error::other(DIFFERS));
            }
            pending.answered();
        }
    };
    let message = || {
        let mut message = vec![0; size];
        sent.fill(&mut message);
        message
    };
    tokio::select! {
        broken = reading => broken,
        broken = keep_asking(session, writer, pending, message) => broken,
    }
}

async fn request(
    session: &Session,
    pending: &Pending,
    mut reader: Reader,
    writer: Writer,
) -> io::Result<Infallible> {
    let size = session.workload.size;
    let reading = async {
        loop {
            read(session, &mut reader, size).await?;
            pending.answered();
        }
    };
    let message = || size.to_be_bytes().to_vec();
    tokio::select! {
        broken = reading => broken,
        broken = keep_asking(session, writer, pending, message) => broken,
    }
}

async fn exchange(
    session: &Session,
    pending: &Pending,
    mut reader: Reader,
    mut writer: Writer,
) -> io::Result<Infallible> {
    let begun = Instant::now();
    let mut number = 0;
    loop {
        pending.push(until(session.due(begun, number)).await);
        exchanges(session, &mut reader, &mut writer, Vec::new()).await?;
        pending.answered();
        number = session.next_due(begun, number);
    }
}

/// Carries out the exchanges of the workload once, the first behind `command`.
async fn exchanges(
    session: &Session,
    reader: &mut Reader,
    writer: &mut Writer,
    command: Vec<u8>,
) -> io::Result<()> {
    let mut message = command;
    for exchange in &session.workload.exchanges {
        message.extend(exchange.message());
        writer.write_all(&message).await?;
        read(session, reader, exchange.answer).await?;
        message.clear();
    }
    Ok(())
}

impl Exchange {
    /// The request.
    fn message(self) -> Vec<u8> {
        let mut message = [self.request, self.answer].map(u64::to_be_bytes).concat();
        message.resize(usize::try_from(self.request).unwrap_or(CHUNK), b'.');
        message
    }
}

/// Sends on a schedule that does not wait for answers.
async fn keep_asking(
    session: &Session,
    mut writer: Writer,
    pending: &Pending,
    mut message: impl FnMut() -> Vec<u8>,
) -> io::Result<Infallible> {
    let begun = Instant::now();
    for number in 0.. {
        pending.push(until(session.due(begun, number)).await);
        writer.write_all(&message()).await?;
    }
    Err(io::ErrorKind::Other.into())
}

/// Waits until then; the time from which latency counts. A timer that fires late adds no latency.
async fn until(due: Instant) -> Instant {
    if due <= Instant::now() {
        return due;
    }
    sleep_until(due.into()).await;
    Instant::now()
}

/// Reads exactly `size` bytes and counts them.
async fn read(
    session: &Session,
    reader: &mut (impl AsyncReadExt + Unpin),
    size: u64,
) -> io::Result<()> {
    let mut buffer = vec![0; usize::try_from(size).unwrap_or(CHUNK).min(CHUNK)];
    let mut left = size;
    while left > 0 {
        let room = usize::try_from(left).unwrap_or(CHUNK).min(buffer.len());
        let length = reader.read(&mut buffer[..room]).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        session.record.bytes(session.index, length);
        left -= length as u64;
    }
    Ok(())
}

async fn download(session: &Session, mut reader: Reader) -> io::Result<Infallible> {
    read(session, &mut reader, u64::MAX).await?;
    Err(io::ErrorKind::Other.into())
}

async fn upload(mut writer: Writer) -> io::Result<Infallible> {
    let chunk = vec![0; CHUNK];
    loop {
        writer.write_all(&chunk).await?;
    }
}

async fn checked_download(
    session: &Session,
    mut reader: Reader,
    mut writer: Writer,
) -> io::Result<Infallible> {
    let mut expected = Noise::new(fastrand::u64(..));
    writer.write_all(&with(b'P', &[expected.seed()])).await?;
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = reader.read(&mut buffer).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if !expected.matches(&buffer[..length]) {
            return Err(io::Error::other(DIFFERS));
        }
        session.record.bytes(session.index, length);
    }
}

async fn checked_upload(mut reader: Reader, mut writer: Writer) -> io::Result<Infallible> {
    let mut sent = Noise::new(fastrand::u64(..));
    let writing = async {
        writer.write_all(&with(b'V', &[sent.seed()])).await?;
        let mut chunk = vec![0; CHUNK];
        loop {
            sent.fill(&mut chunk);
            writer.write_all(&chunk).await?;
            yield_now().await;
        }
    };
    let reading = async {
        reader.read_u8().await?;
        Err(io::Error::other(DIFFERS))
    };
    // A target that ends the connection is noticed also while it takes no bytes.
    tokio::select! {
        broken = writing => broken,
        broken = reading => broken,
    }
}

async fn tail(session: &Session, mut reader: Reader) -> io::Result<Infallible> {
    let mut line = vec![0; usize::try_from(session.workload.size).unwrap_or(CHUNK).clamp(8, CHUNK)];
    loop {
        reader.read_exact(&mut line).await?;
        session.record.bytes(session.index, line.len());
        let sent = line.first_chunk().map_or(0, |sent| u64::from_be_bytes(*sent));
        let sent = SystemTime::UNIX_EPOCH + Duration::from_nanos(sent);
        let took = sent.elapsed().unwrap_or_default();
        let now = Instant::now();
        session.record.latency(session.index, now.checked_sub(took).unwrap_or(now), took);
    }
}

/// Runs a session that dials again and again until the run ends.
pub(super) async fn repeat(session: &Session) {
    let open_loop = matches!(session.workload.kind, Kind::Dial | Kind::ShortConnection);
    if !open_loop || session.workload.interval_ms == 0.0 {
        loop {
            let begun = Instant::now();
            once(session, begun).await;
            let next = begun + session.workload.interval();
            if next > Instant::now() {
                sleep_until(next.into()).await;
            }
        }
    }
    let begun = Instant::now();
    let mut under_way = JoinSet::new();
    for number in 0.. {
        let from = until(session.due(begun, number)).await;
        while under_way.try_join_next().is_some() {}
        if under_way.len() >= UNDER_WAY {
            session.record.error(session.index, "too many dials under way");
            continue;
        }
        let session = Session {
            route: Arc::clone(&session.route),
            record: Arc::clone(&session.record),
            workload: Arc::clone(&session.workload),
            ..*session
        };
        under_way.spawn(async move { once(&session, from).await });
    }
}

/// One dial of an open-loop session.
async fn once(session: &Session, due: Instant) {
    let pending = session.pending();
    pending.push(due);
    match transfer(session, &pending).await {
        Ok(()) => {}
        Err(error) => {
            pending.failed(error);
            // A frontend that refuses at once must not be dialed in a busy loop.
            sleep(Duration::from_millis(10)).await;
        }
    }
}

async fn transfer(session: &Session, pending: &Pending) -> io::Result<()> {
    let (kind, size) = (session.workload.kind, session.workload.size);
    if kind == Kind::Dial && size == 0 {
        let connection = session.route.dial().await?;
        pending.answered();
        drop(connection);
        return Ok(());
    }
    let mut connection = session.begin().await?;
    match kind {
        Kind::Greeting => {
            let mut line = vec![0; GREETING.len()];
            connection.read_exact(&mut line).await?;
            if line != GREETING.as_bytes() {
                return Err(io::Error::other("the greeting differs from what the target says"));
            }
        }
        Kind::ShortConnection => {
            let (mut reader, mut writer) = tokio::io::split(connection);
            exchanges(session, &mut reader, &mut writer, vec![b'X']).await?;
        }
        Kind::Fetch | Kind::Abandon => read(session, &mut connection, size).await?,
        Kind::Send => {
            write(&mut connection, size).await?;
            connection.read_u8().await?;
        }
        Kind::WriteClose => write(&mut connection, size).await?,
        Kind::HalfClose => {
            write(&mut connection, size).await?;
            connection.shutdown().await?;
            let arrived = connection.read_u64().await?;
            if arrived != size {
                return Err(io::Error::other("the half-close cut off what was written"));
            }
        }
        _ => {
            write(&mut connection, size).await?;
            read(session, &mut connection, size).await?;
        }
    }
    pending.answered();
    Ok(())
}

async fn write(connection: &mut Connection, size: u64) -> io::Result<()> {
    let chunk = vec![0; CHUNK];
    let mut left = size;
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        connection.write_all(&chunk[..length]).await?;
        left -= length as u64;
    }
    Ok(())
}
