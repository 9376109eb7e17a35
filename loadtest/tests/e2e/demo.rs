//! The demo does what it says, in a second.

use crate::support::within;
use culvert_loadtest::demo::{self, Options};

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_runs_and_goes_down_again() {
    within(async {
        demo::run(&Options { agents: 2, seconds: 1, ..on_loopback() }).await.unwrap();
    })
    .await;
}

fn on_loopback() -> Options {
    Options {
        agents: 1,
        seconds: 1,
        hold: false,
        loss: None,
        delay: None,
        rate: 20.0,
        peers: vec![],
    }
}
