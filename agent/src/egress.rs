//! One data stream on the node: read what is to be dialed, dial it, answer, splice.

mod dial;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_transport::{
    RecvHalf, SendHalf,
    splice::{self, Local},
};
use culvert_wire::{
    StreamCode,
    dial::{DialErrorKind, DialFailure, DialReply, DialRequest, DialTiming},
    extension::Extensions,
    frame::{self, Message},
};
use tokio::{net::TcpStream, time::timeout};
use tracing::debug;

use crate::metrics::AgentMetrics;

/// Time for the server to send a whole dial request; it does so in the stream's first packet.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Dials targets for streams.
#[derive(Debug)]
pub struct Egress {
    /// Time for the look-up and connection of a target; the server's own limit counts if shorter.
    pub dial_timeout: Duration,
    /// What is counted.
    pub metrics: Arc<AgentMetrics>,
}

impl Egress {
    /// Serves one stream to its end.
    pub async fn serve(&self, (mut send, mut recv): (SendHalf, RecvHalf)) {
        let arrived = Instant::now();
        let request = match timeout(HEADER_TIMEOUT, read_request(&mut recv)).await {
            Ok(Ok(request)) => request,
            Ok(Err(error)) => return refuse(send, recv, StreamCode::MALFORMED, &error),
            Err(_) => return refuse(send, recv, StreamCode::MALFORMED, "no dial in time"),
        };
        let mut timing = DialTiming {
            header_micros: DialTiming::micros(arrived.elapsed()),
            ..DialTiming::default()
        };
        let outcome = tokio::select! {
            outcome = self.dial(&request, &mut timing) => outcome,
            // The server gave up; there is nobody to answer.
            () = abandoned(&send, &mut recv) => {
                return debug!(dial = %request.id, target = %request.target, "dial abandoned");
            }
        };
        let (answer, socket) = match outcome {
            Ok(socket) => (Ok(()), Some(socket)),
            Err(failure) => (Err(failure), None),
        };
        if let Err(failure) = &answer {
            self.metrics.dial_failed(failure.kind);
            debug!(dial = %request.id, target = %request.target, %failure, "dial failed");
        }
        let reply = DialReply { outcome: answer, timing, extensions: Extensions::default() };
        let Ok(reply) = frame::encode(&reply) else {
            return refuse(
                send,
                recv,
                StreamCode::ABANDONED,
                "a reply that does not fit its frame",
            );
        };
        if let Err(error) = send.write_chunk(reply).await {
            return debug!(dial = %request.id, %error, "nobody waits for the dial's answer");
        }
        match socket {
            Some(socket) => self.carry(&request, socket, (send, recv)).await,
            None => {
                send.finish();
                recv.stop(StreamCode::DIAL_FAILED);
            }
        }
    }

    async fn dial(
        &self,
        request: &DialRequest,
        timing: &mut DialTiming,
    ) -> Result<TcpStream, DialFailure> {
        if let Err(error) = request.extensions.require_known() {
            return Err(DialFailure::new(DialErrorKind::UNSUPPORTED, error.to_string()));
        }
        let limit = match request.timeout_millis {
            0 => self.dial_timeout,
            millis => self.dial_timeout.min(Duration::from_millis(millis.into())),
        };
        let started = Instant::now();
        let socket = dial::dial(request.network, &request.target, limit, timing).await?;
        self.metrics.dial_duration.record(started.elapsed());
        Ok(socket)
    }

    async fn carry(&self, request: &DialRequest, socket: TcpStream, stream: (SendHalf, RecvHalf)) {
        let started = Instant::now();
        let counted = self.metrics.stream_open();
        let (reader, writer, abort) = splice::halves(socket);
        let local = Local::new(reader, writer, abort);
        let outcome = splice::splice(local, stream, &self.metrics.meter).await;
        drop(counted);
        self.metrics.stream_ended(&outcome);
        let (dial, target, kind) = (request.id, &request.target, request.kind);
        let (up, down) = (outcome.to_tunnel, outcome.from_tunnel);
        let seconds = started.elapsed().as_secs_f64();
        match outcome.end {
            Ok((to, from)) => debug!(%dial, %target, ?kind, up, down, seconds, ?to, ?from, "ended"),
            Err(cut) => debug!(%dial, %target, ?kind, up, down, seconds, %cut, "cut off"),
        }
    }
}

async fn read_request(recv: &mut RecvHalf) -> Result<DialRequest, String> {
    let frame = recv.read_frame(DialRequest::MAX_LEN).await.map_err(|error| error.to_string())?;
    frame.message().map_err(|error| error.to_string())
}

/// Completes when the server has abandoned a dial that was not answered.
async fn abandoned(send: &SendHalf, recv: &mut RecvHalf) {
    tokio::select! {
        _ = send.stopped() => {}
        _ = recv.failed() => {}
    }
}

fn refuse(mut send: SendHalf, mut recv: RecvHalf, code: StreamCode, reason: &str) {
    debug!(%code, reason, "a stream was refused");
    send.reset(code);
    recv.stop(code);
}
