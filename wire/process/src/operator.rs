//! Commands of an operator, who asks a running process.
//!
//! ```text
//!  socket     the process's side: a Unix socket that its owner alone may connect to
//!  client     the operator's side: one request, one answer
//!  proofs     what certificates and tokens say of themselves
//!  streams    live streams: their registry, and the list that crosses the socket
//!  top        which streams are busy, and what each waits for
//!  table      lists for a terminal
//! ```
//!
//! The socket speaks HTTP: a request line without a body, answered by one JSON text.

pub mod client;
pub mod proofs;
pub mod socket;
pub mod streams;
pub mod table;
pub mod top;
