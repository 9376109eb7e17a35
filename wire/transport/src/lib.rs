//! Tunnels between agents and servers, the streams on them, and the splice that joins a stream to a
//! socket.
//!
//! A [`Tunnel`] is one authenticated connection between one agent and one server. Either side opens
//! streams on it; each stream has two halves that end on their own: a [`SendHalf`] is finished or
//! reset, a [`RecvHalf`] runs to its end or is stopped. Code that uses a tunnel does not know what
//! carries it. A carrier makes a connection, and `Tunnel::from` makes a tunnel of that; the carrier
//! knows nothing of what stands on it.
//!
//! ```text
//!  splice                    a stream and a socket joined, with exact ends
//!  control                   the control stream: messages, pings, deadlines
//!  tunnel, stream, priority  Tunnel, SendHalf, RecvHalf; which stream's bytes go first
//!     ├─ quic                QUIC, by quinn; named nowhere else
//!     └─ qmux                streams over any reliable byte stream
//!         ├─ tcp             TLS over TCP, directly or through a proxy
//!         └─ memory          a pipe within one process
//!  resume                    streams that go on over another tunnel when theirs is lost
//!  budget                    what the process holds for its peers
//!  progress                  how far a stream has come, for those who look at it
//!  carrier, error, settings  what all of them share
//! ```
//!
//! Start with [`Tunnel`], then [`splice`](mod@splice).

mod arrived;
pub mod budget;
mod carrier;
mod chunks;
pub mod congestion;
pub mod control;
mod error;
pub mod memory;
pub mod priority;
mod progress;
pub mod qmux;
pub mod quic;
pub mod resume;
mod settings;
pub mod socket;
pub mod splice;
mod stream;
pub mod task;
pub mod tcp;
#[cfg(feature = "test-util")]
#[doc(hidden)]
pub mod test_util;
pub mod tls;
mod tunnel;

pub use carrier::{Carrier, ParseCarrierError};
pub use error::{
    ConnectError, IoFault, ProxyFault, ReadError, ReadFrameError, TransportFault, TunnelLost,
    WriteError,
};
pub use progress::{Progress, Step};
pub use quic::{
    icmp::Unreachable,
    udp::{BindError, BufferSizes, UdpHealth, UdpStats},
};
pub use settings::Settings;
pub use stream::{RecvHalf, SendHalf};
pub use tunnel::{Tunnel, TunnelStats};
pub(crate) use tunnel::{canonical, now};
