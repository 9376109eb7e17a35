//! Flags that server and agent share: how a tunnel behaves, and how the process logs.

use std::{sync::Arc, time::Duration};

use clap::{
    Args, ValueEnum,
    builder::{PossibleValuesParser, TypedValueParser},
};
use culvert_transport::{Settings, budget::MemoryBudget, congestion::Congestion, tls::KeyExchange};
use tracing::info;

use crate::{
    byte_size::ByteSize,
    faults::Faults,
    go_duration::GoDuration,
    klog::KlogFlags,
    logging::{LogConfig, LogFormat},
    memory_limit,
};

/// Shared flags, to be flattened into those of a process.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Tunnel")]
pub struct TunnelFlags {
    /// Time without a packet from the peer after which a tunnel counts as lost, at least 1s. Both
    /// sides have this limit, and the shorter one applies
    #[arg(long, value_name = "DURATION", default_value_t = default_idle_timeout())]
    pub tunnel_idle_timeout: GoDuration,

    /// Idle time after which a tunnel is pinged; 0 sends no pings. Must be shorter than
    /// --tunnel-idle-timeout, and should be shorter than the UDP timeout of every NAT and load
    /// balancer on the path
    #[arg(long, value_name = "DURATION", default_value_t = default_keep_alive_interval())]
    pub tunnel_keep_alive_interval: GoDuration,

    /// Maximum number of bytes of one stream that wait in this process for a slow reader, 16Ki to
    /// 1Gi. Limits memory per stream, and the speed of a stream to this size per round trip
    #[arg(long, value_name = "SIZE", default_value_t = default_stream_receive_window())]
    pub(crate) stream_receive_window: ByteSize,

    /// Maximum number of bytes that this process holds for peers that do not read or acknowledge; 0
    /// sets no limit, else at least 1Mi. Streams wait before they exceed it, and at the limit the
    /// stream that holds most is cut [default: 40 percent of the memory limit of the control group,
    /// or 25 percent of the machine's memory without one]
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory_limit: Option<ByteSize>,

    /// Kernel buffer to request for each UDP socket and direction, up to 1Gi. The kernel caps it at
    /// net.core.rmem_max and net.core.wmem_max
    #[arg(long, value_name = "SIZE", default_value_t = default_udp_buffer_size())]
    pub(crate) udp_buffer_size: ByteSize,

    /// Largest UDP payload that path MTU discovery tries, 1200 to 65527 bytes; the MTU of the local
    /// interface limits it too
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().mtu_cap.into())]
    pub mtu_cap: i64,

    /// Whether packets are handed to the kernel in batches, which it segments (GSO): auto (yes, except
    /// for peers that batches do not reach), or off (costs CPU time)
    #[arg(long, value_name = "KIND", value_enum, default_value_t)]
    pub gso: GsoFlag,

    /// Congestion control: model (follows the path's bandwidth and shortest round trip, and does
    /// not take random loss for congestion), cubic (RFC 9438), or auto (the one with the best
    /// measurements, currently model)
    #[arg(
        long,
        value_name = "KIND",
        value_parser = congestions(),
        default_value_t = Settings::default().congestion
    )]
    pub congestion: Congestion,

    /// Maximum rate of second copies of short writes and of packets that repair bursts up to 64Ki,
    /// both together, in bytes per second and tunnel, up to 1Gi; 0 sends neither. They are sent while
    /// the path loses packets, so that short answers do not wait for retransmissions
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize(DEFAULT_HEDGE_RATE.into()))]
    pub(crate) hedge_rate: ByteSize,

    /// Time for which the streams of a lost tunnel wait for another one between the same processes;
    /// 0 cuts them at once. Both sides have this limit, and the shorter one applies
    #[arg(long, value_name = "DURATION", default_value_t = go_duration(DEFAULT_RESUME_TIMEOUT))]
    pub resume_timeout: GoDuration,

    /// Key exchange of TLS between server and agent (older name: --tls-kx)
    #[arg(long, alias = "tls-kx", value_name = "KIND", value_enum, default_value_t)]
    pub tls_key_exchange: KeyExchangeFlag,

    /// Format of log lines
    #[arg(
        long,
        value_name = "FORMAT",
        value_enum,
        default_value_t = LogFormat::Text,
        help_heading = "Logging"
    )]
    pub log_format: LogFormat,

    /// Flags of klog.
    #[command(flatten)]
    pub(crate) klog: KlogFlags,
}

