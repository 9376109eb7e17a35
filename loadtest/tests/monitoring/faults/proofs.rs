//! Peers that do not prove what they should, or claim what is not theirs.

use std::fs;

use culvert_loadtest::{certificates::Certificates, process::Signal};
use culvert_process::kubernetes::Timestamp;
use serde_json::json;
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

use super::{Bench, Fault};
use crate::{
    site::Site,
    support::kube_api::{ACCOUNT, AUDIENCE, KubeApi, jwt},
};

fn token(name: &str) -> String {
    jwt(&json!({ "sub": name, "exp": Timestamp::now().as_second() + 3600 }))
}

/// Flags of an agent with this certificate.
fn with_certificate(certificates: &Certificates, name: &str) -> [String; 2] {
    let pair = certificates.issue(name).unwrap();
    let (certificate, key) = (pair.certificate.display(), pair.key.display());
    [format!("--agent-cert={certificate}"), format!("--agent-key={key}")]
}

/// The flag of an agent with this token, and its file.
fn with_token(site: &Site, token: &str) -> String {
    let file = site.file("token");
    fs::write(&file, token).unwrap();
    format!("--service-account-token-path={}", file.display())
}

pub(crate) async fn foreign_certificate(bench: Bench) -> Fault {
    let site = bench.site("foreign_certificate");
    let server = site.server(&[]).await;
    let agent = site.inner_agent("a", &[]);
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move {
        let others = Certificates::generate().unwrap();
        let flags = with_certificate(&others, "stranger");
        let stranger = site.inner_agent("b", &flags.each_ref().map(String::as_str));
        (server, agent, others, stranger)
    })
}

pub(crate) async fn http_at_the_agent_port(bench: Bench) -> Fault {
    let site = bench.site("http_at_the_agent_port");
    let server = site.server(&[]).await;
    let agent = site.inner_agent("a", &[]);
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move {
        for _ in 0..80 {
            let mut scanner = TcpStream::connect(site.tunnel).await.unwrap();
            scanner.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        }
        (server, agent)
    })
}

/// A server that asks for tokens, and the kube-apiserver that reviews them.
async fn guarded(name: &'static str) -> (Site, KubeApi, super::super::site::Node) {
    let site = Bench::apart(name);
    let api = KubeApi::start(&site.certificates).await;
    let server = site.server(&api.token_flags().each_ref().map(String::as_str)).await;
    (site, api, server)
}

pub(crate) async fn reviews_refused(_: Bench) -> Fault {
    let (site, api, server) = guarded("reviews_refused").await;
    let accepted = token("accepted");
    api.accept(&accepted, ACCOUNT, AUDIENCE);
    let agent = site.inner_agent("a", &[&with_token(&site, &accepted)]);
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move {
        api.refuse(Some("the server may not review tokens"));
        let others: Vec<_> = (0..6)
            .map(|number| {
                let id = format!("other-{number}");
                let other = Site { name: "reviews_refused_others", ..site.clone() };
                let file = other.file(&id);
                fs::write(&file, token(&id)).unwrap();
                let flag = format!("--service-account-token-path={}", file.display());
                site.inner_agent(&id, &[&flag])
            })
            .collect();
        (server, agent, api, others, site)
    })
}

pub(crate) async fn new_token_refused(_: Bench) -> Fault {
    let (site, api, server) = guarded("new_token_refused").await;
    let accepted = token("accepted");
    api.accept(&accepted, ACCOUNT, AUDIENCE);
    let flag = with_token(&site, &accepted);
    let mut agent = site.agent("a", &[flag]).await;
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move {
        with_token(&site, &token("unknown"));
        agent.process.signal(Signal::Reload).await.unwrap();
        (server, agent, api, site)
    })
}

pub(crate) async fn one_id_twice(bench: Bench) -> Fault {
    let site = bench.site("one_id_twice");
    let server = site.server(&[]).await;
    let agents = [site.inner_agent("twin", &[]), site.inner_agent("twin", &[])];
    server.until_joined(2).await;
    Fault::of(vec![server.target.clone()], async move { (server, agents) })
}

pub(crate) async fn id_of_another(bench: Bench) -> Fault {
    let site = bench.site("id_of_another");
    let server = site.server(&[]).await;
    let flags = with_certificate(&site.certificates, "owner");
    let owner = site.inner_agent("node-1", &flags.each_ref().map(String::as_str));
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move {
        let flags = with_certificate(&site.certificates, "impostor");
        let impostor = site.inner_agent("node-1", &flags.each_ref().map(String::as_str));
        (server, owner, impostor)
    })
}

pub(crate) async fn no_lease(_: Bench) -> Fault {
    let site = Bench::apart("no_lease");
    let api = KubeApi::start(&site.certificates).await;
    let json = "--kube-api-content-type=application/json";
    let server = site.server(&["--enable-lease-controller", json, &api.flag()]).await;
    let agent = site.inner_agent("a", &[]);
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move {
        api.refuse(Some("the server may not keep Leases"));
        (server, agent, api, site)
    })
}
