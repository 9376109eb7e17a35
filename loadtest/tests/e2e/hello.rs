//! The hello of an agent, and its attempts after a refusal.

use culvert_wire::{CloseCode, control::Secret, identifiers::Identifier};
use rstest::rstest;

use crate::support::{
    Carrier::{self, Quic, Tcp},
    server::FakeServer,
    within,
};

#[rstest]
#[tokio::test]
async fn a_hello_has_the_agents_name_identifiers_and_token(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let folder = tempfile::tempdir().unwrap();
        let token = folder.path().join("token");
        std::fs::write(&token, "first\n").unwrap();
        let fake = FakeServer::start(carrier, |config| {
            config.servers.token_file = Some(token.clone());
            config.identifiers =
                vec![Identifier::new("ipv4", "10.0.0.1").unwrap()].try_into().unwrap();
        })
        .await;
        let (tunnel, _control, hello) = fake.agent_joins().await;
        assert_eq!(hello.agent_id.as_str(), "agent");
        assert_eq!(hello.identifiers[..], [Identifier::new("ipv4", "10.0.0.1").unwrap()]);
        assert_eq!(hello.token, Some(Secret::new("first").unwrap()));

        // The token is replaced while the agent runs, and its next tunnel uses the new one.
        std::fs::write(&token, "second\n").unwrap();
        tunnel.close(CloseCode::DONE, "come again");
        let (_tunnel, _control, again) = fake.agent_joins().await;
        assert_eq!(again.token, Some(Secret::new("second").unwrap()));
        assert_eq!(again.instance, hello.instance, "the same process");
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn an_agent_that_is_refused_connects_again(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let fake = FakeServer::start(carrier, |_| {}).await;
        for _ in 0..5 {
            let (tunnel, ..) = fake.agent_joins().await;
            tunnel.close(CloseCode::OVERLOADED, "not now");
        }
        fake.agent_joins().await;
    })
    .await;
}
