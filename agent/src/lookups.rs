//! Lookups of names, on threads of their own: a resolver that hangs delays no task, uses up no
//! thread of tokio's, and holds no process back that ends.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fmt,
    fs::File,
    io,
    net::{SocketAddr, ToSocketAddrs as _},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
};

use culvert_process::{descriptors::is_shortage, metrics::Counted};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::metrics::LookupMetrics;

/// Maximum number of addresses of one name that are used.
const MAX_ADDRESSES: usize = 256;

/// The addresses of a name, each once, with port 0, in the resolver's order; shared by all that asked.
pub(crate) type Answer = Result<Arc<[SocketAddr]>, LookupError>;

/// Why a name has no addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LookupError {
    /// The resolver failed, for this reason.
    #[error("{0}")]
    Failed(String),
    /// A defect of this program.
    #[error("internal error: {0}")]
    Internal(&'static str),
    /// Too many lookups of other names wait already.
    #[error("too many lookups wait already")]
    Busy,
    /// No thread could be started.
    #[error("no thread for the lookup: {0}")]
    NoThread(String),
}

/// Resolves names. Blocks the calling thread.
pub(crate) trait Resolve: Send + Sync + 'static {
    /// The addresses of `host`, with port 0.
    ///
    /// # Errors
    /// The resolver's.
    fn resolve(&self, host: &str) -> io::Result<Vec<SocketAddr>>;
}

/// The system's resolver. A lookup takes as long as `resolv.conf` allows, usually up to 30 s.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve(&self, host: &str) -> io::Result<Vec<SocketAddr>> {
        match (host, 0).to_socket_addrs() {
            Ok(found) => Ok(found.collect()),
            // getaddrinfo reports a name that does not exist where it could open no file or socket.
            Err(error) => Err(File::open("/dev/null").err().filter(is_shortage).unwrap_or(error)),
        }
    }
}

/// Limits of [`Lookups`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Maximum number of lookups that run at the same time, each in a thread. A thread ends when
    /// no lookup waits.
    pub(crate) running: usize,
    /// Maximum number of lookups that wait for a thread.
    pub(crate) waiting: usize,
}

/// Lookups of names: one per name at a time, whose answer all that ask meanwhile share. Answers are
/// not kept.
pub(crate) struct Lookups {
    shared: Arc<Shared>,
}

struct Shared {
    resolver: Box<dyn Resolve>,
    limits: Limits,
    metrics: LookupMetrics,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    threads: usize,
    /// Names that wait for a thread.
    waiting: VecDeque<Arc<str>>,
    /// Every name that is looked up or waits.
    pending: HashMap<Arc<str>, Pending>,
}

/// A lookup without an answer yet.
struct Pending {
    answer: watch::Sender<Option<Answer>>,
    counted: Counted,
}

impl fmt::Debug for Lookups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lookups").field("limits", &self.shared.limits).finish_non_exhaustive()
    }
}

impl Lookups {
    /// No lookups yet, and no threads.
    pub(crate) fn new(resolver: impl Resolve, limits: Limits, metrics: LookupMetrics) -> Self {
        let (resolver, state) = (Box::new(resolver), Mutex::default());
        Self { shared: Arc::new(Shared { resolver, limits, metrics, state }) }
    }

    /// The addresses of `host`, without a time limit of its own.
    ///
    /// # Errors
    /// When the resolver fails, or too many lookups wait.
    ///
    /// # Cancel safety
    /// Cancel safe. A lookup that runs goes on, and those who ask for the name later share it. One
    /// that waits for a thread is given up once no caller waits for it.
    pub(crate) async fn look_up(&self, host: &str) -> Answer {
        let mut answer = self.shared.join(host).inspect_err(|_| self.shared.metrics.refused())?;
        match answer.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(answer)) => answer.clone(),
            // Each lookup ends with an answer, so these do not happen.
            Ok(None) | Err(_) => Err(LookupError::Internal("the lookup was given up")),
        }
    }
}

impl Shared {
    /// The answer of the pending lookup of `host`, which begins if there is none.
    fn join(self: &Arc<Self>, host: &str) -> Result<watch::Receiver<Option<Answer>>, LookupError> {
        let mut state = self.state.lock();
        if let Some(pending) = state.pending.get(host) {
            return Ok(pending.answer.subscribe());
        }
        if state.waiting.len() >= self.limits.waiting {
            state.give_up_abandoned();
        }
        if state.waiting.len() >= self.limits.waiting {
            return Err(LookupError::Busy);
        }
        if state.threads < self.limits.running {
            match self.start_thread() {
                Ok(()) => state.threads += 1,
                Err(error) if state.threads == 0 => {
                    return Err(LookupError::NoThread(error.to_string()));
                }
                // Another thread will do it.
                Err(_) => {}
            }
        }
        let host: Arc<str> = host.into();
        let (answer, receiver) = watch::channel(None);
        state.waiting.push_back(host.clone());
        state.pending.insert(host, Pending { answer, counted: self.metrics.pending() });
        Ok(receiver)
    }

    fn start_thread(self: &Arc<Self>) -> io::Result<()> {
        let shared = self.clone();
        thread::Builder::new().name("lookup".into()).spawn(move || shared.work()).map(drop)
    }

    /// Does what waits, until nothing does.
    fn work(&self) {
        while let Some(host) = self.next() {
            // The hook logs the panic.
            let found = catch_unwind(AssertUnwindSafe(|| self.resolver.resolve(&host)));
            let answer = match found {
                Ok(Ok(mut addresses)) => {
                    // A dead address that comes twice would delay its race twice.
                    let mut seen = HashSet::new();
                    addresses.retain(|address| seen.insert(*address));
                    addresses.truncate(MAX_ADDRESSES);
                    Ok(addresses.into())
                }
                Ok(Err(error)) => Err(LookupError::Failed(error.to_string())),
                Err(_) => Err(LookupError::Internal("the lookup panicked")),
            };
            self.metrics.ended(answer.is_ok());
            let pending = self.state.lock().pending.remove(&host);
            if let Some(Pending { answer: sender, counted }) = pending {
                drop(counted);
                sender.send_replace(Some(answer));
            }
        }
    }

    /// The next name to look up; `None` ends the thread.
    fn next(&self) -> Option<Arc<str>> {
        let mut state = self.state.lock();
        while let Some(host) = state.waiting.pop_front() {
            if state.is_wanted(&host) {
                return Some(host);
            }
            state.pending.remove(&host);
        }
        state.threads -= 1;
        None
    }
}

impl State {
    /// Gives up the lookups that wait for a thread and that no caller waits for.
    fn give_up_abandoned(&mut self) {
        for host in std::mem::take(&mut self.waiting) {
            if self.is_wanted(&host) {
                self.waiting.push_back(host);
            } else {
                self.pending.remove(&host);
            }
        }
    }

    /// Whether a caller waits for the pending lookup of `host`.
    fn is_wanted(&self, host: &str) -> bool {
        self.pending.get(host).is_some_and(|pending| !pending.answer.is_closed())
    }
}

#[cfg(test)]
pub(crate) mod scripted;
#[cfg(test)]
mod tests;
