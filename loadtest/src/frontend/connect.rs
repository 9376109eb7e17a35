//! HTTP CONNECT, on a Unix socket or over TLS.

use std::{io, path::Path};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::UnixStream,
};

/// Answer to a dial that succeeded.
pub const ESTABLISHED: &str = "HTTP/1.1 200 Connection Established\r\n\r\n";

/// A dial that was not answered with 200.
#[derive(Debug, thiserror::Error)]
#[error("{answer}")]
pub struct Refused {
    /// The whole answer.
    pub answer: String,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The frontend refused the dial.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The frontend's connection failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Dials `target` through the frontend on a Unix socket.
///
/// # Errors
/// When the socket cannot be reached or the dial is refused.
pub async fn dial(uds: &Path, target: impl ToString) -> Result<UnixStream, ConnectError> {
    let mut socket = UnixStream::connect(uds).await?;
    request(&mut socket, &target.to_string()).await?;
    Ok(socket)
}

/// Requests `target` on a connection to the frontend, and reads the head of the answer and no more.
///
/// # Errors
/// When the connection fails or the dial is refused.
pub async fn request<S>(socket: &mut S, target: &str) -> Result<(), ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let head = format!("CONNECT {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
    socket.write_all(head.as_bytes()).await?;
    let mut answer = vec![0; ESTABLISHED.len()];
    let mut filled = 0;
    while filled < answer.len() {
        match socket.read(&mut answer[filled..]).await? {
            0 => break,
            count => filled += count,
        }
    }
    answer.truncate(filled);
    if answer == ESTABLISHED.as_bytes() {
        return Ok(());
    }
    socket.read_to_end(&mut answer).await?;
    Err(Refused { answer: String::from_utf8_lossy(&answer).into_owned() }.into())
}
