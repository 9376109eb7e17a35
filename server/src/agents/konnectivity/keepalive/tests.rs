use std::collections::VecDeque;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const PING_LEN: u16 = 8;

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn frame(kind: u8, stream_id: u32, payload: &[u8]) -> Vec<u8> {
    let head = FrameHead::new(kind, stream_id, u16::try_from(payload.len()).unwrap());
    [&head.bytes()[..], payload].concat()
}

fn ping() -> Vec<u8> {
    frame(kind::PING, 0, &[7; PING_LEN as usize])
}

fn ended(mut frame: Vec<u8>) -> Vec<u8> {
    frame[4] = flag::END_HEADERS;
    frame
}

fn goaway_frame(last_stream_id: u8) -> Vec<u8> {
    let head = [0, 0, 22, 7, 0, 0, 0, 0, 0];
    [&head[..], &[0, 0, 0, last_stream_id, 0, 0, 0, 0xb], b"too_many_pings"].concat()
}

/// Index of the ping that is one too many. The pings come so many seconds after the start.
fn judged(pings: &[u64]) -> Option<usize> {
    let (start, mut strikes) = (Instant::now(), Strikes::new(seconds(30)));
    pings.iter().position(|at| strikes.on_ping(start + seconds(*at)))
}

#[test]
fn the_third_ping_that_comes_too_soon_is_one_too_many() {
    assert_eq!(judged(&[0, 0, 0]), None);
    assert_eq!(judged(&[0, 0, 0, 0]), Some(3));
    assert_eq!(judged(&[0, 29, 58, 87]), Some(3));
    assert_eq!(judged(&[0, 10, 20, 100, 129]), Some(4), "strikes do not grow old");
}

#[test]
fn pings_that_keep_their_distance_are_never_too_many() {
    let pings: Vec<_> = (0..1000).map(|nth| nth * 30).collect();
    assert_eq!(judged(&pings), None);
    assert_eq!(judged(&[5000]), None);
}

#[test]
fn what_the_server_sends_resets_the_strikes_and_makes_the_next_ping_free() {
    let (now, mut strikes) = (Instant::now(), Strikes::new(seconds(30)));
    for _ in 0..1000 {
        assert!(!strikes.on_ping(now) && !strikes.on_ping(now) && !strikes.on_ping(now));
        strikes.on_sent();
        assert!(!strikes.on_ping(now), "the free one");
        strikes.on_sent();
    }
    assert!(!strikes.on_ping(now) && !strikes.on_ping(now) && !strikes.on_ping(now));
    assert!(strikes.on_ping(now));
}

#[test]
fn a_free_ping_counts_as_the_last_one() {
    let (start, mut strikes) = (Instant::now(), Strikes::new(seconds(30)));
    strikes.on_sent();
    let pings = [0, 29, 58, 87].map(|at| strikes.on_ping(start + seconds(at)));
    assert_eq!(pings, [false, false, false, true]);
}

proptest! {
    /// grpc-go's client asks for the bandwidth with a ping when it receives DATA, and not again
    /// before the answer. What it receives behind the answer, the server sent behind the ping.
    #[test]
    fn an_agent_that_pings_only_for_what_it_receives_is_never_ended(
        gaps in prop::collection::vec((0_u64..40, 1_u8..5), 1..200),
    ) {
        let (mut now, mut strikes) = (Instant::now(), Strikes::new(seconds(30)));
        for (gap, sent) in gaps {
            (0..sent).for_each(|_| strikes.on_sent());
            now += Duration::from_millis(gap);
            prop_assert!(!strikes.on_ping(now));
        }
    }
}

/// A connection that yields the prepared reads, and takes the prepared number of bytes with each
/// write; 0 makes a write pending.
#[derive(Debug, Default)]
struct Scripted {
    reads: VecDeque<Vec<u8>>,
    takes: VecDeque<usize>,
    written: Vec<u8>,
}

