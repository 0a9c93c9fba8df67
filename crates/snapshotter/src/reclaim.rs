//! Deleting directories that belong to no snapshot any more.
//!
//! Removing a snapshot only removes its record; its directory goes here, soon after or at `Cleanup`. A mount is always
//! taken away before anything beneath it is deleted: walking into a mount of our own could wait for ourselves, and a
//! directory that stays mounted is left for the next time.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use futures::StreamExt;

use crate::provider::{LayerProvider, SnapshotDir};
use crate::store::Store;

/// How many layers are let go at once.
const AT_ONCE: usize = 16;

/// Deletes what may be deleted; returns how many directories went. Failures are logged and tried again next time.
pub async fn run(store: &Arc<Store>, provider: &dyn LayerProvider) -> usize {
    let listed = {
        let store = Arc::clone(store);
        tokio::task::spawn_blocking(move || store.reclaimable()).await
    };
    let dirs = match listed {
        Ok(Ok(dirs)) => dirs,
        Ok(Err(error)) => {
            tracing::warn!(%error, "cannot list snapshot directories to clean up");
            return 0;
        }
        Err(_) => return 0,
    };
    // All layers are let go before anything is deleted: nothing more is fetched for them while a large directory goes.
    let released = dirs.into_iter().map(|path| async {
        let id = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
        let Some(id) = id else { return Some(path) };
        match provider.release(&SnapshotDir::new(store.snapshots(), id)).await {
            Ok(()) => Some(path),
            Err(error) => {
                tracing::warn!(%error, dir = %path.display(), "cannot unmount a removed layer, will try again");
                None
            }
        }
    });
    let released: Vec<_> = futures::stream::iter(released).buffer_unordered(AT_ONCE).collect().await;
    let mut gone = 0;
    for path in released.into_iter().flatten() {
        let doomed = path.clone();
        match tokio::task::spawn_blocking(move || delete(&doomed)).await {
            Ok(Ok(())) => gone += 1,
            Ok(Err(error)) => {
                tracing::warn!(%error, dir = %path.display(), "cannot delete a removed snapshot, will try again");
            }
            Err(_) => {}
        }
    }
    gone
}

fn delete(dir: &Path) -> io::Result<()> {
    if is_mounted(&dir.join("fs"))? || is_mounted(dir)? {
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, "something is still mounted there"));
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Whether `path` is a mount point. Asks the kernel's mount table by way of `statx`, never the mounted file system.
fn is_mounted(path: &Path) -> io::Result<bool> {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    match statx(CWD, path, flags, StatxFlags::empty()) {
        Ok(stat) => Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(rustix::io::Errno::NOENT) => Ok(false),
        Err(rustix::io::Errno::NOTCONN) => Ok(true),
        Err(error) => Err(error.into()),
    }
}
