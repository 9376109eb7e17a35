//! Counts packets that have arrived in part.
//!
//! tonic collects the bytes of a packet until it has all of them, up to
//! [`MAX_PACKET_LEN`](crate::codec::MAX_PACKET_LEN) for each call. The peer decides when the rest
//! comes. So the body of a call counts them in the process's memory before tonic gets them, and
//! fails when the call holds most of what the process may hold.
//!
//! tonic keeps a packet in the buffer that it has collected it in, as long as the packet's bytes
//! live. So no frame of the body crosses the end of a packet or of its head: the buffer then has the
//! length of the packet, where it would be twice as long.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use culvert_transport::budget::{Held, Holder, StreamMemory};
use http_body::{Body, Frame, SizeHint};
use tonic::Status;

/// Length of what precedes each message of gRPC: a flag, and the message's length.
const HEAD: usize = 5;

/// The body of a call, whose last packet counts for as long as it is incomplete.
pub struct Partial<B> {
    body: Pin<Box<B>>,
    memory: Arc<StreamMemory>,
    message: Message,
    /// The rest of a frame that crosses the end of a packet or of its head.
    rest: Bytes,
    /// What counts the bytes, once a packet came in parts.
    held: Option<Counted>,
}

impl<B> fmt::Debug for Partial<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Partial").field("message", &self.message).finish_non_exhaustive()
    }
}

impl<B> Partial<B> {
    /// The body of a call, whose bytes are held by this memory.
    pub fn new(body: B, memory: Arc<StreamMemory>) -> Self {
        Self {
            body: Box::pin(body),
            memory,
            message: Message::default(),
            rest: Bytes::new(),
            held: None,
        }
    }

    /// The next part of what has arrived.
    fn next(&mut self) -> Bytes {
        let length = self.message.until_boundary().min(self.rest.len());
        let part = self.rest.split_to(length);
        self.count(&part);
        part
    }

    fn count(&mut self, bytes: &[u8]) {
        self.message.add(bytes);
        let partial = self.message.partial() as u64;
        if self.held.is_none() && partial > 0 {
            self.held = Some(Counted::new(self.memory.holder(Held::Konnectivity)));
        }
        if let Some(held) = &mut self.held {
            held.set(partial);
        }
    }
}

impl<B> Body for Partial<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<tonic::codegen::StdError>,
{
    type Data = Bytes;
    type Error = tonic::codegen::StdError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        if this.held.as_mut().is_some_and(|held| held.cut.as_mut().poll(cx).is_ready()) {
            let reason = "the process has no more memory for packets that are incomplete";
            return Poll::Ready(Some(Err(Status::resource_exhausted(reason).into())));
        }
        if !this.rest.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(this.next()))));
        }
        let Some(frame) = ready!(this.body.as_mut().poll_frame(cx)) else {
            return Poll::Ready(None);
        };
        Poll::Ready(Some(frame.map_err(Into::into).map(|frame| {
            frame.map_data(|bytes| {
                this.rest = bytes;
                this.next()
            })
        })))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Where the bytes of a call are in its messages.
#[derive(Debug, Default)]
struct Message {
    /// The head of the message, as far as it has arrived.
    head: [u8; HEAD],
    /// Number of bytes of the message that have arrived, with its head.
    arrived: usize,
}

impl Message {
    fn add(&mut self, mut bytes: &[u8]) {
        while let Some(first) = bytes.first() {
            if self.arrived < HEAD {
                self.head[self.arrived] = *first;
                self.arrived += 1;
                bytes = &bytes[1..];
            } else {
                let taken = bytes.len().min(self.length() - self.arrived);
                self.arrived += taken;
                bytes = &bytes[taken..];
            }
            if self.arrived >= HEAD && self.arrived == self.length() {
                self.arrived = 0;
            }
        }
    }

    fn length(&self) -> usize {
        let [_flag, length @ ..] = self.head;
        HEAD.saturating_add(u32::from_be_bytes(length) as usize)
    }

    /// Number of bytes until the end of the head, or of the message.
    fn until_boundary(&self) -> usize {
        let end = if self.arrived < HEAD { HEAD } else { self.length() };
        end - self.arrived
    }

    /// Number of bytes of a message that has not arrived as a whole.
    fn partial(&self) -> usize {
        self.arrived
    }
}

