//! Addresses of a demo that stays up, and commands to try it with.

use std::{fmt, net::SocketAddr, path::PathBuf};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, UnixStream},
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    rig::Running,
    targets::{self, Target},
};

/// A target, and a proxy on TCP for clients that cannot use one on a Unix socket.
pub(super) struct Poke {
    uds: PathBuf,
    proxy: SocketAddr,
    target: Target,
    server: SocketAddr,
    agents: Vec<(String, SocketAddr)>,
    forwarder: AbortOnDropHandle<()>,
}

impl Poke {
    pub(super) async fn start(rig: &Running) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (proxy, uds) = (listener.local_addr()?, rig.uds());
        Ok(Self {
            forwarder: culvert_transport::task::owned(forward(listener, uds.clone())),
            uds,
            proxy,
            target: targets::http(38).await?,
            server: rig.server.health,
            agents: rig.agents().iter().map(|a| (a.name.clone(), a.health)).collect(),
        })
    }
}

/// Forwards each TCP connection to the frontend's socket.
async fn forward(listener: TcpListener, uds: PathBuf) {
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((mut outer, _)) = listener.accept().await {
        let uds = uds.clone();
        connections.spawn(async move {
            if let Ok(mut inner) = UnixStream::connect(uds).await {
                let _ = copy_bidirectional(&mut outer, &mut inner).await;
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

impl Drop for Poke {
    fn drop(&mut self) {
        self.forwarder.abort();
    }
}

impl fmt::Display for Poke {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (target, uds) = (self.target.address(), self.uds.display());
        writeln!(f, "Through the tunnel, as any HTTP client with a proxy:")?;
        writeln!(f, "  curl --proxytunnel --proxy http://{} http://{target}/", self.proxy)?;
        writeln!(f, "The same on the Unix socket itself, where the body is what is sent through:")?;
        writeln!(
            f,
            "  curl --unix-socket {uds} -X CONNECT --request-target {target} \\\n    \
             --data-binary $'GET / HTTP/1.0\\r\\n\\r\\n' http://culvert/"
        )?;
        writeln!(f, "A dial that fails, with the agent's text:")?;
        writeln!(f, "  curl --proxytunnel --proxy http://{} http://127.0.0.1:1/", self.proxy)?;
        writeln!(f, "Readiness and metrics of the server and the agents:")?;
        writeln!(f, "  curl http://{}/readyz http://{0}/metrics", self.server)?;
        for (name, health) in &self.agents {
            writeln!(
                f,
                "  curl http://{health}/readyz?verbose http://{health}/metrics   # {name}"
            )?;
        }
        Ok(())
    }
}