/// [`KeyExchange`] as a flag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum KeyExchangeFlag {
    /// Post-quantum first (X25519 with ML-KEM-768); elliptic curves for peers without it, and by the
    /// agent after a handshake without an answer
    #[default]
    #[value(alias = "hybrid")]
    Auto,
    /// Post-quantum only: a peer without it is refused, and so is TLS 1.2
    PostQuantum,
    /// Elliptic curves only: smaller first packets, for paths that drop large ones
    #[value(alias = "classic")]
    Classical,
}

/// Whether packets are handed to the kernel in batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum GsoFlag {
    /// Batches, except for peers that they do not reach
    #[default]
    Auto,
    /// No batches
    Off,
}

impl From<KeyExchangeFlag> for KeyExchange {
    fn from(flag: KeyExchangeFlag) -> Self {
        match flag {
            KeyExchangeFlag::Auto => Self::Hybrid,
            KeyExchangeFlag::PostQuantum => Self::PostQuantum,
            KeyExchangeFlag::Classical => Self::Classic,
        }
    }
}

/// Checked options of a process's tunnels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelConfig {
    /// Settings of the carrier. Each side replaces `max_streams` by its own; see
    /// [`settings`](Self::settings).
    pub transport: Settings,
    /// Number of bytes that the process holds for its peers; 0 without a limit.
    pub memory_limit: u64,
    /// Bytes per second and tunnel that may be sent a second time, up to 1 GiB; 0 sends none.
    pub hedge_rate: u32,
    /// Time for which streams wait for another tunnel; zero cuts them at once.
    pub resume_timeout: Duration,
    /// Key exchange groups to offer.
    pub key_exchange: KeyExchange,
}

/// Minimum idle timeout: a shorter one loses a tunnel with one lost packet and its retransmission.
const MIN_IDLE_TIMEOUT: Duration = Duration::from_secs(1);
/// Minimum stream window, in bytes: a smaller one makes each TLS record wait for a window update.
const MIN_STREAM_WINDOW: u64 = 16 << 10;
/// Least number of bytes of packets that may wait for their connections: 500 full packets.
const MIN_PACKET_BACKLOG: u64 = 1 << 20;
/// Minimum of a memory limit other than 0, in bytes: room for two hundred streams to go on.
const MIN_MEMORY_LIMIT: u64 = 1 << 20;
/// Number of stream windows that the memory for peers must hold.
const WINDOWS: u64 = 128;
/// Maximum of every size but the memory's, in bytes: 32-bit socket options and one process's memory hold it.
const MAX_SIZE: u64 = 1 << 30;
/// Smallest and largest `max_udp_payload_size` (RFC 9000 §18.2).
const MTU_RANGE: std::ops::RangeInclusive<i64> = 1200..=65527;
/// Default of `--hedge-rate`, in bytes per second.
const DEFAULT_HEDGE_RATE: u32 = 512 << 10;
/// Default of `--resume-timeout`.
const DEFAULT_RESUME_TIMEOUT: Duration = Duration::from_secs(30);

// The carrier's own defaults, in the types of the flags.

fn congestions() -> impl TypedValueParser<Value = Congestion> {
    PossibleValuesParser::new(["auto", "model", "cubic"]).try_map(|name| name.parse::<Congestion>())
}

fn default_idle_timeout() -> GoDuration {
    go_duration(Settings::default().idle_timeout)
}

fn default_keep_alive_interval() -> GoDuration {
    go_duration(Settings::default().keep_alive_interval.unwrap_or_default())
}

fn default_stream_receive_window() -> ByteSize {
    ByteSize(Settings::default().stream_receive_window.into())
}

fn default_udp_buffer_size() -> ByteSize {
    ByteSize(Settings::default().udp_buffer_size as u64)
}

