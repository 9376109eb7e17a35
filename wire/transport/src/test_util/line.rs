//! The byte stream between the ends of a [`Pair`](super::Pair), which can fail on request.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The agent's end.
    Agent,
    /// The server's end.
    Server,
}

impl Side {
    fn index(self) -> usize {
        match self {
            Self::Agent => 0,
            Self::Server => 1,
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Agent => Self::Server,
            Self::Server => Self::Agent,
        }
    }
}

/// Handle to the line between two ends. Clones control the same line.
#[derive(Clone, Debug, Default)]
pub struct Line(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Whether what each side sends is held back, by [`Side::index`].
    silent: [bool; 2],
    is_cut: bool,
    /// The reader of what each side sends, if it waits.
    readers: [Option<Waker>; 2],
}

impl Line {
    /// Holds back what this side sends from now on: its peer hears nothing more of it.
    pub fn silence(&self, side: Side) {
        self.0.lock().silent[side.index()] = true;
    }

    /// Ends a silence: what this side sent meanwhile arrives now.
    pub fn restore(&self, side: Side) {
        self.change(|state| state.silent[side.index()] = false);
    }

    /// Breaks the line: both ends see the connection reset, and bytes in flight are lost.
    pub fn cut(&self) {
        self.change(|state| state.is_cut = true);
    }

    /// Changes the state and wakes both readers to see it.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.0.lock();
        change(&mut state);
        let readers = state.readers.each_mut().map(Option::take);
        drop(state);
        readers.into_iter().flatten().for_each(Waker::wake);
    }

    /// The byte stream of this side's end.
    pub(super) fn end(&self, side: Side, io: DuplexStream) -> End {
        End { side, line: self.clone(), io }
    }
}

/// One end of the line, as the byte stream that a carrier is established on.
#[derive(Debug)]
pub(super) struct End {
    side: Side,
    line: Line,
    io: DuplexStream,
}

fn reset() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

impl AsyncRead for End {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let sender = self.side.other().index();
        let mut state = self.line.0.lock();
        if state.is_cut {
            return Poll::Ready(Err(reset()));
        }
        // A change of the line wakes the reader, whether or not it waits for bytes too.
        state.readers[sender] = Some(cx.waker().clone());
        let is_silent = state.silent[sender];
        drop(state);
        if is_silent {
            return Poll::Pending;
        }
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for End {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.line.0.lock().is_cut {
            return Poll::Ready(Err(reset()));
        }
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
