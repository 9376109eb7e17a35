//! The loopback device of a new network namespace, which is down.
#![allow(unsafe_code, reason = "ioctl(SIOCSIFFLAGS) has no safe wrapper")]

use std::{io, net::UdpSocket, os::fd::AsRawFd as _};

use nix::libc;

nix::ioctl_write_ptr_bad!(set_interface_flags, libc::SIOCSIFFLAGS, libc::ifreq);

/// Brings it up in the calling thread's namespace.
pub(super) fn up() -> io::Result<()> {
    // Any socket of the namespace will do.
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: `ifreq` is plain data for which all zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: the request is a valid `ifreq` that outlives the call, which only reads it.
    unsafe { set_interface_flags(socket.as_raw_fd(), &raw const request) }?;
    Ok(())
}
