//! Pages of the health and metrics ports that processes have on their own loopback device.

use std::{io, net::Ipv4Addr};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    /// The answer, with its head.
    text: String,
}

impl Page {
    /// Asks for one, in the calling task's host.
    ///
    /// # Errors
    /// When nobody listens there, or the connection breaks.
    pub(crate) async fn get(port: u16, path: &str) -> io::Result<Self> {
        let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        socket.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
        let mut text = String::new();
        socket.read_to_string(&mut text).await?;
        Ok(Self { text })
    }

    /// Whether it says 200.
    pub(crate) fn is_ok(&self) -> bool {
        self.text.get(8..12) == Some(" 200")
    }

    /// What is below the head.
    pub(crate) fn body(&self) -> &str {
        self.text.split_once("\r\n\r\n").map_or("", |(_, body)| body)
    }
}
