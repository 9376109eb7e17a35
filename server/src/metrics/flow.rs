//! What Konnectivity counts about its streams of packets.

use std::time::{Duration, Instant};

use culvert_process::metrics::{
    Counted, Durations, Exposition, Kind, LiveCount, Metrics, PacketType, Segment, StreamErrors,
    StreamPackets,
};
use culvert_transport::splice::Meter;

use super::families::{
    FRONTEND_WRITES, FULL_CHANNELS, Family, LATENCY_BUCKETS, STREAM_ERRORS, STREAM_PACKETS,
};

/// Code of gRPC, as Go spells it, of a stream whose peer has gone.
const CANCELED: &str = "Canceled";

/// What flows between frontends and agents. Agents of Culvert send no packets: a dial, its reply and
/// the ends of a connection count as the packets that Konnectivity would send.
#[derive(Debug)]
pub(crate) struct Flow {
    packets: StreamPackets,
    errors: StreamErrors,
    writes: Durations,
    /// Connections whose frontend's bytes wait for the tunnel.
    from_frontend: LiveCount,
    /// Connections whose frontend does not take the target's bytes.
    to_frontend: LiveCount,
}

impl Flow {
    pub(super) fn new(metrics: &Metrics) -> Self {
        let known = [(Segment::FromClient, CANCELED), (Segment::FromAgent, CANCELED)];
        Self {
            packets: StreamPackets::default(),
            errors: StreamErrors::new(metrics, STREAM_ERRORS, &known),
            writes: Durations::new(LATENCY_BUCKETS),
            from_frontend: LiveCount::default(),
            to_frontend: LiveCount::default(),
        }
    }

    /// Counts a packet.
    pub(crate) fn packet(&self, segment: Segment, packet: PacketType) {
        self.packets.record(segment, packet);
    }

    /// Counts the end of a connection that was not lost with its tunnel.
    pub(crate) fn closed(&self) {
        self.packet(Segment::ToAgent, PacketType::CloseReq);
        self.packet(Segment::FromAgent, PacketType::CloseRsp);
    }

    /// Counts a stream whose peer has left before its end.
    pub(crate) fn canceled(&self, segment: Segment, packet: Option<PacketType>) {
        self.errors.record(segment, CANCELED, packet);
    }

    /// Records the time of a write to a frontend.
    pub(crate) async fn timed<T>(&self, write: impl Future<Output = T>) -> T {
        let started = Instant::now();
        let written = write.await;
        self.written(started.elapsed());
        written
    }

    /// Records the time of a write to a frontend.
    pub(crate) fn written(&self, duration: Duration) {
        self.writes.record(duration);
    }

    /// Counts a connection whose frontend's bytes wait for the tunnel, until the guard is dropped.
    pub(crate) fn waits_for_tunnel(&self) -> Counted {
        self.from_frontend.enter()
    }

    /// Counts a connection whose frontend does not take bytes, until the guard is dropped.
    pub(crate) fn waits_for_frontend(&self) -> Counted {
        self.to_frontend.enter()
    }

    /// Adds the families. `meter` has counted the bytes between frontends and agents.
    pub(super) fn collect(&self, meter: &Meter, exposition: &mut Exposition) {
        let Family { name, help } = FRONTEND_WRITES;
        exposition.histogram(name, help, &self.writes);
        let Family { name, help } = FULL_CHANNELS;
        let waiting = [("Proxy", &self.from_frontend), ("Connect", &self.to_frontend)];
        let rows =
            waiting.map(|(method, it)| (vec![("service_method", method.to_owned())], it.get()));
        exposition.family(name, Kind::Gauge, help, rows);
        let segments = [
            (Segment::FromClient, 0),
            (Segment::ToClient, 0),
            (Segment::FromAgent, meter.writes_from_tunnel()),
            (Segment::ToAgent, meter.writes_to_tunnel()),
        ];
        self.packets.collect(STREAM_PACKETS, &segments, exposition);
    }
}
