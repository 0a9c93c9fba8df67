//! What containerd is told to mount for a snapshot.

use std::path::{Path, PathBuf};

use crate::records::Kind;

/// One mount, as containerd takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// File system type.
    pub kind: &'static str,
    /// What is mounted.
    pub source: String,
    /// Options.
    pub options: Vec<String>,
}

/// Directories of a snapshot that is to be mounted.
#[derive(Debug)]
pub struct Parts<'a> {
    /// View or active.
    pub kind: Kind,
    /// Its own content.
    pub upper: &'a Path,
    /// Overlay's work directory.
    pub work: &'a Path,
    /// The layers below, topmost first.
    pub lower: &'a [PathBuf],
}

/// Returns the mounts of a view or an active snapshot.
///
/// `userxattr` says that overlay is mounted inside a user namespace.
pub fn compose(parts: &Parts<'_>, userxattr: bool) -> Vec<Mount> {
    let bind = |source: &Path, mode: &str| Mount {
        kind: "bind",
        source: source.display().to_string(),
        options: vec![mode.to_owned(), "rbind".to_owned()],
    };
    let active = parts.kind == Kind::Active;
    match parts.lower {
        [] => return vec![bind(parts.upper, if active { "rw" } else { "ro" })],
        [only] if !active => return vec![bind(only, "ro")],
        _ => {}
    }
    let mut options = Vec::with_capacity(4);
    if active {
        options.push(format!("workdir={}", parts.work.display()));
        options.push(format!("upperdir={}", parts.upper.display()));
    }
    let lower: Vec<String> = parts.lower.iter().map(|path| path.display().to_string()).collect();
    options.push(format!("lowerdir={}", lower.join(":")));
    if userxattr {
        options.push("userxattr".to_owned());
    }
    vec![Mount { kind: "overlay", source: "overlay".to_owned(), options }]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compose_with(kind: Kind, lower: &[&str], userxattr: bool) -> (&'static str, String, String) {
        let lower: Vec<PathBuf> = lower.iter().map(PathBuf::from).collect();
        let parts = Parts { kind, upper: Path::new("/3/fs"), work: Path::new("/3/work"), lower: &lower };
        let mut mounts = compose(&parts, userxattr);
        assert_eq!(mounts.len(), 1);
        let mount = mounts.remove(0);
        (mount.kind, mount.source, mount.options.join(","))
    }

    #[test]
    fn the_table_of_mounts() {
        let overlay = |options: &str| ("overlay", "overlay".to_owned(), options.to_owned());
        let bind = |source: &str, options: &str| ("bind", source.to_owned(), options.to_owned());
        assert_eq!(compose_with(Kind::Active, &[], false), bind("/3/fs", "rw,rbind"));
        assert_eq!(compose_with(Kind::View, &[], false), bind("/3/fs", "ro,rbind"));
        assert_eq!(compose_with(Kind::View, &["/1/fs"], true), bind("/1/fs", "ro,rbind"));
        assert_eq!(
            compose_with(Kind::Active, &["/1/fs"], false),
            overlay("workdir=/3/work,upperdir=/3/fs,lowerdir=/1/fs")
        );
        assert_eq!(
            compose_with(Kind::Active, &["/2/fs", "/1/fs"], true),
            overlay("workdir=/3/work,upperdir=/3/fs,lowerdir=/2/fs:/1/fs,userxattr")
        );
        assert_eq!(compose_with(Kind::View, &["/2/fs", "/1/fs"], false), overlay("lowerdir=/2/fs:/1/fs"));
    }
}
