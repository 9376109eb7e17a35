//! The recipes of `deploy/recipes`: the command lines that integrators generate start the programs,
//! on two hosts of their own as in a cluster, and systemd accepts the units.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use culvert_loadtest::{
    certificates::Certificates,
    frontend::{Connection, Protocol, connect},
    link::{Host, Link, LinkSettings, NODE, SERVER},
    process::{Launch, Namespace, Process},
    targets,
};
use culvert_transport::tls::{Identity, KeyExchange, authorities, certificates, tunnel_client};
use serde_json::json;
use tokio::{net::TcpStream, runtime::Runtime};
use tokio_rustls::TlsConnector;

use crate::{
    docs::{block_with, command_lines},
    support::{
        echo, eventually, has_program,
        kube_api::{AUDIENCE, KubeApi, jwt},
        network, within,
    },
};

/// What an integrator starts. Paths are those of its containers; `NODE` and `SERVER` are addresses.
struct Integrator {
    server: &'static str,
    agent: &'static str,
    /// Names of the programs, which decide on default ports.
    programs: [&'static str; 2],
    health_ports: [u16; 2],
    /// Path of the Unix socket for kube-apiserver; over TCP without.
    socket: Option<&'static str>,
    /// Path of the server's certificate, without `.crt` and `.key`.
    certificate: &'static str,
}

/// Kamaji 26.8, in its order: `internal/builders/controlplane/konnectivity_server.go` and
/// `internal/resources/konnectivity/agent.go`.
const KAMAJI: Integrator = Integrator {
    server: "--admin-port=8133 --agent-namespace=kube-system --agent-port=8132 \
             --agent-service-account=konnectivity-agent \
             --authentication-audience=system:konnectivity-server \
             --cluster-cert=/etc/kubernetes/pki/apiserver.crt \
             --cluster-key=/etc/kubernetes/pki/apiserver.key --health-port=8134 \
             --kubeconfig=/etc/kubernetes/konnectivity-server.conf --mode=grpc --server-count=1 \
             --server-port=0 --uds-name=/run/konnectivity/konnectivity-server.socket",
    agent: "--admin-server-port=8133 \
            --ca-cert=/var/run/secrets/kubernetes.io/serviceaccount/ca.crt \
            --health-server-port=8134 --logtostderr=true --proxy-server-host=SERVER \
            --proxy-server-port=8132 \
            --service-account-token-path=/var/run/secrets/tokens/konnectivity-agent-token -v=8",
    programs: ["proxy-server", "proxy-agent"],
    health_ports: [8134, 8134],
    socket: Some("/run/konnectivity/konnectivity-server.socket"),
    certificate: "/etc/kubernetes/pki/apiserver",
};

/// The examples of kubernetes.io for kubeadm: `examples/admin/konnectivity`.
const KUBEADM: Integrator = Integrator {
    server: "--logtostderr=true \
             --uds-name=/etc/kubernetes/konnectivity-server/konnectivity-server.socket \
             --delete-existing-uds-file --cluster-cert=/etc/kubernetes/pki/apiserver.crt \
             --cluster-key=/etc/kubernetes/pki/apiserver.key --mode=grpc --server-port=0 \
             --agent-port=8132 --admin-port=8133 --health-port=8134 --agent-namespace=kube-system \
             --agent-service-account=konnectivity-agent \
             --kubeconfig=/etc/kubernetes/konnectivity-server.conf \
             --authentication-audience=system:konnectivity-server",
    agent: "--logtostderr=true --ca-cert=/var/run/secrets/kubernetes.io/serviceaccount/ca.crt \
            --proxy-server-host=SERVER --proxy-server-port=8132 --admin-server-port=8133 \
            --health-server-port=8134 \
            --service-account-token-path=/var/run/secrets/tokens/konnectivity-agent-token",
    programs: ["proxy-server", "proxy-agent"],
    health_ports: [8134, 8134],
    socket: Some("/etc/kubernetes/konnectivity-server/konnectivity-server.socket"),
    certificate: "/etc/kubernetes/pki/apiserver",
};

/// k0s 1.36: `pkg/component/controller/konnectivity.go`. Its program is `konnectivity-server`,
/// which has Culvert's default ports; the line names all.
const K0S: Integrator = Integrator {
    server: "--uds-name=/run/k0s/konnectivity-server/konnectivity-server.sock \
             --cluster-cert=/var/lib/k0s/pki/server.crt --cluster-key=/var/lib/k0s/pki/server.key \
             --kubeconfig=/etc/kubernetes/konnectivity-server.conf --mode=grpc --server-port=0 \
             --agent-port=8132 --admin-port=8133 --health-bind-address=localhost \
             --health-port=8092 --graceful-shutdown-timeout=1ns --agent-namespace=kube-system \
             --agent-service-account=konnectivity-agent \
             --authentication-audience=system:konnectivity-server --logtostderr=true \
             --stderrthreshold=1 --v=1 --enable-profiling=false --delete-existing-uds-file=true \
             --server-count=1 --server-id=4b1a2f --proxy-strategies=destHost,defaultRoute,default \
             --cipher-suites=TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,\
             TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    agent: "--logtostderr=true --ca-cert=/var/run/secrets/kubernetes.io/serviceaccount/ca.crt \
            --proxy-server-host=SERVER --proxy-server-port=8132 \
            --service-account-token-path=/var/run/secrets/tokens/konnectivity-agent-token \
            --agent-identifiers=host=NODE --agent-id=NODE",
    programs: ["culvert-server", "proxy-agent"],
    health_ports: [8092, 8093],
    socket: Some("/run/k0s/konnectivity-server/konnectivity-server.sock"),
    certificate: "/var/lib/k0s/pki/server",
};

/// k0smotron 2: the lines of k0s, whose configuration has another port for agents
/// (`internal/controller/k0smotron.io/k0smotroncluster_configmap.go`). For an ingress and an older
/// k0s it makes the agents' DaemonSet itself, with the same arguments and this program.
fn k0smotron() -> Integrator {
    let port = |line: &str| &*line.replace("-port=8132", "-port=30132").leak();
    Integrator { server: port(K0S.server), agent: port(K0S.agent), ..K0S }
}

/// HyperShift: `v2/assets/kube-apiserver/deployment.yaml`, and the DaemonSet of the guest cluster.
const HYPERSHIFT: Integrator = Integrator {
    server: "--logtostderr=true --log-file-max-size=0 \
             --cluster-cert /etc/konnectivity/cluster/tls.crt \
             --cluster-key /etc/konnectivity/cluster/tls.key \
             --server-cert /etc/konnectivity/server/tls.crt \
             --server-key /etc/konnectivity/server/tls.key \
             --server-ca-cert /etc/konnectivity/ca/ca.crt --server-port 8090 --agent-port 8091 \
             --health-port 2041 --admin-port=8093 --mode=http-connect \
             --proxy-strategies=destHost,defaultRoute --keepalive-time 30s \
             --frontend-keepalive-time 30s",
    agent: "--logtostderr=true --ca-cert /etc/konnectivity/ca/ca.crt \
            --agent-cert /etc/konnectivity/agent/tls.crt \
            --agent-key /etc/konnectivity/agent/tls.key --proxy-server-host SERVER \
            --proxy-server-port 8091 --health-server-port 2041 \
            --agent-identifiers default-route=true --keepalive-time 30s --probe-interval 5s \
            --sync-interval 5s --sync-interval-cap 30s --sync-forever --v 3",
    programs: ["proxy-server", "proxy-agent"],
    health_ports: [2041, 2041],
    socket: None,
    certificate: "/etc/konnectivity/server/tls",
};

/// The quick start with a token: `docs/getting-started.md`.
fn quick_start() -> Integrator {
    let line = |program: &str, flag: &str| {
        let mut lines = command_lines("docs/getting-started.md", program).into_iter();
        let words = lines.find(|words| words.iter().any(|word| word.starts_with(flag))).unwrap();
        let line = words[1..].join(" ").replace("control-plane.example.com", "SERVER");
        &*line.leak()
    };
    Integrator {
        server: line("culvert-server", "--agent-service-account="),
        agent: line("culvert-agent", "--service-account-token-path="),
        programs: ["culvert-server", "culvert-agent"],
        health_ports: [8134, 8136],
        socket: Some("/run/culvert/frontend.sock"),
        certificate: "/etc/culvert/server",
    }
}

/// What `deploy/recipes/hypershift.md` adds.
const AGENTS_CA: &str = "--cluster-ca-cert=/etc/konnectivity/ca/ca.crt";

/// `deploy/recipes/systemd`.
const SYSTEMD: Integrator = Integrator {
    server: "--config=/etc/culvert/server.toml",
    agent: "--config=/etc/culvert/agent.toml",
    programs: ["culvert-server", "culvert-agent"],
    health_ports: [8134, 8136],
    socket: Some("/run/culvert-server/frontend.sock"),
    certificate: "/etc/culvert/server",
};

fn recipes() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/recipes")
}

