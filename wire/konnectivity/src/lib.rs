//! What Konnectivity peers say to each other, so that rollouts may mix versions.
//!
//! Konnectivity knows no streams: all connections of an agent are packets of one gRPC stream, told apart
//! by a number, and none of them can be slowed down alone. Here each of them becomes a stream of a
//! tunnel again, whose other end is in the same process, and everything above the
//! [tunnel](culvert_transport::Tunnel) goes on as with any other tunnel:
//!
//! ```text
//! Konnectivity agent ──▶ gRPC ── bridge ═ pipe ═ tunnel ─ the server as ever
//! the agent as ever ─ tunnel ═ pipe ═ bridge ── gRPC ──▶ Konnectivity server
//! ```

//= docs/protocol.md#11-konnectivity-peers

mod batches;
pub mod codec;
mod connection;
mod inbox;
mod outbound;
pub mod packet;

pub use batches::batches;
pub use connection::{Connections, NoAbort, Side, carry};
pub use inbox::{End, Inbox};
pub use outbound::{Outbound, Packets, PeerNotReading, outbound};

/// The method between agent and server.
pub const CONNECT: &str = "/AgentService/Connect";
/// The method between frontend and server.
pub const PROXY: &str = "/ProxyService/Proxy";
/// ALPN of gRPC (RFC 9113 §3.1).
pub const ALPN_H2: &[u8] = b"h2";

/// Metadata of [`CONNECT`] (upstream `proto/header`).
pub mod header {
    /// Agent: its name.
    pub const AGENT_ID: &str = "agentid";
    /// Agent: what it announces, as a URL query.
    pub const AGENT_IDENTIFIERS: &str = "agentidentifiers";
    /// Agent: `Bearer` and its token.
    pub const AUTHORIZATION: &str = "authorization";
    /// Server: its name.
    pub const SERVER_ID: &str = "serverid";
    /// Server: how many there are.
    pub const SERVER_COUNT: &str = "servercount";
}
