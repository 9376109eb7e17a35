//! As much of kube-apiserver as tokens and Leases need, over real TLS.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use culvert_loadtest::certificates::Certificates;
use culvert_wire::tls::Identity;
use http::{Method, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rustls::{ServerConfig, crypto::aws_lc_rs::default_provider};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

/// Who may ask: the token in the kubeconfig.
const ASKER: &str = "the-asker";
const REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";

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
    /// What every request is refused with.
    refusal: Option<String>,
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
        let serving =
            tokio::spawn(serve(listener, TlsAcceptor::from(Arc::new(tls)), state.clone()));
        Self { state, kubeconfig, _serving: AbortOnDropHandle::new(serving) }
    }

    /// The flag that sends a server here.
    pub(crate) fn flag(&self) -> String {
        format!("--kubeconfig={}", self.kubeconfig.display())
    }

    /// Vouches from now on for `token` as that of `user`, meant for `audience`.
    pub(crate) fn vouch(&self, token: &str, user: &str, audience: &str) {
        let status = json!({
            "authenticated": true, "user": { "username": user }, "audiences": [audience],
        });
        self.state().tokens.insert(token.into(), status);
    }

    /// Refuses every request with these words, or no longer.
    pub(crate) fn refuse(&self, words: Option<&str>) {
        self.state().refusal = words.map(str::to_owned);
    }

    /// The specs of the reviews so far.
    pub(crate) fn reviews(&self) -> Vec<Value> {
        self.state().reviews.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

fn config_for(address: SocketAddr, certificates: &Certificates) -> String {
    // YAML takes JSON.
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{ "name": "here", "cluster": {
            "server": format!("https://{address}"), "certificate-authority": certificates.ca(),
        } }],
        "users": [{ "name": "me", "user": { "token": ASKER } }],
        "contexts": [{ "name": "here", "context": { "cluster": "here", "user": "me" } }],
    });
    config.to_string()
}

async fn serve(listener: TcpListener, tls: TlsAcceptor, state: Arc<Mutex<State>>) {
    while let Ok((socket, _)) = listener.accept().await {
        let (tls, state) = (tls.clone(), state.clone());
        tokio::spawn(async move {
            let Ok(stream) = tls.accept(socket).await else { return };
            let service = service_fn(move |request| answer(request, state.clone()));
            // Whoever hangs up is done.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    state: Arc<Mutex<State>>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let mut state = state.lock().unwrap();
    let asker = format!("Bearer {ASKER}");
    let (status, answer) = match (&head.method, head.uri.path()) {
        _ if head.headers.get(AUTHORIZATION).is_none_or(|value| *value != *asker) => {
            failure(StatusCode::UNAUTHORIZED, "Unauthorized")
        }
        _ if state.refusal.is_some() => {
            failure(StatusCode::FORBIDDEN, state.refusal.as_deref().unwrap_or_default())
        }
        (&Method::POST, REVIEWS) => (StatusCode::CREATED, state.review(&body)),
        (_, path) => failure(StatusCode::NOT_FOUND, &format!("nothing at {path}")),
    };
    let answer = Full::new(Bytes::from(answer.to_string()));
    let response = Response::builder().status(status).header("content-type", "application/json");
    Ok(response.body(answer).unwrap())
}

impl State {
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
