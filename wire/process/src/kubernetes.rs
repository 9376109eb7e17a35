//! Set-up of kube-apiserver's client.

mod answers;
pub mod leases;
mod proxy;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD as BASE64};
use culvert_transport::tls::Current;
use hyper::header::HeaderValue;

use self::answers::Answers;
pub use self::answers::status_text;
use crate::{
    error::with_causes,
    reload::{Files, LoadError, Reloads, parse_private_key},
};
pub use k8s_openapi::jiff::Timestamp;
use k8s_openapi::{api::coordination::v1::LeaseSpec, jiff::SignedDuration};
pub use kube::Client;
use kube::{
    Config,
    client::ClientBuilder,
    config::{AuthInfo, Cluster, InClusterError, Kubeconfig, KubeconfigError},
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use secrecy::ExposeSecret as _;
use tower::{layer::layer_fn, limit::RateLimitLayer, util::option_layer};

/// Time limit of a connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time without a byte after which a connection that is being read fails, so that a lost peer is
/// noticed. A watch of Leases receives a renewal every 15 s.
const READ_TIMEOUT: Duration = Duration::from_secs(45);
/// Burst size where only the rate is given, in requests; client-go's default.
const DEFAULT_BURST: u32 = 10;

/// Access to kube-apiserver.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KubernetesConfig {
    /// Kubeconfig file; `None` is the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// Maximum rate, in requests per second; `None` is no limit.
    pub qps: Option<f32>,
    /// Burst size, in requests; `None` is 10.
    pub burst: Option<u32>,
}

/// The client of kube-apiserver cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The kubeconfig cannot be used.
    #[error("{}: cannot be used as a kubeconfig: {}", path.display(), in_one_line(source))]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// The fault.
        source: KubeconfigError,
    },
    /// There is no kubeconfig, and the process is not in a pod with a service account.
    #[error("no kubeconfig is given, and this is no pod with a service account: {}", in_pod(.0))]
    InCluster(#[from] InClusterError),
    /// The kubeconfig is not valid for a client.
    #[error("the client of kube-apiserver cannot be set up: {}", with_causes(.0))]
    Client(#[from] kube::Error),
}

/// The error and its causes, without the excerpt of the file that YAML's errors have.
fn in_one_line(error: &KubeconfigError) -> String {
    let text = with_causes(error);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.take(1).collect()
}

fn in_pod(error: &InClusterError) -> String {
    match error {
        InClusterError::ReadEnvironmentVariable(_) => {
            "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set".into()
        }
        error => with_causes(error),
    }
}

impl From<ClientError> for LoadError {
    fn from(error: ClientError) -> Self {
        Self::new(error.to_string())
    }
}

/// A client of kube-apiserver, made anew when the files that it was made of have changed.
#[derive(Clone)]
pub struct CurrentClient {
    clients: Current<Vec<(Client, Arc<str>)>>,
    index: usize,
    reloads: Option<Reloads>,
}

impl fmt::Debug for CurrentClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CurrentClient").field("index", &self.index).finish_non_exhaustive()
    }
}

impl CurrentClient {
    /// A client that is never made anew, and the host and the port that it asks.
    pub fn fixed(client: Client, address: &str) -> Self {
        let clients = vec![(client, address.into())];
        Self { clients: Current::fixed(clients), index: 0, reloads: None }
    }

    /// Has these files looked at when a request fails.
    #[must_use]
    pub fn with_files(self, reloads: Reloads) -> Self {
        Self { reloads: Some(reloads), ..self }
    }

    /// The client as it is now.
    pub fn get(&self) -> Client {
        self.clients.get()[self.index].0.clone()
    }

    /// Why a request to kube-apiserver has no result after this time, with the host and the port.
    pub fn no_answer_within(&self, time: Duration) -> String {
        let address = &self.clients.get()[self.index].1;
        format!("kube-apiserver at {address} did not answer within {time:?}")
    }

