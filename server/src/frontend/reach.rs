//! Whether frontends reach this server: its Unix socket may be removed, or taken by another process.

use std::time::Duration;

use culvert_process::{
    rate_limited,
    threads::on_thread,
    unix_socket::{Found, SocketFile},
};
use parking_lot::Mutex;
use tokio::{net::UnixListener, time::sleep};
use tracing::{info, warn};

/// Time without a new connection after which the file is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// Minimum time between two warnings about a socket that cannot be made again.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Faults for the readiness of the server.
const REMOVED: &str = "the Unix socket of frontends was removed";
const TAKEN: &str = "another process has taken the Unix socket of frontends";

/// Why no frontend reaches this server, for its readiness; nothing while they do.
#[derive(Debug, Default)]
pub(crate) struct Reach(Mutex<Option<&'static str>>);

impl Reach {
    /// Why no frontend reaches the server.
    pub(crate) fn fault(&self) -> Option<&'static str> {
        *self.0.lock()
    }

    /// Looks at the socket's file every few seconds, records whether frontends reach it, and
    /// completes when it was gone and another one was made.
    ///
    /// # Cancel safety
    /// Cancel safe: a file that is made for no listener is removed.
    pub(super) async fn remade(&self, file: &SocketFile) -> (UnixListener, SocketFile) {
        let path = file.path().display();
        loop {
            sleep(LOOK_INTERVAL).await;
            let mark = file.mark();
            let look = move || mark.look();
            match on_thread("socket", look).await.flatten() {
                Ok(Found::Nothing(Ok(made))) => {
                    self.set(None);
                    warn!(%path, "the frontend's socket was removed and has been made again");
                    return made;
                }
                Ok(Found::Nothing(Err(error))) => {
                    self.set(Some(REMOVED));
                    rate_limited!(
                        LOG_INTERVAL, per error = error, at most 8 in all, WARN, %path,
                        "the frontend's socket was removed and cannot be made again"
                    );
                }
                Ok(Found::Other) if self.set(Some(TAKEN)) => {
                    warn!(%path, "another process has taken the frontend's socket");
                }
                Ok(Found::Own) if self.set(None) => {
                    info!(%path, "the frontend's socket is this server's own again");
                }
                // Unchanged; or unknown, without a thread or an answer of the file system.
                _ => {}
            }
        }
    }

    /// Records why no frontend reaches the server; whether that is new.
    fn set(&self, fault: Option<&'static str>) -> bool {
        std::mem::replace(&mut *self.0.lock(), fault) != fault
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use tokio::{join, net::UnixStream};

    use super::*;
    use culvert_process::unix_socket::bind;

    const MODE: u32 = 0o770;

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("frontend.sock");
        (folder, path)
    }

    #[tokio::test(start_paused = true)]
    async fn a_socket_that_was_removed_is_made_again() {
        let (folder, path) = folder();
        let (_listener, file) = bind(&path, true, MODE).unwrap();
        let reach = Reach::default();
        let away = folder.path().with_extension("away");
        fs::rename(folder.path(), &away).unwrap();
        let folder_comes_back = async {
            sleep(3 * LOOK_INTERVAL).await;
            assert_eq!(reach.fault(), Some(REMOVED));
            fs::create_dir(folder.path()).unwrap();
        };
        let ((listener, _made), ()) = join!(reach.remade(&file), folder_comes_back);
        assert_eq!(reach.fault(), None);
        UnixStream::connect(&path).await.unwrap();
        listener.accept().await.unwrap();
        drop(file);
        assert!(path.exists(), "the end of the first must not remove the second");
        fs::remove_dir_all(away).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_socket_that_another_process_has_taken_is_a_fault_until_that_has_ended() {
        let (_folder, path) = folder();
        let (_listener, file) = bind(&path, true, MODE).unwrap();
        let other = bind(&path, true, MODE).unwrap();
        let reach = Reach::default();
        let other_ends = async {
            sleep(3 * LOOK_INTERVAL).await;
            assert_eq!(reach.fault(), Some(TAKEN));
            drop(other);
        };
        let ((listener, _made), ()) = join!(reach.remade(&file), other_ends);
        assert_eq!(reach.fault(), None);
        UnixStream::connect(&path).await.unwrap();
        listener.accept().await.unwrap();
    }
}
