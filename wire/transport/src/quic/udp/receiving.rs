//! Which call receives packets, and what follows when it fails.
//!
//! ```text
//!            refused, or several errors in a row
//!  recvmmsg ────────────────────────────────────▶ recvmsg ──▶ pauses that grow ──▶ broken
//!     ▲       tried again after 10 min, 20 min, …    │  ▲          │  works again    │
//!     └──────────────────────────────────────────────┘  └──────────┴─────────────────┘
//! ```

use std::{io, time::Duration};

use nix::errno::Errno;
use tokio::time::Instant;

/// Number of errors in a row after which a call counts as failing. The kernel reports each ICMP
/// error as one failed call; between two of them packets arrive, or none is left.
const ERRORS_IN_ROW: u32 = 8;
/// First and longest pause between two calls that fail.
const PAUSES: [Duration; 2] = [Duration::from_millis(10), Duration::from_secs(1)];
/// Time after which a socket whose calls fail counts as broken.
const BROKEN_AFTER: Duration = Duration::from_secs(2);
/// First and longest time without `recvmmsg` after it was refused.
const PERIODS: [Duration; 2] = [Duration::from_secs(600), Duration::from_secs(4 * 3600)];

/// A call that receives packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// `recvmmsg`.
    Many,
    /// `recvmsg`.
    One,
}

/// What follows a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Another call.
    Again,
    /// Another call, by `recvmsg` from now on.
    OneByOne,
    /// Another call after this time.
    Pause(Duration),
    /// The same; the socket counts as broken from now on.
    Broken(Duration),
}

/// What has changed with a call that worked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Recovered {
    /// `recvmmsg` works again.
    pub(super) many: bool,
    /// The socket counted as broken.
    pub(super) broken: bool,
}

/// The choice of the call that receives packets.
#[derive(Debug, Default)]
pub(super) struct Receiving {
    /// Until when `recvmmsg` is not tried, and for how long it was not to be tried.
    one_by_one: Option<(Instant, Duration)>,
    errors: u32,
    /// When the pauses began.
    paused_since: Option<Instant>,
    pause: Duration,
    broken: bool,
}

impl Receiving {
    /// The call to make now.
    pub(super) fn call(&self, now: Instant) -> Call {
        match self.one_by_one {
            Some((until, _)) if now < until => Call::One,
            _ => Call::Many,
        }
    }

    /// Records that a call worked, which it also does when there is no packet.
    pub(super) fn worked(&mut self, call: Call) -> Recovered {
        let many = call == Call::Many && self.one_by_one.take().is_some();
        let broken = std::mem::take(&mut self.broken);
        (self.errors, self.paused_since) = (0, None);
        Recovered { many, broken }
    }

    /// Records that a call failed.
    pub(super) fn failed(&mut self, call: Call, now: Instant, error: &io::Error) -> Next {
        self.errors = self.errors.saturating_add(1);
        let errno = error.raw_os_error().map(Errno::from_raw);
        let refused = matches!(errno, Some(Errno::ENOSYS | Errno::EPERM));
        match (call, self.one_by_one) {
            // It was tried again, and is refused still.
            (Call::Many, Some((_, period))) if refused || self.errors >= ERRORS_IN_ROW => {
                self.errors = 0;
                let period = (period * 2).min(PERIODS[1]);
                self.one_by_one = Some((now + period, period));
                Next::Again
            }
            _ if !refused && self.errors < ERRORS_IN_ROW => Next::Again,
            (Call::Many, _) => {
                self.one_by_one = Some((now + PERIODS[0], PERIODS[0]));
                self.errors = 0;
                Next::OneByOne
            }
            (Call::One, _) => self.pause(now),
        }
    }

