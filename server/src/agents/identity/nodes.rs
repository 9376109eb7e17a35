//! The addresses of nodes, as their Node objects have them.

use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};

use culvert_process::kubernetes::{self, CurrentClient};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use parking_lot::Mutex;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};

/// Time for which the addresses of a node are not looked up again.
const LIFE: Duration = Duration::from_secs(60);
/// The same for an agent that announces another address: its node may have a new one.
const SHORT_LIFE: Duration = Duration::from_secs(5);
/// Time for which they are used while kube-apiserver does not answer.
const STALE_LIFE: Duration = Duration::from_secs(3600);
/// Time for a lookup, and for its turn before.
const TIMEOUT: Duration = Duration::from_secs(4);
/// Maximum number of lookups in progress.
const MAX_LOOKUPS: usize = 32;
/// Maximum number of nodes whose addresses are remembered.
const MAX_NODES: usize = 16 * 1024;
/// Maximum number of addresses of one node that are used.
const MAX_ADDRESSES: usize = 64;

/// Addresses of one node.
pub(crate) type Addresses = Arc<[IpAddr]>;

/// The addresses of nodes, looked up at kube-apiserver and remembered for a while.
#[derive(Debug)]
pub(crate) struct Nodes {
    client: CurrentClient,
    permits: Semaphore,
    known: Mutex<HashMap<String, (Addresses, Instant)>>,
}

impl Nodes {
    /// Looks nodes up with this client.
    pub(crate) fn new(client: CurrentClient) -> Self {
        Self { client, permits: Semaphore::new(MAX_LOOKUPS), known: Mutex::default() }
    }

    /// The addresses of a node whose agent announces those in `announced`; none for a node that does
    /// not exist. It is for admitted agents alone: each call may be a request.
    ///
    /// # Errors
    /// With the reason, when kube-apiserver does not answer and the node is not remembered.
    ///
    /// # Cancel safety
    /// Cancel safe: a lookup in progress is given up.
    pub(crate) async fn addresses(
        &self,
        node: &str,
        announced: &[IpAddr],
    ) -> Result<Addresses, String> {
        if !is_node_name(node) {
            return Ok(Addresses::default());
        }
        let known = self.known.lock().get(node).cloned();
        if let Some((addresses, at)) = &known {
            let has_all = announced.iter().all(|address| addresses.contains(address));
            if at.elapsed() < if has_all { LIFE } else { SHORT_LIFE } {
                return Ok(addresses.clone());
            }
        }
        match timeout(TIMEOUT, self.look_up(node)).await {
            Ok(Ok(addresses)) => {
                self.remember(node, &addresses);
                Ok(addresses)
            }
            failed => {
                self.client.failed();
                let reason = match failed {
                    Ok(Err(error)) => kubernetes::reason(&error),
                    _ => self.client.no_answer_within(TIMEOUT),
                };
                let known = known.filter(|(_, at)| at.elapsed() < STALE_LIFE);
                known.map(|(addresses, _)| addresses).ok_or(reason)
            }
        }
    }

    async fn look_up(&self, node: &str) -> Result<Addresses, kube::Error> {
        let _permit = self.permits.acquire().await;
        let node = Api::<Node>::all(self.client.get()).get_opt(node).await?;
        let addresses = node.and_then(|node| node.status?.addresses).unwrap_or_default();
        let addresses = addresses.iter().filter_map(|address| address.address.parse().ok());
        Ok(addresses.take(MAX_ADDRESSES).collect())
    }

    fn remember(&self, node: &str, addresses: &Addresses) {
        let mut known = self.known.lock();
        if known.len() >= MAX_NODES {
            known.retain(|_, (_, at)| at.elapsed() < LIFE);
        }
        if known.len() < MAX_NODES || known.contains_key(node) {
            known.insert(node.to_owned(), (addresses.clone(), Instant::now()));
        }
    }
}

