//! The introduction of a Konnectivity agent: the metadata of its call.

use culvert_konnectivity::header;
use culvert_wire::{
    AgentId, InstanceId,
    bounded::Text,
    control::{Hello, Secret},
    extension::Extensions,
    identifiers::{Identifier, Identifiers, MAX_IDENTIFIERS},
    version::{Features, REVISION},
};
use tonic::metadata::MetadataMap;

/// The hello that an agent of ours would send for this metadata, without the [`token`], and the
/// number of announced identifiers that do not fit it and are left out.
///
/// # Errors
/// In Konnectivity's words, when the metadata names no agent.
pub(super) fn read(metadata: &MetadataMap) -> Result<(Hello, usize), String> {
    let agent_id: AgentId = one(metadata, header::AGENT_ID, "agent ID")?
        .parse()
        .map_err(|error: culvert_wire::ids::InvalidId| error.to_string())?;
    let (identifiers, left_out) = identifiers(metadata)?;
    let hello = Hello {
        revision: REVISION,
        features: Features::default(),
        agent_id,
        instance: InstanceId(std::array::from_fn(|_| fastrand::u8(..))),
        identifiers,
        token: None,
        software: Text::truncated(text(metadata, "user-agent").unwrap_or_default().into()),
        extensions: Extensions::default(),
    };
    Ok((hello, left_out))
}

/// The token of the metadata, if there is one.
///
/// # Errors
/// In Konnectivity's words, when there are several or the header is malformed.
pub(super) fn token(metadata: &MetadataMap) -> Result<Option<Secret>, String> {
    let mut values = metadata.get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    match values.count() {
        0 => {}
        more => return Err(format!("too many ({}) tokens are received", more + 1)),
    }
    let token = value.to_str().ok().and_then(|value| value.strip_prefix("Bearer "));
    let token = token.ok_or("received token does not have \"Bearer \" prefix")?;
    Secret::new(token.trim()).map(Some).map_err(|error| error.to_string())
}

/// The announced identifiers that fit a hello, and the number of others. Unknown keys are kept: they
/// match nothing.
fn identifiers(metadata: &MetadataMap) -> Result<(Identifiers, usize), String> {
    let query = match metadata.contains_key(header::AGENT_IDENTIFIERS) {
        true => one(metadata, header::AGENT_IDENTIFIERS, "set of agent identifiers")?,
        false => "",
    };
    let announced = form_urlencoded::parse(query.as_bytes());
    let (mut fit, mut left_out) = (Vec::new(), 0);
    for (key, value) in announced {
        match Identifier::new(&key, &value) {
            Ok(identifier) if fit.len() < MAX_IDENTIFIERS => fit.push(identifier),
            _ => left_out += 1,
        }
    }
    Ok((Identifiers::try_from(fit).expect("no more than fit"), left_out))
}

fn one<'a>(metadata: &'a MetadataMap, key: &str, what: &str) -> Result<&'a str, String> {
    let mut values = metadata.get_all(key).iter();
    match (values.next().map(|value| value.to_str()), values.next()) {
        (Some(Ok(value)), None) => Ok(value),
        (None, _) => Err(format!("expected one {what} in the context, got []")),
        _ => Err(format!("expected one {what} in the context, got several or no text")),
    }
}

fn text<'a>(metadata: &'a MetadataMap, key: &str) -> Option<&'a str> {
    metadata.get(key)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(pairs: &[(&'static str, &str)]) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        for (key, value) in pairs {
            metadata.append(*key, value.parse().unwrap());
        }
        metadata
    }

    #[test]
    fn the_metadata_of_a_konnectivity_agent_becomes_a_hello() {
        let (hello, left_out) = read(&metadata(&[
            ("agentid", "node-1"),
            ("agentidentifiers", "ipv4=10.0.0.1&host=a%2Bb&default-route=true&later=x"),
            ("user-agent", "grpc-go/1.83.0"),
        ]))
        .unwrap();
        assert_eq!(hello.agent_id.as_str(), "node-1");
        assert_eq!(hello.identifiers.hosts().collect::<Vec<_>>(), ["10.0.0.1", "a+b"]);
        assert!(hello.identifiers.is_default_route());
        assert_eq!(left_out, 0);
        assert!(read(&metadata(&[("agentid", "a"), ("agentidentifiers", "")])).is_ok());
    }

    #[test]
    fn identifiers_that_do_not_fit_a_hello_are_left_out_and_counted() {
        let mut query: Vec<_> = (0..66).map(|number| format!("host=node-{number}")).collect();
        query.insert(0, format!("host={}", "x".repeat(256)));
        let query = query.join("&");
        let announced = metadata(&[("agentid", "a"), ("agentidentifiers", &query)]);
        let (hello, left_out) = read(&announced).unwrap();
        assert_eq!((hello.identifiers.len(), left_out), (64, 3));
        assert_eq!(hello.identifiers.hosts().next(), Some("node-0"));
    }

    #[test]
    fn faults_are_named_in_konnectivitys_words() {
        let fault = |pairs: &[(&'static str, &str)]| read(&metadata(pairs)).unwrap_err();
        assert_eq!(fault(&[]), "expected one agent ID in the context, got []");
        assert!(fault(&[("agentid", "a"), ("agentid", "b")]).starts_with("expected one agent ID"));
    }

    #[test]
    fn there_is_at_most_one_token_and_it_is_a_bearers() {
        let token = |values: &[&str]| {
            let pairs: Vec<_> = values.iter().map(|value| ("authorization", *value)).collect();
            token(&metadata(&pairs)).map(|token| token.map(|token| token.expose().to_owned()))
        };
        assert_eq!(token(&[]), Ok(None));
        assert_eq!(token(&["Bearer abc\u{20}"]), Ok(Some("abc".into())));
        assert_eq!(
            token(&["Basic x"]).unwrap_err(),
            "received token does not have \"Bearer \" prefix"
        );
        assert_eq!(
            token(&["Bearer a", "Bearer b"]).unwrap_err(),
            "too many (2) tokens are received"
        );
    }
}
