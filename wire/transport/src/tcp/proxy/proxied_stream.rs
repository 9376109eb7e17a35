//! The CONNECT request to a proxy, and its answer.
//!
//! ```text
//! CONNECT host:port HTTP/1.1          request
//! HTTP/1.1 200 …                      answer; the server's bytes follow its head
//! ```

use culvert_wire::target::Target;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};

use crate::ProxyFault;

/// Maximum length of the head of an answer, in bytes.
const MAX_HEAD_LEN: usize = 8 * 1024;
/// Maximum length of the reason that is reported of a refusal, in bytes.
const MAX_REASON_LEN: usize = 100;
/// Size of the buffer that the head is read into, in bytes. Larger reads bypass it afterwards.
const READ_LEN: usize = 1024;
/// Start of every answer.
const VERSION: &[u8] = b"HTTP/1.";
/// Value of the User-Agent header.
const USER_AGENT: &str = concat!("culvert-agent/", env!("CARGO_PKG_VERSION"));

/// Asks for a connection to the server. The stream that it returns yields all bytes of the server,
/// and no others.
pub(super) async fn open<S>(
    mut stream: S,
    host: &str,
    port: u16,
    credentials: Option<&str>,
) -> Result<BufReader<S>, ProxyFault>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // A target's host has no line ends, so it cannot add headers.
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

/// Reads the head of an answer, including the empty line, and nothing behind it.
async fn read_head<S>(stream: &mut BufReader<S>) -> Result<Vec<u8>, ProxyFault>
where
    S: AsyncRead + Unpin,
{
    let mut head = Vec::new();
    // Some proxies end lines without a carriage return.
    while !head.ends_with(b"\r\n\r\n") && !head.ends_with(b"\n\n") {
        if head.len() == MAX_HEAD_LEN {
            return Err(ProxyFault::LongHead);
        }
        let read = stream.fill_buf().await;
        let read = read.map_err(|error| ProxyFault::Broken(error.into()))?;
        let Some(byte) = read.first().copied() else { return Err(ProxyFault::Closed) };
        // A peer of another protocol may wait for an answer itself, and never end this head.
        if VERSION.get(head.len()).is_some_and(|expected| *expected != byte) {
            return Err(ProxyFault::Malformed);
        }
        stream.consume(1);
        head.push(byte);
    }
    Ok(head)
}

/// The status and the reason of an answer. Its headers do not matter, and are not looked at.
fn parse(head: &[u8]) -> Option<(u16, String)> {
    let line = head.split_inclusive(|byte| *byte == b'\n').next()?;
    let line = [line, b"\r\n"].concat();
    let mut headers = [];
    let mut answer = httparse::Response::new(&mut headers);
    answer.parse(&line).ok()?;
    let printable = answer.reason?.chars().filter(|c| matches!(c, ' '..='~'));
    Some((answer.code?, printable.take(MAX_REASON_LEN).collect()))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, duplex};

    use super::*;

    /// Opens a connection through a proxy that answers this and closes; what follows the head.
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
    async fn all_bytes_behind_the_head_are_the_servers() {
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
    async fn a_refusal_is_reported_in_printable_ascii() {
        for (answer, fault) in [
            (&b"HTTP/1.1 403 Forbidden\r\n\r\n<html>"[..], refused(403, "Forbidden")),
            (b"HTTP/1.1 502 no\twhere\r\n\r\n", refused(502, "nowhere")),
            // Bytes that are not ASCII are allowed (RFC 9112 §4), and the parser leaves them out.
            (b"HTTP/1.1 502 \xffnowhere\r\n\r\n", refused(502, "")),
            (b"HTTP/1.1 502 \x1b[31mno\r\n\r\n", Err(ProxyFault::Malformed)),
            (b"HTTP/1.1 502 no\r\nnot a header\x1b\r\n\r\n", refused(502, "no")),
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
    async fn a_head_beyond_the_maximum_length_is_a_fault() {
        let head = |length: usize| {
            let (start, end) = ("HTTP/1.1 200 OK\r\nX: ", "\r\n\r\n");
            start.to_owned() + &"y".repeat(length - start.len() - end.len()) + end
        };
        assert_eq!(answered(head(MAX_HEAD_LEN).as_bytes()).await, Ok(vec![]));
        let long = answered(head(MAX_HEAD_LEN + 1).as_bytes()).await;
        assert_eq!(long, Err(ProxyFault::LongHead));
    }

    #[tokio::test]
    async fn another_protocol_is_recognised_by_its_first_byte() {
        let (near, mut far) = duplex(1024);
        far.write_all(b"220 mail").await.unwrap();
        assert_eq!(open(near, "server", 1, None).await.err(), Some(ProxyFault::Malformed));
    }

    #[tokio::test]
    async fn a_name_with_a_line_end_is_refused() {
        let (near, _far) = duplex(1024);
        let opened = open(near, "server\r\nX: y", 1, None).await;
        assert!(matches!(opened.err(), Some(ProxyFault::Server(_))));
    }

    #[test]
    fn a_request_names_the_server_and_the_agent() {
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
