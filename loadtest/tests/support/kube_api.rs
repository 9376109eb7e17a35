//! The parts of kube-apiserver that tokens and Leases need, over TLS.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    convert::Infallible,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use culvert_loadtest::certificates::Certificates;
use culvert_process::kubernetes::Timestamp;
use culvert_transport::tls::Identity;
use http::{Method, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use k8s_openapi::jiff::SignedDuration;
use parking_lot::{Mutex, MutexGuard};
use rustls::{ServerConfig, crypto::aws_lc_rs::default_provider};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    time::sleep,
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::{StreamExt as _, wrappers::UnboundedReceiverStream};
use tokio_util::task::AbortOnDropHandle;

/// Audience of agents' tokens.
pub(crate) const AUDIENCE: &str = "system:konnectivity-server";
/// User of the service account whose tokens [`KubeApi::token_flags`] asks for.
pub(crate) const ACCOUNT: &str = "system:serviceaccount:kube-system:konnectivity-agent";
/// Token in the file that the kubeconfig names, which every request has to show.
const ASKER: &str = "the-asker";
const REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
const ACCESS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
const NODES: &str = "/api/v1/nodes/";
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases";

/// A kube-apiserver on loopback, stopped when dropped.
#[derive(Debug)]
pub(crate) struct KubeApi {
    state: Arc<Mutex<State>>,
    kubeconfig: PathBuf,
    _serving: AbortOnDropHandle<()>,
}

#[derive(Debug, Default)]
struct State {
    /// The status of a review, by token.
    tokens: HashMap<String, Value>,
    /// The specs of all reviews.
    reviews: Vec<Value>,
    /// What is not permitted, as a verb and a resource.
    forbidden: HashSet<(String, String)>,
    /// The addresses of nodes, by name.
    nodes: HashMap<String, Vec<String>>,
    /// Reason with which every request is refused.
    refusal: Option<String>,
    /// Delay of every answer.
    pause: Duration,
    leases: BTreeMap<String, Value>,
    /// Events of Leases, each with its number; the length is the resource version.
    events: Vec<Value>,
    /// Notified of each event.
    version: watch::Sender<usize>,
}

impl KubeApi {
    /// Starts one, and writes a kubeconfig for it beside the certificates.
    pub(crate) async fn start(certificates: &Certificates) -> Self {
        let pair = certificates.server();
        let identity = Identity::from_pem_files(&pair.certificate, &pair.key).unwrap();
        let tls = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(identity.chain, identity.key)
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let kubeconfig = certificates.folder().join("kubeconfig");
        let address = listener.local_addr().unwrap();
        std::fs::write(&kubeconfig, config_for(address, certificates)).unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let serving = culvert_transport::task::owned(serve(
            listener,
            TlsAcceptor::from(Arc::new(tls)),
            state.clone(),
        ));
        Self { state, kubeconfig, _serving: serving }
    }

    /// Flags of a server whose agents need a token of [`ACCOUNT`] for [`AUDIENCE`], and no
    /// certificate.
    pub(crate) fn token_flags(&self) -> [String; 6] {
        [
            "--cluster-ca-cert=".into(),
            "--agent-namespace=kube-system".into(),
            "--agent-service-account=konnectivity-agent".into(),
            format!("--authentication-audience={AUDIENCE}"),
            "--kube-api-content-type=application/json".into(),
            self.flag(),
        ]
    }

    /// The flag with the kubeconfig.
    pub(crate) fn flag(&self) -> String {
        format!("--kubeconfig={}", self.kubeconfig.display())
    }

    /// Has the kubeconfig name an address that this proxy alone reaches.
    pub(crate) fn go_through(&self, proxy: SocketAddr) {
        let mut config = self.read_kubeconfig();
        let cluster = &mut config["clusters"][0]["cluster"];
        cluster["server"] = json!("https://192.0.2.1:6443");
        cluster["tls-server-name"] = json!("localhost");
        cluster["proxy-url"] = json!(format!("http://{proxy}"));
        std::fs::write(&self.kubeconfig, config.to_string()).unwrap();
    }

    /// Its address, as the kubeconfig names it.
    pub(crate) fn address(&self) -> SocketAddr {
        let config = self.read_kubeconfig();
        let url = config["clusters"][0]["cluster"]["server"].as_str().unwrap();
        url.trim_start_matches("https://").parse().unwrap()
    }

    fn read_kubeconfig(&self) -> Value {
        serde_json::from_str(&std::fs::read_to_string(&self.kubeconfig).unwrap()).unwrap()
    }

    /// Path of the kubeconfig.
    pub(crate) fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Accepts `token` from now on as that of `user`, for `audience`.
    pub(crate) fn accept(&self, token: &str, user: &str, audience: &str) {
        let status = json!({
            "authenticated": true, "user": { "username": user }, "audiences": [audience],
        });
        self.state().tokens.insert(token.into(), status);
    }

    /// The same for a token that is bound to a pod on this node.
    pub(crate) fn accept_on_node(&self, token: &str, user: &str, audience: &str, node: &str) {
        let extra = json!({ "authentication.kubernetes.io/node-name": [node] });
        let status = json!({
            "authenticated": true,
            "user": { "username": user, "extra": extra },
            "audiences": [audience],
        });
        self.state().tokens.insert(token.into(), status);
    }

    /// Has a node with these addresses.
    pub(crate) fn put_node(&self, name: &str, addresses: &[&str]) {
        let addresses = addresses.iter().map(|address| (*address).to_owned()).collect();
        self.state().nodes.insert(name.into(), addresses);
    }

    /// Answers from now on that this is not permitted.
    pub(crate) fn forbid(&self, verb: &str, resource: &str) {
        self.state().forbidden.insert((verb.into(), resource.into()));
    }

    /// Delays every answer from now on.
    pub(crate) fn delay_answers(&self, pause: Duration) {
        self.state().pause = pause;
    }

    /// Refuses every request with this reason from now on; accepts requests again with `None`.
    pub(crate) fn refuse(&self, words: Option<&str>) {
        self.state().refusal = words.map(str::to_owned);
    }

    /// The specs of the reviews so far.
    pub(crate) fn reviews(&self) -> Vec<Value> {
        self.state().reviews.clone()
    }

    /// Adds a Lease that was renewed this many seconds ago, for 30 s.
    pub(crate) fn put_lease(&self, name: &str, labels: Value, seconds_ago: i64) {
        let renewed = Timestamp::now() - SignedDuration::from_secs(seconds_ago);
        self.state().set(json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": { "name": name, "namespace": "kube-system", "labels": labels },
            "spec": {
                "holderIdentity": name, "leaseDurationSeconds": 30,
                "renewTime": format!("{renewed:.6}"),
            },
        }));
    }

    /// Removes a Lease.
    pub(crate) fn remove_lease(&self, name: &str) {
        self.state().remove(name).unwrap();
    }

    /// A Lease as it is now.
    pub(crate) fn lease(&self, name: &str) -> Option<Value> {
        self.state().leases.get(name).cloned()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

/// A token with these claims, whose signature no one checks.
pub(crate) fn jwt(claims: &Value) -> String {
    let encode = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(text);
    let header = encode(r#"{"alg":"RS256","kid":"key"}"#);
    format!("{header}.{}.{}", encode(&claims.to_string()), encode("signature"))
}

fn config_for(address: SocketAddr, certificates: &Certificates) -> String {
    let token = certificates.folder().join("asker.token");
    std::fs::write(&token, format!("{ASKER}\n")).unwrap();
    // YAML takes JSON.
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{ "name": "here", "cluster": {
            "server": format!("https://{address}"), "certificate-authority": certificates.ca(),
        } }],
        "users": [{ "name": "me", "user": { "tokenFile": token } }],
        "contexts": [{ "name": "here", "context": { "cluster": "here", "user": "me" } }],
    });
    config.to_string()
}