/// A number of bytes that are held.
struct Counted {
    holder: Arc<Holder>,
    bytes: u64,
    /// Completes when they are to be given up.
    cut: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Counted {
    fn new(holder: Arc<Holder>) -> Self {
        let waits = holder.clone();
        Self { holder, bytes: 0, cut: Box::pin(async move { waits.cut().await }) }
    }

    fn set(&mut self, bytes: u64) {
        if bytes == self.bytes {
            return;
        }
        self.holder.add(bytes);
        self.holder.give_back(std::mem::replace(&mut self.bytes, bytes));
        self.holder.relieve();
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.holder.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, convert::Infallible, future::poll_fn};

    use culvert_transport::budget::MemoryBudget;
    use proptest::prelude::*;

    use super::*;

    /// A body that has these frames, and does not end.
    struct Frames(VecDeque<Bytes>);

    impl Body for Frames {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            match self.0.pop_front() {
                Some(bytes) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
                None => Poll::Pending,
            }
        }
    }

    fn message(length: usize) -> Vec<u8> {
        let mut message = vec![0];
        message.extend(u32::try_from(length).unwrap().to_be_bytes());
        message.resize(HEAD + length, 7);
        message
    }

    fn body(budget: &Arc<MemoryBudget>, frames: &[&[u8]]) -> Partial<Frames> {
        let frames = frames.iter().map(|frame| Bytes::copy_from_slice(frame)).collect();
        Partial::new(Frames(frames), StreamMemory::of(budget))
    }

    async fn next(body: &mut Partial<Frames>) -> Result<Bytes, tonic::codegen::StdError> {
        let frame = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await.unwrap()?;
        Ok(frame.into_data().unwrap())
    }

    #[tokio::test]
    async fn a_packet_counts_from_its_first_byte_to_its_last() {
        let budget = MemoryBudget::new(1 << 20);
        let held = || budget.held(Held::Konnectivity);
        let (first, second) = (message(1000), message(0));
        let (begin, end) = first.split_at(300);
        let rest = [end, &second, &[0, 0][..]].concat();
        let mut body = body(&budget, &[begin, &rest, &[0, 0, 9, 1]]);
        // Frames end where packets and their heads do.
        let parts: &[(&[u8], u64)] = &[
            (&begin[..HEAD], 5),
            (&begin[HEAD..], 300),
            (end, 0),
            (&second, 0),
            (&[0, 0], 2),
            (&[0, 0, 9], 5),
            (&[1], 6),
        ];
        for (part, counted) in parts {
            assert_eq!(next(&mut body).await.unwrap(), part);
            assert_eq!(held(), *counted, "after {part:?}");
        }
        drop(body);
        assert_eq!(held(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_largest_packet_is_given_up_at_the_limit() {
        let budget = MemoryBudget::new(1 << 20);
        let large = message(4 << 20);
        let mut other = body(&budget, &[&message(1000)[..500]]);
        next(&mut other).await.unwrap();
        next(&mut other).await.unwrap();
        let mut body = body(&budget, &[&large[..1 << 20]]);
        next(&mut body).await.unwrap();
        next(&mut body).await.unwrap();
        let error = next(&mut body).await.map(|part| part.len()).unwrap_err();
        let status = error.downcast_ref::<Status>().expect("a status");
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        drop(body);
        assert_eq!(budget.held(Held::Konnectivity), 500);
    }

    proptest! {
        /// However messages are cut into pieces, what is partial is what follows the last whole one.
        #[test]
        fn what_is_partial_follows_the_last_whole_message(
            lengths in prop::collection::vec(0_usize..50, 0..10),
            cuts in prop::collection::vec(1_usize..20, 1..60),
        ) {
            let messages: Vec<_> = lengths.iter().map(|length| message(*length)).collect();
            let all = messages.concat();
            let (mut rest, mut sent, mut state) = (&all[..], 0, Message::default());
            for cut in cuts {
                let piece;
                (piece, rest) = rest.split_at(cut.min(rest.len()));
                state.add(piece);
                sent += piece.len();
                let mut whole = 0;
                for message in &messages {
                    if whole + message.len() > sent {
                        break;
                    }
                    whole += message.len();
                }
                prop_assert_eq!(state.partial(), sent - whole);
            }
        }
    }
}
