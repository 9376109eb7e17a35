//! The load of a run: a plan of workloads, and the samples that come of it.
//!
//! A [`Plan`] is data. Two programs carry it out in the same way: [`drive`] through HTTP CONNECT or
//! without a tunnel, and `konnectivity-client load` through gRPC, with kube-apiserver's own client
//! library. Both report a stream of [`Sample`]s, one JSON value per line.
//!
//! Every session connects to the one target of the plan, [`service`], and chooses with its first
//! byte what the target does (all numbers are big-endian):
//!
//! | bytes | what the target does |
//! | --- | --- |
//! | `E` | echoes |
//! | `D` | sends zeros until the connection ends |
//! | `S` | reads until the connection ends |
//! | `F` size:8 | sends `size` zeros |
//! | `R` size:8 | reads `size` bytes, then sends one byte |
//! | `Q` | answers each size:8 with that many zeros |
//! | `X` | answers each request, which begins with its own length:8 and size:8, with `size` zeros |
//! | `T` size:8 interval:8 | sends a line of `size` bytes every `interval` microseconds; the first eight are the time in nanoseconds since 1970 |
//! | `W` size:8 | reads to the end, and counts if that comes before `size` bytes |
//! | `A` size:8 | reads to the end, then sends how many bytes that were, as eight bytes |
//! | `P` seed:8 | sends the pseudo-random bytes of `seed` until the connection ends |
//! | `V` seed:8 | reads the pseudo-random bytes of `seed`; counts, and ends the connection, when it reads others |
//! | `H` | holds the connection |

pub mod drive;
mod noise;
mod record;
pub mod service;
mod session;

use serde::{Deserialize, Serialize};

/// The load of one run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Duration from the first dial on, in seconds.
    pub seconds: f64,
    /// Address of the target, as seen from the node.
    pub target: String,
    /// Workloads that run at the same time. Samples name them by their index.
    pub workloads: Vec<Workload>,
}

/// Sessions of one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Name in reports.
    pub name: String,
    /// Kind of its sessions.
    pub kind: Kind,
    /// Target of its sessions; that of the plan when `None`. In scenarios: `greeter`, which writes
    /// first, or `nowhere`, an address of the node's network that no host has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Number of sessions at the same time.
    #[serde(default = "one")]
    pub sessions: u32,
    /// Size of a message, a line, an answer or a transfer, in bytes.
    #[serde(default)]
    pub size: u64,
    /// Minimum time between two messages, lines, requests or dials of a session, in milliseconds.
    #[serde(default)]
    pub interval_ms: f64,
    /// Requests and answers of `exchange` and `short-connection`, carried out one after another:
    /// the next request is sent when the answer before it is complete.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exchanges: Vec<Exchange>,
}

/// A request and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exchange {
    /// Size of the request, in bytes: at least 16, which say how long it and the answer are.
    pub request: u64,
    /// Size of the answer, in bytes.
    pub answer: u64,
}

fn one() -> u32 {
    1
}

/// Kind of a session, which lasts from the run's start to its end.
///
/// A session that is cut has an error and connects again.
///
/// Open loop means: on a schedule that does not wait for answers. A message that is late because an
/// earlier write blocked counts from when it was due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Keystrokes: sends `size` bytes every interval, open loop, and times each echo. An echo with
    /// other bytes, or in another order, is an error.
    Echo,
    /// Reads as fast as it can.
    Download,
    /// Writes as fast as it can.
    Upload,
    /// Reads pseudo-random bytes as fast as it can and compares each. The first that differs is an
    /// error.
    CheckedDownload,
    /// Writes pseudo-random bytes as fast as it can; the target compares each. The first that
    /// differs is an error.
    CheckedUpload,
    /// Copies from the node: dials, reads `size` bytes and closes, again and again; times each.
    Fetch,
    /// Copies to the node: dials, writes `size` bytes, waits until they have arrived and closes,
    /// again and again; times each.
    Send,
    /// Requests on one connection: asks for `size` bytes every interval, open loop; times each
    /// answer to its last byte.
    Request,
    /// Requests on one connection, each of them all `exchanges`: every interval, but one at a
    /// time, as a client without pipelining. One that comes due before the last was answered is left out. Times each
    /// from when it was due to the last byte of the answer.
    Exchange,
    /// Dials, carries out all `exchanges` and closes, as a TLS client with one request: every
    /// interval, open loop, or one after another if that is 0. Times each from when the dial was
    /// due to the last byte of the last answer.
    ShortConnection,
    /// Log tails: the target writes a line of `size` bytes every interval; times each from the
    /// target.
    Tail,
    /// Dials, sends `size` bytes and reads them back unless that is 0, and closes: every interval,
    /// open loop, or one after another if that is 0. Times each to the dial's answer, or the echo.
    Dial,
    /// Dials, writes `size` bytes and closes, again and again; the target counts transfers that are
    /// incomplete.
    WriteClose,
    /// Dials, reads `size` bytes of an endless download and closes, again and again: Ctrl-C.
    Abandon,
    /// Dials a target that writes first, reads its line and closes, again and again.
    Greeting,
    /// Dials, writes `size` bytes, ends that direction and waits for the answer; not through gRPC,
    /// which cannot end one direction.
    HalfClose,
    /// Requests an endless download and reads nothing.
    Stall,
    /// Dials and does nothing.
    Idle,
}

/// An event of a session, with microseconds since the run's start. `workload` is an index of the
/// plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sample {
    /// The run starts: the time in nanoseconds since 1970.
    Start(u64),
    /// All sessions that stay are connected.
    Ready(u64),
    /// An answer: when it was due or requested, and how many microseconds it took. A session that
    /// was cut has one for its gap: from the oldest request without an answer, or from the cut if
    /// there was none, to the first answer on its next connection.
    Latency(usize, u64, u64),
    /// No answer before the end of the connection or of the run: when it was due, and how many
    /// microseconds that was before the end.
    Overdue(usize, u64, u64),
    /// Payload bytes read since the last such sample of the workload, all its sessions together;
    /// at least every 100 ms while there are any.
    Bytes(usize, u64, u64),
    /// Something failed.
    Error(usize, u64, String),
    /// The run is over.
    Done(u64),
}