impl AsyncRead for Scripted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        buf.put_slice(&self.reads.pop_front().unwrap_or_default());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Scripted {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut left = match self.takes.pop_front() {
            Some(0) => return Poll::Pending,
            takes => takes.unwrap_or(usize::MAX),
        };
        let before = self.written.len();
        for buf in bufs {
            let part = left.min(buf.len());
            self.written.extend_from_slice(&buf[..part]);
            left -= part;
        }
        Poll::Ready(Ok(self.written.len() - before))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn limited(scripted: Scripted) -> PingLimit<Scripted> {
    PingLimit::new(scripted, seconds(30), CancellationToken::new())
}

fn write(limit: &mut PingLimit<Scripted>, bufs: &[&[u8]]) -> Poll<io::Result<usize>> {
    let bufs: Vec<_> = bufs.iter().map(|buf| IoSlice::new(buf)).collect();
    let mut cx = Context::from_waker(std::task::Waker::noop());
    Pin::new(limit).poll_write_vectored(&mut cx, &bufs)
}

fn read(limit: &mut PingLimit<Scripted>) -> Poll<io::Result<Vec<u8>>> {
    let mut bytes = [0; 1024];
    let mut buf = ReadBuf::new(&mut bytes);
    let mut cx = Context::from_waker(std::task::Waker::noop());
    let ready = ready!(Pin::new(limit).poll_read(&mut cx, &mut buf));
    Poll::Ready(ready.map(|()| buf.filled().to_vec()))
}

/// A connection whose peer has opened stream 5 and pinged too often.
fn exceeded(takes: &[usize]) -> PingLimit<Scripted> {
    let opened = ended(frame(kind::HEADERS, 5, b"fields"));
    let bytes = [PREFACE, &opened, &ping(), &ping(), &ping(), &ping()].concat();
    let mut limit =
        limited(Scripted { takes: takes.iter().copied().collect(), ..Scripted::default() });
    limit.inner.reads.push_back(bytes.clone());
    assert_eq!(read(&mut limit).map(Result::unwrap), Poll::Ready(bytes));
    assert!(limit.exceeded.is_cancelled());
    limit
}

fn is_over<T: std::fmt::Debug>(result: Poll<io::Result<T>>) -> bool {
    let Poll::Ready(Err(error)) = result else { return false };
    error.get_ref().is_some_and(|error| error.is::<TooManyPings>())
}

#[tokio::test]
async fn pings_are_found_wherever_what_is_read_was_cut() {
    let bytes = [PREFACE, &ping(), &ping(), &ping(), &ping()].concat();
    for cut in 1..bytes.len() {
        let mut limit = limited(Scripted::default());
        let (before, after) = bytes.split_at(cut);
        limit.inner.reads.extend([before.to_vec(), after.to_vec()]);
        assert!(read(&mut limit).is_ready());
        // The head is enough.
        assert_eq!(limit.exceeded.is_cancelled(), cut + usize::from(PING_LEN) >= bytes.len());
        if !limit.exceeded.is_cancelled() {
            assert!(read(&mut limit).is_ready());
        }
        assert!(limit.exceeded.is_cancelled() && is_over(read(&mut limit)), "cut at {cut}");
    }
}

#[tokio::test]
async fn answers_to_pings_and_other_frames_are_no_pings() {
    let mut answer = ping();
    answer[4] = flag::ACK;
    let data = frame(kind::DATA, 1, &ping().repeat(20));
    let bytes = [PREFACE, &answer.repeat(20), &data].concat();
    let mut limit = limited(Scripted::default());
    limit.inner.reads.extend(bytes.chunks(100).map(<[_]>::to_vec));
    while !limit.inner.reads.is_empty() {
        assert!(read(&mut limit).is_ready());
    }
    assert_eq!(limit.strikes.last_ping, None);
}

#[test]
fn only_what_was_taken_is_counted_as_sent() {
    let frames = [
        frame(0x4, 0, &[]),
        frame(0x8, 0, &[0; 4]),
        ping(),
        ended(frame(kind::HEADERS, 1, b"fields")),
    ];
    let bytes = frames.concat();
    let until_headers = frames[..3].concat().len() + HEAD_LEN;
    for takes in 1..bytes.len() {
        for cut in 0..bytes.len() {
            let mut limit = limited(Scripted::default());
            limit.inner.takes.push_back(takes);
            let (first, second) = bytes.split_at(cut);
            assert!(write(&mut limit, &[first, &[], second]).is_ready());
            assert_eq!(limit.strikes.forgiven, takes >= until_headers, "{takes} of {cut}");
            assert!(write(&mut limit, &[&bytes[takes..]]).is_ready());
            assert!(limit.strikes.forgiven);
        }
    }
}

#[test]
fn each_data_frame_counts_as_sent_whatever_came_before() {
    let mut limit = limited(Scripted::default());
    for chunk in frame(kind::DATA, 1, &[0; 100]).repeat(50).chunks(109) {
        limit.strikes.forgiven = false;
        assert!(write(&mut limit, &[chunk]).is_ready());
        assert!(limit.strikes.forgiven);
    }
}

#[tokio::test]
async fn the_goaway_waits_for_the_end_of_a_frame_wherever_it_was_cut() {
    let data = frame(kind::DATA, 5, b"twelve bytes");
    for cut in 0..data.len() {
        let mut limit = limited(Scripted::default());
        assert!(write(&mut limit, &[&data[..cut]]).is_ready());
        let bytes = [PREFACE, &ping().repeat(4)].concat();
        limit.inner.reads.push_back(bytes);
        assert!(read(&mut limit).is_ready());
        // What hyper writes next is the rest of the frame, and another.
        let rest = [&data[cut..], &data].concat();
        let mut at = 0;
        while limit.sent.under_way() > 0 {
            assert!(read(&mut limit).is_pending(), "cut at {cut}");
            let Poll::Ready(Ok(written)) = write(&mut limit, &[&[], &rest[at..]]) else {
                panic!("cut at {cut}");
            };
            at += written;
        }
        // None of it was written where the GOAWAY could be sent at once.
        let sent = if cut == 0 { &[][..] } else { &data };
        assert!(is_over(write(&mut limit, &[&rest[at..]])));
        assert_eq!(limit.inner.written, [sent, &goaway_frame(0)].concat(), "cut at {cut}");
    }
}

#[tokio::test]
async fn the_goaway_does_not_come_between_fields() {
    let begun = frame(kind::HEADERS, 5, b"fields");
    let rest = ended(frame(kind::CONTINUATION, 5, b"more"));
    let mut limit = exceeded(&[]);
    // As if it had been under way before.
    limit.on_sent(&begun);
    assert!(read(&mut limit).is_pending());
    let mut left = &rest[..];
    while !left.is_empty() {
        let Poll::Ready(Ok(written)) = write(&mut limit, &[left, b"others"]) else { panic!() };
        left = &left[written..];
    }
    assert!(is_over(read(&mut limit)));
    assert_eq!(limit.inner.written, [rest, goaway_frame(5)].concat());
}

#[tokio::test]
async fn a_goaway_that_is_taken_in_pieces_is_whole() {
    let mut limit = exceeded(&[1, 0, 5, 0, 0, 20]);
    let mut looks = 0;
    while read(&mut limit).is_pending() {
        looks += 1;
    }
    assert_eq!(looks, 3);
    assert_eq!(limit.inner.written, goaway_frame(5));
}

#[tokio::test]
async fn no_bytes_of_hyper_follow_the_goaway() {
    let mut limit = exceeded(&[]);
    for _ in 0..3 {
        assert!(is_over(write(&mut limit, &[&ping()])));
        assert!(is_over(read(&mut limit)));
        assert_eq!(limit.inner.written, goaway_frame(5));
    }
}

fn over_a_pipe(size: usize) -> (DuplexStream, PingLimit<DuplexStream>, CancellationToken) {
    let (peer, socket) = duplex(size);
    let exceeded = CancellationToken::new();
    (peer, PingLimit::new(socket, seconds(30), exceeded.clone()), exceeded)
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_read_is_waited_for_no_longer_than_one_that_does_not_hang_up() {
    for size in [8, 1024] {
        let (mut peer, mut limit, exceeded) = over_a_pipe(size);
        let begun = tokio::time::Instant::now();
        let pinging = async {
            // A full pipe takes no more, which is no failure of the test.
            let _ = peer.write_all(&[PREFACE, &ping().repeat(4)].concat()).await;
        };
        let reading = async { limit.read_to_end(&mut Vec::new()).await.unwrap_err() };
        let ((), error) = tokio::join!(pinging, reading);
        assert!(exceeded.is_cancelled());
        assert_eq!(error.to_string(), "the agent pings more often than every 30s");
        assert_eq!(begun.elapsed(), GOAWAY_TIMEOUT, "{size}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_connection_ends_as_soon_as_the_peer_has_hung_up() {
    let (mut peer, mut limit, _) = over_a_pipe(1024);
    let begun = tokio::time::Instant::now();
    let pinging = async {
        peer.write_all(&[PREFACE, &ping().repeat(4)].concat()).await.unwrap();
        let mut heard = Vec::new();
        peer.read_to_end(&mut heard).await.unwrap();
        peer.shutdown().await.unwrap();
        heard
    };
    let reading = async { limit.read_to_end(&mut Vec::new()).await.unwrap_err() };
    let (heard, _) = tokio::join!(pinging, reading);
    assert_eq!(heard, goaway_frame(0));
    assert!(begun.elapsed() < GOAWAY_TIMEOUT);
}
