//! Metrics on request: always those of now, and never so often that they load the process.

use std::{fmt, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::Mutex,
    time::{Instant, sleep_until},
};

/// Pause after a rendering, in times of its own duration: a tenth of one thread at most.
const PAUSE: u32 = 9;
/// Maximum pause: well below the time after which clients give a request up.
const MAX_PAUSE: Duration = Duration::from_millis(250);

/// Renders a text of which every request gets one that is not older than itself. Requests that come
/// while one is rendered share the next.
pub(super) struct Rendering {
    render: Box<dyn Fn() -> String + Send + Sync>,
    last: Mutex<Option<Rendered>>,
}

struct Rendered {
    begun: Instant,
    /// Start of the next rendering, at the earliest.
    next: Instant,
    text: Bytes,
}

impl fmt::Debug for Rendering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rendering").finish_non_exhaustive()
    }
}

impl Rendering {
    pub(super) fn new(render: impl Fn() -> String + Send + Sync + 'static) -> Self {
        Self { render: Box::new(render), last: Mutex::new(None) }
    }

    /// The text of now.
    ///
    /// # Cancel safety
    /// Cancel safe: other requests go on.
    pub(super) async fn text(&self) -> Bytes {
        let arrived = Instant::now();
        let mut last = self.last.lock().await;
        if let Some(rendered) = &*last {
            if rendered.begun > arrived {
                return rendered.text.clone();
            }
            sleep_until(rendered.next).await;
        }
        let begun = Instant::now();
        let text = Bytes::from((self.render)());
        let ended = Instant::now();
        let next = ended + ((ended - begun) * PAUSE).min(MAX_PAUSE);
        *last = Some(Rendered { begun, next, text: text.clone() });
        text
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use tokio::{task::JoinSet, time::sleep};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn requests_that_come_together_share_a_text_that_is_not_older_than_they_are() {
        let count = Arc::new(AtomicU32::new(0));
        let rendering = Arc::new(Rendering::new({
            let count = count.clone();
            move || (count.fetch_add(1, Ordering::Relaxed) + 1).to_string()
        }));
        assert_eq!(rendering.text().await, "1");
        sleep(Duration::from_millis(1)).await;
        assert_eq!(rendering.text().await, "2", "time has passed");
        // As after a rendering that took long.
        let next = Instant::now() + MAX_PAUSE;
        rendering.last.lock().await.as_mut().unwrap().next = next;
        let mut requests = JoinSet::new();
        for _ in 0..100 {
            let rendering = rendering.clone();
            requests.spawn(async move { rendering.text().await });
        }
        let texts = requests.join_all().await;
        assert!(texts.iter().all(|text| text == "3"), "{texts:?}");
        assert!(Instant::now() >= next);
    }
}
