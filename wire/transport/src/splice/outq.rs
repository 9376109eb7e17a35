//! Number of bytes written to a TCP socket that its peer has not acknowledged.
//!
//! `unsafe` is needed here and nowhere else in the splice: no library wraps this ioctl (`SIOCOUTQ`,
//! tcp(7)). The kernel writes one `c_int` through the pointer it is given.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

nix::ioctl_read_bad!(siocoutq, nix::libc::TIOCOUTQ, nix::libc::c_int);

/// Number of bytes written and not acknowledged; the end of the stream counts as one.
///
/// # Errors
/// When the descriptor is not a socket that counts them.
pub(super) fn unacknowledged(socket: &impl AsFd) -> io::Result<usize> {
    let mut bytes: nix::libc::c_int = 0;
    // SAFETY: the descriptor is open for as long as it is borrowed, and `bytes` is a live c_int.
    unsafe { siocoutq(socket.as_fd().as_raw_fd(), &raw mut bytes) }?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}
