//! What a peer may send before it is granted more (RFC 9113 §5.2).

/// The window that one stream, or a connection, grants its peer.
///
/// What the peer may send, what has arrived and was not read, and what was read and not granted
/// again are the size together, always.
#[derive(Debug)]
pub(super) struct ReceiveWindow {
    size: i64,
    /// Number of bytes that the peer may send; less than 0 after the size became smaller.
    left: i64,
    /// Number of bytes that were read, and not granted again.
    read: i64,
}

impl ReceiveWindow {
    pub(super) fn new(size: u32) -> Self {
        Self { size: size.into(), left: size.into(), read: 0 }
    }

    /// Takes bytes that arrive; whether the peer was allowed to send them.
    pub(super) fn take(&mut self, length: usize) -> bool {
        self.left -= length as i64;
        self.left >= 0
    }

    /// Gives back bytes that were read; the increment to grant the peer, once it is worth a frame.
    pub(super) fn give_back(&mut self, length: usize) -> Option<u32> {
        self.read += length as i64;
        if self.read == 0 || self.read < self.size / 2 {
            return None;
        }
        self.left += self.read;
        u32::try_from(std::mem::take(&mut self.read)).ok()
    }

    /// Raises the size to at least this one, of which the peer does not know; the increment to grant
    /// it.
    pub(super) fn widen(&mut self, size: u32) -> Option<u32> {
        let more = (i64::from(size) - self.size).max(0);
        self.size += more;
        self.left += more;
        u32::try_from(more).ok().filter(|more| *more > 0)
    }

    /// Changes the size, of which the peer knows; the increment to grant it, as for
    /// [`Self::give_back`].
    pub(super) fn resize(&mut self, size: u32) -> Option<u32> {
        self.left += i64::from(size) - self.size;
        self.size = size.into();
        self.give_back(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Send(usize),
        Read(usize),
        Resize(u32),
        Widen(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (1..20_000_usize).prop_map(Step::Send),
            (1..20_000_usize).prop_map(Step::Read),
            prop_oneof![Just(2), Just(32 * 1024), Just(512 * 1024)].prop_map(Step::Resize),
            prop_oneof![Just(2), Just(40 * 1024), Just(600 * 1024)].prop_map(Step::Widen),
        ]
    }

    proptest! {
        /// A peer that keeps to its window is never refused, and never waits for ever: once all is
        /// read, it may send.
        #[test]
        fn a_peer_that_keeps_to_it_can_always_go_on(steps in prop::collection::vec(step(), 0..100)) {
            let (mut window, mut size) = (ReceiveWindow::new(32 * 1024), 32 * 1024_i64);
            let (mut allowed, mut arrived) = (size, 0);
            for step in steps {
                match step {
                    Step::Send(length) => {
                        let length = (length as i64).min(allowed.max(0));
                        allowed -= length;
                        arrived += length;
                        prop_assert!(length == 0 || window.take(length as usize));
                    }
                    Step::Read(length) => {
                        let length = (length as i64).min(arrived);
                        arrived -= length;
                        allowed += i64::from(window.give_back(length as usize).unwrap_or(0));
                    }
                    Step::Resize(to) => {
                        allowed += i64::from(to) - size;
                        allowed += i64::from(window.resize(to).unwrap_or(0));
                        size = to.into();
                    }
                    Step::Widen(to) => {
                        allowed += i64::from(window.widen(to).unwrap_or(0));
                        size = size.max(to.into());
                    }
                }
                prop_assert_eq!(allowed, window.left);
                prop_assert_eq!(window.left + window.read + arrived, size);
                prop_assert!(allowed + arrived > 0, "it waits for ever");
            }
        }
    }

    #[test]
    fn more_than_the_window_is_noticed() {
        let mut window = ReceiveWindow::new(10);
        assert!(window.take(10));
        assert!(!window.take(1));
    }
}
