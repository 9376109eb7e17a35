//! All faults of a configuration at once, each with the flag to change.
//!
//! An operator who mistyped three flags starts the process once to see all three. The checks that
//! both sides need are methods of [`Faults`]: each records a fault and returns a harmless value,
//! so that checking goes on.

use std::{
    borrow::Cow,
    fmt, io,
    net::{IpAddr, Ipv6Addr, SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use culvert_wire::ids::InvalidId;
use uuid::Uuid;

use crate::{
    go_duration::GoDuration,
    kubernetes::KubernetesConfig,
    reload::{Files, LoadError, Role},
};

/// Largest port that is not ephemeral (RFC 6335 §6); a Konnectivity server refuses higher ones.
const LAST_REGISTERED_PORT: i64 = 49151;
/// Smallest port that needs no privilege; a Konnectivity server refuses lower ones.
const FIRST_REGISTERED_PORT: i64 = 1024;

/// One fault that keeps a process from starting.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{origin}{flag}: {reason}")]
pub struct ConfigError {
    /// The flag to change, without its hyphens, or the variable of the environment.
    pub flag: Cow<'static, str>,
    /// Where its value is.
    pub origin: Origin,
    /// The fault, and what would be right.
    pub reason: String,
}

/// Where a value is that has a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// On the command line, or nowhere where it must be given.
    Flag,
    /// On the command line, written as it is.
    Argument,
    /// In the environment.
    Variable,
    /// In this configuration file.
    File(PathBuf),
}

/// What stands before the name.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("--"),
            Self::Argument | Self::Variable => Ok(()),
            Self::File(path) => write!(f, "{}: ", path.display()),
        }
    }
}

/// All faults that keep a process from starting, at least one. Its exit code is 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// The faults, in the order in which they were found.
    pub fn iter(&self) -> impl Iterator<Item = &ConfigError> {
        self.0.iter()
    }

    /// The faults, in the same order.
    pub(crate) fn into_vec(self) -> Vec<ConfigError> {
        self.0
    }
}

impl From<Vec<ConfigError>> for ConfigErrors {
    fn from(faults: Vec<ConfigError>) -> Self {
        Self(faults)
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the configuration cannot be used:")?;
        self.0.iter().try_for_each(|error| write!(f, "\n  {error}"))
    }
}

impl std::error::Error for ConfigErrors {}

/// Files of a certificate chain and of its private key, both PEM and both present at the check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificatePair {
    /// Chain, leaf first.
    pub certificate: PathBuf,
    /// Private key of the leaf.
    pub key: PathBuf,
}

/// Faults and warnings found so far.
#[derive(Debug, Default)]
pub struct Faults {
    errors: Vec<ConfigError>,
    warnings: Vec<String>,
}

impl Faults {
    /// Without faults and warnings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Records a fault of `flag`.
    pub fn add(&mut self, flag: &'static str, reason: impl Into<String>) {
        let reason = reason.into();
        self.errors.push(ConfigError { flag: flag.into(), origin: Origin::Flag, reason });
    }

    /// The value of `flag`, or `None` along with its fault.
    pub fn checked<T>(
        &mut self,
        flag: &'static str,
        result: Result<T, impl fmt::Display>,
    ) -> Option<T> {
        result.map_err(|error| self.add(flag, error.to_string())).ok()
    }

    /// Records a fault of a variable of the environment.
    pub fn add_variable(&mut self, name: &'static str, reason: impl Into<String>) {
        let reason = reason.into();
        self.errors.push(ConfigError { flag: name.into(), origin: Origin::Variable, reason });
    }

    /// Records a fault of `flag` unless `fine`.
    pub fn require(&mut self, fine: bool, flag: &'static str, reason: impl Into<String>) {
        if !fine {
            self.add(flag, reason);
        }
    }

    /// Records a warning, which is logged at start.
    pub fn warn(&mut self, flag: &'static str, text: impl fmt::Display) {
        self.warnings.push(format!("--{flag}: {text}"));
    }

    /// Records a warning of a variable of the environment, which is logged at start.
    pub fn warn_of_variable(&mut self, name: &'static str, text: impl fmt::Display) {
        self.warnings.push(format!("{name}: {text}"));
    }

    /// The warnings, if there is no fault.
    ///
    /// # Errors
    /// With all faults.
    pub fn finish(self) -> Result<Vec<String>, ConfigErrors> {
        if self.errors.is_empty() { Ok(self.warnings) } else { Err(ConfigErrors(self.errors)) }
    }

    /// `path`, which must exist; `None` if it is empty.
    pub fn file(&mut self, flag: &'static str, path: &str) -> Option<PathBuf> {
        if path.is_empty() {
            return None;
        }
        let path = PathBuf::from(path);
        // As in Konnectivity, only absence is a fault: permissions may change before it is read.
        if let Err(error) = std::fs::metadata(&path)
            && error.kind() == io::ErrorKind::NotFound
        {
            self.add(flag, format!("{} does not exist", path.display()));
        }
        Some(path)
    }

