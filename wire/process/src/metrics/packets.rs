//! Packets and errors of streams, as Konnectivity counts them.

use std::sync::atomic::{AtomicU64, Ordering};

use metrics::Counter;

use super::{Exposition, Kind, Metrics};

/// Part of a packet's path, and its direction there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// From a frontend to the server.
    FromClient,
    /// From the server to a frontend.
    ToClient,
    /// From an agent to the server.
    FromAgent,
    /// From the server to an agent.
    ToAgent,
}

impl Segment {
    fn label(self) -> &'static str {
        match self {
            Self::FromClient => "from_client",
            Self::ToClient => "to_client",
            Self::FromAgent => "from_agent",
            Self::ToAgent => "to_agent",
        }
    }

    /// The types of packets that occur there.
    fn types(self) -> &'static [PacketType] {
        use PacketType::{CloseReq, CloseRsp, Data, DialCls, DialReq, DialRsp, Drain};
        match self {
            Self::FromClient | Self::ToAgent => &[DialReq, CloseReq, Data, DialCls],
            Self::ToClient => &[DialRsp, CloseRsp, Data],
            Self::FromAgent => &[DialRsp, CloseRsp, Data, Drain],
        }
    }
}

/// Type of a packet, in the order of Konnectivity's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketType {
    /// The request of a dial.
    DialReq,
    /// Its result.
    DialRsp,
    /// The end of a connection, from its client's side.
    CloseReq,
    /// The end of a connection, from its target's side.
    CloseRsp,
    /// Bytes that were read at once.
    Data,
    /// A dial that is given up.
    DialCls,
    /// An agent that takes no new dials.
    Drain,
}

impl PacketType {
    const ALL: [Self; 7] = [
        Self::DialReq,
        Self::DialRsp,
        Self::CloseReq,
        Self::CloseRsp,
        Self::Data,
        Self::DialCls,
        Self::Drain,
    ];

    /// The type with this number in Konnectivity's protocol.
    pub fn from_number(number: i32) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    fn label(self) -> &'static str {
        match self {
            Self::DialReq => "DIAL_REQ",
            Self::DialRsp => "DIAL_RSP",
            Self::CloseReq => "CLOSE_REQ",
            Self::CloseRsp => "CLOSE_RSP",
            Self::Data => "DATA",
            Self::DialCls => "DIAL_CLS",
            Self::Drain => "DRAIN",
        }
    }
}

/// Number of packets by segment and type.
#[derive(Debug, Default)]
pub struct StreamPackets([[AtomicU64; 7]; 4]);

impl StreamPackets {
    /// Counts one packet.
    pub fn record(&self, segment: Segment, packet: PacketType) {
        self.0[segment as usize][packet as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Adds the family `name` with these segments: the types that occur there, and any other that
    /// was counted. The numbers are those of DATA packets, which are counted elsewhere.
    pub fn collect(&self, name: &str, segments: &[(Segment, u64)], exposition: &mut Exposition) {
        let rows = segments.iter().flat_map(|&(segment, data)| {
            PacketType::ALL.into_iter().filter_map(move |packet| {
                let counted = self.0[segment as usize][packet as usize].load(Ordering::Relaxed);
                let value = counted + if packet == PacketType::Data { data } else { 0 };
                let labels = vec![
                    ("segment", segment.label().to_owned()),
                    ("packet_type", packet.label().to_owned()),
                ];
                (segment.types().contains(&packet) || value > 0).then_some((labels, value))
            })
        });
        let help = "Count of packets processed, by segment and packet type \
                    (example: from_client, DIAL_REQ)";
        exposition.family(name, Kind::Counter, help, rows);
    }
}

/// Counter of the errors of streams, by segment, code of gRPC and type of the packet.
#[derive(Clone, Debug)]
pub struct StreamErrors {
    metrics: Metrics,
    name: &'static str,
}

impl StreamErrors {
    /// The counter `name`. These errors, which concern no packet, begin at 0.
    pub fn new(metrics: &Metrics, name: &'static str, known: &[(Segment, &str)]) -> Self {
        let help = "Count of gRPC stream errors, by segment, grpc Code, packet type. \
                    (example: from_agent, Code.Unavailable, DIAL_RSP)";
        metrics.describe_counter(name, help);
        let errors = Self { metrics: metrics.clone(), name };
        known.iter().for_each(|(segment, code)| drop(errors.counter(*segment, code, None)));
        errors
    }

    /// Counts an error with this code, in Go's spelling, while a packet was sent, or without one.
    pub fn record(&self, segment: Segment, code: &str, packet: Option<PacketType>) {
        self.counter(segment, code, packet).increment(1);
    }

    fn counter(&self, segment: Segment, code: &str, packet: Option<PacketType>) -> Counter {
        let packet = packet.map_or("Unknown", PacketType::label);
        let labels = [("segment", segment.label()), ("code", code), ("packet_type", packet)];
        self.metrics.counter(self.name, &labels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_has_the_types_that_occur_there_and_those_that_came_nevertheless() {
        let packets = StreamPackets::default();
        packets.record(Segment::FromAgent, PacketType::DialRsp);
        packets.record(Segment::FromAgent, PacketType::from_number(2).unwrap());
        assert_eq!(PacketType::from_number(7), None);
        let mut exposition = Exposition::new(String::new());
        packets.collect("p", &[(Segment::FromAgent, 5)], &mut exposition);
        let text = exposition.into_text();
        let values: Vec<_> = text.lines().filter(|line| line.starts_with("p{")).collect();
        let expected =
            [("DIAL_RSP", 1), ("CLOSE_REQ", 1), ("CLOSE_RSP", 0), ("DATA", 5), ("DRAIN", 0)]
                .map(|(name, n)| format!("p{{segment=\"from_agent\",packet_type=\"{name}\"}} {n}"));
        assert_eq!(values, expected);
    }

    #[test]
    fn errors_have_konnectivitys_labels() {
        let metrics = Metrics::new("1", &[]).unwrap();
        let errors = StreamErrors::new(&metrics, "e", &[(Segment::FromAgent, "Canceled")]);
        errors.record(Segment::ToClient, "Unavailable", Some(PacketType::Data));
        let text = metrics.render(|_| {});
        for line in [
            "e{segment=\"from_agent\",code=\"Canceled\",packet_type=\"Unknown\"} 0",
            "e{segment=\"to_client\",code=\"Unavailable\",packet_type=\"DATA\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }
}
