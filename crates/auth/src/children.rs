//! Programs that are run for a credential: credential helpers, and the exec plugins of a kubeconfig.

use std::path::Path;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tokio::process::Child;

/// Variables of the environment that such a program does not inherit: what the service manager tells the daemon, with which
/// a child could speak for it, and credentials for other registries.
pub const NOT_INHERITED: [&str; 7] = [
    "DOCKER_AUTH_CONFIG",
    "NOTIFY_SOCKET",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
];

/// Takes from a program that was just started what it has from this process: that the kernel kills it last when memory is
/// short. A node needs this process, not a program that grows.
pub fn unprotect(process: u32) {
    unprotect_by(Path::new(&format!("/proc/{process}/oom_score_adj")));
}

/// The process group that a child of this process leads. Dropped before the child is reaped, as it must be, it is killed.
///
/// What made a session of its own, as an agent does that others use too, is not in the group.
#[derive(Debug)]
pub struct Group(Option<Pid>);

impl Group {
    /// Returns the group of a child that was started with one of its own.
    pub fn of(child: &Child) -> Self {
        Self(child.id().and_then(|id| Pid::from_raw(id.cast_signed())))
    }

    /// Waits until the child has ended, and kills what it left running. It is there to be reaped then.
    pub async fn kill_at_the_end(&mut self) {
        if let Some(leader) = self.0 {
            ended(leader).await;
            self.kill();
        }
    }

    /// Kills the child and all that is in its group.
    pub fn kill(&mut self) {
        // Once: when it is reaped its number may be that of another group.
        if let Some(leader) = self.0.take() {
            // The group is gone already if this fails.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until a child of this process has ended, and leaves it to be reaped: as long as it is not, nobody else gets its
/// number, nor that of the group that it leads.
async fn ended(child: Pid) {
    // The thread is given back when the child ends, by itself or because it is killed.
    let wait = move || waitid(WaitId::Pid(child), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
    if let Ok(Err(error)) = tokio::task::spawn_blocking(wait).await {
        tracing::debug!(%error, "a program for credentials cannot be waited for");
    }
}

fn unprotect_by(score: &Path) {
    let spared = std::fs::read_to_string(score).is_ok_and(|score| score.starts_with('-'));
    if spared && let Err(error) = std::fs::write(score, "0") {
        // It may have ended by itself.
        tracing::debug!(%error, "a program for credentials is spared like this process when memory is short");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_spared_when_memory_is_short_no_longer_is() {
        let directory = tempfile::tempdir().unwrap();
        for (score, then) in [("-999\n", "0"), ("0\n", "0\n"), ("300\n", "300\n")] {
            let file = directory.path().join("oom_score_adj");
            std::fs::write(&file, score).unwrap();
            unprotect_by(&file);
            assert_eq!(std::fs::read_to_string(&file).unwrap(), then);
        }
    }
}
