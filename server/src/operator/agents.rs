//! The list of agents: one entry for each tunnel.

use std::{fmt::Write as _, sync::Arc};

use culvert_process::{
    kubernetes::Timestamp,
    operator::table::{Table, left, or_dash},
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::backends::{Backend, Backends, duplicates::duplicates, registry::Candidate as _};

/// One tunnel of an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct AgentEntry {
    /// Name of the agent.
    agent: String,
    /// Who it has proved to be.
    identity: String,
    /// SHA-256 of its certificate, in hexadecimal.
    certificate_sha256: Option<String>,
    /// Pod of its token.
    pod: Option<String>,
    /// When the proof expires; `None` for one that does not.
    expires: Option<String>,
    /// What carries the tunnel.
    carrier: String,
    /// Address that the agent's packets come from.
    remote: String,
    /// Name and version of its software, as it says.
    software: String,
    /// Its revision of the protocol.
    revision: u16,
    /// The process, which differs after each restart.
    instance: String,
    /// Time since it joined, in seconds.
    age_seconds: u64,
    /// `used`, `silent`, or `draining`.
    state: String,
    /// Whether several live processes have its name.
    duplicate: bool,
    /// Streams being dialed or spliced.
    streams: usize,
    /// Identifiers that it has, as `key=value`.
    identifiers: Vec<String>,
    /// Identifiers that it announced and does not have.
    refused: Vec<String>,
}

/// All tunnels, in the order of arrival.
pub(super) fn list(backends: &Backends) -> Vec<AgentEntry> {
    let all = backends.all();
    let duplicates = duplicates(&all);
    let is_duplicate = |backend: &Backend| duplicates.contains(backend.agent_id());
    all.iter().map(|backend| entry(backend, is_duplicate(backend), backends)).collect()
}

fn entry(backend: &Arc<Backend>, duplicate: bool, backends: &Backends) -> AgentEntry {
    let claims = &backend.claims;
    let held = backends.waits_for(backend);
    let pair = |key: &str, value: &str| format!("{key}={value}");
    let (refused, identifiers): (Vec<_>, Vec<_>) = claims
        .identifiers
        .iter()
        .partition(|identifier| held.contains(&identifier.value.to_string()));
    let refused = refused.into_iter().chain(&claims.not_proven);
    let certificate = claims.identity.certificate.as_ref();
    let expiry = *backend.expiry().borrow();
    AgentEntry {
        agent: backend.agent_id().to_string(),
        identity: claims.identity.to_string(),
        certificate_sha256: certificate.map(|certificate| hexadecimal(&certificate.fingerprint)),
        pod: claims.identity.account.as_ref().and_then(|account| account.pod.clone()),
        expires: expiry.map(|expiry| expiry.time.to_string()),
        carrier: backend.tunnel.carrier().to_string(),
        remote: backend.tunnel.remote_address().to_string(),
        software: backend.software().to_string(),
        revision: backend.revision(),
        instance: backend.instance().to_string(),
        age_seconds: Instant::now().saturating_duration_since(backend.since).as_secs(),
        state: match (backend.is_draining(), backend.is_silent()) {
            (true, _) => "draining".into(),
            (false, true) => "silent".into(),
            (false, false) => "used".into(),
        },
        duplicate,
        streams: backend.open_streams(),
        identifiers: identifiers.iter().map(|found| pair(&found.key, &found.value)).collect(),
        refused: refused.map(|found| pair(&found.key, &found.value)).collect(),
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The entries as a table for a terminal.
pub(super) fn table(entries: &[AgentEntry], now: Timestamp) -> String {
    let list = |items: &[String]| or_dash(Some(&items.join(",")));
    let mut table = Table::new([
        "AGENT",
        "IDENTITY",
        "EXPIRES",
        "CARRIER",
        "REMOTE",
        "STATE",
        "STREAMS",
        "SOFTWARE",
        "IDENTIFIERS",
        "REFUSED",
    ]);
    for entry in entries {
        let state = match entry.duplicate {
            true => format!("{}, duplicate id", entry.state),
            false => entry.state.clone(),
        };
        table.push([
            entry.agent.clone(),
            entry.identity.clone(),
            entry.expires.as_deref().map_or_else(|| "never".into(), |time| left(time, now)),
            entry.carrier.clone(),
            entry.remote.clone(),
            state,
            entry.streams.to_string(),
            or_dash(Some(&entry.software)),
            list(&entry.identifiers),
            list(&entry.refused),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backends::Strategy,
        testing::{TestAgent, identity},
    };

    #[tokio::test(start_paused = true)]
    async fn the_list_has_each_tunnel_with_what_it_has_and_what_it_does_not_get() {
        let backends = Backends::new(&[Strategy::DestHost]);
        let one = TestAgent::join_by(&backends, identity("one"), "a", &["node-1"]).await;
        let _two = TestAgent::join_by(&backends, identity("two"), "b", &["node-1", "node-2"]).await;
        let _permit = one.backend.permit().unwrap();
        backends.drain(&one.backend);
        let entries = list(&backends);
        assert_eq!(entries[0].agent, "a");
        assert_eq!((entries[0].state.as_str(), entries[0].streams), ("draining", 1));
        assert_eq!(entries[0].identity, "certificate \"CN=one\"");
        assert_eq!(entries[0].certificate_sha256.as_ref().unwrap().len(), 64);
        assert_eq!(entries[0].refused, [""; 0]);
        assert_eq!(entries[1].identifiers, ["host=node-2"]);
        assert_eq!(entries[1].refused, ["host=node-1"]);
        let text = serde_json::to_string(&entries).unwrap();
        assert_eq!(serde_json::from_str::<Vec<AgentEntry>>(&text).unwrap(), entries);
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_has_a_line_for_each_tunnel_and_escapes_what_agents_say() {
        let backends = Backends::new(&[Strategy::DestHost]);
        let _one = TestAgent::join_for(&backends, "a", &["x\u{1b}[31m\ny"]).await;
        let _two = TestAgent::join(&backends, "longer-name").await;
        let text = table(&list(&backends), Timestamp::now());
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[0].starts_with("AGENT        IDENTITY   EXPIRES  CARRIER"), "{text}");
        assert!(lines[1].starts_with("a            anonymous  never    tcp"), "{text}");
        assert!(lines[1].contains("host=x\\u{1b}[31m\\ny"), "{text}");
        assert!(
            lines[2].ends_with(&format!("0        test      -{}  -", " ".repeat(18))),
            "{text}"
        );
    }
}
