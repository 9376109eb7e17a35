//! Unix sockets that other processes connect to.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;
use tracing::warn;

/// Maximum number of connections that wait to be accepted: a burst of kube-apiserver's.
const BACKLOG: i32 = 4096;
/// Maximum length of a socket's path, in bytes: `sun_path` less its final zero.
const PATH_LIMIT: usize = 107;

/// A socket file, removed when dropped unless another process has replaced it by its own.
#[derive(Debug)]
pub struct SocketFile(Mark);

/// Where a socket file was made, and what tells it from another file there.
#[derive(Clone, Debug)]
pub struct Mark {
    path: PathBuf,
    inode: (u64, u64),
    mode: u32,
}

/// What is at the path of a socket file.
#[derive(Debug)]
pub enum Found {
    /// The file itself.
    Own,
    /// Another file, in most cases another process's socket.
    Other,
    /// No file was there. This is what came of making the socket again.
    Nothing(io::Result<(UnixListener, SocketFile)>),
}

impl SocketFile {
    /// Path of the socket.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Where the file was made.
    pub fn mark(&self) -> Mark {
        self.0.clone()
    }
}

impl Mark {
    /// Looks at the path, and makes the socket again if no file is there. It blocks, and needs a
    /// tokio runtime.
    ///
    /// # Errors
    /// When the file system does not answer the question.
    pub fn look(&self) -> io::Result<Found> {
        match fs::symlink_metadata(&self.path) {
            Ok(metadata) if inode(&metadata) == self.inode => Ok(Found::Own),
            Ok(_) => Ok(Found::Other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Found::Nothing(bind(&self.path, false, self.mode)))
            }
            Err(error) => Err(error),
        }
    }
}

fn inode(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Listens at `path`, for those whom the file's mode permits to connect. With `delete_existing` a
/// socket that is there gives way; one that another process listens on gives a warning. Needs a
/// tokio runtime.
///
/// # Errors
/// When the path cannot be bound, with the remedy.
pub fn bind(
    path: &Path,
    delete_existing: bool,
    mode: u32,
) -> io::Result<(UnixListener, SocketFile)> {
    if delete_existing {
        remove_existing(path)?;
    }
    let length = path.as_os_str().len();
    if length > PATH_LIMIT {
        let text = format!("the path has {length} bytes, and {PATH_LIMIT} are the most");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::unix(path)?).map_err(|error| with_remedy(error, path))?;
    let inode = inode(&fs::symlink_metadata(path)?);
    let file = SocketFile(Mark { path: path.into(), inode, mode });
    // Until here the process's umask decides, which never permits others to connect.
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    socket.listen(BACKLOG)?;
    Ok((UnixListener::from_std(socket.into())?, file))
}

/// Removes a socket that a crash left behind, or that another process listens on. Any other file
/// stays.
fn remove_existing(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {
            if is_listened_on(path) {
                let path = path.display();
                warn!(%path, "a Unix socket is taken over from another process");
            }
            fs::remove_file(path)
        }
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "a file that is not a socket is in the way",
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether a process accepts connections at the socket.
pub(crate) fn is_listened_on(path: &Path) -> bool {
    let connect = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.connect(&SockAddr::unix(path)?)
    };
    match connect() {
        Ok(()) => true,
        // Its backlog is full.
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

/// The kernel's reason, with what an operator can do about it.
fn with_remedy(error: io::Error, path: &Path) -> io::Error {
    let text = match error.kind() {
        io::ErrorKind::NotFound => {
            let folder = path.parent().unwrap_or_else(|| Path::new("/")).display();
            format!("the folder {folder} does not exist")
        }
        io::ErrorKind::AddrInUse if is_listened_on(path) => {
            "another process listens there; stop it, or give another path".into()
        }
        io::ErrorKind::AddrInUse => {
            "a file is there already; remove it, or set --delete-existing-uds-file".into()
        }
        _ => return error,
    };
    io::Error::new(error.kind(), text)
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_own = |metadata: fs::Metadata| inode(&metadata) == self.0.inode;
        if fs::symlink_metadata(&self.0.path).is_ok_and(is_own) {
            let _ = fs::remove_file(&self.0.path);
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
        assert!(!is_listened_on(&path));
        let error = bind(&path, false, MODE).unwrap_err().to_string();
        assert!(error.contains("set --delete-existing-uds-file"), "{error}");
        let first = bind(&path, true, MODE).unwrap();
        assert!(is_listened_on(&path));
        let error = bind(&path, false, MODE).unwrap_err().to_string();
        assert!(error.contains("another process listens there"), "{error}");
        // A successor has taken the path over; the end of the first must not remove it.
        let second = bind(&path, true, MODE).unwrap();
        drop(first);
        UnixStream::connect(&path).await.unwrap();
        drop(second);

        fs::write(&path, "precious").unwrap();
        assert!(bind(&path, true, MODE).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_path_that_cannot_be_bound_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing");
        let error = bind(&missing.join("s"), true, MODE).unwrap_err().to_string();
        assert_eq!(error, format!("the folder {} does not exist", missing.display()));
        let long = folder.path().join("a".repeat(200));
        let error = bind(&long, true, MODE).unwrap_err().to_string();
        let length = long.as_os_str().len();
        assert_eq!(error, format!("the path has {length} bytes, and 107 are the most"));
        let length = PATH_LIMIT - 1 - folder.path().as_os_str().len();
        bind(&folder.path().join("a".repeat(length)), true, MODE).unwrap();
    }
}
