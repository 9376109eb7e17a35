//! An agent whose node reaches nothing, beside one whose node does (decision 0023).

use culvert_loadtest::{
    frontend::{Connection, FrontendKind::ConnectUnix, Protocol},
    targets,
};
use tokio::task::JoinSet;

use crate::support::{Carrier::Quic, agent, rig, within};

const EJECTIONS: &str = "culvert_server_ejections_total";
/// Dials at the same time: both agents get some of them.
const AT_ONCE: usize = 8;
/// Rounds of dials after which the agent must be ejected. The row of three time-outs takes one or
/// two; the agent that replies may get all dials of a round.
const MAX_ROUNDS: usize = 20;

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_reaches_nothing_gets_no_dials_after_a_few_time_outs() {
    within(async {
        let rig = rig(ConnectUnix, Quic).server_flag("--backend-dial-timeout=1s");
        let rig = rig.start().await.unwrap();
        let (tunnel, control) = agent::joined(&rig, "reaches-nothing").await;
        let _answering = culvert_transport::task::owned(agent::answer_pings(control));
        rig.until_joined(2).await.unwrap();
        let targets = [targets::echo().await.unwrap(), targets::echo().await.unwrap()];
        let addresses = targets.iter().map(|target| target.address()).collect::<Vec<_>>();
        let dial_all = async || {
            let mut dials = JoinSet::new();
            for address in addresses.iter().cycle().take(AT_ONCE).copied() {
                let socket = rig.uds();
                dials.spawn(async move {
                    Connection::dial_unix(Protocol::Connect, &socket, address).await.map(drop)
                });
            }
            dials.join_all().await
        };

        let mut failed = Vec::new();
        for _ in 0..MAX_ROUNDS {
            let round = dial_all().await;
            failed.extend(round.into_iter().filter_map(Result::err).map(|error| error.to_string()));
            if rig.server.metric(EJECTIONS) > 0.0 {
                break;
            }
        }
        assert_eq!(rig.server.metric(EJECTIONS), 1.0, "{failed:?}");
        let is_time_out = |error: &String| error.contains("timed out waiting for backend dial");
        assert!(failed.iter().all(is_time_out), "{failed:?}");

        // It is connected and alive; the other one gets all dials.
        for _ in 0..3 {
            dial_all().await.into_iter().for_each(Result::unwrap);
        }
        assert_eq!(rig.server.metric("culvert_server_tunnels"), 2.0);
        drop(tunnel);
    })
    .await;
}
