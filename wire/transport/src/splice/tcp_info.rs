//! What the kernel knows about a TCP connection: that it is closed, and that the host behind it is
//! gone while bytes wait for its acknowledgement.
//!
//! Keep-alives find a vanished host only while nothing is unacknowledged. With bytes on the way the
//! kernel retransmits for a quarter of an hour, and `TCP_USER_TIMEOUT` is no remedy: it also ends
//! connections whose peer acknowledges window probes and does not read. So the kernel's counters are
//! read: a peer that pauses answers probes, a host that is gone answers nothing.
//!
//! `unsafe` is needed because no library wraps `TCP_INFO` (tcp(7)). The kernel writes at most the
//! given number of bytes, every bit pattern of which is a valid `tcp_info`.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

use nix::{errno::Errno, libc};
use tokio::time::sleep;

use crate::socket::KEEP_ALIVE;

/// Interval at which a socket's counters are read.
const INTERVAL: Duration = KEEP_ALIVE.interval;
/// Minimum number of unanswered retransmissions or probes in a row: a few lost packets on a quiet
/// connection are not taken for a host that is gone.
const MIN_UNANSWERED: u8 = 3;

/// State of a connection that is over (`include/net/tcp_states.h`).
const TCP_CLOSE: u8 = 7;

/// Completes with [`io::ErrorKind::TimedOut`] once the peer's host is gone; see the module.
///
/// # Cancel safety
/// Cancel safe.
pub(super) async fn vanished(socket: &impl AsFd) -> io::Error {
    loop {
        sleep(INTERVAL).await;
        // Without the counters there is only what the kernel finds.
        if tcp_info(socket).is_ok_and(|info| is_gone(&info)) {
            return Errno::ETIMEDOUT.into();
        }
    }
}

/// Whether the counters are those of a host that has answered nothing for as long as keep-alives
/// would take to find it gone.
fn is_gone(info: &libc::tcp_info) -> bool {
    let silence = Duration::from_millis(info.tcpi_last_ack_recv.into());
    silence >= KEEP_ALIVE.limit()
        && (info.tcpi_retransmits >= MIN_UNANSWERED || info.tcpi_probes >= MIN_UNANSWERED)
}

/// Whether the connection is over for the kernel: it was reset, or both sides have ended it.
pub(super) fn is_closed(socket: &impl AsFd) -> bool {
    tcp_info(socket).is_ok_and(|info| info.tcpi_state == TCP_CLOSE)
}

fn tcp_info(socket: &impl AsFd) -> io::Result<libc::tcp_info> {
    // SAFETY: `tcp_info` is plain integers, for which zero is valid.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).unwrap_or(0);
    // SAFETY: the descriptor is open for as long as it is borrowed; `info` and `length` are live,
    // and `length` is the size of `info`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    Errno::result(result)?;
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(silence: Duration, retransmits: u8, probes: u8) -> libc::tcp_info {
        // SAFETY: as above.
        let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
        info.tcpi_last_ack_recv = silence.as_millis().try_into().unwrap();
        info.tcpi_retransmits = retransmits;
        info.tcpi_probes = probes;
        info
    }

    #[test]
    fn a_host_is_gone_when_it_answers_neither_retransmissions_nor_probes() {
        let long = KEEP_ALIVE.limit();
        assert!(is_gone(&info(long, MIN_UNANSWERED, 0)));
        assert!(is_gone(&info(long, 0, MIN_UNANSWERED)));
    }

    #[test]
    fn a_host_is_not_gone_while_it_answers_or_is_asked_nothing() {
        let long = KEEP_ALIVE.limit();
        // Idle since an hour: the first byte after it is on the way.
        assert!(!is_gone(&info(Duration::from_secs(3600), 0, 0)));
        // A peer that does not read acknowledges each probe, up to two minutes apart.
        assert!(!is_gone(&info(Duration::from_secs(120), 0, 1)));
        assert!(!is_gone(&info(long, MIN_UNANSWERED - 1, MIN_UNANSWERED - 1)));
        assert!(!is_gone(&info(long - Duration::from_millis(1), 9, 9)));
    }

    #[tokio::test]
    async fn a_live_connection_has_counters_and_is_not_gone() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let info = tcp_info(&socket).unwrap();
        assert!(info.tcpi_snd_mss > 0, "the kernel filled the counters in");
        assert!(!is_gone(&info));
        let (unix, _peer) = tokio::net::UnixStream::pair().unwrap();
        assert!(tcp_info(&unix).is_err());
    }
}