/// A control-plane host and a node, joined by a link, with the files of an integrator.
struct Cluster {
    integrator: Integrator,
    link: Link,
    /// Runtimes of the control-plane host and of the node.
    hosts: [Runtime; 2],
    certificates: Arc<Certificates>,
    /// kube-apiserver of the control-plane host.
    _api: KubeApi,
}

impl Cluster {
    /// `None` when tests with namespaces are skipped.
    async fn start(integrator: Integrator) -> Option<Self> {
        let link = network::link(&LinkSettings::default())?;
        let hosts = [&link.server, &link.node].map(|host| host.runtime(1).unwrap());
        let certificates = Arc::new(Certificates::generate().unwrap());
        let of_api = Arc::clone(&certificates);
        let api = hosts[0].spawn(async move { KubeApi::start(&of_api).await }).await.unwrap();
        let token = jwt(&json!({ "sub": "agent" }));
        let account = ["culvert-agent", "konnectivity-agent"]
            .into_iter()
            .find(|name| integrator.server.contains(&format!("--agent-service-account={name}")));
        let account = format!("system:serviceaccount:kube-system:{}", account.unwrap_or_default());
        api.accept(&token, &account, AUDIENCE);
        let cluster = Self { integrator, link, hosts, certificates, _api: api };
        cluster.write_files(&token);
        Some(cluster)
    }

