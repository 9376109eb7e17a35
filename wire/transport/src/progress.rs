//! How far a spliced stream has come, and what each of its directions waits for, for those who look
//! at it from outside.

use std::sync::{
    OnceLock, Weak,
    atomic::{AtomicU8, AtomicU64, Ordering},
};

use crate::{Tunnel, priority::Class, resume::link::Link};

/// What one direction of a splice waits for, or does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// More bytes from the side that it reads.
    Input,
    /// Memory of the process's budget.
    Memory,
    /// Room on the side that it writes.
    Output,
    /// Another tunnel in place of the one that was lost.
    Tunnel,
    /// Nothing: it has ended.
    Ended,
}

impl Step {
    const ALL: [Self; 5] = [Self::Input, Self::Memory, Self::Output, Self::Tunnel, Self::Ended];
}

/// The progress of one stream. The stream's splice changes it; others read it.
#[derive(Debug)]
pub struct Progress {
    to_tunnel: AtomicU64,
    from_tunnel: AtomicU64,
    class: AtomicU8,
    sending: AtomicU8,
    receiving: AtomicU8,
    /// What is known about the stream beyond its tunnel, if it outlives that.
    link: OnceLock<Weak<Link>>,
}

impl Default for Progress {
    fn default() -> Self {
        let step = || AtomicU8::new(Step::Input as u8);
        Self {
            to_tunnel: AtomicU64::new(0),
            from_tunnel: AtomicU64::new(0),
            class: AtomicU8::new(Class::Interactive as u8),
            sending: step(),
            receiving: step(),
            link: OnceLock::new(),
        }
    }
}

impl Progress {
    /// Number of bytes that were read from the local connection and written to the stream.
    pub fn to_tunnel(&self) -> u64 {
        self.to_tunnel.load(Ordering::Relaxed)
    }

    /// Number of bytes that were read from the stream and written to the local connection.
    pub fn from_tunnel(&self) -> u64 {
        self.from_tunnel.load(Ordering::Relaxed)
    }

    /// The class of what this side sends.
    pub fn class(&self) -> Class {
        let class = self.class.load(Ordering::Relaxed);
        [Class::Bulk, Class::Short]
            .into_iter()
            .find(|known| *known as u8 == class)
            .unwrap_or(Class::Interactive)
    }

    /// What the direction from the local connection to the stream waits for.
    pub fn sending(&self) -> Step {
        self.or_tunnel(step(&self.sending))
    }

    /// What the direction from the stream to the local connection waits for.
    pub fn receiving(&self) -> Step {
        self.or_tunnel(step(&self.receiving))
    }

    /// The tunnel that the stream is on, or the last one; `None` for a stream that stays on its first.
    pub fn tunnel(&self) -> Option<Tunnel> {
        Some(self.link.get()?.upgrade()?.tunnel().tunnel().clone())
    }

    fn or_tunnel(&self, step: Step) -> Step {
        let waits = || self.link.get()?.upgrade().map(|link| link.is_waiting());
        match step {
            Step::Ended => step,
            _ if waits() == Some(true) => Step::Tunnel,
            step => step,
        }
    }

    pub(crate) fn set_link(&self, link: Weak<Link>) {
        let _ = self.link.set(link);
    }

    pub(crate) fn add_to_tunnel(&self, bytes: u64) {
        self.to_tunnel.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn add_from_tunnel(&self, bytes: u64) {
        self.from_tunnel.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn set_class(&self, class: Class) {
        self.class.store(class as u8, Ordering::Relaxed);
    }

    pub(crate) fn set_sending(&self, step: Step) {
        self.sending.store(step as u8, Ordering::Relaxed);
    }

    pub(crate) fn set_receiving(&self, step: Step) {
        self.receiving.store(step as u8, Ordering::Relaxed);
    }
}

fn step(value: &AtomicU8) -> Step {
    let value = value.load(Ordering::Relaxed);
    Step::ALL.into_iter().find(|step| *step as u8 == value).unwrap_or(Step::Ended)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_is_read() {
        let progress = Progress::default();
        assert_eq!(progress.class(), Class::Interactive);
        assert_eq!((progress.sending(), progress.receiving()), (Step::Input, Step::Input));
        for class in [Class::Bulk, Class::Short, Class::Interactive] {
            progress.set_class(class);
            assert_eq!(progress.class(), class);
        }
        for step in Step::ALL {
            progress.set_sending(step);
            assert_eq!((progress.sending(), progress.receiving()), (step, Step::Input));
        }
        progress.set_receiving(Step::Memory);
        assert_eq!(progress.receiving(), Step::Memory);
    }
}
