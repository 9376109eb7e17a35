//! Peers that have the connection work or hold as much as they can.

use super::*;

#[tokio::test(start_paused = true)]
async fn answers_that_are_not_read_stop_the_reading() {
    const FRAMES: usize = 100_000;
    // Also to data of a stream that is over, which is answered with resets.
    let floods: [(u8, u32, &[u8], u8); 3] = [
        (kind::PING, 0, &[1; 8], kind::PING),
        (kind::SETTINGS, 0, &[], kind::SETTINGS),
        (kind::DATA, 1, b"x", kind::RST_STREAM),
    ];
    for (kind, id, payload, answered) in floods {
        let (near, far) = duplex(4096);
        let server = serve(near);
        let mut peer = Peer(far);
        peer.begin().await;
        peer.send(kind::HEADERS, 5, 1, FIELDS).await.unwrap();
        let flood = async {
            for _ in 0..FRAMES {
                peer.send(kind, 0, id, payload).await.unwrap();
            }
        };
        let stalled = timeout(Duration::from_secs(1), flood).await;
        assert!(stalled.is_err(), "all frames of kind {kind} were taken");
        assert!(!server.task.is_finished());
        // It goes on as soon as they are read.
        let mut answers = 0;
        while answers < 500 {
            answers += usize::from(peer.next().await.unwrap().0.kind() == answered);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_header_block_is_at_most_so_long() {
    let (mut peer, _server) = peer().await;
    peer.send(kind::HEADERS, 0, 1, &[0; 16_384]).await.unwrap();
    peer.send(kind::CONTINUATION, 0, 1, &[0; 16_384]).await.unwrap();
    peer.send(kind::CONTINUATION, 0, 1, &[0]).await.unwrap();
    let goaway = peer.next_of(kind::GOAWAY).await.unwrap();
    assert_eq!(code(&goaway), Reason::ENHANCE_YOUR_CALM.0);
}

#[tokio::test(start_paused = true)]
async fn a_window_that_overflows_ends_the_stream_or_the_connection() {
    const MOST: [u8; 4] = [0x7f, 0xff, 0xff, 0xff];
    let (mut peer, _server) = peer().await;
    peer.send(kind::HEADERS, 4, 1, FIELDS).await.unwrap();
    peer.send(kind::WINDOW_UPDATE, 0, 1, &MOST).await.unwrap();
    let reset = peer.next_of(kind::RST_STREAM).await.unwrap();
    assert_eq!(code(&reset), Reason::FLOW_CONTROL_ERROR.0);
    // One of all streams, by a setting.
    peer.send(kind::HEADERS, 4, 3, FIELDS).await.unwrap();
    peer.send(kind::WINDOW_UPDATE, 0, 3, &[0, 1, 0, 0]).await.unwrap();
    peer.send(kind::SETTINGS, 0, 0, &[&[0, 4][..], &MOST].concat()).await.unwrap();
    let goaway = peer.next_of(kind::GOAWAY).await.unwrap();
    assert_eq!(code(&goaway), Reason::FLOW_CONTROL_ERROR.0);
    let (mut peer, _server) = self::peer().await;
    peer.send(kind::WINDOW_UPDATE, 0, 0, &MOST).await.unwrap();
    let goaway = peer.next_of(kind::GOAWAY).await.unwrap();
    assert_eq!(code(&goaway), Reason::FLOW_CONTROL_ERROR.0);
}

/// A connection whose first stream is not read, with a limit of what the process may hold.
async fn unread(limit: u64) -> (Peer, Arc<MemoryBudget>, Request<RecvStream>, impl Sized) {
    let (near, far) = duplex(1 << 20);
    let budget = MemoryBudget::new(limit);
    let limits = Limits { stream_window: DEFAULT_WINDOW, ..LIMITS };
    let mut connection = Connection::new(near, StreamMemory::of(&budget), &limits);
    let mut peer = Peer(far);
    peer.begin().await;
    peer.send(kind::HEADERS, 4, 1, FIELDS).await.unwrap();
    let (request, answer) = connection.accept().await.unwrap().unwrap();
    let served = owned(async move { while connection.accept().await.is_some() {} });
    (peer, budget, request, (answer, served))
}

#[tokio::test(start_paused = true)]
async fn many_tiny_frames_count_with_what_they_cost_and_are_cut() {
    const FRAMES: u64 = 10_000;
    let (mut peer, budget, request, _served) = unread(FRAMES * stream::FRAME_COST).await;
    for _ in 0..FRAMES - 1 {
        peer.send(kind::DATA, 0, 1, b"x").await.unwrap();
    }
    let cut = timeout(Duration::from_secs(1), request.body().holder().cut()).await;
    assert!(cut.is_ok(), "{} are counted", budget.held(Held::Send));
    drop(request);
    assert_eq!(budget.held(Held::Send), 0);
}

#[tokio::test(start_paused = true)]
async fn frames_that_are_empty_cost_nothing() {
    let (mut peer, budget, request, _served) = unread(0).await;
    for _ in 0..100_000 {
        peer.send(kind::DATA, 0, 1, b"").await.unwrap();
    }
    // They were read before the answer.
    peer.send(kind::PING, 0, 0, &[1; 8]).await.unwrap();
    peer.next_of(kind::PING).await.unwrap();
    assert_eq!(budget.held(Held::Send), 0);
    drop(request);
}

#[tokio::test(start_paused = true)]
async fn resets_of_streams_whose_tasks_are_busy_do_not_make_room() {
    let (near, far) = duplex(1 << 20);
    let memory = StreamMemory::of(&MemoryBudget::new(0));
    let mut connection = Connection::new(near, memory, &LIMITS);
    let mut peer = Peer(far);
    peer.begin().await;
    let mut open = Vec::new();
    for stream in 0..=LIMITS.streams {
        let id = 2 * stream + 1;
        peer.send(kind::HEADERS, 4, id, FIELDS).await.unwrap();
        peer.send(kind::RST_STREAM, 0, id, &8_u32.to_be_bytes()).await.unwrap();
        let accepted = timeout(Duration::from_millis(1), connection.accept()).await;
        open.extend(accepted.ok().flatten().map(Result::unwrap));
    }
    assert_eq!(open.len(), LIMITS.streams as usize);
    let reset = peer.next_of(kind::RST_STREAM).await.unwrap();
    assert_eq!(code(&reset), Reason::REFUSED_STREAM.0);
}
