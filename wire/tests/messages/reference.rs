//! The encoding, written a second time.

use culvert_wire::{
    codec::{self},
    control::ControlMessage,
    extension::Extensions,
};

use crate::common::Message;

/// The encoding as `docs/protocol.md` describes it, written a second time: the code cannot drift
/// from the text.
#[derive(Default)]
pub(crate) struct Reference(pub(crate) Vec<u8>);

impl Reference {
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn integer(self, value: impl Into<u64>) -> Self {
        let value = value.into();
        let wide = value.to_le_bytes();
        match value {
            0..=250 => self.bytes(&wide[..1]),
            251..=0xffff => self.bytes(&[251]).bytes(&wide[..2]),
            0x1_0000..=0xffff_ffff => self.bytes(&[252]).bytes(&wide[..4]),
            _ => self.bytes(&[253]).bytes(&wide),
        }
    }

    pub(crate) fn text(self, text: &str) -> Self {
        self.integer(text.len() as u64).bytes(text.as_bytes())
    }

    pub(crate) fn list<T>(self, items: &[T], item: impl Fn(Self, &T) -> Self) -> Self {
        items.iter().fold(self.integer(items.len() as u64), item)
    }

    pub(crate) fn option<T>(self, value: Option<&T>, some: impl Fn(Self, &T) -> Self) -> Self {
        match value {
            None => self.bytes(&[0]),
            Some(value) => some(self.bytes(&[1]), value),
        }
    }

    pub(crate) fn extensions(self, extensions: &Extensions) -> Self {
        self.list(extensions, |out, extension| {
            out.integer(extension.kind)
                .integer(extension.value.len() as u64)
                .bytes(&extension.value)
        })
    }

    pub(crate) fn body(message: &Message) -> Vec<u8> {
        let out = Self::default();
        let out = match message {
            Message::Control(ControlMessage::Hello(hello)) => out
                .integer(hello.revision)
                .integer(hello.features.bits())
                .text(hello.agent_id.as_str())
                .bytes(&hello.instance.0)
                .list(&hello.identifiers, |out, identifier| {
                    out.text(&identifier.key).text(&identifier.value)
                })
                .option(hello.token.as_ref(), |out, token| out.text(token.expose()))
                .text(&hello.software)
                .extensions(&hello.extensions),
            Message::Control(ControlMessage::Welcome(welcome)) => out
                .integer(welcome.revision)
                .integer(welcome.features.bits())
                .text(welcome.server_id.as_str())
                .integer(welcome.server_count)
                .list(&welcome.servers, |out, server| {
                    out.text(server.id.as_str()).text(&server.address)
                })
                .integer(welcome.max_streams)
                .extensions(&welcome.extensions),
            Message::Control(ControlMessage::Ping(ping)) => out.integer(ping.echo),
            Message::Control(ControlMessage::Pong(pong)) => out.integer(pong.echo),
            Message::Control(ControlMessage::Drain(drain)) => out.integer(drain.deadline_millis),
            Message::Control(ControlMessage::Goodbye(goodbye)) => {
                out.integer(goodbye.code).text(&goodbye.reason)
            }
            Message::Control(ControlMessage::Renewal(renewal)) => out.text(renewal.token.expose()),
            Message::Control(ControlMessage::ServerSet(set)) => {
                out.integer(set.server_count).list(&set.servers, |out, server| {
                    out.text(server.id.as_str()).text(&server.address)
                })
            }
            Message::Control(ControlMessage::Received(received)) => {
                out.list(&received.streams, |out, stream| {
                    out.integer(stream.id.0).integer(stream.offset).bytes(&[stream.ended.into()])
                })
            }
            Message::Control(ControlMessage::TunnelLost(lost)) => out.integer(lost.tunnel),
            Message::Control(ControlMessage::Resumed(resumed)) => out
                .integer(resumed.tunnel)
                .list(&resumed.streams, |out, stream| out.integer(stream.0))
                .bytes(&[resumed.more.into()]),
            Message::Control(ControlMessage::Unknown { .. }) => out,
            Message::Request(request) => out
                .integer(request.id.0)
                .integer(request.network as u64)
                .text(request.target.host())
                .integer(request.target.port())
                .bytes(&[number(request.kind)])
                .integer(request.timeout_millis)
                .option(request.trace.as_ref(), |out, trace| {
                    out.text(&trace.traceparent).text(&trace.tracestate)
                })
                .extensions(&request.extensions),
            Message::Reply(reply) => match &reply.outcome {
                Ok(()) => out.integer(0_u64),
                Err(failure) => {
                    out.integer(1_u64).bytes(&[number(failure.kind)]).text(&failure.text)
                }
            }
            .integer(reply.timing.header_micros)
            .integer(reply.timing.resolve_micros)
            .integer(reply.timing.connect_micros)
            .extensions(&reply.extensions),
            Message::ResumeRequest(request) => {
                out.integer(request.id.0).integer(request.received).extensions(&request.extensions)
            }
            Message::ResumeReply(reply) => match reply.outcome {
                Ok(received) => out.integer(0_u64).integer(received),
                Err(kind) => out.integer(1_u64).bytes(&[number(kind)]),
            }
            .option(reply.reset.as_ref(), |out, code| out.integer(*code))
            .extensions(&reply.extensions),
        };
        out.0
    }
}

/// The number of a stream kind or of an error, which keeps it to itself.
fn number(kind: impl serde::Serialize) -> u8 {
    let mut bytes = Vec::new();
    codec::encode(&kind, &mut bytes).unwrap();
    bytes[0]
}
