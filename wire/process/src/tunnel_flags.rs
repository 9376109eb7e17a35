//! The options server and agent share: how a tunnel behaves, and how the process logs.

use std::time::Duration;

use clap::{Args, ValueEnum};
use culvert_transport::{Settings, congestion::Congestion, tls::KeyExchange};

use super::{
    byte_size::ByteSize,
    faults::Faults,
    go_duration::GoDuration,
    klog::KlogFlags,
    logging::{LogConfig, LogFormat},
};

/// Shared flags, to be flattened into those of a process.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Tunnel")]
pub struct TunnelFlags {
    /// How long a tunnel may be silent before it counts as dead. Both sides have one; the shorter
    /// holds
    #[arg(long, value_name = "DURATION", default_value = "25s")]
    pub tunnel_idle_timeout: GoDuration,

    /// How often a silent tunnel is given a sign of life. Must be shorter than the idle timeout;
    /// keep it below the shortest UDP timeout of any NAT or load balancer on the way. 0 sends none
    #[arg(long, value_name = "DURATION", default_value = "5s")]
    pub tunnel_keep_alive_interval: GoDuration,

    /// Bytes of one stream that may wait here for a slow reader: bounds memory per stream and,
    /// divided by the round-trip time, the speed of one. Plain or with Ki or Mi
    #[arg(long, value_name = "SIZE", default_value = "2Mi")]
    pub stream_receive_window: ByteSize,

    /// Kernel buffer to ask for on each UDP socket, per direction; the kernel caps it at
    /// net.core.rmem_max and wmem_max. Plain or with Ki or Mi
    #[arg(long, value_name = "SIZE", default_value = "8Mi")]
    pub udp_buffer_size: ByteSize,

    /// Largest UDP payload that path discovery may try, 1200 to 65527 bytes; never more than the
    /// first link of the path carries
    #[arg(long, value_name = "BYTES", default_value_t = 6500)]
    pub mtu_cap: i64,

    /// How much of the path a tunnel fills: model follows its bandwidth and shortest round trip and
    /// does not take random loss for congestion, cubic is what most of the Internet does; auto is the
    /// one that measures best, today model
    #[arg(long, value_name = "KIND", default_value = "auto")]
    pub congestion: Congestion,

    /// Bytes per second and tunnel that may be sent a second time, so that a keystroke does not wait
    /// for a lost packet; only while the path loses packets. Plain or with Ki or Mi; 0 sends none
    #[arg(long, value_name = "SIZE", default_value = "128Ki")]
    pub hedge_rate: ByteSize,

    /// Key exchange of the tunnel's TLS
    #[arg(long, value_name = "KIND", default_value = "hybrid")]
    pub tls_kx: KeyExchangeFlag,

    /// Form of the log lines
    #[arg(long, value_name = "FORMAT", default_value = "text", help_heading = "Logging")]
    pub log_format: LogFormat,

    /// klog's own.
    #[command(flatten)]
    pub klog: KlogFlags,
}

/// [`KeyExchange`] as a flag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum KeyExchangeFlag {
    /// Post-quantum first (X25519 with ML-KEM-768), elliptic curves for peers without it
    #[default]
    Hybrid,
    /// Elliptic curves only: a first flight small enough for paths that drop large ones
    Classic,
}

impl From<KeyExchangeFlag> for KeyExchange {
    fn from(flag: KeyExchangeFlag) -> Self {
        match flag {
            KeyExchangeFlag::Hybrid => Self::Hybrid,
            KeyExchangeFlag::Classic => Self::Classic,
        }
    }
}

/// How a tunnel behaves, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelConfig {
    /// Silence after which a tunnel counts as dead; at least 1 s.
    pub idle_timeout: Duration,
    /// Interval of signs of life on a silent tunnel, shorter than `idle_timeout`; `None` sends none.
    pub keep_alive_interval: Option<Duration>,
    /// Bytes a stream may have waiting for its reader, 16 KiB to 1 GiB.
    pub stream_receive_window: u32,
    /// Bytes of kernel buffer to ask for, per UDP socket and direction, up to 1 GiB; 0 leaves the
    /// kernel's own.
    pub udp_buffer_size: u32,
    /// Largest UDP payload to try, 1200 to 65527 bytes (RFC 9000 §14, §18.2).
    pub mtu_cap: u16,
    /// How much of the path a tunnel fills.
    pub congestion: Congestion,
    /// Bytes per second and tunnel that may be sent a second time, up to 1 GiB; 0 sends none.
    pub hedge_rate: u32,
    /// Key exchange groups to offer.
    pub key_exchange: KeyExchange,
}