async fn serve(listener: TcpListener, tls: TlsAcceptor, state: Arc<Mutex<State>>) {
    while let Ok((socket, _)) = listener.accept().await {
        let (tls, state) = (tls.clone(), state.clone());
        culvert_transport::test_util::detached(async move {
            let Ok(stream) = tls.accept(socket).await else { return };
            let service = service_fn(move |request| answer(request, state.clone()));
            // A client may hang up.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    state: Arc<Mutex<State>>,
) -> Result<Response<UnsyncBoxBody<Bytes, Infallible>>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let query: HashMap<String, String> =
        form_urlencoded::parse(head.uri.query().unwrap_or_default().as_bytes())
            .into_owned()
            .collect();
    let pause = state.lock().pause;
    if !pause.is_zero() {
        sleep(pause).await;
    }
    let shared = state.clone();
    let mut state = state.lock();
    let asker = format!("Bearer {ASKER}");
    let (status, answer) = match (&head.method, head.uri.path()) {
        _ if head.headers.get(AUTHORIZATION).is_none_or(|value| *value != *asker) => {
            failure(StatusCode::UNAUTHORIZED, "Unauthorized")
        }
        _ if state.refusal.is_some() => {
            failure(StatusCode::FORBIDDEN, state.refusal.as_deref().unwrap_or_default())
        }
        (&Method::POST, REVIEWS) => (StatusCode::CREATED, state.review(&body)),
        (&Method::POST, ACCESS) => (StatusCode::CREATED, state.access(&body)),
        (&Method::GET, LEASES) if query.contains_key("sendInitialEvents") => {
            failure(StatusCode::UNPROCESSABLE_ENTITY, "only what comes is watched")
        }
        (&Method::GET, LEASES) if query.contains_key("watch") => {
            return Ok(Response::new(state.watched(&query, shared)));
        }
        (&Method::GET, LEASES) => (StatusCode::OK, state.list(&query)),
        (&Method::POST, LEASES) => state.create(&body),
        (&Method::GET, path) if path.starts_with(NODES) => state.node(&path[NODES.len()..]),
        (method, path) => match path.strip_prefix(LEASES).and_then(|rest| rest.strip_prefix('/')) {
            Some(name) => state.on_lease(method, name, &body),
            None => failure(StatusCode::NOT_FOUND, &format!("nothing at {path}")),
        },
    };
    let answer = Full::new(Bytes::from(answer.to_string()));
    let response = Response::builder().status(status).header("content-type", "application/json");
    Ok(response.body(answer.boxed_unsync()).unwrap())
}

/// Whether a Lease has the labels of a selector.
fn selects(query: &HashMap<String, String>, lease: &Value) -> bool {
    let selector = query.get("labelSelector").map_or("", String::as_str);
    selector
        .split(',')
        .filter_map(|pair| pair.split_once('='))
        .all(|(key, value)| lease["metadata"]["labels"][key] == value.trim_start_matches('='))
}

impl State {
    fn set(&mut self, mut lease: Value) -> Value {
        let name = lease["metadata"]["name"].as_str().unwrap().to_owned();
        let kind = if self.leases.contains_key(&name) { "MODIFIED" } else { "ADDED" };
        lease["metadata"]["resourceVersion"] = json!((self.events.len() + 1).to_string());
        lease["metadata"]["uid"] = json!(format!("uid-of-{name}"));
        self.leases.insert(name, lease.clone());
        self.notify(kind, &lease);
        lease
    }

    fn remove(&mut self, name: &str) -> Option<Value> {
        let lease = self.leases.remove(name)?;
        self.notify("DELETED", &lease);
        Some(lease)
    }

    fn notify(&mut self, kind: &str, lease: &Value) {
        self.events.push(json!({ "type": kind, "object": lease }));
        self.version.send_replace(self.events.len());
    }

    fn list(&self, query: &HashMap<String, String>) -> Value {
        let items: Vec<_> = self.leases.values().filter(|lease| selects(query, lease)).collect();
        json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "LeaseList",
            "metadata": { "resourceVersion": self.events.len().to_string() }, "items": items,
        })
    }

    /// The events behind a version, and those to come.
    fn watched(
        &self,
        query: &HashMap<String, String>,
        shared: Arc<Mutex<Self>>,
    ) -> UnsyncBoxBody<Bytes, Infallible> {
        let query = query.clone();
        let mut seen: usize = query.get("resourceVersion").map_or(0, |text| text.parse().unwrap());
        let (lines, body) = mpsc::unbounded_channel();
        let mut versions = self.version.subscribe();
        culvert_transport::test_util::detached(async move {
            loop {
                let events = shared.lock().events[seen..].to_vec();
                seen += events.len();
                for event in events.iter().filter(|event| selects(&query, &event["object"])) {
                    if lines.send(format!("{event}\n")).is_err() {
                        return;
                    }
                }
                tokio::select! {
                    () = lines.closed() => return,
                    changed = versions.changed() => changed.unwrap(),
                }
            }
        });
        let frames = UnboundedReceiverStream::new(body).map(|line| Ok(Frame::data(line.into())));
        StreamBody::new(frames).boxed_unsync()
    }

    fn create(&mut self, body: &[u8]) -> (StatusCode, Value) {
        let lease: Value = serde_json::from_slice(body).unwrap();
        let name = lease["metadata"]["name"].as_str().unwrap();
        match self.leases.contains_key(name) {
            true => failure(StatusCode::CONFLICT, "it exists"),
            false => (StatusCode::CREATED, self.set(lease)),
        }
    }

    fn on_lease(&mut self, method: &Method, name: &str, body: &[u8]) -> (StatusCode, Value) {
        let Some(lease) = self.leases.get(name) else {
            return failure(StatusCode::NOT_FOUND, &format!("leases {name:?} not found"));
        };
        let given: Value = serde_json::from_slice(body).unwrap_or_default();
        let version = &lease["metadata"]["resourceVersion"];
        let differs = |given: &Value| !given.is_null() && given != version;
        match *method {
            Method::GET => (StatusCode::OK, lease.clone()),
            Method::PUT if differs(&given["metadata"]["resourceVersion"]) => {
                failure(StatusCode::CONFLICT, "it has changed")
            }
            Method::PUT => (StatusCode::OK, self.set(given)),
            Method::DELETE if differs(&given["preconditions"]["resourceVersion"]) => {
                failure(StatusCode::CONFLICT, "it has changed")
            }
            Method::DELETE => (StatusCode::OK, self.remove(name).unwrap()),
            _ => failure(StatusCode::METHOD_NOT_ALLOWED, "no such method"),
        }
    }
}

