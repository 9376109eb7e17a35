//! The protocol of Konnectivity, for agents and servers that are not Culvert's.
//!
//! Konnectivity has no streams. All connections of an agent are packets of one gRPC stream, each
//! with a connection id, so none of them can be slowed down alone. A bridge turns each connection
//! into a stream of an in-memory [tunnel](culvert_transport::Tunnel), whose other end is in the
//! same process. Everything above the tunnel is the same as for a Culvert peer:
//!
//! ```text
//! Konnectivity agent ── gRPC ──▶ bridge ══ tunnel in memory ══ backend   (in culvert-server)
//! session ══ tunnel in memory ══ bridge ── gRPC ──▶ Konnectivity server  (in culvert-agent)
//! ```
//!
//! The bridges are in the server and in the agent. This crate has what both need: [`packet`] and
//! [`codec`] are the messages, [`Connections`] holds an [`Inbox`] for each connection,
//! [`outbound()`] is the queue to the peer, and [`carry`] splices a connection and a stream.
//! [`Partial`] counts packets that have arrived in part. It and [`DataWriter`] serve the gRPC frontend
//! too.

//= docs/protocol.md#11-konnectivity-peers

pub mod codec;
mod connection;
mod data;
mod inbox;
mod outbound;
pub mod packet;
mod partial;

pub use connection::{Connections, NoAbort, Side, carry};
pub use data::DataWriter;
pub use inbox::{End, Inbox};
pub use outbound::{Outbound, Packets, PeerNotReading, outbound};
pub use partial::Partial;

/// The method between agent and server.
pub const CONNECT: &str = "/AgentService/Connect";
/// The method between frontend and server.
pub const PROXY: &str = "/ProxyService/Proxy";
/// ALPN of gRPC (RFC 9113 §3.1).
pub const ALPN_H2: &[u8] = b"h2";

/// Metadata of [`CONNECT`] (Konnectivity's `proto/header`).
pub mod header {
    /// Name of the agent, from the agent.
    pub const AGENT_ID: &str = "agentid";
    /// Identifiers of the agent as a URL query, from the agent.
    pub const AGENT_IDENTIFIERS: &str = "agentidentifiers";
    /// `Bearer` and the agent's token, from the agent.
    pub const AUTHORIZATION: &str = "authorization";
    /// Name of the server, from the server.
    pub const SERVER_ID: &str = "serverid";
    /// Number of servers, from the server.
    pub const SERVER_COUNT: &str = "servercount";
}
