//! A target that never answers a connection attempt.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use socket2::{Domain, Socket, Type};

/// A port whose accept queue is full: connecting to it never completes.
pub(crate) struct SilentTarget {
    listener: Socket,
    _queued: Vec<TcpStream>,
}

impl SilentTarget {
    pub(crate) fn start() -> Self {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        let mut queued = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
            queued.push(stream);
        }
        Self { listener, _queued: queued }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap().as_socket().unwrap()
    }

    /// Sockets that are connecting to the target, of any process.
    pub(crate) fn attempts(&self) -> usize {
        const SYN_SENT: &str = "02";
        let remote = format!("0100007F:{:04X}", self.address().port());
        let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
        let sockets = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        sockets.filter(|fields| fields[2] == remote && fields[3] == SYN_SENT).count()
    }
}
