//! What crosses a Culvert tunnel: the protocol `culvert/1`, as types and bytes.
//!
//! Framing and routing metadata, and nothing else: no I/O, no clock, no async runtime. The
//! normative text is `docs/protocol.md`; modules cite its sections.
//!
//! ```text
//!  control ─ dial             messages, checked while they are decoded
//!     └─ frame ─ codec        bytes ↔ messages, with a hard limit on every length
//!  resume                     the messages that continue streams on another tunnel
//!  ids, identifiers, target   what a message names: agents, servers, their facts, addresses
//!  bounded, extension         texts and lists with a limit, additions of later revisions
//!  code, version              close codes, reset codes, feature bits
//! ```
//!
//! Start with [`control::ControlMessage`], then [`dial::DialRequest`].

pub mod bounded;
pub mod code;
pub mod codec;
pub mod control;
pub mod dial;
pub mod extension;
pub mod frame;
pub mod identifiers;
pub mod ids;
pub mod resume;
pub mod target;
pub mod version;

pub use code::{CloseCode, StreamCode};
pub use ids::{AgentId, DialId, InstanceId, ServerId};
pub use target::Target;
