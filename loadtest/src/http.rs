//! GET of the health, metrics and admin pages that servers and agents have.

use std::io;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, ToSocketAddrs},
};

/// Answer to a GET.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Body, without the head.
    pub body: String,
}

/// Gets a page, in the network namespace of the calling task.
///
/// # Errors
/// When the address refuses, the connection breaks, or the answer is not HTTP.
pub async fn get(address: impl ToSocketAddrs, path: &str) -> io::Result<Response> {
    let mut socket = TcpStream::connect(address).await?;
    // HTTP/1.0: the body ends with the connection and has no chunks.
    socket.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await?;
    parse(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, answer))
}

fn parse(answer: &str) -> Option<Response> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some(Response { status, body: body.to_owned() })
}

/// Value of one series of a scrape, given as its name with its labels; `None` when it is absent.
///
/// # Panics
/// When the value is not a number.
pub fn metric(scrape: &str, series: &str) -> Option<f64> {
    let value = scrape.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
    Some(value.parse().expect("the value of a series is a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_its_status_and_its_body() {
        let parsed = parse("HTTP/1.0 503 Service Unavailable\r\nx: y\r\n\r\nnot ready\n").unwrap();
        assert_eq!(parsed, Response { status: 503, body: "not ready\n".into() });
        assert_eq!(parse("SSH-2.0\r\n"), None);
    }

    #[test]
    fn a_series_is_matched_as_a_whole() {
        let scrape = "# TYPE a gauge\na{b=\"c\"} 1\nab 2\n";
        assert_eq!(metric(scrape, "a{b=\"c\"}"), Some(1.0));
        assert_eq!(metric(scrape, "ab"), Some(2.0));
        assert_eq!(metric(scrape, "a"), None);
    }
}
