//! Finds out when connections have processed the packets that they were handed.
//!
//! quinn queues packets without a limit between the task that reads a socket and the task of each
//! connection, and reports nothing of these queues. A task that is handed a packet is woken, and it
//! empties its queue before it returns, unless tokio interrupts it. So time is divided into rounds:
//! a connection works in a round from the moment when it is woken until it has emptied its queue.
//! Once no connection works in a round any more, all packets of that round were processed.
//!
//! ```text
//!                wake, in this round
//!        ┌──────────────────────────────────┐
//!        │                                  ▼      woken during the poll
//!      idle                              working ──────────────────────┐
//!        ▲                                │   ▲                        │
//!        └────────────────────────────────┘   └────────────────────────┘
//!         poll that empties the queue           in the round when the poll began
//! ```
//!
//! A round may begin while connections work in the one before, but not while they work in the one
//! before that: two counters are enough.

mod reader;

use std::{
    fmt, io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, Wake, Waker},
    time::Instant,
};

use atomic_waker::AtomicWaker;
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};
use tokio::task::coop::has_budget_remaining;

use self::reader::Reader;

/// The rounds of the connections of one socket.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    /// Number of the round, of which the lowest bit matters.
    current: AtomicUsize,
    /// Numbers of connections that work in the round and in the one before.
    working: [AtomicUsize; 2],
    /// The socket's reader, which waits for the end of a round.
    reader: AtomicWaker,
}

impl Rounds {
    /// Begins the next round, if no connection works in the one before this one; whether it did.
    /// For the socket's reader alone.
    pub(super) fn begin_next(&self) -> bool {
        let next = self.current.load(SeqCst).wrapping_add(1);
        let may_begin = self.working[next & 1].load(SeqCst) == 0;
        if may_begin {
            self.current.store(next, SeqCst);
        }
        may_begin
    }

    /// Wakes this task once when [`Self::begin_next`] may have become possible.
    pub(super) fn wake_when_possible(&self, reader: &Waker) {
        self.reader.register(reader);
    }

    pub(super) fn current(&self) -> u8 {
        u8::from(self.current.load(SeqCst) & 1 == 1)
    }

    pub(super) fn enter(&self, round: u8) {
        self.working[usize::from(round)].fetch_add(1, SeqCst);
    }

    pub(super) fn leave(&self, round: u8) {
        if self.working[usize::from(round)].fetch_sub(1, SeqCst) == 1 {
            self.reader.wake();
        }
    }
}

/// An endpoint of quinn on this socket, whose connections work in rounds.
pub(super) fn endpoint(
    config: quinn::EndpointConfig,
    server: Option<quinn::ServerConfig>,
    socket: Arc<dyn AsyncUdpSocket>,
    rounds: Arc<Rounds>,
) -> io::Result<quinn::Endpoint> {
    let runtime = Arc::new(InRounds { rounds, has_reader: AtomicBool::new(false) });
    let endpoint =
        quinn::Endpoint::new_with_abstract_socket(config, server, socket, runtime.clone())?;
    // The first task is the reader; each further one is a connection's.
    runtime.has_reader.store(true, SeqCst);
    Ok(endpoint)
}

/// Tokio's runtime, by which quinn spawns the reader of a socket and then its connections.
#[derive(Debug)]
struct InRounds {
    rounds: Arc<Rounds>,
    has_reader: AtomicBool,
}

impl Runtime for InRounds {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, task: Task) {
        if self.has_reader.load(SeqCst) {
            TokioRuntime.spawn(Box::pin(Working::new(task, self.rounds.clone())));
        } else {
            TokioRuntime.spawn(Box::pin(Reader::new(task)));
        }
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

/// The bit that names the round in which a connection works.
const ROUND: u8 = 1;
/// The connection works.
const WORKING: u8 = 2;
/// The connection was woken since its latest poll began.
const WOKEN: u8 = 4;
/// The connection's task has ended.
const ENDED: u8 = 8;

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The task of a connection.
struct Working {
    task: Task,
    waker: Waker,
    state: Arc<State>,
}

/// What a connection's task and its wakers share.
#[derive(Debug)]
struct State {
    bits: AtomicU8,
    task: AtomicWaker,
    rounds: Arc<Rounds>,
}

impl State {
    /// Replaces the bits by what `next` makes of them, and enters and leaves rounds accordingly. No
    /// round that is left ends before the other one is entered.
    fn change(&self, next: impl Fn(u8) -> u8) {
        let round = |bits: u8| (bits & WORKING != 0).then_some(bits & ROUND);
        let mut old = self.bits.load(SeqCst);
        loop {
            let new = next(old);
            let (before, after) = (round(old), round(new));
            if before != after {
                after.inspect(|round| self.rounds.enter(*round));
            }
            let result = self.bits.compare_exchange(old, new, SeqCst, SeqCst);
            let left = if result.is_ok() { before } else { after };
            if before != after {
                left.inspect(|round| self.rounds.leave(*round));
            }
            match result {
                Ok(_) => return,
                Err(other) => old = other,
            }
        }
    }
}

impl Wake for State {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.change(|bits| match bits {
            _ if bits & ENDED != 0 => bits,
            _ if bits & WORKING != 0 => bits | WOKEN,
            _ => WORKING | self.rounds.current(),
        });
        self.task.wake();
    }
}

impl Working {
    /// A task that works from now on: it may be handed packets before its first poll, which do not
    /// wake it.
    fn new(task: Task, rounds: Arc<Rounds>) -> Self {
        let state = State { bits: AtomicU8::new(0), task: AtomicWaker::new(), rounds };
        state.change(|_| WORKING | state.rounds.current());
        let state = Arc::new(state);
        Self { task, waker: state.clone().into(), state }
    }
}