impl State {
    fn node(&self, name: &str) -> (StatusCode, Value) {
        let Some(addresses) = self.nodes.get(name) else {
            return failure(StatusCode::NOT_FOUND, &format!("nodes {name:?} not found"));
        };
        let address = |address| json!({ "type": "InternalIP", "address": address });
        let addresses: Vec<_> = addresses.iter().map(address).collect();
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": { "name": name },
            "status": { "addresses": addresses },
        });
        (StatusCode::OK, node)
    }

    fn access(&self, body: &[u8]) -> Value {
        let mut review: Value = serde_json::from_slice(body).unwrap();
        let text = |key: &str| review["spec"]["resourceAttributes"][key].as_str().unwrap().into();
        let allowed = !self.forbidden.contains(&(text("verb"), text("resource")));
        review["status"] = json!({ "allowed": allowed });
        review
    }

    fn review(&mut self, body: &[u8]) -> Value {
        let mut review: Value = serde_json::from_slice(body).unwrap();
        let token = review["spec"]["token"].as_str().unwrap_or_default();
        let unknown = || json!({ "authenticated": false, "user": {} });
        review["status"] = self.tokens.get(token).cloned().unwrap_or_else(unknown);
        self.reviews.push(review["spec"].clone());
        review
    }
}

fn failure(code: StatusCode, message: &str) -> (StatusCode, Value) {
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
        "message": message, "reason": code.canonical_reason().unwrap_or_default().replace(' ', ""),
        "code": code.as_u16(),
    });
    (code, status)
}
