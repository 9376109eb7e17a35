//! Benchmarks of small parts: `cargo bench -p culvert-loadtest`.
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on has failed")]

use std::{sync::Arc, time::Instant};

use culvert_loadtest::{
    frontend::Connection,
    rig::{Rig, Running},
    targets,
};
use culvert_server::{
    backends::departure::Departure,
    backends::load::Load,
    backends::registry::{Candidate, Registry},
    config::Strategy,
};
use culvert_transport::priority::{AttainedService, PriorityBudget};
use culvert_wire::{
    AgentId, Target,
    dial::{DialReply, DialRequest, DialTiming, Network, StreamKind},
    extension::Extensions,
    frame::{self, Frame, FrameHead, HEAD_LEN},
    identifiers::{Identifier, Identifiers},
    ids::DialId,
};
use divan::{Bencher, black_box, counter::BytesCount};
use tokio::runtime::Runtime;

fn main() {
    divan::main();
}

fn request() -> DialRequest {
    DialRequest {
        id: DialId(0x0123_4567_89ab_cdef),
        network: Network::Tcp,
        target: "10.0.0.9:10250".parse().unwrap(),
        timeout_millis: 10_000,
        kind: StreamKind::UNKNOWN,
        trace: None,
        extensions: Extensions::default(),
    }
}

fn frame_of(bytes: &[u8]) -> Frame {
    let (head, body) = bytes.split_first_chunk::<HEAD_LEN>().unwrap();
    Frame { kind: FrameHead::decode(*head).kind, body: body.to_vec().into() }
}

#[divan::bench]
fn encode_a_dial_request(bencher: Bencher<'_, '_>) {
    let request = request();
    bencher.bench_local(|| frame::encode(black_box(&request)).unwrap());
}

#[divan::bench]
fn decode_a_dial_request(bencher: Bencher<'_, '_>) {
    let frame = frame_of(&frame::encode(&request()).unwrap());
    bencher.bench_local(|| black_box(&frame).message::<DialRequest>().unwrap());
}

#[divan::bench]
fn decode_a_dial_reply(bencher: Bencher<'_, '_>) {
    let reply = DialReply {
        outcome: Ok(()),
        timing: DialTiming { header_micros: 1, resolve_micros: 2, connect_micros: 3 },
        extensions: Extensions::default(),
    };
    let frame = frame_of(&frame::encode(&reply).unwrap());
    bencher.bench_local(|| black_box(&frame).message::<DialReply>().unwrap());
}

struct Backend {
    agent_id: AgentId,
    identifiers: Identifiers,
}

impl Candidate for Backend {
    fn agent_id(&self) -> &AgentId {
        &self.agent_id
    }

    fn identifiers(&self) -> &Identifiers {
        &self.identifiers
    }

    fn is_avoided(&self) -> bool {
        false
    }

    fn has_left(&self) -> bool {
        false
    }

    fn may_replace(&self, _: &Self) -> bool {
        true
    }

    fn load(&self) -> Load {
        Load { pending_dials: 0, rtt: None }
    }

    fn has_outlived_the_arrival_of(&self, _: &Self) -> bool {
        true
    }
}

fn backend(number: usize) -> Arc<Backend> {
    let host = Identifier::new("host", &format!("node-{number}")).unwrap();
    Arc::new(Backend {
        agent_id: format!("agent-{number}").parse().unwrap(),
        identifiers: Identifiers::try_from(vec![host]).unwrap(),
    })
}

fn registry(backends: usize) -> Registry<Backend> {
    let mut registry = Registry::new(&[Strategy::DestHost, Strategy::Default]);
    for number in 0..backends {
        registry.add(&backend(number));
    }
    registry
}

#[divan::bench(args = [1, 100, 10_000])]
fn choose_a_backend(bencher: Bencher<'_, '_>, backends: usize) {
    let registry = registry(backends);
    let known: Target = format!("node-{}:10250", backends / 2).parse().unwrap();
    let other: Target = "10.0.0.9:10250".parse().unwrap();
    bencher.bench_local(|| {
        (registry.choose(black_box(&known), 7), registry.choose(black_box(&other), 7))
    });
}

#[divan::bench(args = [1, 100, 10_000])]
fn add_and_remove_a_backend(bencher: Bencher<'_, '_>, backends: usize) {
    let mut registry = registry(backends);
    let newcomer = backend(backends);
    bencher.bench_local(|| {
        registry.add(black_box(&newcomer));
        registry.remove(&newcomer, Departure::InOrder, tokio::time::Instant::now());
    });
}

/// Cost of the scheduler for a write, with a hundred streams that take turns.
#[divan::bench]
fn schedule_a_write(bencher: Bencher<'_, '_>) {
    let now = Instant::now();
    let share = PriorityBudget::new(now);
    let mut streams: Vec<_> = (0..100).map(|_| AttainedService::new(share.clone(), now)).collect();
    let mut turn = 0;
    bencher.bench_local(|| {
        turn = (turn + 1) % streams.len();
        black_box(streams[turn].on_write(Instant::now(), 1400))
    });
}

/// A rig with a connection to an echo through it.
struct Spliced {
    runtime: Runtime,
    connection: Connection,
    _rig: Running,
    _target: targets::Target,
}

impl Spliced {
    fn new() -> Self {
        let runtime = Runtime::new().unwrap();
        let (rig, target, connection) = runtime.block_on(async {
            let rig = Rig::new().start().await.unwrap();
            let target = targets::echo().await.unwrap();
            let connection = rig.dial(target.address()).await.unwrap();
            (rig, target, connection)
        });
        Self { runtime, connection, _rig: rig, _target: target }
    }
}

/// There and back: twice two splices.
#[divan::bench(args = [64, 16_384, 1_048_576], sample_count = 20)]
fn echo_through_two_splices(bencher: Bencher<'_, '_>, bytes: usize) {
    let mut spliced = Spliced::new();
    let message = vec![7; bytes];
    bencher.counter(BytesCount::new(2 * bytes)).bench_local(|| {
        let Spliced { runtime, connection, .. } = &mut spliced;
        runtime.block_on(async {
            connection.write(&message).await.unwrap();
            connection.read_count(bytes).await.unwrap()
        })
    });
}
