//! Agents that prove who they are by a service-account token: agents and servers of both makes, and
//! a kube-apiserver that says which tokens are good. Where there is no Go to build Konnectivity's programs
//! these say so and are skipped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{path::PathBuf, time::Duration};

use common::{
    kube_api::KubeApi,
    mixed::{Daemon, Make, Site, until},
    within,
};
use culvert_loadtest::{peer::Frontend, targets};

const AUDIENCE: &str = "system:konnectivity-server";
const MAKES: [Make; 2] = [Make::Culvert, Make::Konnectivity];

/// A server that asks for tokens, and the kube-apiserver that it asks.
struct Guarded {
    site: Site,
    api: KubeApi,
}

impl Guarded {
    async fn start(make: Make) -> Option<Self> {
        let mut site = Site::idle(Frontend::Connect).await?;
        let api = KubeApi::start(&site.certificates).await;
        let kubeconfig = api.flag();
        let flags = [
            "--cluster-ca-cert=",
            "--agent-namespace=kube-system",
            "--agent-service-account=konnectivity-agent",
            "--authentication-audience=system:konnectivity-server",
            "--kube-api-content-type=application/json",
            &kubeconfig,
        ];
        site.start_server(make, &flags).await;
        Some(Self { site, api })
    }

    fn vouch(&self, token: &str, user: &str) {
        self.api.vouch(token, user, AUDIENCE);
    }

    /// Starts an agent whose token is what the file says.
    fn start_agent(&self, make: Make, name: &str, token: &str) -> (Daemon, PathBuf) {
        let file = self.site.certificates.folder().join(format!("{name}.token"));
        std::fs::write(&file, token).unwrap();
        let flag = format!("--service-account-token-path={}", file.display());
        (self.site.start_agent_unproven(make, name, vec![flag]), file)
    }
}

const GOOD: &str = "system:serviceaccount:kube-system:konnectivity-agent";

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_with_the_right_token_serves() {
    for server in MAKES {
        let Some(guarded) = Guarded::start(server).await else { return };
        guarded.vouch("good", GOOD);
        for agent in MAKES {
            println!("{agent:?} at {server:?}");
            within(async {
                let (_agent, _) = guarded.start_agent(agent, &format!("{agent:?}"), "good");
                guarded.site.until_joined(1).await;
                let echo = targets::echo().await.unwrap();
                let mut connection = guarded.site.dial(echo.address()).await.unwrap();
                connection.write(b"through").await.unwrap();
                assert_eq!(connection.read_count(7).await.unwrap(), b"through");
            })
            .await;
            guarded.site.until_joined(0).await;
        }
        let reviews = guarded.api.reviews();
        assert!(!reviews.is_empty());
        for review in reviews {
            assert_eq!(review["token"], "good");
            assert_eq!(review["audiences"][0], AUDIENCE);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_with_another_token_is_told_why_and_joins_once_it_has_the_right_one() {
    let other_namespace = "incoming request from \"default\" namespace. Expected \"kube-system\"";
    let other_account =
        "incoming request from \"default\" service account. Expected \"konnectivity-agent\"";
    let cases = [
        ("unknown", "service account jwt not valid"),
        ("other-namespace", other_namespace),
        ("other-account", other_account),
        ("a-node", "unexpected username format"),
    ];
    for server in MAKES {
        let Some(guarded) = Guarded::start(server).await else { return };
        guarded.vouch("other-namespace", "system:serviceaccount:default:konnectivity-agent");
        guarded.vouch("other-account", "system:serviceaccount:kube-system:default");
        guarded.vouch("a-node", "system:node:one");
        for agent in MAKES {
            for (token, words) in cases {
                println!("{agent:?} at {server:?} with {token}");
                within(guarded.refused_until_right(agent, token, words)).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_waits_while_nobody_reviews_tokens() {
    const WORDS: &str = "tokenreviews is forbidden";
    for server in MAKES {
        let Some(guarded) = Guarded::start(server).await else { return };
        for agent in MAKES {
            println!("{agent:?} at {server:?}");
            within(async {
                guarded.api.refuse(Some(WORDS));
                // Each has its own: a server of ours remembers good ones for a moment.
                let token = format!("of {agent:?}");
                guarded.vouch(&token, GOOD);
                let (process, _) = guarded.start_agent(agent, &format!("{agent:?}"), &token);
                guarded.until_told(agent, &process, WORDS).await;
                guarded.api.refuse(None);
                guarded.site.until_joined(1).await;
            })
            .await;
            guarded.site.until_joined(0).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_without_a_token_is_told_that_it_needs_one() {
    for server in MAKES {
        let Some(guarded) = Guarded::start(server).await else { return };
        for agent in MAKES {
            println!("{agent:?} at {server:?}");
            within(async {
                let name = format!("{agent:?}");
                let process = guarded.site.start_agent_unproven(agent, &name, Vec::new());
                let words = match server {
                    Make::Culvert => "--service-account-token-path",
                    Make::Konnectivity => "Authentication context was not found in metadata",
                };
                guarded.until_told(agent, &process, words).await;
            })
            .await;
        }
        assert_eq!(guarded.api.reviews().len(), 0);
    }
}

/// A review that takes its time is no fault of QUIC's, and nobody asks twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_review_keeps_an_agent_on_quic_and_its_verdict_is_remembered() {
    let Some(guarded) = Guarded::start(Make::Culvert).await else { return };
    within(async {
        guarded.vouch("good", GOOD);
        guarded.api.take_long(Duration::from_secs(1));
        let (agent, _) = guarded.start_agent(Make::Culvert, "agent", "good");
        guarded.site.until_joined(1).await;
        assert!(agent.log().contains("transport=\"quic\""), "{}", agent.log());
        let (_other, _) = guarded.start_agent(Make::Culvert, "other", "good");
        guarded.site.until_joined(2).await;
        assert_eq!(guarded.api.reviews().len(), 1);
    })
    .await;
}

impl Guarded {
    async fn refused_until_right(&self, make: Make, token: &str, words: &str) {
        self.vouch("good", GOOD);
        let (agent, file) = self.start_agent(make, &format!("{make:?}-{token}"), token);
        self.until_told(make, &agent, words).await;
        std::fs::write(file, "good").unwrap();
        self.site.until_joined(1).await;
        drop(agent);
        self.site.until_joined(0).await;
    }

    /// Waits until server and agent have logged that the agent is refused with these words. A Konnectivity
    /// agent sees no more than that there is no answer.
    async fn until_told(&self, make: Make, agent: &Daemon, words: &str) {
        let agent_sees = match make {
            Make::Culvert => words,
            Make::Konnectivity => "expected one server ID in the context, got []",
        };
        // Both makes escape quotes.
        let logged = |log: String, words| log.replace('\\', "").contains(words);
        until("the agent is told", async || logged(agent.log(), agent_sees)).await;
        until("the server tells", async || logged(self.site.server.log(), words)).await;
        assert_eq!(self.site.ready_backends().await, 0.0);
    }
}
