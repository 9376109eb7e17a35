//! Streams of QMux, without a connection.

use super::*;

const CODE: StreamCode = StreamCode::PEER_RESET;
const STATES: [RecvState; 5] = [
    RecvState::Open,
    RecvState::Finished,
    RecvState::Reset(CODE),
    RecvState::Stopped,
    RecvState::Closed,
];

/// A half in this state on which 3 bytes have arrived; they wait where the state allows it.
fn recv(state: RecvState) -> Recv {
    let mut recv = Recv::new(10);
    recv.receive(0, &Bytes::from_static(b"abc"), false).unwrap();
    match state {
        RecvState::Open => {}
        RecvState::Finished => recv.receive(3, &Bytes::new(), true).unwrap(),
        RecvState::Reset(code) => recv.receive_reset(code, 3).unwrap(),
        RecvState::Stopped => assert!(recv.stop()),
        RecvState::Closed => {
            recv.stop();
            recv.receive(3, &Bytes::new(), true).unwrap();
        }
    }
    assert_eq!(recv.state, state);
    recv.check();
    recv
}

/// The state after `event`, for each of [`STATES`].
fn after<T>(event: impl Fn(&mut Recv) -> T) -> [(T, RecvState); 5] {
    STATES.map(|state| {
        let mut recv = recv(state);
        let result = event(&mut recv);
        // After a fault the connection ends, and its state means nothing.
        (result, recv.state)
    })
}

#[test]
fn data_is_taken_until_the_end_of_the_stream() {
    use RecvState::{Closed, Finished, Open, Reset, Stopped};
    let data = Bytes::from_static(b"def");
    assert_eq!(
        after(|recv| recv.receive(3, &data, false)),
        [
            (Ok(()), Open),
            (Err(Fault::AfterEnd), Finished),
            (Err(Fault::AfterEnd), Reset(CODE)),
            (Ok(()), Stopped),
            (Err(Fault::AfterEnd), Closed),
        ]
    );
    let ends = after(|recv| recv.receive(3, &data, true).is_ok());
    assert_eq!(
        ends,
        [
            (true, Finished),
            (false, Finished),
            (false, Reset(CODE)),
            (true, Closed),
            (false, Closed)
        ]
    );
}

#[test]
fn data_out_of_order_or_beyond_the_limit_is_a_fault() {
    let receive = |offset, length| {
        let data = Bytes::from(vec![7; length]);
        recv(RecvState::Open).receive(offset, &data, false)
    };
    assert_eq!(receive(2, 1), Err(Fault::Offset));
    assert_eq!(receive(4, 1), Err(Fault::Offset));
    assert_eq!(receive(3, 7), Ok(()));
    assert_eq!(receive(3, 8), Err(Fault::Limit));
}

#[test]
fn a_reset_counts_until_the_end_of_the_stream() {
    use RecvState::{Closed, Finished, Reset};
    let other = StreamCode::BROKEN_PIPE;
    assert_eq!(
        after(|recv| recv.receive_reset(other, 3).is_ok()),
        [
            (true, Reset(other)),
            (true, Finished),
            (true, Reset(CODE)),
            (true, Closed),
            (true, Closed)
        ]
    );
    for state in STATES {
        assert_eq!(recv(state).receive_reset(other, 2), Err(Fault::FinalSize), "{state:?}");
    }
}

#[test]
fn a_stop_is_sent_only_while_the_peer_may_send() {
    use RecvState::{Closed, Stopped};
    assert_eq!(
        after(Recv::stop),
        [(true, Stopped), (false, Closed), (false, Closed), (false, Stopped), (false, Closed)]
    );
}

#[test]
fn a_reader_gets_all_bytes_and_then_the_end_once() {
    let mut chunks = [Bytes::new()];
    for (state, end, again) in [
        (RecvState::Open, Found::Nothing, Found::Nothing),
        (RecvState::Finished, Found::End, Found::Stopped),
    ] {
        let mut recv = Recv::new(10);
        recv.receive(0, &Bytes::from_static(b"ab"), false).unwrap();
        recv.receive(2, &Bytes::from_static(b"c"), state == RecvState::Finished).unwrap();
        assert_eq!(recv.read(&mut chunks), Found::Chunks(1));
        assert_eq!(chunks[0], "abc", "short data is joined");
        assert_eq!(recv.read(&mut chunks), end);
        assert_eq!(recv.read(&mut chunks), again);
    }
    let mut reset = recv(RecvState::Reset(CODE));
    assert_eq!(reset.read(&mut chunks), Found::Reset(CODE));
    assert_eq!(reset.read(&mut chunks), Found::Stopped);
    assert_eq!(reset.take_reset(), None, "it is reported once");
    for state in [RecvState::Stopped, RecvState::Closed] {
        assert_eq!(recv(state).read(&mut chunks), Found::Stopped);
    }
}

#[test]
fn a_limit_is_raised_an_eighth_of_the_window_at_a_time() {
    let mut recv = Recv::new(80);
    let mut chunks = [Bytes::new()];
    for (offset, length, limit) in [(0, 9, None), (9, 1, Some(90)), (10, 3, None)] {
        recv.receive(offset, &Bytes::from(vec![7; length]), false).unwrap();
        recv.read(&mut chunks);
        assert_eq!(recv.grant(80), limit);
    }
    recv.receive(13, &Bytes::new(), true).unwrap();
    recv.read(&mut chunks);
    assert_eq!(recv.grant(80), None, "nothing more will arrive");
}

#[test]
fn a_sender_sends_what_its_limit_allows_and_then_the_fin() {
    let mut send = Send::new(4);
    assert!(!send.is_ready());
    send.push(Bytes::from_static(b"abc"));
    send.push(Bytes::from_static(b"de"));
    send.finish();
    let sent = |send: &mut Send, most| {
        let part = send.next(most)?;
        send.check();
        Some((part.offset, part.data, part.fin))
    };
    assert_eq!(sent(&mut send, 2), Some((0, "ab".into(), false)));
    assert_eq!(sent(&mut send, 9), Some((2, "c".into(), false)));
    assert_eq!(sent(&mut send, 9), Some((3, "d".into(), false)));
    assert!(!send.is_ready(), "the limit is reached");
    assert!(sent(&mut send, 9).is_none());
    send.raise_limit(3);
    assert!(!send.is_ready(), "a limit is never lowered, and this is no raise");
    send.raise_limit(5);
    assert_eq!(sent(&mut send, 9), Some((4, "e".into(), true)));
    assert_eq!(send.state(), SendState::Ended);
    assert!(!send.is_ready());
    assert_eq!(send.reset(), None, "the FIN is sent");
    send.settle();
    assert_eq!(send.reset(), None);
}

#[test]
fn a_fin_needs_no_limit_and_a_reset_discards_what_waits() {
    let mut finished = Send::new(0);
    finished.finish();
    assert!(finished.is_ready());
    assert!(finished.next(0).is_some_and(|part| part.fin && part.data.is_empty()));

    for finishes in [false, true] {
        let mut reset = Send::new(2);
        reset.push(Bytes::from_static(b"abc"));
        reset.next(9);
        if finishes {
            reset.finish();
        }
        assert_eq!(reset.reset(), Some(2), "the final size is what was sent");
        assert_eq!((reset.queued(), reset.state()), (0, SendState::Settled));
        assert!(!reset.is_ready());
        reset.finish();
        assert_eq!(reset.state(), SendState::Settled);
    }
}