    /// Completes when the client was made anew since the last call.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn replaced(&mut self) {
        self.clients.replaced().await;
    }

    /// Records that a request failed, or was not answered in time: the files are looked at soon,
    /// for they may name another kube-apiserver or hold another certificate.
    pub fn failed(&self) {
        if let Some(reloads) = &self.reloads {
            reloads.ask();
        }
    }
}

/// CA of kube-apiserver in a pod.
const POD_CA: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";

impl KubernetesConfig {
    /// Clients, which are kept up to date with the files: those that are `paced` with a rate limit
    /// of their own, the others with none. They send no request yet, so kube-apiserver may start
    /// later. Panics outside a tokio runtime.
    ///
    /// # Errors
    /// If the kubeconfig, or the pod's service account, cannot be used.
    pub fn clients<const N: usize>(
        &self,
        reloads: &Reloads,
        paced: [bool; N],
    ) -> Result<[CurrentClient; N], LoadError> {
        let config = self.clone();
        let file = self.kubeconfig.as_deref().unwrap_or_else(|| Path::new(POD_CA));
        let make = move |files: &mut Files| {
            paced.iter().map(|paced| config.client(files, *paced)).collect()
        };
        let clients = reloads.add(file, make)?;
        Ok(std::array::from_fn(|index| {
            let (clients, reloads) = (clients.clone(), Some(reloads.clone()));
            CurrentClient { clients, index, reloads }
        }))
    }

    /// The CA certificates of kube-apiserver; none if they cannot be read. It blocks.
    pub fn cluster_authorities(&self) -> Vec<CertificateDer<'static>> {
        let config = self.config(&mut Files::default()).ok();
        let authorities = config.and_then(|config| config.root_cert).unwrap_or_default();
        authorities.into_iter().map(CertificateDer::from).collect()
    }

    /// A client, made of the files as they are now, and the host and the port that it asks.
    fn client(&self, files: &mut Files, paced: bool) -> Result<(Client, Arc<str>), LoadError> {
        let mut config = self.config(files)?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = Some(READ_TIMEOUT);
        config.reset_reader_on_write = true;
        // The callers retry with intervals of their own, and log the failures.
        config.default_retry = false;
        let rate = self.qps.filter(|_| paced).map(|qps| {
            let burst = self.burst.unwrap_or(DEFAULT_BURST);
            RateLimitLayer::new(
                burst.into(),
                Duration::from_secs_f64(f64::from(burst) / f64::from(qps)),
            )
        });
        // A URL may have credentials.
        let url = &config.cluster_url;
        let (host, port) = (url.host().unwrap_or_default(), url.port_u16().unwrap_or(443));
        let address: Arc<str> = format!("{host}:{port}").into();
        let builder = ClientBuilder::try_from(config).map_err(ClientError::from)?;
        let asked = address.clone();
        let answers = layer_fn(move |service| Answers::new(service, asked.clone()));
        Ok((builder.with_layer(&answers).with_layer(&option_layer(rate)).build(), address))
    }

    /// Reads the kubeconfig and the files that it names, or those of the pod. What a program of the
    /// kubeconfig prints is renewed by the client itself.
    ///
    /// # Errors
    /// If they cannot be used.
    pub(crate) fn config(&self, files: &mut Files) -> Result<Config, LoadError> {
        let Some(path) = &self.kubeconfig else {
            // Before the client reads it: if it changes meanwhile, the next look finds that out.
            let ca = files.read(Path::new(POD_CA));
            let mut config = Config::incluster().map_err(ClientError::from)?;
            record_authorities(files, Path::new(POD_CA), &ca?)?;
            read_token(files, &mut config.auth_info, Path::new(POD_CA))?;
            set_proxy(&mut config, None)?;
            return Ok(config);
        };
        // Bounded, and what later looks compare with. What is parsed below may be newer; the next
        // look finds that out.
        files.read(path)?;
        let fault = |source| ClientError::Kubeconfig { path: path.clone(), source };
        let kubeconfig = Kubeconfig::read_from(path).map_err(fault)?;
        let cluster = current_cluster(&kubeconfig);
        let proxy = cluster.and_then(|cluster| cluster.proxy_url.clone());
        let root_cert =
            cluster.map(|cluster| authorities(cluster, path, files)).transpose()?.flatten();
        let mut config = from_kubeconfig(&kubeconfig).map_err(fault)?;
        config.root_cert = root_cert;
        let user = &config.auth_info;
        match (&user.client_certificate_data, &user.client_certificate) {
            (Some(data), _) => {
                let pem = BASE64.decode(data).unwrap_or_default();
                files.record_chain(path, &pem);
            }
            (None, Some(file)) => {
                let contents = files.read(Path::new(file))?;
                files.record_chain(Path::new(file), &contents);
            }
            (None, None) => {}
        }
        // Before the client parses it, whose error would quote a key without line breaks.
        match (&user.client_key_data, &user.client_key) {
            (Some(data), _) => {
                let pem = BASE64.decode(data.expose_secret()).unwrap_or_default();
                parse_private_key(path, &pem)?;
            }
            (None, Some(key)) => drop(files.private_key(Path::new(key))?),
            (None, None) => {}
        }
        read_token(files, &mut config.auth_info, path)?;
        set_proxy(&mut config, proxy.as_deref())?;
        Ok(config)
    }
}

