//! What restores the packets of a connection, for its keys and its task.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::BytesMut;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, SetOnce},
    time::sleep,
};

use super::{
    code::{self, Malformed},
    receiver::Restorer,
};
use crate::{budget::TunnelUnread, now};

/// Maximum number of bytes that a connection keeps.
const MAX_KEPT: usize = 1024 * 1024;
/// Interval at which what is old is dropped.
const TIDY_INTERVAL: Duration = Duration::from_secs(1);

/// What restores the packets of a connection.
#[derive(Debug)]
pub(in crate::quic) struct Restoring {
    state: Mutex<State>,
    /// Whether packets without datagrams are of interest.
    is_keeping: AtomicBool,
    /// Notified when something is kept, and when repair shards have come first.
    kept: Notify,
    malformed: SetOnce<Malformed>,
}

#[derive(Debug)]
struct State {
    restorer: Restorer,
    /// The part of what is kept in the process's bytes, if those are limited.
    budget: Option<Arc<TunnelUnread>>,
    /// Number of bytes that the budget counts.
    counted: usize,
}

impl Restoring {
    pub(super) fn new(budget: Option<Arc<TunnelUnread>>) -> Self {
        let restorer = Restorer::new(now(), MAX_KEPT);
        Self {
            state: Mutex::new(State { restorer, budget, counted: 0 }),
            is_keeping: AtomicBool::new(false),
            kept: Notify::new(),
            malformed: SetOnce::new(),
        }
    }

    /// Adds to a packet what its datagrams restore, if it has one. `arrived` counts the end of bytes
    /// of a stream.
    pub(in crate::quic) fn restore(
        &self,
        payload: &mut BytesMut,
        has_datagram: bool,
        arrived: impl FnMut(u64, u64) -> u64,
    ) {
        if !has_datagram && !self.is_keeping.load(Relaxed) {
            return;
        }
        let mut state = self.state.lock();
        let was_empty = state.restorer.cost() == 0;
        let restored = state.restorer.restore(now(), payload, arrived);
        self.is_keeping.store(state.restorer.is_keeping(), Relaxed);
        state.count();
        if was_empty && state.restorer.cost() > 0 {
            self.kept.notify_one();
        }
        drop(state);
        if let Err(malformed) = restored {
            let _ = self.malformed.set(malformed);
        }
    }

    /// Drops what is kept of a stream.
    pub(in crate::quic) fn forget(&self, stream: u64) {
        if self.is_keeping.load(Relaxed) {
            let mut state = self.state.lock();
            state.restorer.forget(stream);
            state.count();
        }
    }

    /// Numbers of copies that came first and of bursts that were rebuilt.
    pub(super) fn counts(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.restorer.used, state.restorer.rebuilt)
    }

    /// Completes when the peer did what it may not.
    pub(super) async fn malformed(&self) -> Malformed {
        *self.malformed.wait().await
    }

    /// Prepares the code when repair shards come first, and drops what is old, for ever.
    pub(super) async fn tidy(&self) {
        loop {
            self.kept.notified().await;
            if !code::is_prepared() {
                prepare().await;
            }
            loop {
                sleep(TIDY_INTERVAL).await;
                let mut state = self.state.lock();
                let is_left = state.restorer.expire(now());
                self.is_keeping.store(state.restorer.is_keeping(), Relaxed);
                state.count();
                if !is_left {
                    break;
                }
            }
        }
    }
}

impl State {
    /// Counts in the budget what is kept. Keeps nothing if that is short.
    fn count(&mut self) {
        let Some(budget) = &self.budget else { return };
        if self.restorer.cost() > self.counted && !budget.may_keep() {
            self.restorer.clear();
        }
        let cost = self.restorer.cost();
        match cost.checked_sub(self.counted) {
            Some(0) => {}
            Some(more) => budget.add(more as u64),
            None => budget.remove((self.counted - cost) as u64),
        }
        self.counted = cost;
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if let Some(budget) = &self.budget {
            budget.remove(self.counted as u64);
        }
    }
}

/// Prepares the code on a thread that may take its time.
pub(super) async fn prepare() {
    // It panics only if memory is used up.
    let _ = tokio::task::spawn_blocking(code::prepare).await;
}