/// Whether a node may have this name (RFC 1123 subdomain). Other names of certificates are not sent
/// to kube-apiserver: they would be another path.
fn is_node_name(name: &str) -> bool {
    let is_allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || b"-.".contains(&c);
    name.bytes().all(is_allowed)
        && name.len() <= 253
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use http::{Request, Response, StatusCode};
    use kube::client::Body;
    use serde_json::json;
    use tokio::time::sleep;
    use tower::service_fn;

    use super::*;

    /// Nodes that are looked up with these answers, and the number of lookups.
    fn nodes(
        answer: impl Fn(&str) -> (StatusCode, serde_json::Value) + Clone + Send + 'static,
    ) -> (Nodes, Arc<AtomicUsize>) {
        let lookups = Arc::<AtomicUsize>::default();
        let count = lookups.clone();
        let service = service_fn(move |request: Request<Body>| {
            count.fetch_add(1, Ordering::Relaxed);
            let (status, body) = answer(request.uri().path());
            let body = Body::from(serde_json::to_vec(&body).unwrap());
            async move { Response::builder().status(status).body(body) }
        });
        let client = CurrentClient::fixed(kube::Client::new(service, "default"), "kubernetes:6443");
        (Nodes::new(client), lookups)
    }

    fn node(addresses: &[&str]) -> (StatusCode, serde_json::Value) {
        let addresses: Vec<_> = addresses
            .iter()
            .map(|address| json!({ "type": "InternalIP", "address": address }))
            .collect();
        let status = json!({ "addresses": addresses });
        let metadata = json!({ "name": "node-1" });
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": metadata, "status": status,
        });
        (StatusCode::OK, node)
    }

    fn failure(status: StatusCode) -> (StatusCode, serde_json::Value) {
        let code = status.as_u16();
        let reason = if code == 404 { "NotFound" } else { "InternalError" };
        let body = json!({
            "apiVersion": "v1", "kind": "Status", "status": "Failure", "message": "", "metadata": {},
            "reason": reason, "code": code,
        });
        (status, body)
    }

    fn ip(address: &str) -> IpAddr {
        address.parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn the_addresses_of_a_node_are_looked_up_once_in_a_while() {
        let (nodes, lookups) = nodes(|path| {
            assert_eq!(path, "/api/v1/nodes/node-1");
            node(&["10.0.0.1", "fd00::1", "node-1.example"])
        });
        let looked_up = async |announced: &str| {
            let addresses = nodes.addresses("node-1", &[ip(announced)]).await.unwrap();
            assert_eq!(*addresses, [ip("10.0.0.1"), ip("fd00::1")]);
            lookups.load(Ordering::Relaxed)
        };
        assert_eq!([looked_up("10.0.0.1").await, looked_up("fd00::1").await], [1, 1]);
        // An address that is not known: a moment later the node may have it.
        assert_eq!(looked_up("10.0.0.2").await, 1);
        sleep(SHORT_LIFE).await;
        assert_eq!([looked_up("10.0.0.2").await, looked_up("10.0.0.1").await], [2, 2]);
        sleep(LIFE).await;
        assert_eq!(looked_up("10.0.0.1").await, 3);
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_are_used_for_an_hour_while_kube_apiserver_is_away() {
        let is_away = Arc::<AtomicUsize>::default();
        let away = is_away.clone();
        let (nodes, _) = nodes(move |_| match away.load(Ordering::Relaxed) {
            0 => node(&["10.0.0.1"]),
            _ => failure(StatusCode::SERVICE_UNAVAILABLE),
        });
        nodes.addresses("node-1", &[]).await.unwrap();
        is_away.store(1, Ordering::Relaxed);
        sleep(STALE_LIFE - Duration::from_secs(1)).await;
        assert_eq!(*nodes.addresses("node-1", &[]).await.unwrap(), [ip("10.0.0.1")]);
        sleep(Duration::from_secs(1)).await;
        assert!(nodes.addresses("node-1", &[]).await.unwrap_err().contains("503"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_does_not_exist_has_no_addresses() {
        let (nodes, lookups) = nodes(|_| failure(StatusCode::NOT_FOUND));
        assert!(nodes.addresses("node-1", &[]).await.unwrap().is_empty());
        for name in ["", "../secrets", "a?b", "a/b", "A", "-a"] {
            assert!(nodes.addresses(name, &[]).await.unwrap().is_empty());
        }
        assert_eq!(lookups.load(Ordering::Relaxed), 1, "of those that may be names");
    }
}