    /// A path of the integrator's containers as one of this test's.
    fn path(&self, path: &str) -> PathBuf {
        self.certificates.folder().join("root").join(path.trim_start_matches('/'))
    }

    fn write(&self, path: &str, contents: impl AsRef<[u8]>) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }

    fn write_files(&self, token: &str) {
        let folder = self.certificates.folder();
        let own = |name: &str| fs::read(folder.join(name)).unwrap();
        for certificate in [self.integrator.certificate, "/etc/konnectivity/cluster/tls"] {
            self.write(&format!("{certificate}.crt"), own("server.crt"));
            self.write(&format!("{certificate}.key"), own("server.key"));
        }
        for certificate in ["/etc/konnectivity/agent/tls", "/etc/culvert/agent"] {
            self.write(&format!("{certificate}.crt"), own("agent.crt"));
            self.write(&format!("{certificate}.key"), own("agent.key"));
        }
        let account = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";
        let culvert = ["/etc/culvert/ca.crt", "/etc/culvert/agents-ca.crt"];
        for ca in [account, "/etc/konnectivity/ca/ca.crt"].into_iter().chain(culvert) {
            self.write(ca, own("ca.crt"));
        }
        for kubeconfig in ["/etc/kubernetes/konnectivity-server.conf", "/etc/culvert/kubeconfig"] {
            self.write(kubeconfig, own("kubeconfig"));
        }
        for name in ["konnectivity-agent-token", "culvert-agent"] {
            self.write(&format!("/var/run/secrets/tokens/{name}"), token);
        }
        for side in ["server", "agent"] {
            let text = fs::read_to_string(recipes().join(format!("systemd/{side}.toml"))).unwrap();
            let text = text.replace("control-plane.example.com", &SERVER.to_string());
            let root = self.path("").display().to_string();
            let text = text.replace("\"/", &format!("\"{root}/"));
            self.write(&format!("/etc/culvert/{side}.toml"), text);
        }
        for socket in self.integrator.socket.into_iter().chain(["/run/culvert-agent/socket"]) {
            fs::create_dir_all(self.path(socket).parent().unwrap()).unwrap();
        }
    }

    /// Starts the server (0) or the agent (1), with further arguments.
    fn start_side(&self, side: usize, more: &str) -> Process {
        let (host, line) = match side {
            0 => (&self.link.server, self.integrator.server),
            _ => (&self.link.node, self.integrator.agent),
        };
        let name = self.integrator.programs[side];
        let program = self.path("/programs").join(name);
        fs::create_dir_all(self.path("/programs")).unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_culvert-loadtest"), &program).unwrap();
        let arg = |word: &str| {
            let word = word.replace("SERVER", &SERVER.to_string());
            let word = word.replace("NODE", &NODE.to_string());
            match word.split_once('=') {
                Some((flag, path)) if path.starts_with('/') => {
                    format!("{flag}={}", self.path(path).display())
                }
                None if word.starts_with('/') => self.path(&word).display().to_string(),
                _ => word,
            }
        };
        Process::start(Launch {
            program,
            args: line.split_whitespace().chain(more.split_whitespace()).map(arg).collect(),
            log: self.certificates.folder().join(format!("{name}.log")),
            health_port: self.integrator.health_ports[side],
            namespace: Some(self.namespace(host, side)),
        })
        .unwrap()
    }

    fn namespace(&self, host: &Arc<Host>, side: usize) -> Namespace {
        Namespace {
            host: Arc::clone(host),
            runtime: self.hosts[side].handle().clone(),
            loadtest: env!("CARGO_BIN_EXE_culvert-loadtest").into(),
        }
    }

    /// Dials this target as kube-apiserver does.
    async fn dial(&self, target: std::net::SocketAddr) -> Connection {
        if let Some(socket) = self.integrator.socket {
            let socket = self.path(socket);
            return Connection::dial_unix(Protocol::Grpc, &socket, target).await.unwrap();
        }
        let pair = self.certificates.frontend();
        let identity = Identity::from_pem_files(&pair.certificate, &pair.key).unwrap();
        let roots = authorities(&certificates(&self.certificates.ca()).unwrap()).unwrap();
        let mut tls = tunnel_client(roots, Some(identity), KeyExchange::Hybrid).unwrap();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let dial = async move {
            let socket = TcpStream::connect(("127.0.0.1", 8090)).await.unwrap();
            let name = "localhost".try_into().unwrap();
            let mut socket = TlsConnector::from(Arc::new(tls)).connect(name, socket).await.unwrap();
            connect::request(&mut socket, &target.to_string()).await.unwrap();
            Connection::Tls(Box::new(socket))
        };
        self.hosts[0].spawn(dial).await.unwrap()
    }

    fn stop(self) {
        for host in self.hosts {
            host.shutdown_background();
        }
    }
}

