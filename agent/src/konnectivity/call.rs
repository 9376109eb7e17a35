//! The call to a Konnectivity server: the agent's metadata, and the server's in its answer.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use culvert_konnectivity::{
    CONNECT, Packets, Partial,
    codec::{MAX_PACKET_LEN, SmallBuffers},
    header,
    packet::Packet,
};
use culvert_transport::budget::StreamMemory;
use culvert_wire::{ServerId, bounded::PeerText, control::Hello};
use http::uri::PathAndQuery;
use hyper::client::conn::http2;
use tonic::{
    Status, Streaming,
    body::Body,
    client::Grpc,
    metadata::{MetadataMap, MetadataValue, errors::InvalidMetadataValue},
};

/// Why a Konnectivity server did not accept the agent.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// The agent's id, identifiers or token do not fit a header.
    #[error("the agent's name, identifiers or token cannot be sent: {0}")]
    Metadata(#[from] InvalidMetadataValue),
    /// The server refused the call, with this text.
    #[error("{}", PeerText::lossy(.0.message().as_bytes()))]
    Refused(Status),
    /// The connection ended.
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// The answer does not name the server, or lacks the number of servers.
    #[error("{0}")]
    Unnamed(String),
}

/// A call that the server has accepted.
#[derive(Debug)]
pub(super) struct Call {
    /// The server's name.
    pub(super) server_id: ServerId,
    /// Number of servers, as the server reports it.
    pub(super) server_count: u32,
    /// The server's packets.
    pub(super) inbound: Streaming<Packet>,
}

/// Calls the server with the metadata of `hello`; `packets` become the agent's half of the stream.
/// Packets that have arrived in part are held by `memory`.
///
/// # Errors
/// When the server refuses the call or does not name itself.
///
/// # Cancel safety
/// Cancel safe: dropping the future cancels the call.
pub(super) async fn call(
    requests: http2::SendRequest<Body>,
    hello: &Hello,
    packets: Packets,
    memory: &Arc<StreamMemory>,
) -> Result<Call, CallError> {
    let mut request = tonic::Request::new(packets);
    introduce(request.metadata_mut(), hello)?;
    let origin = http::Uri::from_static("https://konnectivity-server");
    let mut grpc = Grpc::with_origin(Requests { http: requests, memory: memory.clone() }, origin)
        .max_decoding_message_size(MAX_PACKET_LEN);
    grpc.ready().await?;
    let path = PathAndQuery::from_static(CONNECT);
    let response = grpc.streaming(request, path, SmallBuffers).await.map_err(CallError::Refused)?;
    let metadata = response.metadata();
    let server_id = one(metadata, header::SERVER_ID)?
        .parse()
        .map_err(|error: culvert_wire::ids::InvalidId| CallError::Unnamed(error.to_string()))?;
    let server_count = one(metadata, header::SERVER_COUNT)?
        .parse()
        .map_err(|_| CallError::Unnamed("the server's count of servers is no number".into()))?;
    Ok(Call { server_id, server_count, inbound: response.into_inner() })
}

fn introduce(metadata: &mut MetadataMap, hello: &Hello) -> Result<(), InvalidMetadataValue> {
    let mut identifiers = form_urlencoded::Serializer::new(String::new());
    for identifier in hello.identifiers.iter() {
        identifiers.append_pair(&identifier.key, &identifier.value);
    }
    metadata.insert(header::AGENT_ID, MetadataValue::try_from(hello.agent_id.as_str())?);
    metadata
        .insert(header::AGENT_IDENTIFIERS, MetadataValue::try_from(identifiers.finish().as_str())?);
    if let Some(token) = &hello.token {
        let mut bearer = MetadataValue::try_from(format!("Bearer {}", token.expose()))?;
        bearer.set_sensitive(true);
        metadata.insert(header::AUTHORIZATION, bearer);
    }
    metadata.insert("user-agent", MetadataValue::try_from(&*hello.software)?);
    Ok(())
}

fn one<'a>(metadata: &'a MetadataMap, key: &str) -> Result<&'a str, CallError> {
    let mut values = metadata.get_all(key).iter();
    match (values.next().map(|value| value.to_str()), values.next()) {
        (Some(Ok(value)), None) => Ok(value),
        _ => Err(CallError::Unnamed(format!("expected one {key} in the server's answer"))),
    }
}

/// Hyper's request sender as the service that tonic needs.
#[derive(Clone, Debug)]
struct Requests {
    http: http2::SendRequest<Body>,
    /// Holds packets that have arrived in part.
    memory: Arc<StreamMemory>,
}

impl tower_service::Service<http::Request<Body>> for Requests {
    type Response = http::Response<Partial<hyper::body::Incoming>>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.http.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (response, memory) = (self.http.send_request(request), self.memory.clone());
        Box::pin(async move { Ok(response.await?.map(|body| Partial::new(body, memory))) })
    }
}

#[cfg(test)]
mod tests {
    use culvert_wire::{
        InstanceId,
        bounded::Text,
        control::Secret,
        extension::Extensions,
        identifiers::{Identifier, Identifiers},
        version::{Features, REVISION},
    };

    use super::*;

    fn hello(identifiers: &[(&str, &str)], token: Option<&str>) -> Hello {
        let identifiers: Vec<_> =
            identifiers.iter().map(|(key, value)| Identifier::new(key, value).unwrap()).collect();
        Hello {
            revision: REVISION,
            features: Features::supported(),
            agent_id: "node-1".parse().unwrap(),
            instance: InstanceId([0; 16]),
            identifiers: Identifiers::try_from(identifiers).unwrap(),
            token: token.map(|token| Secret::new(token).unwrap()),
            software: Text::truncated("culvert-agent 1".into()),
            extensions: Extensions::default(),
        }
    }

    #[test]
    fn the_agent_introduces_itself_as_a_konnectivity_agent_does() {
        let mut metadata = MetadataMap::new();
        let identifiers = [("ipv4", "10.0.0.1"), ("host", "a+b"), ("default-route", "true")];
        introduce(&mut metadata, &hello(&identifiers, Some("abc"))).unwrap();
        let value = |key| metadata.get(key).unwrap().to_str().unwrap();
        assert_eq!(value("agentid"), "node-1");
        assert_eq!(value("agentidentifiers"), "ipv4=10.0.0.1&host=a%2Bb&default-route=true");
        assert_eq!(value("authorization"), "Bearer abc");
        assert!(!format!("{metadata:?}").contains("abc"));
    }

    #[test]
    fn without_identifiers_their_header_is_empty_and_without_a_token_its_header_is_absent() {
        let mut metadata = MetadataMap::new();
        introduce(&mut metadata, &hello(&[], None)).unwrap();
        assert_eq!(metadata.get("agentidentifiers").unwrap(), "");
        assert!(metadata.get("authorization").is_none());
    }

    #[test]
    fn a_server_names_itself_exactly_once() {
        let mut metadata = MetadataMap::new();
        assert!(one(&metadata, "serverid").is_err());
        metadata.append("serverid", "a".parse().unwrap());
        assert_eq!(one(&metadata, "serverid").unwrap(), "a");
        metadata.append("serverid", "b".parse().unwrap());
        assert!(one(&metadata, "serverid").is_err());
    }
}
