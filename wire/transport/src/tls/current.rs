//! Values that are replaced while they are in use.

use std::sync::Arc;

use tokio::sync::watch;

/// The current one of a series of values. Clones see the same series.
#[derive(Debug)]
pub struct Current<T>(watch::Receiver<Arc<T>>);

/// Replaces the value of a [`Current`].
#[derive(Debug)]
pub struct Replace<T>(watch::Sender<Arc<T>>);

impl<T> Current<T> {
    /// A value that is never replaced.
    pub fn fixed(value: T) -> Self {
        Self::replaceable(value).1
    }

    /// A value that can be replaced.
    pub fn replaceable(value: T) -> (Replace<T>, Self) {
        let (replace, current) = watch::channel(Arc::new(value));
        (Replace(replace), Self(current))
    }

    /// The value as it is now.
    pub fn get(&self) -> Arc<T> {
        self.0.borrow().clone()
    }

    /// The value as it is now. [`replaced`](Self::replaced) completes for later ones.
    pub fn current(&mut self) -> Arc<T> {
        self.0.borrow_and_update().clone()
    }

    /// Completes once the value was replaced since this clone was made or last completed; never
    /// when it cannot be replaced any more.
    ///
    /// # Cancel safety
    /// Cancel safe: the next call completes for a replacement that this one missed.
    pub async fn replaced(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

impl<T> Clone for Current<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Replace<T> {
    /// Replaces the value. Callers that hold the old one keep it.
    pub fn with(&self, value: T) {
        self.0.send_replace(Arc::new(value));
    }
}
