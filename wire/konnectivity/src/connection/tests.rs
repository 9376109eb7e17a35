use std::time::Duration;

use culvert_transport::{
    Carrier, ReadError, Settings,
    qmux::Peer,
    splice::{Cut, HalfEnd},
    test_util::Pair,
};
use tokio::time::sleep;
use tokio_stream::StreamExt as _;

use super::*;
use crate::{
    outbound::{Packets, outbound},
    packet::PacketMessage,
};

const ID: i64 = 7;

/// A connection being carried, and what its test drives: the peer's side and the stream's far end.
struct Carried {
    connections: Connections,
    packets: Packets,
    far: (SendHalf, RecvHalf),
    outcome: culvert_transport::task::Owned<Outcome>,
    _pair: Pair,
}

async fn carried(side: Side) -> Carried {
    let settings = Settings::default();
    let pair = Pair::without_idle_timeout(Peer::local(Carrier::Grpc), &settings, &settings);
    let pair = pair.await.unwrap();
    let mut near = pair.server.open().await.unwrap();
    // A stream is announced by its first bytes.
    near.0.write_chunk(Bytes::from_static(b"!")).await.unwrap();
    let mut far = pair.agent.accept().await.unwrap();
    assert_eq!(read(&mut far.1).await, "!");
    let (connections, (outbound, packets)) = (Connections::default(), outbound());
    let inbox = connections.insert(ID);
    let shared = connections.clone();
    let outcome = culvert_transport::task::owned(async move {
        carry((ID, inbox), side, near, outbound, &shared, &Meter::default()).await
    });
    Carried { connections, packets, far, outcome, _pair: pair }
}

async fn read(recv: &mut RecvHalf) -> Bytes {
    let mut chunks = [Bytes::new()];
    assert_eq!(recv.read_chunks(&mut chunks).await, Ok(Some(1)));
    let [chunk] = chunks;
    chunk
}

async fn end(recv: &mut RecvHalf) -> Result<Option<usize>, ReadError> {
    recv.read_chunks(&mut [Bytes::new()]).await
}

impl Carried {
    async fn packet(&mut self) -> PacketMessage {
        self.packets.next().await.expect("the connection goes on").into()
    }

    async fn data(&mut self) -> Bytes {
        match self.packet().await {
            PacketMessage::Data(data) if data.connect_id == ID => data.data,
            other => panic!("{other:?}"),
        }
    }

    /// The outcome, after which no packet follows and the connection is gone.
    async fn ended(mut self) -> Outcome {
        let outcome = self.outcome.await.unwrap();
        assert_eq!(self.packets.next().await, None);
        assert!(self.connections.remove(ID).is_none());
        outcome
    }
}

#[tokio::test(start_paused = true)]
async fn bytes_pass_in_both_directions() {
    let mut carried = carried(Side::Agent).await;
    assert!(carried.connections.deliver(ID, Bytes::from_static(b"from the peer")).await);
    assert_eq!(read(&mut carried.far.1).await, "from the peer");
    carried.far.0.write_chunk(Bytes::from_static(b"to the peer")).await.unwrap();
    assert_eq!(carried.data().await, "to the peer");
    assert!(!carried.connections.deliver(ID + 1, Bytes::from_static(b"to none")).await);
}

#[tokio::test(start_paused = true)]
async fn a_large_write_is_sent_in_packets_of_at_most_32_kibibytes() {
    let mut carried = carried(Side::Agent).await;
    carried.far.0.write_chunk(Bytes::from(vec![7; 100 << 10])).await.unwrap();
    let mut lengths = Vec::new();
    while lengths.iter().sum::<usize>() < 100 << 10 {
        lengths.push(carried.data().await.len());
    }
    let max = lengths.iter().max().unwrap();
    assert!((16 << 10..=32 << 10).contains(max), "{lengths:?}");
}

