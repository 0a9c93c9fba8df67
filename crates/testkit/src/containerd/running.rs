//! A container that runs while the test goes on, and what it prints line by line.

use std::io::{self, BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::{Containerd, unique};
use crate::process::output;

/// A running container. Dropping it kills and removes it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    kill: Command,
}

impl Containerd {
    /// Starts a command in a new container of an image. The container's name begins with `id`, as that of
    /// [`Containerd::run_container`].
    ///
    /// # Errors
    /// Where `ctr` cannot be started; what goes wrong later ends the lines.
    pub fn start_container(
        &self,
        namespace: &str,
        snapshotter: &str,
        image: &str,
        id: &str,
        words: &[&str],
    ) -> io::Result<Running> {
        let id = unique(id);
        let mut command = self.run_command(namespace, snapshotter, image, &id, words);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let printed = child.stdout.take().ok_or_else(|| io::Error::other("ctr has no output"))?;
        let (sender, lines) = channel();
        // Ends with the container, or with the last who reads its lines.
        std::thread::spawn(move || {
            for line in BufReader::new(printed).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut kill = self.ctr(namespace);
        kill.args(["task", "kill", "--signal", "SIGKILL", &id]);
        Ok(Running { child, lines, kill })
    }
}

impl Running {
    /// Returns the next line that it prints.
    ///
    /// # Errors
    /// Where none comes in time, or it ended.
    pub fn next_line(&self, limit: Duration) -> io::Result<String> {
        let told = |error| io::Error::other(format!("no line of the container within {limit:?}: {error}"));
        self.lines.recv_timeout(limit).map_err(told)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // `ctr run` removes the container when its task has ended. Without a task there is nothing to wait for.
        if output(&mut self.kill).is_err() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