    /// What `read` makes of the file or files of a flag. A file that cannot be used is a fault; one
    /// that does not exist is left to [`Self::file`].
    pub fn contents<T>(
        &mut self,
        flag: &'static str,
        path: &Path,
        read: impl FnOnce(&mut Files) -> Result<T, LoadError>,
    ) {
        self.reads(flag, path, read);
    }

    /// As [`Self::contents`]; whether the file exists and can be used.
    fn reads<T>(
        &mut self,
        flag: &'static str,
        path: &Path,
        read: impl FnOnce(&mut Files) -> Result<T, LoadError>,
    ) -> bool {
        if !path.exists() {
            return false;
        }
        let read = read(&mut Files::default());
        read.map_err(|error| self.add(flag, error.to_string())).is_ok()
    }

    /// Ports over TCP that this process listens on: no two of the `needed` ones may be one. A `spare`
    /// one that is another's too causes a warning, because it is not served, and the process works
    /// without it. Port 0 is any free one.
    pub fn distinct_ports(
        &mut self,
        needed: &[(&'static str, SocketAddr)],
        spare: &[(&'static str, SocketAddr)],
    ) {
        let all: Vec<_> = needed.iter().chain(spare).collect();
        for (index, (flag, address)) in all.iter().enumerate() {
            let collides = |other: &SocketAddr| {
                let is_shared = address.ip().is_unspecified()
                    || other.ip().is_unspecified()
                    || address.ip() == other.ip();
                address.port() == other.port() && address.port() != 0 && is_shared
            };
            let Some((other, _)) = all[..index].iter().find(|(_, other)| collides(other)) else {
                continue;
            };
            let text = format!("{} is that of --{other} too", address.port());
            match index < needed.len() {
                true => self.add(flag, text),
                false => self.warn(flag, format!("{text}, and is served there alone")),
            }
        }
    }

    /// A file with CA certificates; `None` if it is empty.
    pub fn authorities(&mut self, flag: &'static str, path: &str) -> Option<PathBuf> {
        let path = self.file(flag, path)?;
        self.contents(flag, &path, |files| files.authorities(&path));
        Some(path)
    }

    /// A file with a token; `None` if it is empty.
    pub fn token(&mut self, flag: &'static str, path: &str) -> Option<PathBuf> {
        let path = self.file(flag, path)?;
        self.contents(flag, &path, |files| files.token(&path));
        Some(path)
    }

    /// A file with a secret; `None` if it is empty.
    pub fn secret(&mut self, flag: &'static str, path: &str) -> Option<PathBuf> {
        let path = self.file(flag, path)?;
        self.contents(flag, &path, |files| files.secret(&path));
        Some(path)
    }

    /// A kubeconfig; `None` if it is empty. Unless it is used, only its absence is a fault.
    pub fn kubeconfig(&mut self, flag: &'static str, path: &str, is_used: bool) -> Option<PathBuf> {
        let path = self.file(flag, path)?;
        if is_used {
            let kubeconfig = Some(path.clone());
            let config = KubernetesConfig { kubeconfig, ..KubernetesConfig::default() };
            self.contents(flag, &path, |files| config.config(files));
        }
        Some(path)
    }

    /// A certificate and its key, which must belong together: both or neither.
    pub fn pair(
        &mut self,
        (certificate_flag, certificate): (&'static str, &str),
        (key_flag, key): (&'static str, &str),
    ) -> Option<CertificatePair> {
        let certificate = self.file(certificate_flag, certificate);
        let key = self.file(key_flag, key);
        match (certificate, key) {
            (Some(certificate), Some(key)) => {
                let pair = CertificatePair { certificate, key };
                let chain = |files: &mut Files| files.chain(&pair.certificate);
                let chain_is_fit = self.reads(certificate_flag, &pair.certificate, chain);
                let key = |files: &mut Files| files.private_key(&pair.key);
                if self.reads(key_flag, &pair.key, key) && chain_is_fit {
                    self.reads(key_flag, &pair.key, |files| files.identity(&pair, Role::Client));
                }
                Some(pair)
            }
            (None, None) => None,
            (Some(_), None) => {
                self.add(key_flag, format!("must be given along with --{certificate_flag}"));
                None
            }
            (None, Some(_)) => {
                self.add(certificate_flag, format!("must be given along with --{key_flag}"));
                None
            }
        }
    }

    /// A port to listen on, 1024 to 49151.
    pub fn registered_port(&mut self, flag: &'static str, port: i64) -> u16 {
        if !(0..=i64::from(u16::MAX)).contains(&port) {
            self.add(flag, format!("{port} is not a port; use one from 1024 to 49151"));
        } else if port > LAST_REGISTERED_PORT {
            self.add(flag, format!("{port} is an ephemeral port; use one up to 49151"));
        } else if port < FIRST_REGISTERED_PORT {
            self.add(flag, format!("{port} is a reserved port; use one from 1024 up"));
        }
        u16::try_from(port).unwrap_or_default()
    }

    /// A port, 1 to 65535.
    pub fn port(&mut self, flag: &'static str, port: i64) -> u16 {
        match u16::try_from(port) {
            Ok(port) if port > 0 => port,
            _ => {
                self.add(flag, format!("{port} is not a port; use one from 1 to 65535"));
                0
            }
        }
    }

    /// Address to listen on. `host` is an address, a name of this machine, or empty for every
    /// interface.
    ///
    /// Every interface is `[::]`, which [`listen::tcp`](crate::listen::tcp) binds for both address
    /// families. A name is resolved once, here, and IPv4 is preferred, as in Go's `net.Listen`.
    pub fn bind_address(&mut self, flag: &'static str, host: &str, port: u16) -> SocketAddr {
        let every_interface = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        if host.is_empty() {
            return every_interface;
        }
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if let Ok(address) = bare.parse::<IpAddr>() {
            return (address, port).into();
        }
        match (host, port).to_socket_addrs() {
            Ok(found) => found.min_by_key(|address| address.is_ipv6()).unwrap_or(every_interface),
            Err(error) => {
                self.add(flag, format!("{host:?} is no address and cannot be looked up: {error}"));
                every_interface
            }
        }
    }

    /// A duration of zero or more.
    pub fn duration(&mut self, flag: &'static str, duration: GoDuration) -> Duration {
        duration.non_negative().unwrap_or_else(|| {
            self.add(flag, format!("must not be negative, got {duration}"));
            Duration::ZERO
        })
    }

    /// A duration above zero.
    pub fn positive_duration(&mut self, flag: &'static str, duration: GoDuration) -> Duration {
        match duration.non_negative() {
            Some(duration) if !duration.is_zero() => duration,
            _ => {
                self.add(flag, format!("must be longer than 0, got {duration}"));
                Duration::ZERO
            }
        }
    }

    /// A count of at least `least` that fits 32 bits.
    pub fn count(&mut self, flag: &'static str, count: i64, least: u32) -> u32 {
        match u32::try_from(count) {
            Ok(count) if count >= least => count,
            _ => {
                self.add(flag, format!("must be from {least} to {}, got {count}", u32::MAX));
                least
            }
        }
    }

    /// Name of a server or an agent; a random UUID when none, or an empty one, was given.
    pub fn id<T: FromStr<Err = InvalidId>>(&mut self, flag: &'static str, id: Option<&str>) -> T {
        let given = id.filter(|id| !id.is_empty()).and_then(|id| {
            id.parse().map_err(|error| self.add(flag, format!("{id:?}: {error}"))).ok()
        });
        given.unwrap_or_else(|| {
            let random = Uuid::new_v4().to_string();
            random.parse().expect("a UUID is a valid name")
        })
    }

    /// `key=value` pairs separated by commas; at least one.
    pub fn labels(&mut self, flag: &'static str, text: &str) -> Vec<(String, String)> {
        let mut labels = Vec::new();
        for pair in text.split(',') {
            match pair.split_once('=') {
                Some((key, value)) if !value.contains('=') => {
                    labels.push((key.trim().to_owned(), value.trim().to_owned()));
                }
                _ => self.add(flag, format!("{pair:?} is not of the form key=value")),
            }
        }
        labels
    }
}

#[cfg(test)]
mod tests {
    use culvert_wire::ids::AgentId;

    use super::*;

    fn faults_of(check: impl FnOnce(&mut Faults)) -> String {
        let mut faults = Faults::new();
        check(&mut faults);
        faults.finish().map_or_else(|errors| errors.to_string(), |_| String::new())
    }

    #[test]
    fn faults_are_reported_together_and_warnings_only_without_any() {
        let mut faults = Faults::new();
        faults.warn("mode", "odd");
        faults.add("a", "is wrong");
        faults.add("b", "is worse");
        let errors = faults.finish().unwrap_err();
        let text = "the configuration cannot be used:\n  --a: is wrong\n  --b: is worse";
        assert_eq!(errors.to_string(), text);

        let mut faults = Faults::new();
        faults.warn("mode", "odd");
        assert_eq!(faults.finish().unwrap(), ["--mode: odd"]);
    }

    #[test]
    fn ports_have_konnectivitys_bounds() {
        for (port, fine) in
            [(1023, false), (1024, true), (49151, true), (49152, false), (-1, false)]
        {
            let text = faults_of(|faults| {
                faults.registered_port("agent-port", port);
            });
            assert_eq!(text.is_empty(), fine, "{port}: {text}");
        }
        for (port, fine) in [(0, false), (1, true), (65535, true), (65536, false), (-1, false)] {
            let text = faults_of(|faults| {
                faults.port("health-server-port", port);
            });
            assert_eq!(text.is_empty(), fine, "{port}: {text}");
        }
    }

    #[test]
    fn bind_addresses_are_literals_names_or_everything() {
        let mut faults = Faults::new();
        for (host, address) in [
            ("", "[::]:7"),
            ("127.0.0.1", "127.0.0.1:7"),
            ("::1", "[::1]:7"),
            ("[::1]", "[::1]:7"),
            ("localhost", "127.0.0.1:7"),
        ] {
            assert_eq!(faults.bind_address("x", host, 7).to_string(), address, "{host}");
        }
        faults.finish().unwrap();
        let text = faults_of(|faults| {
            faults.bind_address("x", "no such host", 7);
        });
        assert!(text.contains("--x: \"no such host\""), "{text}");
    }

    #[test]
    fn names_follow_the_rule_of_the_wire() {
        let mut faults = Faults::new();
        let random = [None, Some("")].map(|id| faults.id::<AgentId>("agent-id", id));
        assert_ne!(random[0], random[1]);
        assert_eq!(random.map(|id| id.as_str().len()), [36; 2], "UUIDs");
        let id: AgentId = faults.id("agent-id", Some("node-1"));
        assert_eq!(id.as_str(), "node-1");
        faults.finish().unwrap();
        let text = faults_of(|faults| drop(faults.id::<AgentId>("agent-id", Some("n\u{f6}de"))));
        assert!(text.contains("--agent-id: \"n\u{f6}de\": "), "{text}");
    }

    #[test]
    fn files_must_exist_and_pairs_must_be_complete() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        std::fs::write(path, certificate.pem() + &key.serialize_pem()).unwrap();
        let mut faults = Faults::new();
        assert_eq!(faults.file("ca", ""), None);
        assert_eq!(faults.file("ca", path), Some(path.into()));
        assert_eq!(faults.pair(("crt", ""), ("key", "")), None);
        let pair = CertificatePair { certificate: path.into(), key: path.into() };
        assert_eq!(faults.pair(("crt", path), ("key", path)), Some(pair));
        faults.finish().unwrap();

        let text = faults_of(|faults| drop(faults.file("ca", "/no/such/file")));
        assert!(text.contains("--ca: /no/such/file does not exist"), "{text}");
        let text = faults_of(|faults| drop(faults.pair(("crt", path), ("key", ""))));
        assert!(text.contains("--key: must be given along with --crt"), "{text}");
        let text = faults_of(|faults| drop(faults.pair(("crt", ""), ("key", path))));
        assert!(text.contains("--crt: must be given along with --key"), "{text}");
    }

    #[test]
    fn numbers_have_bounds() {
        let second = GoDuration::from_secs(1);
        let negative = "-1s".parse().unwrap();
        let mut faults = Faults::new();
        assert_eq!(faults.registered_port("p", 8132), 8132);
        assert_eq!(faults.port("p", 8132), 8132);
        assert_eq!(faults.duration("d", second), Duration::from_secs(1));
        assert_eq!(faults.duration("d", GoDuration::default()), Duration::ZERO);
        assert_eq!(faults.positive_duration("d", second), Duration::from_secs(1));
        assert_eq!(faults.count("c", 3, 3), 3);
        assert_eq!(faults.count("c", u32::MAX.into(), 0), u32::MAX);
        faults.finish().unwrap();
        let text = faults_of(|faults| {
            faults.duration("a", negative);
            faults.positive_duration("b", negative);
            faults.positive_duration("c", GoDuration::default());
            faults.count("d", 2, 3);
            faults.count("e", 1 << 32, 0);
            faults.add_variable("HTTPS_PROXY", "is no URL");
        });
        for fault in ["--a: ", "--b: ", "--c: ", "--d: ", "--e: ", "\n  HTTPS_PROXY: is no URL"] {
            assert!(text.contains(fault), "{fault} in {text}");
        }
    }

    #[test]
    fn labels_are_pairs() {
        let mut faults = Faults::new();
        let labels = faults.labels("lease-label", "k8s-app=konnectivity-server, a=");
        assert_eq!(labels[0], ("k8s-app".into(), "konnectivity-server".into()));
        assert_eq!(labels[1], ("a".into(), String::new()));
        faults.finish().unwrap();
        for text in ["", "a", "a=b=c", "a=b,"] {
            assert!(!faults_of(|faults| drop(faults.labels("x", text))).is_empty(), "{text}");
        }
    }
}
