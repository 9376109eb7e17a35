//! CONNECT, by which a proxy is asked to let a connection through.
//!
//! ```text
//! CONNECT host:port HTTP/1.1          asked by this side
//! HTTP/1.1 200 …                      whatever else the head says, the server's bytes follow it
//! ```

use culvert_wire::target::Target;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};

use crate::ProxyFault;

/// Most bytes of the head of a proxy's answer.
const MAX_HEAD_LEN: usize = 8 * 1024;
/// Longest reason that is repeated after a refusal.
const MAX_REASON_LEN: usize = 100;
/// Bytes read at once while the head is looked for; larger reads go past the buffer afterwards.
const READ_LEN: usize = 1024;
/// What every answer begins with.
const VERSION: &[u8] = b"HTTP/1.";
/// What proxies see in their logs.
const USER_AGENT: &str = concat!("culvert-agent/", env!("CARGO_PKG_VERSION"));

/// Asks for a connection to the server. What comes out of the stream then are the server's bytes,
/// all of them.
pub(super) async fn open<S>(
    mut stream: S,
    host: &str,
    port: u16,
    credentials: Option<&str>,
) -> Result<BufReader<S>, ProxyFault>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // No line can end within the name, so it cannot add headers.
    let server = Target::new(host, port).map_err(|error| ProxyFault::Server(error.to_string()))?;
    let broken = |error: std::io::Error| ProxyFault::Broken(error.into());
    stream.write_all(request(&server, credentials).as_bytes()).await.map_err(broken)?;
    stream.flush().await.map_err(broken)?;
    let mut stream = BufReader::with_capacity(READ_LEN, stream);
    let head = read_head(&mut stream).await?;
    match parse(&head).ok_or(ProxyFault::Malformed)? {
        (200..=299, _) => Ok(stream),
        (status, reason) => Err(ProxyFault::Refused { status, reason }),
    }
}

fn request(server: &Target, credentials: Option<&str>) -> String {
    let authorization =
        credentials.map_or_else(String::new, |value| format!("Proxy-Authorization: {value}\r\n"));
    format!(
        "CONNECT {server} HTTP/1.1\r\nHost: {server}\r\nUser-Agent: {USER_AGENT}\r\n\
         {authorization}\r\n"
    )
}

/// Reads the head of an answer, its last line included, and nothing behind it.
async fn read_head<S>(stream: &mut BufReader<S>) -> Result<Vec<u8>, ProxyFault>
where
    S: AsyncRead + Unpin,
{
    let mut head = Vec::new();
    // Some proxies end their lines as Unix does.
    while !head.ends_with(b"\r\n\r\n") && !head.ends_with(b"\n\n") {
        if head.len() == MAX_HEAD_LEN {
            return Err(ProxyFault::LongHead);
        }
        let read = stream.fill_buf().await;
        let read = read.map_err(|error| ProxyFault::Broken(error.into()))?;
        let Some(byte) = read.first().copied() else { return Err(ProxyFault::Closed) };
        // Whoever speaks something else may wait for an answer, and never end this head.
        if VERSION.get(head.len()).is_some_and(|expected| *expected != byte) {
            return Err(ProxyFault::Malformed);
        }
        stream.consume(1);
        head.push(byte);
    }
    Ok(head)
}

/// The status and the words of an answer; what else its head says does not matter.
fn parse(head: &[u8]) -> Option<(u16, String)> {
    let line = head.split(|byte| *byte == b'\n').next()?;
    let (_version, rest) = split_at_space(line)?;
    let (status, reason) = split_at_space(rest).unwrap_or((rest, b""));
    let status = std::str::from_utf8(status).ok()?.trim_end();
    if status.len() != 3 || !status.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let printable = reason.iter().filter(|byte| matches!(byte, b' '..=b'~'));
    let reason: String = printable.take(MAX_REASON_LEN).copied().map(char::from).collect();
    Some((status.parse().ok()?, reason))
}

