//! `precheck` of both programs.

use std::{net::SocketAddr, process::Output};

use culvert_loadtest::{
    flags::{AgentFlags, Ports, ServerFlags},
    frontend::Protocol::Connect,
    process::free_port,
};
use culvert_process::kubernetes::Timestamp;
use serde_json::{Value, json};
use tokio::{net::TcpListener, process::Command};

use crate::support::{
    deployment::{Deployment, Implementation::Culvert},
    kube_api::{KubeApi, jwt},
    proxy::proxy,
    within,
};

/// Variables that a run of `precheck` starts without.
const PROXY_VARIABLES: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"];

async fn precheck(side: &str, args: Vec<String>) -> (Option<i32>, Vec<Value>) {
    precheck_with(side, args, None).await
}

/// The same with this proxy in the environment.
async fn precheck_with(
    side: &str,
    args: Vec<String>,
    proxy: Option<SocketAddr>,
) -> (Option<i32>, Vec<Value>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_culvert-loadtest"));
    for name in PROXY_VARIABLES {
        command.env_remove(name);
    }
    command.envs(proxy.map(|proxy| ("HTTPS_PROXY", format!("http://{proxy}"))));
    let Output { status, stdout, stderr } =
        command.args([side, "precheck", "--json"]).args(args).output().await.unwrap();
    let steps = serde_json::from_slice(&stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&stderr)));
    (status.code(), steps)
}

/// The step whose name begins so.
fn step<'a>(steps: &'a [Value], name: &str) -> &'a Value {
    let begins = |step: &&Value| step["step"].as_str().unwrap().starts_with(name);
    steps.iter().find(begins).unwrap_or_else(|| panic!("no {name} in {steps:?}"))
}

/// Its result.
fn result<'a>(steps: &'a [Value], name: &str) -> &'a str {
    step(steps, name)["result"].as_str().unwrap()
}

