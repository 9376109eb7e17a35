//! Everything that crosses a Culvert tunnel, and nothing else: the protocol `culvert/1`, the seam
//! to what carries it, and the splice that joins a stream to a socket.
//!
//! This crate knows no frontend, no registry and no Kubernetes. The normative text is
//! `docs/protocol.md`; modules cite its sections.
//!
//! ```text
//!  control ─ dial            messages, checked while they are read
//!     └─ frame ─ codec       bytes ↔ messages, with a hard limit on every length
//!  splice                    a stream and a socket joined, with exact ends
//!  transport                 tunnel, stream halves; the carriers below them
//!     └─ congestion          how much of the path a tunnel fills
//! ```
//!
//! Start with [`transport::Tunnel`], then [`dial::DialRequest`], then [`splice`].

mod chunks;
pub mod code;
pub mod codec;
pub mod congestion;
pub mod control;
pub mod dial;
pub mod extension;
pub mod frame;
pub mod ids;
#[cfg(feature = "konnectivity")]
pub mod konnectivity;
#[cfg(feature = "process")]
pub mod process;
pub mod route;
pub mod splice;
pub mod target;
pub mod text;
pub mod tls;
pub mod transport;
pub mod version;

pub use code::{CloseCode, StreamCode};
pub use ids::{AgentId, DialId, InstanceId, ServerId};
pub use target::Target;
