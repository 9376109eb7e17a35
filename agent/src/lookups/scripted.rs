//! A resolver that tests script and watch.

use std::{io, net::SocketAddr, sync::Arc, thread};

use parking_lot::{Condvar, Mutex};
use tokio::sync::mpsc;

use super::Resolve;

/// A resolver whose answers depend on the name. Clones share its state.
#[derive(Clone, Debug)]
pub(crate) struct ScriptedResolver {
    shared: Arc<Shared>,
    begun: mpsc::UnboundedSender<String>,
}

#[derive(Debug)]
struct Shared {
    /// What every name has.
    answer: Mutex<Result<Vec<SocketAddr>, String>>,
    released: Mutex<bool>,
    release: Condvar,
}

impl ScriptedResolver {
    /// All names have these addresses. The receiver is sent each name whose lookup begins.
    pub(crate) fn new(addresses: &[&str]) -> (Self, mpsc::UnboundedReceiver<String>) {
        let (begun, receiver) = mpsc::unbounded_channel();
        let shared = Shared {
            answer: Mutex::new(Ok(vec![])),
            released: false.into(),
            release: Condvar::new(),
        };
        let resolver = Self { shared: Arc::new(shared), begun };
        resolver.set(Ok(addresses));
        (resolver, receiver)
    }

    /// All names have these addresses, or fail for this reason, from now on.
    pub(crate) fn set(&self, answer: Result<&[&str], &str>) {
        let parsed = |addresses: &[&str]| addresses.iter().map(|it| it.parse().unwrap()).collect();
        *self.shared.answer.lock() = answer.map(parsed).map_err(str::to_owned);
    }

    /// Lets the lookups that hang end.
    pub(crate) fn release(&self) {
        *self.shared.released.lock() = true;
        self.shared.release.notify_all();
    }
}

impl Resolve for ScriptedResolver {
    /// A name that begins with `hang` has no answer until the resolver is released, and `panic`
    /// panics.
    fn resolve(&self, host: &str) -> io::Result<Vec<SocketAddr>> {
        assert_eq!(thread::current().name(), Some("lookup"));
        let _ = self.begun.send(host.to_owned());
        if host.starts_with("hang") {
            let mut released = self.shared.released.lock();
            self.shared.release.wait_while(&mut released, |released| !*released);
        }
        assert_ne!(host, "panic", "scripted");
        self.shared.answer.lock().clone().map_err(io::Error::other)
    }
}
