//! How an agent introduces itself, and that it never gives up.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use culvert_loadtest::frontend::Door;
use culvert_wire::{CloseCode, control::Secret, identifiers::Identifier};

use common::{server::FakeServer, within};

#[tokio::test]
async fn an_agent_tells_its_name_identifiers_and_token() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let folder = tempfile::tempdir().unwrap();
            let token = folder.path().join("token");
            std::fs::write(&token, "first\n").unwrap();
            let fake = FakeServer::start(door, |config| {
                config.servers.token_file = Some(token.clone());
                config.identifier_pairs = vec![("ipv4".into(), "10.0.0.1".into())];
            })
            .await;
            let (tunnel, _control, hello) = fake.agent_joins().await;
            assert_eq!(hello.agent_id.as_str(), "agent");
            assert_eq!(hello.identifiers[..], [Identifier::new("ipv4", "10.0.0.1").unwrap()]);
            assert_eq!(hello.token, Some(Secret::new("first").unwrap()));

            // The token is replaced while the agent lives, and the next tunnel takes the new one.
            std::fs::write(&token, "second\n").unwrap();
            tunnel.close(CloseCode::DONE, "come again");
            let (_tunnel, _control, again) = fake.agent_joins().await;
            assert_eq!(again.token, Some(Secret::new("second").unwrap()));
            assert_eq!(again.instance, hello.instance, "the same process");
        })
        .await;
    }
}

#[tokio::test]
async fn an_agent_that_is_turned_away_comes_again() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let fake = FakeServer::start(door, |_| {}).await;
            for _ in 0..5 {
                let (tunnel, ..) = fake.agent_joins().await;
                tunnel.close(CloseCode::OVERLOADED, "not now");
            }
            fake.agent_joins().await;
        })
        .await;
    }
}