    fn pause(&mut self, now: Instant) -> Next {
        self.pause = match self.paused_since {
            None => PAUSES[0],
            Some(_) => (self.pause * 2).min(PAUSES[1]),
        };
        let since = *self.paused_since.get_or_insert(now);
        if !self.broken && now - since >= BROKEN_AFTER {
            self.broken = true;
            return Next::Broken(self.pause);
        }
        Next::Pause(self.pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(errno: Errno) -> io::Error {
        errno.into()
    }

    #[test]
    fn a_refused_call_is_replaced_at_once_and_any_other_error_after_some() {
        let now = Instant::now();
        for (errno, after) in [
            (Errno::ENOSYS, 1),
            (Errno::EPERM, 1),
            (Errno::EIO, ERRORS_IN_ROW),
            (Errno::ECONNREFUSED, ERRORS_IN_ROW),
        ] {
            let mut receiving = Receiving::default();
            for _ in 1..after {
                assert_eq!(receiving.failed(Call::Many, now, &error(errno)), Next::Again);
                assert_eq!(receiving.call(now), Call::Many);
            }
            assert_eq!(receiving.failed(Call::Many, now, &error(errno)), Next::OneByOne);
            assert_eq!(receiving.call(now), Call::One, "{errno}");
        }
    }

    #[test]
    fn errors_between_packets_change_nothing() {
        let (mut receiving, now) = (Receiving::default(), Instant::now());
        for _ in 0..100 {
            assert_eq!(receiving.failed(Call::Many, now, &error(Errno::ECONNREFUSED)), Next::Again);
            assert_eq!(receiving.worked(Call::Many), Recovered::default());
        }
        assert_eq!(receiving.call(now), Call::Many);
    }

    #[test]
    fn a_refused_call_is_tried_again_later_and_later() {
        let (mut receiving, mut now) = (Receiving::default(), Instant::now());
        receiving.failed(Call::Many, now, &error(Errno::ENOSYS));
        for minutes in [10, 20, 40, 80, 160, 240, 240] {
            receiving.worked(Call::One);
            now += Duration::from_secs(minutes * 60) - Duration::from_millis(1);
            assert_eq!(receiving.call(now), Call::One, "{minutes}");
            now += Duration::from_millis(1);
            assert_eq!(receiving.call(now), Call::Many, "{minutes}");
            assert_eq!(receiving.failed(Call::Many, now, &error(Errno::ENOSYS)), Next::Again);
            assert_eq!(receiving.call(now), Call::One, "{minutes}");
        }
        now += PERIODS[1];
        assert_eq!(receiving.call(now), Call::Many);
        let recovered = Recovered { many: true, broken: false };
        assert_eq!(receiving.worked(Call::Many), recovered);
        assert_eq!(receiving.call(now), Call::Many);
    }

    #[test]
    fn an_error_between_packets_does_not_end_a_new_attempt() {
        let (mut receiving, mut now) = (Receiving::default(), Instant::now());
        receiving.failed(Call::Many, now, &error(Errno::ENOSYS));
        receiving.worked(Call::One);
        now += PERIODS[0];
        assert_eq!(receiving.failed(Call::Many, now, &error(Errno::ECONNREFUSED)), Next::Again);
        assert_eq!(receiving.call(now), Call::Many);
        assert!(receiving.worked(Call::Many).many);
    }

    #[test]
    fn a_socket_whose_calls_all_fail_pauses_and_is_broken_after_two_seconds() {
        let (mut receiving, begun) = (Receiving::default(), Instant::now());
        receiving.failed(Call::Many, begun, &error(Errno::ENOSYS));
        let (mut now, mut calls) = (begun, 0);
        loop {
            calls += 1;
            match receiving.failed(Call::One, now, &error(Errno::ENOSYS)) {
                Next::Pause(pause) => now += pause,
                Next::Broken(_) => break,
                next => panic!("{next:?}"),
            }
        }
        let after = now - begun;
        assert!(after >= BROKEN_AFTER && after < BROKEN_AFTER * 2, "{after:?}");
        assert!(calls < 15, "{calls}");
        // It is tried every second, is reported once, and recovers.
        let next = receiving.failed(Call::One, now, &error(Errno::ENOSYS));
        assert_eq!(next, Next::Pause(PAUSES[1]));
        assert_eq!(receiving.worked(Call::One), Recovered { many: false, broken: true });
        let next = receiving.failed(Call::One, now, &error(Errno::ENOSYS));
        assert_eq!(next, Next::Pause(PAUSES[0]));
    }
}
