//! The kernel, FUSE, overlay, and the file system that state is kept on.

use std::fs::OpenOptions;
use std::path::Path;

use super::{Finding, Level, shown};

/// The oldest kernel that this is made for; older ones lack what makes lazy layers fast, or overlays of them safe.
const KERNEL: (u32, u32) = (5, 10);
/// Less space than this, in bytes, is worth a warning.
const SPACE: u64 = 1 << 30;

/// Looks at this machine; `root` is where state is kept.
pub(super) fn look(root: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    findings.push(kernel(release.trim()));
    if !rustix::process::geteuid().is_root() {
        let what = "this is not run by root: what only root may read looks as if it were not there";
        findings.push(Finding::new("user", Level::Warning, what).change("sudo soci-snapshotter-grpc doctor"));
    }
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    for (name, what) in [("fuse", "lazy layers"), ("overlay", "containers")] {
        findings.push(file_system(&known, name, what));
    }
    findings.push(device(Path::new("/dev/fuse")));
    findings.push(state(root));
    findings
}

fn kernel(release: &str) -> Finding {
    let mut numbers = release.split(['.', '-']).map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= KERNEL {
        return Finding::new("kernel", Level::Ok, format!("Linux {release}"));
    }
    let what = format!("Linux {release} is older than {}.{}, the oldest supported", KERNEL.0, KERNEL.1);
    let change = format!("upgrade the kernel to {}.{} or later", KERNEL.0, KERNEL.1);
    Finding::new("kernel", Level::Warning, what).change(change)
}

fn file_system(known: &str, name: &'static str, carries: &str) -> Finding {
    if known.lines().any(|line| line.split_whitespace().last() == Some(name)) {
        return Finding::new(name, Level::Ok, "the kernel has it");
    }
    let what = format!("the kernel has no {name}, which carries {carries}");
    let change = format!("modprobe {name} && echo {name} > /etc/modules-load.d/soci-{name}.conf");
    Finding::new(name, Level::Error, what).at("/proc/filesystems").change(change)
}

fn device(path: &Path) -> Finding {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Finding::new("fuse", Level::Ok, format!("{} opens", shown(path))),
        Err(error) => {
            Finding::new("fuse", Level::Error, format!("{} cannot be opened: {error}", shown(path)))
                .change("modprobe fuse; in a container, give it the device and the capability SYS_ADMIN")
        }
    }
}

/// Magic numbers of file systems that do not do, with why.
const UNFIT: [(u64, &str, Level); 4] = [
    (0x794c_7630, "an overlay, which carries no overlays", Level::Error),
    (0x6969, "NFS, which carries no overlays", Level::Error),
    (0x6573_5546, "a FUSE file system, which may carry no overlays", Level::Warning),
    (0x0102_1994, "a tmpfs: what is cached uses memory and is gone after a reboot", Level::Warning),
];

fn state(root: &Path) -> Finding {
    // The daemon makes what is missing.
    let existing = root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let known = rustix::fs::statfs(existing).and_then(|kind| Ok((kind, rustix::fs::statvfs(existing)?)));
    let (kind, space) = match known {
        Ok(known) => known,
        Err(error) => {
            let what = format!("{} cannot be looked at: {error}", shown(existing));
            return Finding::new("state", Level::Warning, what)
                .change("run the doctor as root, or correct --root (SOCI_SNAPSHOTTER_ROOT)");
        }
    };
    let magic = u64::try_from(kind.f_type).unwrap_or(0);
    let change = "--root (SOCI_SNAPSHOTTER_ROOT) with a directory on ext4, xfs or the like";
    if let Some((_, what, level)) = UNFIT.iter().find(|(unfit, ..)| *unfit == magic) {
        return Finding::new("state", *level, format!("{} is on {what}", shown(root))).change(change);
    }
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let mib = free >> 20;
    if free < SPACE {
        let what = format!("{} has {mib} MiB left", shown(root));
        return Finding::new("state", Level::Warning, what).change(change);
    }
    Finding::new("state", Level::Ok, format!("{} has {mib} MiB left", shown(root)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_as_numbers() {
        assert_eq!(kernel("5.9.16-amd64").level, Level::Warning);
        assert_eq!(kernel("5.10.0-8-amd64").level, Level::Ok);
        assert_eq!(kernel("6.1.0").level, Level::Ok);
        assert_eq!(kernel("strange").level, Level::Warning);
    }

    #[test]
    fn a_kernel_without_fuse_is_told_apart_from_one_with_fusectl() {
        assert_eq!(file_system("nodev\tfusectl\n\tfuseblk\n", "fuse", "x").level, Level::Error);
        assert_eq!(file_system("nodev\tfuse\n", "fuse", "x").level, Level::Ok);
    }

    #[test]
    fn a_missing_device_says_what_to_do() {
        let finding = device(Path::new("/nonexistent/fuse"));
        assert_eq!(finding.level, Level::Error);
        assert!(finding.change.unwrap().contains("modprobe fuse"));
    }
}