/// Sets the proxy, which a kubeconfig may name.
///
/// # Errors
/// When the proxy cannot be used.
fn set_proxy(config: &mut Config, named: Option<&str>) -> Result<(), LoadError> {
    let variable = |name: &str| std::env::var(name).ok();
    let proxy = proxy::proxy_for(&config.cluster_url, named, variable);
    config.proxy_url = proxy.map_err(|fault| LoadError::new(format!("kube-apiserver: {fault}")))?;
    Ok(())
}

/// The CA certificates of a cluster; `None` if it names none.
///
/// # Errors
/// When they cannot be read, or there are none.
fn authorities(
    cluster: &Cluster,
    kubeconfig: &Path,
    files: &mut Files,
) -> Result<Option<Vec<Vec<u8>>>, LoadError> {
    let pem = match (&cluster.certificate_authority_data, &cluster.certificate_authority) {
        (Some(data), _) if !data.is_empty() => BASE64.decode(data.trim()).unwrap_or_default(),
        (_, Some(file)) => {
            let contents = files.read(Path::new(file))?;
            record_authorities(files, Path::new(file), &contents)?;
            contents
        }
        _ => return Ok(None),
    };
    let found = CertificateDer::pem_slice_iter(&pem).flatten();
    let found: Vec<_> = found.map(|certificate| certificate.to_vec()).collect();
    if found.is_empty() {
        let kubeconfig = kubeconfig.display();
        let reason = "certificate-authority-data holds no certificate";
        return Err(LoadError::new(format!("{kubeconfig}: {reason}")));
    }
    Ok(Some(found))
}

/// The configuration of the current context, without a CA and a proxy. kube's own conversion reads the proxy
/// from the environment, by other rules than client-go's: it fails for some of NO_PROXY's entries.
///
/// # Errors
/// When something that the context names is missing or cannot be parsed.
fn from_kubeconfig(kubeconfig: &Kubeconfig) -> Result<Config, KubeconfigError> {
    let name = kubeconfig.current_context.as_ref().ok_or(KubeconfigError::CurrentContextNotSet)?;
    let context = kubeconfig.contexts.iter().find(|context| context.name == *name);
    let context = context.and_then(|context| context.context.as_ref());
    let context = context.ok_or_else(|| KubeconfigError::LoadContext(name.clone()))?;
    let cluster = current_cluster(kubeconfig)
        .ok_or_else(|| KubeconfigError::LoadClusterOfContext(context.cluster.clone()))?;
    let url = cluster.server.as_ref().ok_or(KubeconfigError::MissingClusterUrl)?;
    let mut config = Config::new(url.parse().map_err(KubeconfigError::ParseClusterUrl)?);
    config.accept_invalid_certs = cluster.insecure_skip_tls_verify.unwrap_or(false);
    config.tls_server_name.clone_from(&cluster.tls_server_name);
    // As client-go: a user that is missing is no fault.
    let users = kubeconfig.auth_infos.iter();
    let user = users.filter(|user| Some(&user.name) == context.user.as_ref());
    config.auth_info = user.filter_map(|user| user.auth_info.clone()).next().unwrap_or_default();
    if let Some(exec) = &mut config.auth_info.exec
        && exec.provide_cluster_info
    {
        exec.cluster = Some(cluster.try_into()?);
    }
    Ok(config)
}

