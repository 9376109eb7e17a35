//! What is read when the metrics are scraped.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
};

use culvert_process::metrics::{Exposition, Kind, Labels};
use culvert_wire::AgentId;

use super::ServerMetrics;
use super::families::{
    AGENTS_BY_VERSION, DIRECTIONS, DUPLICATE_AGENTS, ESTABLISHED, GRPC_CONNECTIONS,
    HTTP_CONNECTIONS, OPEN_STREAMS, PENDING_DIALS, READY_BACKENDS, READY_CONNECTIONS, SET_SERVERS,
    STREAM_BYTES, STREAMS, TUNNELS, UNADMITTED,
};
use crate::backends::{Backend, Backends, duplicates::duplicates, registry::Candidate};

/// Number of live tasks.
const TASKS: &str = "culvert_server_tasks";

impl ServerMetrics {
    /// All metrics in Prometheus' text format.
    pub fn render(&self, backends: &Backends) -> String {
        self.metrics.render(|exposition| {
            exposition.tasks(TASKS);
            let agents = backends.all();
            self.collect_connections(agents.len(), exposition);
            self.flow.collect(&self.meter, exposition);
            collect_backends(backends, exposition);
            collect_tunnels(&agents, exposition);
            let versions = self.versions.count(&agents);
            let (name, help) = (AGENTS_BY_VERSION.name, AGENTS_BY_VERSION.help);
            exposition.family(name, Kind::Gauge, help, versions);
            let duplicates = duplicates(&agents).len();
            exposition.gauge(DUPLICATE_AGENTS.name, DUPLICATE_AGENTS.help, duplicates);
            let streams = self.streams.load(Ordering::Relaxed);
            exposition.counter(STREAMS.name, STREAMS.help, streams);
            exposition.meter(STREAM_BYTES, &self.meter, DIRECTIONS);
            if let Some(health) = self.udp_health.get() {
                exposition.udp("culvert_server_udp", &health.stats());
            }
            if let Some(memory) = self.memory.get() {
                exposition.memory("culvert_server", memory);
            }
            exposition.resumptions("culvert_server", &self.known_paths);
            exposition.resumed_streams("culvert_server", &self.resumption);
            if let Some(servers) = self.servers.get() {
                let counts = servers.counts().into_iter();
                let rows = counts.map(|(state, count)| (vec![("address", state.into())], count));
                exposition.family(SET_SERVERS.name, Kind::Gauge, SET_SERVERS.help, rows);
            }
        })
    }

    fn collect_connections(&self, agents: usize, exposition: &mut Exposition) {
        exposition.gauge(PENDING_DIALS.name, PENDING_DIALS.help, self.pending_dials.get());
        exposition.gauge(ESTABLISHED.name, ESTABLISHED.help, self.established.get());
        let method = |name: &str| vec![("service_method", name.to_owned())];
        let rows =
            [(method("Proxy"), self.grpc_connections.get()), (method("Connect"), agents as u64)];
        exposition.family(GRPC_CONNECTIONS.name, Kind::Gauge, GRPC_CONNECTIONS.help, rows);
        exposition.gauge(HTTP_CONNECTIONS.name, HTTP_CONNECTIONS.help, self.http_connections.get());
        let unadmitted = self
            .unadmitted
            .iter()
            .map(|(carrier, count)| (vec![("transport", carrier.name().to_owned())], count.get()));
        exposition.family(UNADMITTED.name, Kind::Gauge, UNADMITTED.help, unadmitted);
    }
}

fn collect_backends(backends: &Backends, exposition: &mut Exposition) {
    let counts = backends.counts();
    let last = counts.last().map_or(0, |(_, count)| *count);
    let rows = counts
        .into_iter()
        .map(|(strategy, count)| (vec![("proxy_strategy", strategy.name().to_owned())], count));
    exposition.family(READY_BACKENDS.name, Kind::Gauge, READY_BACKENDS.help, rows);
    exposition.gauge(READY_CONNECTIONS.name, READY_CONNECTIONS.help, last);
}

fn collect_tunnels(tunnels: &[Arc<Backend>], exposition: &mut Exposition) {
    exposition.gauge(TUNNELS.name, TUNNELS.help, tunnels.len());
    let agent = |id: &AgentId| ("agent_id", id.to_string());
    let mut open: BTreeMap<_, usize> = BTreeMap::new();
    for backend in tunnels {
        *open.entry(backend.agent_id()).or_default() += backend.open_streams();
    }
    let rows = open.into_iter().map(|(id, open)| (Labels::from([agent(id)]), open));
    exposition.family(OPEN_STREAMS.name, Kind::Gauge, OPEN_STREAMS.help, rows);
    // An agent that moves to another tunnel has several; new dials take the newest.
    let newest: BTreeMap<_, _> =
        tunnels.iter().map(|backend| (backend.agent_id(), backend)).collect();
    let paths: Vec<_> = newest
        .into_iter()
        .map(|(id, backend)| (agent(id), backend.tunnel.carrier(), backend.tunnel.stats()))
        .collect();
    exposition.tunnels("culvert_server_tunnel", &paths);
}
