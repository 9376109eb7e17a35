//! The target of the load: each connection begins with a request that says what happens on it.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    runtime::Handle,
    task::JoinSet,
};

use crate::targets;

/// Answer to an upload that arrived as it was sent.
pub(super) const ARRIVED: u8 = b'+';
/// Answer to an upload with other bytes.
const DIFFERS: u8 = b'-';
/// Largest piece that is read or written at once, in bytes.
const CHUNK: usize = 16_384;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The target echoes until the end.
    Echo,
    /// The target sends the bytes of the seed, and ends.
    Download,
    /// The target reads the bytes of the seed and answers [`ARRIVED`].
    Upload,
    /// The target reads to the end of the client's direction, and answers like an upload.
    HalfClose,
    /// The target reads the bytes of the seed and resets the connection.
    Reset,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Echo, Self::Download, Self::Upload, Self::HalfClose, Self::Reset];
}

/// First bytes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) kind: Kind,
    /// Number of bytes.
    pub(super) size: u32,
    /// Seed of the bytes.
    pub(super) seed: u64,
}

impl Request {
    const LENGTH: usize = 13;

    /// The request as bytes.
    pub(super) fn encode(self) -> Vec<u8> {
        let kind = Kind::ALL.iter().position(|kind| *kind == self.kind).unwrap_or_default();
        let mut bytes = vec![u8::try_from(kind).unwrap_or_default()];
        bytes.extend(self.size.to_be_bytes());
        bytes.extend(self.seed.to_be_bytes());
        bytes
    }

    fn decode(bytes: [u8; Self::LENGTH]) -> Option<Self> {
        let kind = *Kind::ALL.get(usize::from(bytes[0]))?;
        let size = u32::from_be_bytes(bytes[1..5].try_into().ok()?);
        let seed = u64::from_be_bytes(bytes[5..].try_into().ok()?);
        Some(Self { kind, size, seed })
    }

    /// The bytes of the transfer.
    pub(super) fn bytes(self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.size).unwrap_or_default()];
        fastrand::Rng::with_seed(self.seed).fill(&mut bytes);
        bytes
    }
}

/// A running target. It ends when dropped.
#[derive(Debug)]
pub(super) struct Target {
    /// Port, on every address of its host.
    pub(super) port: u16,
    _tasks: JoinSet<()>,
}

impl Target {
    /// Starts it on the host whose runtime this is.
    pub(super) async fn start(runtime: &Handle) -> anyhow::Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let listener = runtime.spawn(TcpListener::bind(address)).await??;
        let port = listener.local_addr()?.port();
        let mut tasks = JoinSet::new();
        tasks.spawn_on(
            async move {
                let mut connections = JoinSet::new();
                while let Ok((socket, _)) = listener.accept().await {
                    connections.spawn(serve(socket));
                    while connections.try_join_next().is_some() {}
                }
            },
            runtime,
        );
        Ok(Self { port, _tasks: tasks })
    }
}

/// Errors are what resets and restarts of the other side look like from here.
async fn serve(mut socket: TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let mut head = [0; Request::LENGTH];
    socket.read_exact(&mut head).await?;
    let request = Request::decode(head).ok_or(io::ErrorKind::InvalidData)?;
    match request.kind {
        Kind::Echo => {
            let mut chunk = vec![0; CHUNK];
            loop {
                match socket.read(&mut chunk).await? {
                    0 => break,
                    length => socket.write_all(&chunk[..length]).await?,
                }
            }
        }
        Kind::Download => socket.write_all(&request.bytes()).await?,
        Kind::Upload | Kind::HalfClose | Kind::Reset => {
            let expected = request.bytes();
            let mut bytes = vec![0; expected.len()];
            socket.read_exact(&mut bytes).await?;
            let mut arrived = bytes == expected;
            if request.kind == Kind::Reset {
                targets::reset(socket);
                return Ok(());
            }
            if request.kind == Kind::HalfClose {
                arrived &= socket.read(&mut [0]).await? == 0;
            }
            socket.write_u8(if arrived { ARRIVED } else { DIFFERS }).await?;
        }
    }
    socket.shutdown().await?;
    // The client closes last, so that its own end is not a reset.
    socket.read(&mut [0]).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_decoded_as_it_was_encoded() {
        for kind in Kind::ALL {
            let request = Request { kind, size: 70_000, seed: u64::MAX - 1 };
            let bytes = request.encode().try_into().unwrap();
            assert_eq!(Request::decode(bytes), Some(request));
        }
    }
}
