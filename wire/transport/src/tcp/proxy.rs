//! An HTTP proxy, for networks from which there is no other route to the server.
//!
//! It is asked to connect to the server (CONNECT, RFC 9110 §9.3.6) and then carries bytes that it
//! cannot read: TLS is between agent and server, and the server proves to the agent who it is.

mod proxied_stream;
mod trust;

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr};

use base64::{Engine as _, prelude::BASE64_STANDARD as BASE64};
use culvert_wire::target::{SplitFault, split_host_port};
use percent_encoding::percent_decode_str;
use rustls::RootCertStore;
use tokio::{
    io::BufReader,
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use self::trust::ProxyAuthorities;
use super::{Settings, prepare};
use crate::{ProxyFault, tls::Current};

/// A connection through a proxy, whose bytes are the server's.
pub type ProxiedStream = BufReader<Either<TcpStream, TlsStream<TcpStream>>>;

/// Address of a proxy, and the credentials for it.
///
/// It is displayed as `http://host:port` or `https://host:port`, without credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    scheme: Scheme,
    host: String,
    port: u16,
    credentials: Option<Credentials>,
    authorities: ProxyAuthorities,
}

/// Protocol of the CONNECT request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
    Http,
    /// HTTP within TLS to the proxy, so that the network does not see the credentials.
    Https,
}

/// Value of a Proxy-Authorization header. It is never displayed.
#[derive(Clone, PartialEq, Eq)]
struct Credentials(String);

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(…)")
    }
}

/// Why a text is not the address of a proxy. The text is left out, for it may hold a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidProxy {
    /// The scheme is neither http nor https.
    #[error("a proxy of the scheme {0} is not supported; use an http:// or https:// one")]
    Scheme(String),
    /// There is no host.
    #[error("the proxy's host is missing")]
    Host,
    /// Something other than a port follows the host.
    #[error("the proxy's port is not a number from 1 to 65535")]
    Port,
    /// The user's name or the password is not percent-encoded.
    #[error("the proxy's user or password has a percent sign before no two hexadecimal digits")]
    Credentials,
}

impl Proxy {
    /// Sets the PEM file with the CA certificates for the proxy, instead of the system's.
    #[must_use]
    pub fn with_authorities(self, file: PathBuf) -> Self {
        Self { authorities: ProxyAuthorities { file: Some(file), kept: None }, ..self }
    }

    /// The PEM file with the CA certificates for the proxy, if it is reached over TLS and there is
    /// one.
    pub fn authorities(&self) -> Option<PathBuf> {
        (self.scheme == Scheme::Https).then(|| self.authorities.path()).flatten()
    }

    /// Uses these CA certificates, which the caller keeps up to date, instead of reading their file
    /// for each handshake.
    #[must_use]
    pub fn with_kept_authorities(mut self, kept: Current<RootCertStore>) -> Self {
        self.authorities.kept = Some(kept);
        self
    }

    /// Connects to the proxy and asks it to connect to the server; the connection, and the proxy's
    /// address. The proxy resolves the server's name.
    ///
    /// # Errors
    /// When the proxy cannot be reached, is not who it should be, or refuses.
    pub(super) async fn connect(
        &self,
        (host, port): (&str, u16),
        settings: &Settings,
        deadline: Instant,
    ) -> Result<(ProxiedStream, SocketAddr), ProxyFault> {
        let connecting = async {
            let (stream, address) = self.reach(settings).await?;
            let credentials = self.credentials.as_ref().map(|Credentials(value)| value.as_str());
            Ok((proxied_stream::open(stream, host, port, credentials).await?, address))
        };
        timeout_at(deadline, connecting).await.unwrap_or(Err(ProxyFault::TimedOut))
    }

    /// Connects to the proxy itself.
    async fn reach(
        &self,
        settings: &Settings,
    ) -> Result<(Either<TcpStream, TlsStream<TcpStream>>, SocketAddr), ProxyFault> {
        let unreachable = |error: std::io::Error| ProxyFault::Unreachable(error.into());
        let socket =
            TcpStream::connect((self.host.as_str(), self.port)).await.map_err(unreachable)?;
        prepare(&socket, settings);
        let address = socket.peer_addr().map_err(unreachable)?;
        let stream = match self.scheme {
            Scheme::Http => Either::Left(socket),
            Scheme::Https => {
                Either::Right(trust::handshake(socket, &self.host, &self.authorities).await?)
            }
        };
        Ok((stream, address))
    }
}

impl FromStr for Proxy {
    type Err = InvalidProxy;

