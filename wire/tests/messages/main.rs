//! What each message is on the wire, byte by byte, and what is refused.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../common/mod.rs"]
mod common;
mod exact;
mod properties;
mod reference;
mod refusals;

use culvert_wire::frame::Frame;

/// The frame with this kind and body.
fn frame(kind: u8, body: impl Into<Vec<u8>>) -> Frame {
    Frame { kind, body: body.into().into() }
}
