//! Whose environment an image is looked at with.
//!
//! Proxies, trusted authorities and the place of the Docker config come from variables, and those of the shell that calls the
//! doctor are not the daemon's. The running daemon's are what the kernel has of it; without one they are what the unit's
//! environment file says. Libraries read them of their own process, so the doctor starts itself anew with them, once, and is
//! told by [`SOURCE`] where they are from.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use super::{Finding, Level};

/// The variable that says where all others are from.
pub(super) const SOURCE: &str = "SOCI_DOCTOR_ENVIRONMENT";
/// What the unit reads.
const FILE: &str = "/etc/default/soci-snapshotter-grpc";
/// Where systemd has services look for programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Variables that the caller means for this program itself.
const OURS: [&str; 4] = [
    "SOCI_SNAPSHOTTER_ADDRESS",
    "SOCI_SNAPSHOTTER_CONFIG",
    "SOCI_SNAPSHOTTER_LOG_LEVEL",
    "SOCI_SNAPSHOTTER_ROOT",
];

type Variables = Vec<(OsString, OsString)>;

/// Goes on with the daemon's environment: does not return where that is at hand and was not taken before. Returns what is
/// used otherwise.
pub(super) fn enter(root: &Path) -> Finding {
    if let Some(source) = std::env::var_os(SOURCE) {
        return Finding::new("environment", Level::Ok, source.to_string_lossy());
    }
    let (variables, source) = match running(root) {
        Some((pid, Ok(variables))) => (variables, format!("the running daemon's (process {pid})")),
        Some((pid, Err(error))) => {
            let what = format!("this shell's: that of the daemon, process {pid}, cannot be read: {error}");
            return Finding::new("environment", Level::Warning, what).change("run the doctor as root");
        }
        None => match std::fs::read(FILE) {
            Ok(text) => {
                let path = (OsString::from("PATH"), OsString::from(PATH));
                let variables = [path].into_iter().chain(assignments(&text)).collect();
                (variables, format!("that of {FILE}: no daemon runs"))
            }
            Err(error) => {
                let what = format!("this shell's: no daemon runs, and {FILE} cannot be read: {error}");
                return Finding::new("environment", Level::Note, what);
            }
        },
    };
    let ours = OURS.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    let mut arguments = std::env::args_os();
    let mut command = Command::new("/proc/self/exe");
    command.arg0(arguments.next().unwrap_or_default()).args(arguments);
    command.env_clear().envs(variables).envs(ours).env(SOURCE, source);
    let error = command.exec();
    let what = format!("this shell's: the doctor cannot be started with the daemon's: {error}");
    Finding::new("environment", Level::Warning, what).change(
        "give the doctor the variables that `systemctl show -p Environment soci-snapshotter-grpc` shows",
    )
}

/// Returns the process that has `root`, and its environment.
fn running(root: &Path) -> Option<(u32, std::io::Result<Variables>)> {
    let lock = root.join("lock").canonicalize().ok()?;
    let pid: u32 = std::fs::read_to_string(&lock).ok()?.trim().parse().ok()?;
    // The number may be somebody else's by now: who has the lock has its file open.
    let held = match std::fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(files) => files.flatten().any(|file| std::fs::read_link(file.path()).is_ok_and(|to| to == lock)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => return Some((pid, Err(error))),
    };
    held.then(|| (pid, std::fs::read(format!("/proc/{pid}/environ")).map(|text| variables(&text))))
}

/// Splits what the kernel has of a process.
fn variables(text: &[u8]) -> Variables {
    let each = text.split(|byte| *byte == 0).filter_map(|text| assignment(OsStr::from_bytes(text)));
    each.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn assignment(text: &OsStr) -> Option<(&OsStr, &OsStr)> {
    let bytes = text.as_bytes();
    let at = bytes.iter().position(|byte| *byte == b'=').filter(|at| *at > 0)?;
    Some((OsStr::from_bytes(&bytes[..at]), OsStr::from_bytes(&bytes[at + 1..])))
}

/// Reads an environment file as systemd does: a variable per line, comments, quotes, lines that go on.
fn assignments(text: &[u8]) -> Variables {
    let mut found = Vec::new();
    let mut lines = text.split(|byte| *byte == b'\n');
    while let Some(line) = lines.next() {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") || line.starts_with(b";") {
            continue;
        }
        let mut line = line.to_vec();
        while line.last() == Some(&b'\\') {
            line.pop();
            match lines.next() {
                Some(more) => line.extend_from_slice(more.trim_ascii_end()),
                None => break,
            }
        }
        if let Some((name, value)) = assignment(OsStr::from_bytes(&line)) {
            let name = name.as_bytes().trim_ascii();
            if name.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'_') {
                found.push((OsStr::from_bytes(name).to_owned(), unquoted(value.as_bytes().trim_ascii())));
            }
        }
    }
    found
}

fn unquoted(text: &[u8]) -> OsString {
    let mut value = Vec::new();
    let mut quote = None;
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match (quote, byte) {
            (None, b'"' | b'\'') => quote = Some(byte),
            (Some(open), _) if byte == open => quote = None,
            (None, b'\\') => value.extend(bytes.next()),
            (Some(b'"'), b'\\') => match bytes.peek() {
                Some(b'"' | b'\\' | b'`' | b'$') => value.extend(bytes.next()),
                _ => value.push(byte),
            },
            _ => value.push(byte),
        }
    }
    OsString::from_vec(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(variables: Variables) -> Vec<String> {
        variables.iter().map(|(name, value)| format!("{}={}", name.display(), value.display())).collect()
    }

    #[test]
    fn an_environment_file_is_read_as_systemd_does() {
        let text = b"# proxies\n; and more\nA=1\n B = two words  \nC=\"a \\\"b\\\" \\n\"\nD='$x \\y'\nE=\n\
                     F=a\\\nb\nno assignment\nexport G=1\nH=x=y\nI=a\\ b\nJ=\"end\\";
        let expected =
            ["A=1", "B=two words", "C=a \"b\" \\n", "D=$x \\y", "E=", "F=ab", "H=x=y", "I=a b", "J=end"];
        assert_eq!(shown(assignments(text)), expected);
    }

    #[test]
    fn what_the_kernel_has_is_split_at_zeros() {
        assert_eq!(shown(variables(b"A=1\0B=\0=odd\0C=x=y\n\0")), ["A=1", "B=", "C=x=y\n"]);
    }

    #[test]
    fn the_daemon_is_who_has_the_lock_open() {
        let root = tempfile::tempdir().unwrap();
        assert!(running(root.path()).is_none());
        let lock = crate::lock::RootLock::take(root.path()).unwrap();
        let (pid, variables) = running(root.path()).unwrap();
        assert_eq!(pid, std::process::id());
        let path = std::env::var_os("PATH").unwrap();
        assert!(variables.unwrap().contains(&("PATH".into(), path)));
        drop(lock);
        assert!(running(root.path()).is_none(), "the number alone says nothing");
    }
}