/// Below this a tunnel dies of one lost packet and its retransmission.
const MIN_IDLE_TIMEOUT: Duration = Duration::from_secs(1);
/// One TLS record and a bit: below it every record waits for a window update.
const MIN_STREAM_WINDOW: u64 = 16 << 10;
/// Well inside what 32-bit socket options and one process's memory bear.
const MAX_BUFFER: u64 = 1 << 30;
/// Smallest and largest `max_udp_payload_size` (RFC 9000 §18.2).
const MTU_RANGE: std::ops::RangeInclusive<i64> = 1200..=65527;

impl Default for TunnelConfig {
    /// What the flags say when none is given.
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(25),
            keep_alive_interval: Some(Duration::from_secs(5)),
            stream_receive_window: 2 << 20,
            udp_buffer_size: 8 << 20,
            mtu_cap: 6500,
            congestion: Congestion::Auto,
            hedge_rate: 128 << 10,
            key_exchange: KeyExchange::Hybrid,
        }
    }
}

impl TunnelConfig {
    /// What a carrier is set up with, when the peer may have `max_streams` open at first.
    pub fn settings(&self, max_streams: u32) -> Settings {
        Settings {
            idle_timeout: self.idle_timeout,
            keep_alive_interval: self.keep_alive_interval,
            stream_receive_window: self.stream_receive_window,
            max_streams,
            mtu_cap: self.mtu_cap,
            udp_buffer_size: self.udp_buffer_size as usize,
            congestion: self.congestion,
        }
    }
}

impl TunnelFlags {
    /// The checked options; what is wrong with them goes to `faults`.
    pub fn check(&self, faults: &mut Faults) -> (TunnelConfig, LogConfig) {
        self.klog.check(faults);
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
        let window = self.stream_receive_window;
        faults.require(
            (MIN_STREAM_WINDOW..=MAX_BUFFER).contains(&window.0),
            "stream-receive-window",
            format!("must be from 16Ki to 1Gi, got {window}"),
        );
        let buffer = self.udp_buffer_size;
        faults.require(
            buffer.0 <= MAX_BUFFER,
            "udp-buffer-size",
            format!("must be at most 1Gi, got {buffer}"),
        );
        faults.require(
            MTU_RANGE.contains(&self.mtu_cap),
            "mtu-cap",
            format!("must be from 1200 to 65527, got {}", self.mtu_cap),
        );
        let hedge_rate = self.hedge_rate;
        faults.require(
            hedge_rate.0 <= MAX_BUFFER,
            "hedge-rate",
            format!("must be at most 1Gi, got {hedge_rate}"),
        );
        let tunnel = TunnelConfig {
            idle_timeout,
            keep_alive_interval: (!keep_alive.is_zero()).then_some(keep_alive),
            stream_receive_window: u32::try_from(window.0).unwrap_or_default(),
            udp_buffer_size: u32::try_from(buffer.0).unwrap_or_default(),
            mtu_cap: u16::try_from(self.mtu_cap).unwrap_or_default(),
            congestion: self.congestion,
            hedge_rate: u32::try_from(hedge_rate.0).unwrap_or_default(),
            key_exchange: self.tls_kx.into(),
        };
        (tunnel, LogConfig { format: self.log_format, verbosity: self.klog.v })
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::go_flags;

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
        assert_eq!(log, LogConfig { format: LogFormat::Text, verbosity: 4 });
        assert!(warnings.is_empty());
    }

    #[test]
    fn flags_reach_their_options() {
        let (tunnel, log, _) = check(&[
            "--tunnel-idle-timeout=1m",
            "--tunnel-keep-alive-interval=0",
            "--stream-receive-window=512Ki",
            "--udp-buffer-size=0",
            "--mtu-cap=1200",
            "--congestion=cubic",
            "--hedge-rate=1Mi",
            "--tls-kx=classic",
            "--log-format=json",
            "-v=8",
        ])
        .unwrap();
        let expected = TunnelConfig {
            idle_timeout: Duration::from_secs(60),
            keep_alive_interval: None,
            stream_receive_window: 512 << 10,
            udp_buffer_size: 0,
            mtu_cap: 1200,
            congestion: Congestion::Cubic,
            hedge_rate: 1 << 20,
            key_exchange: KeyExchange::Classic,
        };
        assert_eq!(tunnel, expected);
        assert_eq!(log, LogConfig { format: LogFormat::Json, verbosity: 8 });
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
            "--udp-buffer-size=2Gi",
            "--mtu-cap=1199",
            "--mtu-cap=65528",
            "--congestion=reno",
            "--hedge-rate=2Gi",
            "--tls-kx=none",
            "--log-format=xml",
        ] {
            let flag = arg.split('=').next().unwrap();
            let text = check(&[arg]).unwrap_err();
            assert!(text.contains(flag), "{arg}: {text}");
        }
    }

    #[test]
    fn ignored_klog_flags_are_accepted_and_the_surprising_ones_warned_of() {
        let (_, _, warnings) = check(&[
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
        assert_eq!(flags, ["--log-file", "--log-dir", "--vmodule"]);
    }
}