fn split_at_space(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = text.iter().position(|byte| *byte == b' ')?;
    Some((&text[..space], &text[space + 1..]))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, duplex};

    use super::*;

    /// What becomes of a connection whose proxy answers this and ends it; what follows the head.
    async fn answered(answer: &[u8]) -> Result<Vec<u8>, ProxyFault> {
        let (near, mut far) = duplex(1 << 20);
        far.write_all(answer).await.unwrap();
        far.shutdown().await.unwrap();
        let mut stream = open(near, "server.example", 8132, None).await?;
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        Ok(rest)
    }

    fn refused(status: u16, reason: &str) -> Result<Vec<u8>, ProxyFault> {
        Err(ProxyFault::Refused { status, reason: reason.into() })
    }

    #[tokio::test]
    async fn every_byte_behind_the_head_is_the_servers() {
        let long = [7; 3 * READ_LEN];
        for head in [
            "HTTP/1.1 200 Connection established\r\n\r\n",
            "HTTP/1.0 200\r\n\r\n",
            "HTTP/1.1 299 \r\nContent-Length: 5\r\nX: y\r\n\r\n",
            "HTTP/1.1 200 OK\nX: y\n\n",
        ] {
            for rest in [&b""[..], b"\r\n\r\nHTTP", &long] {
                assert_eq!(answered(&[head.as_bytes(), rest].concat()).await.unwrap(), rest);
            }
        }
    }

    #[tokio::test]
    async fn a_refusal_is_told_in_words_that_harm_no_log() {
        for (answer, fault) in [
            (&b"HTTP/1.1 403 Forbidden\r\n\r\n<html>"[..], refused(403, "Forbidden")),
            (b"HTTP/1.1 502 \x1b[31mno\xff\twhere\r\n\r\n", refused(502, "[31mnowhere")),
            (b"HTTP/1.1 407\r\nProxy-Authenticate: Basic\r\n\r\n", refused(407, "")),
            (b"HTTP/1.1 100 Continue\r\n\r\n", refused(100, "Continue")),
            (b"HTTP/1.1 20x OK\r\n\r\n", Err(ProxyFault::Malformed)),
            (b"HTTP/1.1\r\n\r\n", Err(ProxyFault::Malformed)),
            (b"HTTP/1.1  200 OK\r\n\r\n", Err(ProxyFault::Malformed)),
            (b"HTTP/2 200 OK\r\n\r\n", Err(ProxyFault::Malformed)),
            (b"SSH-2.0-OpenSSH\r\n", Err(ProxyFault::Malformed)),
            (b"HTTP/1.1 200 OK\r\n", Err(ProxyFault::Closed)),
            (b"", Err(ProxyFault::Closed)),
        ] {
            assert_eq!(answered(answer).await, fault, "{}", answer.escape_ascii());
        }
        let endless = [b"HTTP/1.1 502 ", &[b'x'; 1000][..], b"\r\n\r\n"].concat();
        assert_eq!(answered(&endless).await, refused(502, &"x".repeat(MAX_REASON_LEN)));
    }

    #[tokio::test]
    async fn a_head_has_a_longest_length() {
        let head = |length: usize| {
            let (start, end) = ("HTTP/1.1 200 OK\r\nX: ", "\r\n\r\n");
            start.to_owned() + &"y".repeat(length - start.len() - end.len()) + end
        };
        assert_eq!(answered(head(MAX_HEAD_LEN).as_bytes()).await, Ok(vec![]));
        let long = answered(head(MAX_HEAD_LEN + 1).as_bytes()).await;
        assert_eq!(long, Err(ProxyFault::LongHead));
    }

    #[tokio::test]
    async fn whoever_speaks_something_else_is_not_waited_for() {
        let (near, mut far) = duplex(1024);
        far.write_all(b"220 mail").await.unwrap();
        assert_eq!(open(near, "server", 1, None).await.err(), Some(ProxyFault::Malformed));
    }

    #[tokio::test]
    async fn a_name_adds_no_headers() {
        let (near, _far) = duplex(1024);
        let opened = open(near, "server\r\nX: y", 1, None).await;
        assert!(matches!(opened.err(), Some(ProxyFault::Server(_))));
    }

    #[test]
    fn a_request_names_the_server_and_whoever_asks() {
        let server = Target::new("fd00::1", 8132).unwrap();
        assert_eq!(
            request(&server, Some("Basic dTpw")),
            format!(
                "CONNECT [fd00::1]:8132 HTTP/1.1\r\nHost: [fd00::1]:8132\r\n\
                 User-Agent: culvert-agent/{}\r\nProxy-Authorization: Basic dTpw\r\n\r\n",
                env!("CARGO_PKG_VERSION")
            )
        );
        assert!(!request(&server, None).contains("Authorization"));
    }
}
