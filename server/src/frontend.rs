//! Frontends: kube-apiserver's connections, from the accept to the splice.
//!
//! ```text
//!  listen           the listener: a Unix socket, or TCP with mutual TLS; accepts and serves
//!     ├─ connect    HTTP CONNECT: one request, one target
//!     └─ grpc       ProxyService: a Proxy stream per target
//!  context          what they share: the dialer, limits, the splice
//!  hints            hints that a request carries
//!  clients         which certificates may connect over TCP
//!  reach            whether frontends reach the Unix socket
//!  socket, tls      the kinds of connections that can be served and spliced
//! ```

mod clients;
mod connect;
mod context;
mod grpc;
mod hints;
pub mod listen;
mod observed;
mod reach;
mod socket;
mod tls;

#[cfg(fuzzing)]
pub use connect::fuzz_parse;
pub(crate) use context::FrontendContext;