fn go_duration(duration: Duration) -> GoDuration {
    GoDuration::try_from(duration).expect("no default is longer than 292 years")
}

impl Default for TunnelConfig {
    /// The options without any flag.
    fn default() -> Self {
        Self {
            transport: Settings::default(),
            memory_limit: memory_limit::default_limit(),
            hedge_rate: DEFAULT_HEDGE_RATE,
            resume_timeout: DEFAULT_RESUME_TIMEOUT,
            key_exchange: KeyExchangeFlag::default().into(),
        }
    }
}

impl TunnelConfig {
    /// Settings of a carrier whose peer may have `max_streams` open at first. A process with little
    /// memory has smaller windows, so that a few stalled readers do not use it up.
    pub fn settings(&self, max_streams: u32) -> Settings {
        let share = match self.memory_limit {
            0 => u64::MAX,
            limit => (limit / WINDOWS).max(MIN_STREAM_WINDOW),
        };
        let window = self.transport.stream_receive_window;
        let stream_receive_window = window.min(u32::try_from(share).unwrap_or(window));
        // As much as the streams of one tunnel may hold together.
        let tunnel_receive_window = (self.memory_limit > 0).then_some(self.memory_limit / 2);
        let packet_backlog = match self.memory_limit {
            0 => Settings::MAX_PACKET_BACKLOG,
            limit => (limit / 4).clamp(MIN_PACKET_BACKLOG, Settings::MAX_PACKET_BACKLOG),
        };
        Settings {
            max_streams,
            stream_receive_window,
            tunnel_receive_window,
            packet_backlog,
            ..self.transport
        }
    }

    /// The memory that the process has for its peers.
    pub fn memory(&self) -> Arc<MemoryBudget> {
        match self.memory_limit {
            0 => info!("no limit of the memory for peers"),
            bytes => info!(bytes, "the limit of the memory for peers"),
        }
        let window = self.settings(1).stream_receive_window;
        MemoryBudget::with_window(self.memory_limit, window)
    }
}

impl TunnelFlags {
    /// The checked options. Faults of the flags go to `faults`.
    pub fn check(&self, faults: &mut Faults) -> (TunnelConfig, LogConfig) {
        let file = self.klog.check(faults);
        let (idle_timeout, keep_alive_interval) = self.timers(faults);
        let stream_receive_window =
            size("stream-receive-window", self.stream_receive_window, MIN_STREAM_WINDOW, faults);
        let udp_buffer_size = size("udp-buffer-size", self.udp_buffer_size, 0, faults) as usize;
        let hedge_rate = size("hedge-rate", self.hedge_rate, 0, faults);
        let memory_limit = self.memory_limit.map(|limit| limit.0);
        faults.require(
            memory_limit.is_none_or(|limit| limit == 0 || limit >= MIN_MEMORY_LIMIT),
            "memory-limit",
            "must be 0, for no limit, or at least 1Mi".to_owned(),
        );
        let memory_limit = memory_limit.unwrap_or_else(memory_limit::default_limit);
        faults.require(
            MTU_RANGE.contains(&self.mtu_cap),
            "mtu-cap",
            format!("must be from 1200 to 65527, got {}", self.mtu_cap),
        );
        let transport = Settings {
            idle_timeout,
            keep_alive_interval,
            stream_receive_window,
            mtu_cap: u16::try_from(self.mtu_cap).unwrap_or_default(),
            gso: self.gso == GsoFlag::Auto,
            udp_buffer_size,
            congestion: self.congestion,
            ..Settings::default()
        };
        let key_exchange = self.tls_key_exchange.into();
        let resume_timeout = faults.duration("resume-timeout", self.resume_timeout);
        let tunnel =
            TunnelConfig { transport, memory_limit, hedge_rate, resume_timeout, key_exchange };
        (tunnel, LogConfig { format: self.log_format, verbosity: self.klog.v, file })
    }