/// Starts server and agent, waits until both are ready over QUIC, and uses a connection.
async fn both_sides_work(integrator: Integrator, more: &str) {
    within(async {
        let Some(cluster) = Cluster::start(integrator).await else { return };
        let server = cluster.start_side(0, more);
        server.until_ok("/healthz").await.unwrap();
        let agent = cluster.start_side(1, "");
        agent.until_ok("/readyz").await.unwrap();
        // HyperShift asks for /healthz alone: no agent announces a host there, so that the first
        // strategy has none.
        if cluster.integrator.socket.is_some() {
            server.until_ok("/readyz").await.unwrap();
        }
        // Over TCP first on a busy machine.
        let verbose = async || agent.get("/readyz?verbose").await.unwrap().body;
        let is_quic = async || verbose().await.contains(": quic for ");
        eventually("the tunnel is QUIC", is_quic).await;
        let target = cluster.hosts[1].spawn(targets::echo()).await.unwrap().unwrap();
        let mut connection = cluster.dial(target.address()).await;
        echo(&mut connection, b"through the recipe").await.unwrap();
        connection.close().await.unwrap();
        drop((server, agent, target));
        cluster.stop();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kamajis_command_lines_start_both_programs() {
    both_sides_work(KAMAJI, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_lines_of_the_kubernetes_documentation_start_both_programs() {
    both_sides_work(KUBEADM, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_lines_of_k0s_start_both_programs() {
    both_sides_work(K0S, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_lines_of_k0s_with_k0smotrons_port_start_both_programs() {
    let integrator = k0smotron();
    for line in [integrator.server, integrator.agent] {
        assert!(line.contains("-port=30132") && !line.contains("=8132"), "{line}");
    }
    both_sides_work(integrator, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hypershifts_command_lines_and_the_agents_ca_start_both_programs() {
    both_sides_work(HYPERSHIFT, AGENTS_CA).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hypershifts_own_command_line_is_refused_because_no_agent_would_be_verified() {
    within(async {
        let Some(cluster) = Cluster::start(HYPERSHIFT).await else { return };
        let mut server = cluster.start_side(0, "");
        assert_eq!(server.ended().await.unwrap().code(), Some(1));
        assert!(server.log().contains("--cluster-ca-cert"), "{}", server.log());
        cluster.stop();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_files_of_the_units_start_both_programs() {
    both_sides_work(SYSTEMD, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_lines_of_the_quick_start_with_a_token_start_both_programs() {
    both_sides_work(quick_start(), "").await;
}

/// Takes the place of `systemd-run`, and prints its arguments.
const PRINT_ARGUMENTS: &str = "#!/bin/sh\nprintf '%s\\n' \"$@\"\n";

#[test]
fn the_check_of_the_units_runs_precheck_of_the_programs_with_their_files() {
    if !has_program("systemd-run") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let stub = folder.path().join("systemd-run");
    fs::write(&stub, PRINT_ARGUMENTS).unwrap();
    fs::set_permissions(&stub, Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    let function = block_with("deploy/recipes/systemd.md", "systemd-run");
    let function = function.split("check server").next().unwrap();
    for side in ["server", "agent"] {
        let script = format!("{function}check {side}");
        let mut bash = Command::new("bash");
        let printed = bash.args(["-euc", &script]).env("PATH", &path).output().unwrap();
        let printed = String::from_utf8(printed.stdout).unwrap();
        let args: Vec<_> = printed.lines().collect();
        let at = args.iter().position(|arg| !arg.starts_with("--")).unwrap();
        // It reads its own flags before it looks for systemd.
        let flags = Command::new("systemd-run").args(&args[..at]).arg("--help").output().unwrap();
        assert!(flags.status.success(), "{}", String::from_utf8_lossy(&flags.stderr));
        let unit = recipes().join(format!("systemd/culvert-{side}.service"));
        let unit = fs::read_to_string(unit).unwrap();
        for property in args[..at].iter().filter_map(|arg| arg.strip_prefix("--property=")) {
            assert!(unit.contains(&format!("\n{property}\n")), "{property} is not the unit's");
        }
        let config = format!("--config=/etc/culvert/{side}.toml");
        assert_eq!(args[at..], [&*format!("/usr/local/bin/culvert-{side}"), "precheck", &*config]);
        let example = recipes().join(format!("systemd/{side}.toml"));
        let checked = Command::new(env!("CARGO_BIN_EXE_culvert-loadtest"))
            .args([side, "precheck", &format!("--config={}", example.display())])
            .output()
            .unwrap();
        let steps = String::from_utf8(checked.stdout).unwrap();
        assert!(steps.starts_with("STEP "), "{steps}");
        // The files are not on this host.
        let faults = steps.lines().filter(|line| line.starts_with("flags  FAILED"));
        for fault in faults {
            assert!(fault.contains("does not exist"), "{fault}");
        }
    }
}

#[test]
fn systemd_accepts_the_units_and_finds_them_confined() {
    if !has_program("systemd-analyze") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for side in ["server", "agent"] {
        let name = format!("culvert-{side}.service");
        let unit = fs::read_to_string(recipes().join("systemd").join(&name)).unwrap();
        assert!(unit.contains(&format!("--config=/etc/culvert/{side}.toml")), "{unit}");
        // The program must exist to be verified.
        let installed = format!("/usr/local/bin/culvert-{side}");
        assert!(unit.contains(&installed), "{unit}");
        let path = folder.path().join(&name);
        fs::write(&path, unit.replace(&installed, env!("CARGO_BIN_EXE_culvert-loadtest"))).unwrap();
        for args in [
            &["verify", "--man=no", "--recursive-errors=no"][..],
            // In tenths, of 100: root without any confinement has 96.
            &["security", "--offline=true", "--no-pager", "--threshold=20"],
        ] {
            let output = Command::new("systemd-analyze").args(args).arg(&path).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{args:?} {name}: {said}");
            assert!(!said.contains(&name), "{args:?} {name}: {said}");
        }
    }
}
