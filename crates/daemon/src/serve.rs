//! The socket the daemon listens on.
//!
//! A socket must never be open to others, not even for a moment between making it and restricting it. The file mode mask is
//! the whole process's, so it is left alone: the socket is bound in a private directory, restricted there, and renamed into
//! place. A socket that is in the way is replaced only when nobody answers on it.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket at this path.
    Path(PathBuf),
    /// The socket that systemd hands over; where there is none, the default path.
    Inherited,
}

/// Where the daemon listens when nothing else is said.
pub const DEFAULT_ADDRESS: &str = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock";

/// A socket that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address is of no known form.
    #[error("address {0:?}: must be a path, unix://path or fd://")]
    Address(String),
    /// A process answers on the socket.
    #[error("socket {0:?} is in use by a running process: stop it, or use another --address")]
    InUse(PathBuf),
    /// Something else than a socket is in the way.
    #[error("{0:?} exists and is not a socket: remove it, or use another --address")]
    NotASocket(PathBuf),
    /// More than one socket was handed over.
    #[error("fd://: exactly one socket is expected, {0} were handed over")]
    Several(usize),
    /// Making it failed.
    #[error("listen on {path:?}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl std::str::FromStr for Address {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        if text == "fd://" {
            return Ok(Self::Inherited);
        }
        let path = text.strip_prefix("unix://").unwrap_or(text);
        if path.is_empty() || path.contains("://") {
            return Err(ListenError::Address(text.to_owned()));
        }
        Ok(Self::Path(PathBuf::from(path)))
    }
}

/// Starts to listen. Blocks on the disk for a moment.
///
/// # Errors
/// [`ListenError`], naming the path and what to do.
pub fn listen(address: &Address) -> Result<UnixListener, ListenError> {
    match address {
        Address::Path(path) => bind(path),
        Address::Inherited => {
            let mut inherited = listenfd::ListenFd::from_env();
            match inherited.len() {
                0 => {
                    tracing::info!(
                        address = DEFAULT_ADDRESS,
                        "no socket was handed over, using the default address"
                    );
                    bind(Path::new(DEFAULT_ADDRESS))
                }
                1 => {
                    let io = |source| ListenError::Io { path: PathBuf::from("fd://"), source };
                    let listener = inherited.take_unix_listener(0).map_err(io)?;
                    let listener = listener.ok_or(ListenError::Several(0))?;
                    listener.set_nonblocking(true).map_err(io)?;
                    // The service manager hands it over to be inherited; credential helpers are not to have it.
                    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC)
                        .map_err(|error| io(error.into()))?;
                    Ok(listener)
                }
                count => Err(ListenError::Several(count)),
            }
        }
    }
}

/// Returns the path at which `listener`, made for `address`, is reached.
pub fn path_of(address: &Address, listener: &UnixListener) -> PathBuf {
    match address {
        Address::Path(path) => path.clone(),
        // The address of a socket that was bound here leads through a directory that is gone.
        Address::Inherited => listener
            .local_addr()
            .ok()
            .and_then(|address| address.as_pathname().map(Path::to_owned))
            .filter(|path| path.exists())
            .unwrap_or_else(|| PathBuf::from(DEFAULT_ADDRESS)),
    }
}

/// Listens on a socket of mode 0600 at `path`; its directory is made with mode 0700 where it is missing.
///
/// # Errors
/// [`ListenError`].
pub fn bind(path: &Path) -> Result<UnixListener, ListenError> {
    let io = |source| ListenError::Io { path: path.to_owned(), source };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !parent.exists() {
        DirBuilder::new().mode(0o700).create(parent).map_err(io)?;
    }
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(ListenError::NotASocket(path.to_owned())),
        Ok(_) if UnixStream::connect(path).is_ok() => return Err(ListenError::InUse(path.to_owned())),
        _ => {}
    }
    let private = PrivateDir::new(parent).map_err(io)?;
    let bound = private.0.join("s");
    // The address of a socket holds 107 bytes: by way of a descriptor the private directory does not count.
    let dir = fs::File::open(&private.0).map_err(io)?;
    let short = format!("/proc/self/fd/{}/s", dir.as_raw_fd());
    let listener = UnixListener::bind(short).map_err(io)?;
    fs::set_permissions(&bound, Permissions::from_mode(0o600)).map_err(io)?;
    fs::rename(&bound, path).map_err(io)?;
    listener.set_nonblocking(true).map_err(io)?;
    Ok(listener)
}

/// A directory that nobody else enters, gone when dropped.
struct PrivateDir(PathBuf);

impl PrivateDir {
    fn new(parent: &Path) -> io::Result<Self> {
        for attempt in 0..100 {
            let path = parent.join(format!(".s{}-{attempt}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    // Left by a process of our number that was killed here.
                    let _ = fs::remove_file(path.join("s"));
                    let _ = fs::remove_dir(&path);
                }
                made => return made.map(|()| Self(path)),
            }
        }
        Err(io::Error::new(io::ErrorKind::AlreadyExists, "no free name for a private directory"))
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0.join("s"));
        let _ = fs::remove_dir(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!("/run/a.sock".parse::<Address>().unwrap(), Address::Path("/run/a.sock".into()));
        assert_eq!("unix:///run/a.sock".parse::<Address>().unwrap(), Address::Path("/run/a.sock".into()));
        assert_eq!("fd://".parse::<Address>().unwrap(), Address::Inherited);
        for text in ["", "tcp://1.2.3.4:5", "unix://", "fd://3"] {
            assert!(matches!(text.parse::<Address>(), Err(ListenError::Address(_))), "{text}");
        }
    }

    #[test]
    fn the_socket_is_private_and_its_directory_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/a.sock");
        let _listener = bind(&path).unwrap();
        let mode = |path: &Path| fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        assert!(UnixStream::connect(&path).is_ok());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing temporary stays");
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let first = bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(ListenError::InUse(_))));
        drop(first);
        assert!(path.exists());
        let _second = bind(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn a_file_in_the_way_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        fs::write(&path, b"precious").unwrap();
        assert!(matches!(bind(&path), Err(ListenError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
