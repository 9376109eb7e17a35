//! Processes whose standard error is full, slow or gone: they serve, and lose log lines alone.

use std::{fs::File, io::pipe, net::Ipv4Addr, process::Stdio, time::Instant};

use culvert_loadtest::http;
use socket2::SockRef;
use tokio::net::TcpListener;

use crate::support::{
    sides::{ANSWER_TIMEOUT, Sides, answers, events, stop},
    within,
};

/// Counter of the lines that a process lost.
const DROPPED: &str = "culvert_log_lines_dropped_total";

async fn dropped(health_port: u16) -> f64 {
    let scrape = http::get((Ipv4Addr::LOCALHOST, health_port), "/metrics").await.unwrap().body;
    http::metric(&scrape, DROPPED).expect("the counter exists")
}

fn count(events: &[serde_json::Value], message: &str) -> usize {
    events.iter().filter(|event| event["message"] == message).count()
}

#[tokio::test]
async fn processes_whose_log_is_not_read_serve_three_thousand_dials() {
    within(async {
        let sides = Sides::new();
        let ((server_log, server), (agent_log, agent)) = (pipe().unwrap(), pipe().unwrap());
        let mut server = sides.server(server).await;
        let mut agent = sides.agent(agent);
        sides.until_joined().await;
        sides.dial(3_000).await;
        assert!(answers(sides.ports.health).await && answers(sides.agent_health).await);
        // A stuck log delays the end for a bounded time.
        let begun = Instant::now();
        stop(&mut agent).await;
        stop(&mut server).await;
        assert!(begun.elapsed() < ANSWER_TIMEOUT);
        drop((server_log, agent_log));
    })
    .await;
}

#[tokio::test]
async fn an_agent_whose_logs_reader_has_ended_joins_again() {
    within(async {
        let sides = Sides::new();
        let ((server_log, server), (agent_log, agent)) = (pipe().unwrap(), pipe().unwrap());
        let mut server = sides.server(server).await;
        let mut agent = sides.agent(agent);
        sides.until_joined().await;
        drop((server_log, agent_log));
        server.kill().await.unwrap();
        let (server_log, server) = pipe().unwrap();
        let mut server = sides.server(server).await;
        drop(server_log);
        sides.until_joined().await;
        sides.dial(100).await;
        assert!(dropped(sides.agent_health).await > 0.0);
        assert!(answers(sides.ports.health).await && answers(sides.agent_health).await);
        stop(&mut agent).await;
        stop(&mut server).await;
    })
    .await;
}

#[tokio::test]
async fn a_full_disk_under_the_log_costs_its_lines_alone() {
    within(async {
        let sides = Sides::new();
        let full = || File::options().write(true).open("/dev/full").unwrap();
        let mut server = sides.server(full()).await;
        let mut agent = sides.agent(full());
        sides.until_joined().await;
        sides.dial(100).await;
        assert!(dropped(sides.ports.health).await > 100.0);
        assert!(dropped(sides.agent_health).await > 100.0);
        stop(&mut agent).await;
        stop(&mut server).await;
    })
    .await;
}

#[tokio::test]
async fn a_pipe_in_non_blocking_mode_that_is_full_for_a_while_loses_nothing() {
    const DIALS: usize = 1_000; // four lines each, of 200 bytes or more: a pipe holds 64 KiB
    within(async {
        let sides = Sides::new();
        let (log, write) = pipe().unwrap();
        SockRef::from(&write).set_nonblocking(true).unwrap();
        let mut agent = sides.agent(write);
        let mut server = sides.server(Stdio::null()).await;
        sides.until_joined().await;
        sides.dial(DIALS).await;
        assert_eq!(dropped(sides.agent_health).await, 0.0);
        let reading = culvert_transport::task::owned(events(log));
        stop(&mut agent).await;
        stop(&mut server).await;
        let events = reading.await.unwrap();
        assert!(count(&events, "ended") >= DIALS, "{}", events.len());
        assert_eq!(count(&events, "culvert-agent ends"), 1);
    })
    .await;
}

/// Lines of a server in JSON about dials that fail at once, and one that fails three times more.
#[tokio::test]
async fn each_target_has_its_lines_about_failed_dials_and_their_fields_are_values() {
    within(async {
        let sides = Sides::new();
        let (log, write) = pipe().unwrap();
        let mut server = sides.server(write).await;
        let mut agent = sides.agent(Stdio::null());
        sides.until_joined().await;
        let mut refusing = Vec::new();
        for _ in 0..5 {
            let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            refusing.push(bound.local_addr().unwrap().to_string());
        }
        for target in refusing.iter().chain([&refusing[0]; 3]) {
            sides.connect(target).await.unwrap_err();
        }
        stop(&mut server).await;
        stop(&mut agent).await;
        let events = events(log).await;
        for (index, target) in refusing.iter().enumerate() {
            let lines = events.iter().filter(|event| {
                event["message"] == "dial failed" && event["dial_target"] == **target
            });
            let lines: Vec<_> = lines.collect();
            let first = lines[0];
            assert_eq!(first["agent_id"], "the-agent", "{first}");
            assert_eq!(first["reason"], "error_response", "{first}");
            assert_eq!(first["target"], "culvert_server::dial::dialer", "{first}");
            let (failed, reported) = (if index == 0 { 4 } else { 1 }, lines.len() as u64);
            let suppressed: u64 =
                lines.iter().map(|line| line["suppressed"].as_u64().unwrap()).sum();
            // A line that reports suppressed events alone has no reason.
            let events = lines.iter().filter(|line| line["reason"].is_string()).count() as u64;
            assert_eq!(events + suppressed, failed, "{reported} lines: {lines:?}");
        }
        let texts = events.iter().flat_map(|event| event.as_object().unwrap().values());
        for text in texts.filter_map(|value| value.as_str()) {
            let is_debug = text.starts_with('"') || text.contains("Some(") || text.contains(" { ");
            assert!(!is_debug, "{text}");
        }
    })
    .await;
}
