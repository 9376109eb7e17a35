//! The task that reads a socket, with a larger part of the time of a busy runtime.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Context, Poll, Wake, Waker},
};

use atomic_waker::AtomicWaker;
use tokio::task::coop::has_budget_remaining;

use super::Task;

/// Maximum number of polls in one turn of the task. quinn's reader returns after 50 µs, or one call
/// of the kernel, and wakes itself. Where a thousand tasks are ahead of it then, the socket's buffer
/// overflows.
const MAX_POLLS: usize = 8;

/// The task that reads a socket. It is polled again while it wakes itself, up to [`MAX_POLLS`] times.
pub(super) struct Reader {
    task: Task,
    waker: Waker,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    is_woken: AtomicBool,
    task: AtomicWaker,
}

impl Wake for State {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_woken.store(true, SeqCst);
        self.task.wake();
    }
}

impl Reader {
    pub(super) fn new(task: Task) -> Self {
        let state = Arc::new(State::default());
        Self { task, waker: state.clone().into(), state }
    }
}

impl Future for Reader {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..MAX_POLLS {
            self.state.is_woken.store(false, SeqCst);
            // Not before the last poll: what wakes the task during the others is polled for below.
            self.state.task.take();
            let waker = self.waker.clone();
            if self.task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                return Poll::Ready(());
            }
            if !self.state.is_woken.load(SeqCst) || !has_budget_remaining() {
                break;
            }
        }
        self.state.task.register(cx.waker());
        if self.state.is_woken.load(SeqCst) {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, sync::atomic::AtomicUsize, time::Duration};

    use tokio::{sync::Notify, time::timeout};

    use super::*;

    /// A reader that wakes itself so many times, and the number of its polls.
    fn reader(wakes: usize) -> (Reader, Arc<AtomicUsize>) {
        let polls = Arc::new(AtomicUsize::new(0));
        let counted = polls.clone();
        let task = poll_fn(move |cx: &mut Context<'_>| {
            if counted.fetch_add(1, SeqCst) < wakes {
                cx.waker().wake_by_ref();
            }
            Poll::<()>::Pending
        });
        (Reader::new(Box::pin(task)), polls)
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_wakes_itself_is_polled_again_in_its_turn() {
        for (wakes, in_one_turn, in_all) in
            [(0, 1, 1), (3, 4, 4), (MAX_POLLS + 3, MAX_POLLS, MAX_POLLS + 4)]
        {
            let (mut reader, polls) = reader(wakes);
            let first = poll_fn(|cx| Poll::Ready(Pin::new(&mut reader).poll(cx))).await;
            assert_eq!((first, polls.load(SeqCst)), (Poll::Pending, in_one_turn));
            timeout(Duration::from_secs(1), &mut reader).await.unwrap_err();
            // What it still had to do was done in later turns; the time-out polls it as well.
            assert!(polls.load(SeqCst) >= in_all, "{wakes} wakes: {polls:?}");
        }
    }

    #[tokio::test]
    async fn a_reader_is_woken_from_outside() {
        let (notify, ended) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (wait, end) = (notify.clone(), ended.clone());
        let task = async move {
            wait.notified().await;
            end.notify_one();
        };
        let reader = crate::task::owned(Reader::new(Box::pin(task)));
        tokio::task::yield_now().await;
        notify.notify_one();
        timeout(Duration::from_secs(10), ended.notified()).await.unwrap();
        reader.await.unwrap();
    }
}