fn agent_args(deployment: &Deployment) -> Vec<String> {
    let flags = AgentFlags {
        certificates: &deployment.certificates,
        shows_certificate: true,
        id: Some("agent"),
        server: deployment.tunnel(),
        admin_port: free_port().unwrap(),
        health_port: free_port().unwrap(),
    };
    flags.args()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_checks_the_path_to_its_server() {
    within(async {
        let mut deployment = Deployment::without_server(Connect);
        let args = agent_args(&deployment);
        let (code, steps) = precheck("agent", args.clone()).await;
        assert_eq!(code, Some(1), "{steps:?}");
        assert_eq!(result(&steps, "TCP (TLS) to 127.0.0.1"), "failed");
        let remedy = step(&steps, "TCP (TLS) to 127.0.0.1")["remedy"].as_str().unwrap();
        assert!(remedy.contains("--proxy-server-port"), "nothing listens there: {remedy}");
        deployment.start_server(Culvert, &[]).await;
        let (code, steps) = precheck("agent", args).await;
        assert_eq!(code, Some(0), "{steps:?}");
        for step in [
            "files",
            "certificate",
            "certificate of the server",
            "name resolution",
            "UDP (QUIC) to 127.0.0.1",
            "TCP (TLS) to 127.0.0.1",
            "path MTU to 127.0.0.1",
        ] {
            assert_eq!(result(&steps, step), "ok", "{step} in {steps:?}");
        }
        assert_eq!(result(&steps, "HTTPS proxy"), "skipped");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_whose_certificate_the_server_refuses_does_not_work() {
    within(async {
        let mut deployment = Deployment::without_server(Connect);
        deployment.start_server(Culvert, &[]).await;
        let mut args = agent_args(&deployment);
        args.retain(|arg| !arg.starts_with("--agent-cert") && !arg.starts_with("--agent-key"));
        let (code, steps) = precheck("agent", args).await;
        assert_eq!(code, Some(1), "{steps:?}");
        for (name, expected) in
            [("UDP (QUIC) to 127.0.0.1", "warning"), ("TCP (TLS) to 127.0.0.1", "failed")]
        {
            assert_eq!(result(&steps, name), expected, "{steps:?}");
            let detail = step(&steps, name)["detail"].as_str().unwrap();
            assert!(detail.contains("set --agent-cert and --agent-key"), "{detail}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_flags_and_files_are_steps() {
    within(async {
        let deployment = Deployment::without_server(Connect);
        let mut args = agent_args(&deployment);
        args.push("--dial-timeout=0s".into());
        args.push("--max-streams=0".into());
        let (code, steps) = precheck("agent", args).await;
        assert_eq!(code, Some(1));
        let faults: Vec<_> = steps.iter().filter(|step| step["result"] == "failed").collect();
        assert_eq!(faults.len(), 2, "{steps:?}");
        assert!(faults.iter().all(|step| step["step"] == "flags"), "{faults:?}");
    })
    .await;
}

fn server_args(deployment: &Deployment) -> Vec<String> {
    let (admin, health) = (free_port().unwrap(), free_port().unwrap());
    let flags = ServerFlags {
        certificates: &deployment.certificates,
        socket: &deployment.socket(),
        frontend: Connect,
        address: std::net::Ipv4Addr::LOCALHOST.into(),
        ports: Ports { tunnel: deployment.tunnel().port(), admin, health },
        id: "server",
        count: 1,
    };
    flags.args()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_behind_a_proxy_checks_the_path_through_it() {
    within(async {
        let deployment = Deployment::start(Culvert, Connect, &[]).await;
        let mut args = agent_args(&deployment);
        // A host without a route to its servers; the proxy knows them by name.
        args.push("--proxy-server-host=server.invalid".into());
        args.push("--server-name=127.0.0.1".into());
        let carrying = proxy(Ok(deployment.tunnel())).await;
        let (code, steps) = precheck_with("agent", args.clone(), Some(carrying.address)).await;
        assert_eq!(code, Some(0), "{steps:?}");
        assert_eq!(result(&steps, "HTTPS proxy"), "ok");
        assert_eq!(result(&steps, "TCP (TLS) to server.invalid"), "ok");
        assert_eq!(result(&steps, "UDP (QUIC) to server.invalid"), "skipped");

        let refusing = proxy(Err("407 Proxy Authentication Required")).await;
        let (code, steps) = precheck_with("agent", args.clone(), Some(refusing.address)).await;
        assert_eq!(code, Some(1), "{steps:?}");
        let tcp = step(&steps, "TCP (TLS) to server.invalid");
        assert_eq!(tcp["result"], "failed");
        let text = tcp.to_string();
        assert!(text.contains("407") && text.contains("HTTPS_PROXY"), "{text}");

        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let (code, steps) = precheck_with("agent", args, Some(gone)).await;
        assert_eq!(code, Some(1), "{steps:?}");
        let text = step(&steps, "TCP (TLS) to server.invalid").to_string();
        assert!(text.contains("cannot be reached") && text.contains("HTTPS_PROXY"), "{text}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_has_expired_fails_and_its_expiry_is_shown() {
    within(async {
        let deployment = Deployment::start(Culvert, Connect, &[]).await;
        let file = deployment.certificates.folder().join("token");
        let args = |expires_in: i64| {
            let exp = Timestamp::now().as_second() + expires_in;
            let claims = json!({ "sub": "agent", "aud": ["servers"], "exp": exp });
            std::fs::write(&file, jwt(&claims)).unwrap();
            let flag = format!("--service-account-token-path={}", file.display());
            agent_args(&deployment).into_iter().chain([flag]).collect()
        };
        let (code, steps) = precheck("agent", args(-60)).await;
        assert_eq!(code, Some(1), "{steps:?}");
        let token = step(&steps, "token");
        assert_eq!(token["result"], "failed");
        assert!(token["detail"].as_str().unwrap().contains("it expired at "), "{token}");
        assert!(token["remedy"].as_str().unwrap().contains("project"), "{token}");
        let (code, steps) = precheck("agent", args(3600)).await;
        assert_eq!(code, Some(0), "{steps:?}");
        assert_eq!(result(&steps, "token"), "ok");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_asks_kube_apiserver_what_it_may_do() {
    within(async {
        let deployment = Deployment::without_server(Connect);
        let api = KubeApi::start(&deployment.certificates).await;
        let leases = ["--enable-lease-controller".to_owned()];
        let args = || {
            let args = server_args(&deployment).into_iter();
            args.chain(api.token_flags()).chain(leases.clone()).collect::<Vec<_>>()
        };
        let (code, steps) = precheck("server", args()).await;
        assert_eq!(code, Some(0), "{steps:?}");
        let questions = ["create tokenreviews", "get leases", "list leases", "watch leases"];
        for question in questions {
            assert_eq!(result(&steps, &format!("kube-apiserver: {question}")), "ok");
        }

        // Each refusal is shown, also the one after it.
        api.forbid("create", "tokenreviews");
        api.forbid("watch", "leases");
        let (code, steps) = precheck("server", args()).await;
        assert_eq!(code, Some(1), "{steps:?}");
        assert_eq!(result(&steps, "kube-apiserver: create tokenreviews"), "failed");
        assert_eq!(result(&steps, "kube-apiserver: update leases"), "ok");
        // Leases are listed where they cannot be watched.
        let watch = step(&steps, "kube-apiserver: watch leases");
        assert_eq!(watch["result"], "warning", "{watch}");
        assert!(watch["remedy"].as_str().unwrap().contains("permissions.yaml"), "{watch}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_counts_leases_asks_kube_apiserver_whether_it_may() {
    within(async {
        let deployment = Deployment::start(Culvert, Connect, &[]).await;
        let api = KubeApi::start(&deployment.certificates).await;
        api.forbid("watch", "leases");
        let mut args = agent_args(&deployment);
        args.extend(["--count-server-leases".into(), api.flag()]);
        let (code, steps) = precheck("agent", args).await;
        assert_eq!(code, Some(1), "{steps:?}");
        assert_eq!(result(&steps, "kube-apiserver: list leases"), "ok");
        assert_eq!(result(&steps, "kube-apiserver: watch leases"), "failed");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kube_apiserver_that_refuses_the_server_or_is_away_is_one_failed_step() {
    within(async {
        let deployment = Deployment::without_server(Connect);
        let api = KubeApi::start(&deployment.certificates).await;
        let args = || server_args(&deployment).into_iter().chain(api.token_flags()).collect();
        api.refuse(Some("no rights at all"));
        let (code, steps) = precheck("server", args()).await;
        assert_eq!(code, Some(1), "{steps:?}");
        let refused = step(&steps, "kube-apiserver").to_string();
        assert!(refused.contains("no rights at all"), "{refused}");
        let asked = |step: &&Value| step["step"].as_str().unwrap().starts_with("kube-apiserver");
        assert_eq!(steps.iter().filter(asked).count(), 1, "{steps:?}");
        api.refuse(None);

        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let text = std::fs::read_to_string(api.kubeconfig()).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["clusters"][0]["cluster"]["server"] = json!(format!("https://{gone}"));
        std::fs::write(api.kubeconfig(), config.to_string()).unwrap();
        let (code, steps) = precheck("server", args()).await;
        assert_eq!(code, Some(1), "{steps:?}");
        let away = step(&steps, "kube-apiserver");
        assert_eq!(away["result"], "failed");
        let text = away.to_string();
        assert!(text.contains("--kubeconfig") && text.contains(&gone.to_string()), "{text}");
        assert!(text.contains("refused"), "{text}");
        assert_eq!(steps.iter().filter(asked).count(), 1, "{steps:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_checks_its_ports_files_and_folders() {
    within(async {
        let mut deployment = Deployment::without_server(Connect);
        let (code, steps) = precheck("server", server_args(&deployment)).await;
        assert_eq!(code, Some(0), "{steps:?}");
        for step in [
            "files",
            "certificate of --cluster-cert",
            "port of --agent-port (UDP)",
            "folder of --uds-name",
        ] {
            assert_eq!(result(&steps, step), "ok", "{step} in {steps:?}");
        }
        assert_eq!(result(&steps, "kube-apiserver"), "skipped");
        deployment.start_server(Culvert, &[]).await;
        let mut again = server_args(&deployment);
        again.push("--operator-socket=/nowhere/operator.sock".into());
        let (code, steps) = precheck("server", again).await;
        assert_eq!(code, Some(1), "{steps:?}");
        assert_eq!(result(&steps, "port of --agent-port (UDP)"), "failed");
        assert_eq!(result(&steps, "port of --agent-port (TCP)"), "failed");
        assert_eq!(result(&steps, "folder of --operator-socket"), "failed");
    })
    .await;
}
