//! Unix sockets that other processes connect to.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use tokio::net::UnixListener;

/// Maximum number of connections that wait to be accepted: a burst of kube-apiserver's.
const BACKLOG: i32 = 4096;

/// A socket file, removed when dropped unless another process has replaced it by its own.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl SocketFile {
    /// Path of the socket.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Listens at `path`, for those whom the file's mode permits to connect. `delete_existing` removes a
/// socket that a crash left behind. Needs a tokio runtime.
///
/// # Errors
/// When the path cannot be bound.
pub(crate) fn bind(
    path: &Path,
    delete_existing: bool,
    mode: u32,
) -> io::Result<(UnixListener, SocketFile)> {
    if delete_existing {
        remove_stale(path)?;
    }
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&socket2::SockAddr::unix(path)?)?;
    let metadata = fs::symlink_metadata(path)?;
    let file = SocketFile { path: path.into(), inode: (metadata.dev(), metadata.ino()) };
    // Until here the process's umask decides, which never permits others to connect.
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    socket.listen(BACKLOG)?;
    Ok((UnixListener::from_std(socket.into())?, file))
}

/// Removes a socket that a crash left behind. Any other file stays.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => fs::remove_file(path),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "a file that is not a socket is in the way",
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |metadata: fs::Metadata| (metadata.dev(), metadata.ino()) == self.inode;
        if fs::symlink_metadata(&self.path).is_ok_and(ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;

    const MODE: u32 = 0o770;

    #[tokio::test]
    async fn a_unix_socket_has_its_mode_and_is_removed_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("frontend.sock");
        let (listener, file) = bind(&path, true, MODE).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, MODE);
        UnixStream::connect(&path).await.unwrap();
        drop((listener, file));
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_file_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("frontend.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        assert!(bind(&path, false, MODE).is_err());
        let first = bind(&path, true, MODE).unwrap();
        // A successor has taken the path over; the end of the first must not remove it.
        let second = bind(&path, true, MODE).unwrap();
        drop(first);
        UnixStream::connect(&path).await.unwrap();
        drop(second);

        fs::write(&path, "precious").unwrap();
        assert!(bind(&path, true, MODE).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