    /// Reads `[scheme://][user[:password]@]host[:port]` as Go's `httpproxy` does: the scheme is
    /// `http` by default, and what follows the address is ignored.
    fn from_str(url: &str) -> Result<Self, InvalidProxy> {
        let url = url.trim();
        let (scheme, rest) = match url.split_once("://") {
            Some((scheme, rest)) if is_scheme(scheme) => (scheme, rest),
            _ => ("http", url),
        };
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            other => return Err(InvalidProxy::Scheme(other.to_owned())),
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (user, address) = match authority.rsplit_once('@') {
            Some((user, address)) => (Some(user), address),
            None => (None, authority),
        };
        let (host, port) = split_address(address)?;
        Ok(Self {
            scheme,
            host: host.to_owned(),
            port: port.unwrap_or_else(|| scheme.default_port()),
            credentials: user.map(Credentials::from_user_info).transpose()?,
            authorities: ProxyAuthorities::default(),
        })
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { scheme, host, port, .. } = self;
        let scheme = scheme.name();
        match host.contains(':') {
            true => write!(f, "{scheme}://[{host}]:{port}"),
            false => write!(f, "{scheme}://{host}:{port}"),
        }
    }
}

impl Scheme {
    fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// Whether a text is the scheme of a URL (RFC 3986 §3.1).
fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}

/// The host without brackets, and the port if there is one.
fn split_address(address: &str) -> Result<(&str, Option<u16>), InvalidProxy> {
    let (host, port) = match split_host_port(address) {
        Ok((host, port)) => (host, port),
        Err(SplitFault::MissingPort) => (unbracketed(address).ok_or(InvalidProxy::Port)?, ""),
        Err(SplitFault::TooManyColons) => return Err(InvalidProxy::Port),
        Err(SplitFault::MismatchedBracket) => return Err(InvalidProxy::Host),
    };
    if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(InvalidProxy::Host);
    }
    if port.is_empty() {
        return Ok((host, None));
    }
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|port| digits && *port > 0);
    Ok((host, Some(port.ok_or(InvalidProxy::Port)?)))
}

/// A host without the brackets around it; `None` when something follows them.
fn unbracketed(host: &str) -> Option<&str> {
    match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']'),
        None => Some(host),
    }
}

impl Credentials {
    /// The header for the `user[:password]` of a URL (RFC 7617 §2).
    fn from_user_info(text: &str) -> Result<Self, InvalidProxy> {
        let (user, password) = text.split_once(':').unwrap_or((text, ""));
        let mut pair = decode_percent(user)?;
        pair.push(b':');
        pair.extend(decode_percent(password)?);
        Ok(Self(format!("Basic {}", BASE64.encode(&pair))))
    }
}

/// The bytes that a percent-encoded part of a URL stands for.
fn decode_percent(text: &str) -> Result<Vec<u8>, InvalidProxy> {
    let is_encoding = |rest: &str| {
        rest.as_bytes().get(..2).is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    };
    // The crate would keep a percent sign that begins no encoding.
    if !text.split('%').skip(1).all(is_encoding) {
        return Err(InvalidProxy::Credentials);
    }
    Ok(percent_decode_str(text).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(url: &str) -> String {
        match url.parse::<Proxy>() {
            Ok(proxy) => proxy.to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn an_address_reads_as_it_does_in_go() {
        for (url, proxy) in [
            ("http://proxy.example:3128", "http://proxy.example:3128"),
            ("http://proxy.example", "http://proxy.example:80"),
            ("http://proxy.example:", "http://proxy.example:80"),
            ("HTTPS://proxy.example/", "https://proxy.example:443"),
            ("https://10.0.0.1:8443/ignored?too#yes", "https://10.0.0.1:8443"),
            ("proxy.example:3128", "http://proxy.example:3128"),
            ("10.0.0.1", "http://10.0.0.1:80"),
            (" http://[fd00::1]:3128 ", "http://[fd00::1]:3128"),
            ("[fd00::1]", "http://[fd00::1]:80"),
            ("user:p@ss@proxy:1", "http://proxy:1"),
            (
                "socks5://proxy:1080",
                "a proxy of the scheme socks5 is not supported; use an http:// or https:// one",
            ),
            ("http://", "the proxy's host is missing"),
            ("http://user@:3128", "the proxy's host is missing"),
            ("http://[fd00::1:3128", "the proxy's host is missing"),
            ("http://a b:1", "the proxy's host is missing"),
            ("http://proxy:0", "the proxy's port is not a number from 1 to 65535"),
            ("http://proxy:65536", "the proxy's port is not a number from 1 to 65535"),
            ("http://proxy:+1", "the proxy's port is not a number from 1 to 65535"),
            ("http://fd00::1", "the proxy's port is not a number from 1 to 65535"),
            ("http://[fd00::1]3128", "the proxy's port is not a number from 1 to 65535"),
        ] {
            assert_eq!(shown(url), proxy, "{url}");
        }
    }

    #[test]
    fn credentials_are_decoded_and_never_shown() {
        let proxy: Proxy = "http://us%65r:hunter%322@proxy:1".parse().unwrap();
        // "user:hunter22" in base 64.
        assert_eq!(proxy.credentials, Some(Credentials("Basic dXNlcjpodW50ZXIyMg==".into())));
        for shown in [format!("{proxy:?}"), proxy.to_string()] {
            assert!(!shown.contains("hunter") && !shown.contains("dXNl"), "{shown}");
        }
        let fault = "http://user:hunter%2@proxy:1".parse::<Proxy>().unwrap_err();
        assert_eq!(fault, InvalidProxy::Credentials);
        assert!(!shown("http://user:hunter2@proxy:x").contains("hunter"));
    }
}