impl Future for Working {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let state = &this.state;
        state.task.register(cx.waker());
        state.change(|bits| match bits & WORKING {
            0 => WORKING | state.rounds.current(),
            _ => bits & !WOKEN,
        });
        let round = state.rounds.current();
        if this.task.as_mut().poll(&mut Context::from_waker(&this.waker)).is_ready() {
            state.change(|_| ENDED);
            return Poll::Ready(());
        }
        if has_budget_remaining() {
            // The queue was empty once during the poll. What wakes later was handed on in the round
            // when the poll began, or in the next one.
            state.change(|bits| if bits & WOKEN == 0 { 0 } else { WORKING | WOKEN | round });
        } else {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.state.change(|_| ENDED);
    }
}

impl fmt::Debug for Working {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Working").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        sync::atomic::{AtomicU64, Ordering::Relaxed},
        time::Duration,
    };

    use tokio::{
        sync::{Notify, mpsc},
        task::{JoinSet, yield_now},
        time::timeout,
    };

    use super::*;

    /// A connection: what hands packets to it, and how many it has processed.
    struct Connection {
        packets: mpsc::UnboundedSender<()>,
        processed: Arc<AtomicU64>,
        application: Arc<Notify>,
    }

    /// Spawns a connection, which is woken by packets and by its application.
    fn connection(tasks: &mut JoinSet<()>, rounds: &Arc<Rounds>) -> Connection {
        let (packets, mut received) = mpsc::unbounded_channel();
        let (processed, application) = <(Arc<AtomicU64>, Arc<Notify>)>::default();
        let (count, notified) = (processed.clone(), application.clone());
        let task = async move {
            let mut woken = Box::pin(notified.notified());
            poll_fn(|cx| {
                while let Poll::Ready(packet) = received.poll_recv(cx) {
                    let Some(()) = packet else { return Poll::Ready(()) };
                    count.fetch_add(1, Relaxed);
                }
                while woken.as_mut().poll(cx).is_ready() {
                    woken.set(notified.notified());
                }
                Poll::Pending
            })
            .await;
        };
        tasks.spawn(Working::new(Box::pin(task), rounds.clone()));
        Connection { packets, processed, application }
    }

    /// Waits until the next round has begun.
    async fn next_round(rounds: &Rounds) {
        let begins = poll_fn(|cx| {
            if !rounds.begin_next() {
                rounds.wake_when_possible(cx.waker());
                if !rounds.begin_next() {
                    return Poll::Pending;
                }
            }
            Poll::Ready(())
        });
        timeout(Duration::from_secs(60), begins).await.expect("the round ends");
    }

    #[tokio::test]
    async fn a_round_ends_once_its_packets_were_processed() {
        const PACKETS: u64 = 100_000;
        let (rounds, mut tasks) = (Arc::<Rounds>::default(), JoinSet::new());
        let connection = connection(&mut tasks, &rounds);
        assert!(rounds.begin_next());
        assert!(!rounds.begin_next(), "before its first poll a connection is not woken");
        yield_now().await;
        assert!(rounds.begin_next() && rounds.begin_next(), "it is idle");

        for _ in 0..PACKETS {
            connection.packets.send(()).unwrap();
        }
        assert!(rounds.begin_next());
        let mut polls = 0;
        while !rounds.begin_next() {
            polls += 1;
            assert!(polls < PACKETS, "the round does not end");
            yield_now().await;
        }
        assert_eq!(connection.processed.load(Relaxed), PACKETS);
        assert!(polls > 2, "tokio interrupts the connection: {polls}");
    }

    #[tokio::test]
    async fn a_connection_that_ends_works_in_no_round() {
        let (rounds, mut tasks) = (Arc::<Rounds>::default(), JoinSet::new());
        let ends = connection(&mut tasks, &rounds);
        let is_aborted = connection(&mut tasks, &rounds);
        yield_now().await;
        is_aborted.packets.send(()).unwrap();
        drop(ends.packets);
        tasks.shutdown().await;
        is_aborted.application.notify_one();
        assert!(rounds.begin_next() && rounds.begin_next() && rounds.begin_next());
    }

    /// The reader hands packets to connections on other threads, whose applications wake them too.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn no_round_begins_before_the_packets_of_the_one_before_the_last_were_processed() {
        const CONNECTIONS: usize = 8;
        const ROUNDS: u64 = 3000;
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let (rounds, mut tasks) = (Arc::<Rounds>::default(), JoinSet::new());
        let connections = [(); CONNECTIONS].map(|()| connection(&mut tasks, &rounds));
        let applications = connections.each_ref().map(|it| it.application.clone());
        let mut waking = JoinSet::new();
        waking.spawn(async move {
            loop {
                applications[fastrand::usize(..CONNECTIONS)].notify_one();
                yield_now().await;
            }
        });
        let mut handed_on = [0_u64; CONNECTIONS];
        let mut before = handed_on;
        for _ in 0..ROUNDS {
            for _ in 0..random.usize(..300) {
                // Some have more to do than others.
                let chosen = random.usize(..CONNECTIONS).min(random.usize(..CONNECTIONS));
                connections[chosen].packets.send(()).unwrap();
                handed_on[chosen] += 1;
            }
            next_round(&rounds).await;
            for (connection, before) in connections.iter().zip(before) {
                assert!(connection.processed.load(Relaxed) >= before);
            }
            before = handed_on;
        }
    }
}