#[tokio::test(start_paused = true)]
async fn a_finished_stream_sends_an_agent_one_request_to_close() {
    let mut carried = carried(Side::Agent).await;
    carried.far.0.write_chunk(Bytes::from_static(b"last")).await.unwrap();
    carried.far.0.finish();
    assert_eq!(carried.data().await, "last");
    assert!(matches!(carried.packet().await, PacketMessage::Close(ID)));
    // The agent's answer ends the other direction.
    carried.connections.remove(ID).unwrap().end(End::Finished);
    assert_eq!(end(&mut carried.far.1).await, Ok(None));
    let outcome = carried.ended().await;
    assert!(matches!(outcome.end, Ok((HalfEnd::Finished, HalfEnd::Finished))), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn a_finished_stream_sends_a_server_one_response_and_ends_both_directions() {
    let mut carried = carried(Side::Server).await;
    carried.far.0.finish();
    match carried.packet().await {
        PacketMessage::Closed(closed) => assert_eq!((closed.connect_id, &*closed.error), (ID, "")),
        other => panic!("{other:?}"),
    }
    assert_eq!(end(&mut carried.far.1).await, Ok(None));
    let outcome = carried.ended().await;
    assert!(matches!(outcome.end, Ok((HalfEnd::Finished, HalfEnd::Finished))), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn a_reset_stream_sends_a_server_the_reason() {
    let mut carried = carried(Side::Server).await;
    carried.far.0.reset(StreamCode::PEER_RESET);
    match carried.packet().await {
        PacketMessage::Closed(closed) => assert!(!closed.error.is_empty()),
        other => panic!("{other:?}"),
    }
    let outcome = carried.ended().await;
    assert!(matches!(outcome.end, Err(Cut::Reset(StreamCode::PEER_RESET))), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_reads_slowly_after_the_close_gets_every_byte() {
    let mut carried = carried(Side::Agent).await;
    let length = 300 << 10;
    carried.far.0.write_chunk(Bytes::from(vec![7; length])).await.unwrap();
    carried.far.0.finish();
    // The peer's queue fills, and then the other side of the tunnel closes.
    sleep(Duration::from_millis(1)).await;
    carried.far.1.stop(StreamCode::CLOSED);
    let mut taken = 0;
    while taken < length {
        sleep(Duration::from_secs(40)).await;
        taken += carried.data().await.len();
    }
    assert!(matches!(carried.packet().await, PacketMessage::Close(ID)));
}

#[tokio::test(start_paused = true)]
async fn a_second_connection_with_the_same_id_cuts_the_first_and_stays() {
    let mut carried = carried(Side::Agent).await;
    let second = carried.connections.insert(ID);
    assert_eq!(end(&mut carried.far.1).await, Err(ReadError::Reset(StreamCode::MALFORMED)));
    assert!(matches!(carried.packet().await, PacketMessage::Close(ID)));
    carried.outcome.await.unwrap();
    assert!(Arc::ptr_eq(&carried.connections.remove(ID).unwrap(), &second));
}

#[tokio::test]
async fn above_the_total_limit_the_reader_with_the_most_bytes_waiting_is_cut_off() {
    let connections = Connections::default();
    let inboxes: Vec<_> = (0..20).map(|id| connections.insert(id)).collect();
    let chunk = Bytes::from(vec![7; 1 << 20]);
    // Connection 3 has one chunk more than the others, and none is above its own limit.
    assert!(connections.push(3, chunk.clone()).is_some());
    for _ in 0..6 {
        for id in 0..20 {
            assert!(connections.push(id, chunk.clone()).is_some());
        }
    }
    assert!(connections.waiting.bytes() <= TOTAL_LIMIT);
    for id in 0..8 {
        connections.push(id, chunk.clone());
    }
    assert_eq!(inboxes[3].cut().await.code, StreamCode::OVERLOADED);
    assert!(connections.waiting.bytes() <= TOTAL_LIMIT);
    assert_eq!(inboxes[4].take().await.unwrap().unwrap().len(), 16 * 1024);
    assert!(connections.push(99, chunk).is_none());
    drop((inboxes, connections.inboxes));
    assert_eq!(connections.waiting.bytes(), 0);
}