    /// Idle timeout and keep-alive interval.
    fn timers(&self, faults: &mut Faults) -> (Duration, Option<Duration>) {
        let idle_timeout = faults.duration("tunnel-idle-timeout", self.tunnel_idle_timeout);
        faults.require(
            idle_timeout >= MIN_IDLE_TIMEOUT || self.tunnel_idle_timeout.is_negative(),
            "tunnel-idle-timeout",
            format!("must be at least 1s, got {}", self.tunnel_idle_timeout),
        );
        let keep_alive =
            faults.duration("tunnel-keep-alive-interval", self.tunnel_keep_alive_interval);
        faults.require(
            keep_alive.is_zero() || keep_alive < idle_timeout,
            "tunnel-keep-alive-interval",
            format!("must be shorter than --tunnel-idle-timeout={}", self.tunnel_idle_timeout),
        );
        (idle_timeout, (!keep_alive.is_zero()).then_some(keep_alive))
    }
}

/// A size from `least` bytes to 1 GiB.
fn size(flag: &'static str, size: ByteSize, least: u64, faults: &mut Faults) -> u32 {
    faults.require(
        (least..=MAX_SIZE).contains(&size.0),
        flag,
        format!("must be from {} to 1Gi, got {size}", ByteSize(least)),
    );
    u32::try_from(size.0).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::go_flags;
    use crate::logging::LogFileConfig;

    #[derive(Debug, clap::Parser)]
    struct Flags {
        #[command(flatten)]
        tunnel: TunnelFlags,
    }

    fn check(args: &[&str]) -> Result<(TunnelConfig, LogConfig, Vec<String>), String> {
        let args = ["x"].iter().chain(args).map(OsString::from);
        let flags: Flags = go_flags::try_parse_from(args).map_err(|exit| exit.text)?;
        let mut faults = Faults::new();
        let (tunnel, log) = flags.tunnel.check(&mut faults);
        let warnings = faults.finish().map_err(|errors| errors.to_string())?;
        Ok((tunnel, log, warnings))
    }

    #[test]
    fn no_flags_give_the_documented_defaults() {
        let (tunnel, log, warnings) = check(&[]).unwrap();
        assert_eq!(tunnel, TunnelConfig::default());
        let settings = tunnel.settings(7);
        assert_eq!(settings.max_streams, 7);
        assert_eq!(settings.idle_timeout, Duration::from_secs(25));
        assert_eq!(settings.keep_alive_interval, Some(Duration::from_secs(5)));
        let help = go_flags::command::<Flags>().render_help().to_string();
        for default in ["25s", "5s", "2Mi", "8Mi", "6500", "auto", "512Ki", "text"] {
            assert!(help.contains(&format!("[default: {default}]")), "{default} in {help}");
        }
        assert_eq!(log, LogConfig { format: LogFormat::Text, verbosity: 4, file: None });
        assert!(warnings.is_empty());
    }

    #[test]
    fn flags_reach_their_options() {
        let (tunnel, log, _) = check(&[
            "--tunnel-idle-timeout=1m",
            "--tunnel-keep-alive-interval=0",
            "--stream-receive-window=512Ki",
            "--memory-limit=32Mi",
            "--udp-buffer-size=0",
            "--mtu-cap=1200",
            "--gso=off",
            "--congestion=cubic",
            "--hedge-rate=1Mi",
            "--resume-timeout=5s",
            "--tls-key-exchange=classical",
            "--log-format=json",
            "-v=8",
        ])
        .unwrap();
        let transport = Settings {
            idle_timeout: Duration::from_secs(60),
            keep_alive_interval: None,
            stream_receive_window: 512 << 10,
            udp_buffer_size: 0,
            mtu_cap: 1200,
            gso: false,
            congestion: Congestion::Cubic,
            ..Settings::default()
        };
        let expected = TunnelConfig {
            transport,
            memory_limit: 32 << 20,
            hedge_rate: 1 << 20,
            resume_timeout: Duration::from_secs(5),
            key_exchange: KeyExchange::Classic,
        };
        assert_eq!(tunnel, expected);
        assert_eq!(log, LogConfig { format: LogFormat::Json, verbosity: 8, file: None });
    }

    #[test]
    fn the_key_exchange_has_three_kinds_and_its_older_names() {
        for (arg, expected) in [
            ("--tls-key-exchange=auto", KeyExchange::Hybrid),
            ("--tls-key-exchange=post-quantum", KeyExchange::PostQuantum),
            ("--tls-key-exchange=classical", KeyExchange::Classic),
            ("--tls-kx=hybrid", KeyExchange::Hybrid),
            ("--tls-kx=classic", KeyExchange::Classic),
        ] {
            assert_eq!(check(&[arg]).unwrap().0.key_exchange, expected, "{arg}");
        }
    }

    #[test]
    fn windows_are_small_where_memory_is() {
        let window = |limit: &str| {
            let (tunnel, ..) = check(&[&format!("--memory-limit={limit}")]).unwrap();
            (tunnel.memory().limit(), tunnel.settings(1).stream_receive_window)
        };
        assert_eq!(window("1Gi"), (Some(1 << 30), 2 << 20));
        assert_eq!(window("16Mi"), (Some(16 << 20), 128 << 10));
        assert_eq!(window("1Mi"), (Some(1 << 20), 16 << 10));
        assert_eq!(window("0"), (None, 2 << 20));
    }

    #[test]
    fn each_rule_names_its_flag() {
        for arg in [
            "--tunnel-idle-timeout=-1s",
            "--tunnel-idle-timeout=10ms",
            "--tunnel-keep-alive-interval=-1s",
            "--tunnel-keep-alive-interval=25s",
            "--stream-receive-window=1Ki",
            "--stream-receive-window=2Gi",
            "--memory-limit=1Ki",
            "--udp-buffer-size=2Gi",
            "--mtu-cap=1199",
            "--mtu-cap=65528",
            "--gso=on",
            "--congestion=reno",
            "--hedge-rate=2Gi",
            "--tls-key-exchange=none",
            "--log-format=xml",
        ] {
            let flag = arg.split('=').next().unwrap();
            let text = check(&[arg]).unwrap_err();
            assert!(text.contains(flag), "{arg}: {text}");
        }
    }

    #[test]
    fn klog_flags_are_accepted_and_files_without_effect_cause_a_warning() {
        let (_, log, warnings) = check(&[
            "--logtostderr=true",
            "--alsologtostderr",
            "--alsologtostderrthreshold=2",
            "--stderrthreshold=ERROR",
            "--legacy_stderr_threshold_behavior=false",
            "--log_file=/var/log/x.log",
            "--log-file-max-size=0",
            "--log-dir=/var/log",
            "--add-dir-header",
            "--skip-headers",
            "--skip-log-headers=true",
            "--one-output",
            "--log-backtrace-at=a.go:7",
            "--vmodule=a=3,b=4",
        ])
        .unwrap();
        let flags: Vec<_> = warnings.iter().filter_map(|text| text.split(':').next()).collect();
        assert_eq!(flags, ["--vmodule", "--log-file", "--log-dir"]);
        assert_eq!(log.file, None);
    }

    #[test]
    fn the_log_goes_to_a_file_where_klog_writes_one() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().to_str().unwrap();
        let file = |args: &[&str]| check(args).unwrap().1.file;
        let path = format!("--log-file={folder}/server.log");
        let expected = LogFileConfig {
            path: format!("{folder}/server.log").into(),
            max_size: 1800 << 20,
            also_stderr: false,
        };
        assert_eq!(file(&["--logtostderr=false", &path]), Some(expected.clone()));
        let unlimited = LogFileConfig { max_size: 0, also_stderr: true, ..expected };
        let flags = ["--logtostderr=false", &path, "--log-file-max-size=0", "--alsologtostderr"];
        assert_eq!(file(&flags), Some(unlimited));
        let in_folder = file(&["--logtostderr=false", &format!("--log-dir={folder}")]).unwrap();
        assert_eq!(in_folder.path.parent(), Some(folder.as_ref()));
        let (_, log, warnings) = check(&["--logtostderr=false"]).unwrap();
        assert_eq!((log.file, warnings.len()), (None, 1));
        let missing = format!("--log-file={folder}/missing/server.log");
        let fault = check(&["--logtostderr=false", &missing]).unwrap_err();
        assert!(fault.contains("--log-file: cannot be opened for appending"), "{fault}");
    }
}