/// Reads the token of a token file, so that it is one of the files that are looked at: the client
/// would read it once a minute, and would not remove the line break at its end. A token in the
/// kubeconfig itself takes precedence, and programs and passwords before both.
///
/// # Errors
/// When there is a token that cannot be used.
fn read_token(files: &mut Files, user: &mut AuthInfo, kubeconfig: &Path) -> Result<(), LoadError> {
    if user.auth_provider.is_some() || (user.username.is_some() && user.password.is_some()) {
        return Ok(());
    }
    let (file, token) = match (&user.token, &user.token_file) {
        (Some(token), _) => {
            let token = token.expose_secret().trim().to_owned();
            files.record_token(&token);
            (kubeconfig, token)
        }
        (None, Some(file)) => {
            let file = Path::new(file);
            (file, files.token(file)?.expose().to_owned())
        }
        (None, None) => return Ok(()),
    };
    if HeaderValue::try_from(&token).is_err() {
        let file = file.display();
        return Err(LoadError::new(format!("{file}: the token has characters that none may have")));
    }
    (user.token, user.token_file) = (Some(token.into()), None);
    Ok(())
}

/// The answer of kube-apiserver, or the reason why there is none, in one line.
pub fn reason(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status_text(status),
        kube::Error::Service(error) => with_causes(error.as_ref()),
        error => with_causes(error),
    }
}

/// Records the certificates of a CA file. One that is empty, or is being written, trusts no server.
///
/// # Errors
/// When the file holds no certificate.
fn record_authorities(files: &mut Files, path: &Path, pem: &[u8]) -> Result<(), LoadError> {
    if CertificateDer::pem_slice_iter(pem).all(|certificate| certificate.is_err()) {
        return Err(LoadError::new(format!("{}: holds no certificate", path.display())));
    }
    files.record_authorities(path, pem);
    Ok(())
}

/// The cluster of the kubeconfig's current context.
fn current_cluster(kubeconfig: &Kubeconfig) -> Option<&Cluster> {
    let current = kubeconfig.current_context.as_deref()?;
    let context = kubeconfig.contexts.iter().find(|context| context.name == current)?;
    let name = &context.context.as_ref()?.cluster;
    let named = kubeconfig.clusters.iter().find(|named| named.name == *name)?;
    named.cluster.as_ref()
}

/// End of a Lease: its duration after its renewal or, without a renewal, after its acquisition
/// (Konnectivity's `pkg/util/leases.go`). `None` for a Lease without these times.
pub fn lease_expiry(lease: &LeaseSpec) -> Option<Timestamp> {
    let renewed = lease.renew_time.as_ref().or(lease.acquire_time.as_ref())?.0;
    let duration = SignedDuration::from_secs(lease.lease_duration_seconds?.into());
    renewed.checked_add(duration).ok()
}

/// Status code and reason of kube-apiserver's answer, as metric labels; `0` and `unreachable`
/// without an answer in time.
pub fn labels(error: Option<&kube::Error>) -> (String, String) {
    match error {
        Some(kube::Error::Api(status)) => (status.code.to_string(), status.reason.clone()),
        _ => ("0".into(), "unreachable".into()),
    }
}

#[cfg(test)]
mod tests;
