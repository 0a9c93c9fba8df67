//! Credentials for a registry: `--user` if it is given, and then nothing else; otherwise the Docker config.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, IsTerminal as _, Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use soci_auth::keychain::docker_config::{self, DockerConfigKeychain, Environment};
use soci_auth::keychain::explicit::{ExplicitKeychain, UserArgument, parse_user};
use soci_auth::{AuthBoard, Authenticator, Credential, Keychain, KeychainChain, Secret, Settings};
use soci_oci::RegistryName;
use tokio::sync::oneshot;
use zeroize::Zeroizing;

use crate::cli::RegistryFlags;

/// The longest password that is read, in bytes. Tokens of clouds have a few KiB.
const MAX_PASSWORD: u64 = 64 << 10;

/// Returns what authenticates requests to `registry`. Asks for the password where that is possible and needed.
///
/// # Errors
/// When `--user` is of no use; nothing has been sent anywhere by then.
pub(crate) async fn authenticator(
    flags: &RegistryFlags,
    registry: &RegistryName,
) -> anyhow::Result<Arc<Authenticator>> {
    let Some(user) = &flags.user else { return Ok(docker_config()) };
    let keychain = ExplicitKeychain::new(explicit(user.as_bytes(), flags).await?, registry);
    Ok(over(Arc::new(keychain), Arc::new(AuthBoard::new())))
}

/// Returns what authenticates requests by the Docker config of who runs the command.
pub(crate) fn docker_config() -> Arc<Authenticator> {
    let board = Arc::new(AuthBoard::new());
    let settings = docker_config::Settings::default();
    over(Arc::new(DockerConfigKeychain::new(environment(), Arc::clone(&board), settings)), board)
}

fn over(option: Arc<dyn Keychain>, board: Arc<AuthBoard>) -> Arc<Authenticator> {
    // A command says at once that it was refused: nobody will bring another credential while it waits.
    let settings = Settings { patience: Duration::ZERO, ..Settings::default() };
    Authenticator::new(KeychainChain::new(vec![option]), board, settings)
}

fn environment() -> Environment {
    let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let docker_auth_config = std::env::var_os("DOCKER_AUTH_CONFIG").filter(|value| !value.is_empty());
    Environment {
        home: path("HOME"),
        docker_config: path("DOCKER_CONFIG"),
        path: std::env::var_os("PATH"),
        docker_auth_config: docker_auth_config.map(|value| Secret::new(value.as_bytes())),
    }
}

async fn explicit(user: &[u8], flags: &RegistryFlags) -> anyhow::Result<Credential> {
    let argument = parse_user(user)?;
    if flags.password_stdin {
        let all = |password: &mut Vec<u8>| io::stdin().lock().take(MAX_PASSWORD + 1).read_to_end(password);
        let password = read_aside(all).await.context("--password-stdin")?;
        if password.len() as u64 > MAX_PASSWORD {
            bail!("--password-stdin: more than {MAX_PASSWORD} bytes");
        }
        return Ok(argument.with_password(Secret::new(line(&password))));
    }
    match argument {
        UserArgument::NameOnly(_) if io::stdin().is_terminal() => {
            let password = ask().await.context("asking for the password")?;
            Ok(argument.with_password(Secret::new(line(&password))))
        }
        other => Ok(other.complete()?),
    }
}

/// Returns a password without the end of its line.
fn line(password: &[u8]) -> &[u8] {
    let password = password.strip_suffix(b"\n").unwrap_or(password);
    password.strip_suffix(b"\r").unwrap_or(password)
}

/// Reads in a thread of its own. Nobody waits for it when the command is interrupted meanwhile: a read from a terminal or a
/// pipe cannot be broken off.
async fn read_aside(
    read: impl FnOnce(&mut Vec<u8>) -> io::Result<usize> + Send + 'static,
) -> io::Result<Zeroizing<Vec<u8>>> {
    let (tell, told) = oneshot::channel();
    std::thread::Builder::new().name("password".to_owned()).spawn(move || {
        let mut password = Zeroizing::new(Vec::new());
        // Who is not there any more needs no password.
        let _ = tell.send(read(&mut password).map(|_| password));
    })?;
    told.await.map_err(io::Error::other)?
}

/// A terminal that does not show what is typed, until this is dropped.
struct Quiet {
    terminal: Arc<File>,
    before: Termios,
}

impl Quiet {
    fn new(terminal: &Arc<File>) -> io::Result<Self> {
        let before = tcgetattr(terminal.as_fd())?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(terminal.as_fd(), OptionalActions::Flush, &silent)?;
        Ok(Self { terminal: Arc::clone(terminal), before })
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(self.terminal.as_fd(), OptionalActions::Now, &self.before);
    }
}

/// Asks for a password at the terminal, which does not show it.
async fn ask() -> io::Result<Zeroizing<Vec<u8>>> {
    let terminal = Arc::new(File::options().read(true).write(true).open("/dev/tty")?);
    (&*terminal).write_all(b"Password: ")?;
    let quiet = Quiet::new(&terminal)?;
    let typed = Arc::clone(&terminal);
    let password =
        read_aside(move |password| BufReader::new(&*typed).take(MAX_PASSWORD).read_until(b'\n', password))
            .await;
    drop(quiet);
    (&*terminal).write_all(b"\n")?;
    password
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_the_end_of_the_line_is_cut_from_a_password() {
        for (given, expected) in
            [("p", "p"), ("p\n", "p"), ("p\r\n", "p"), ("p\n\n", "p\n"), (" p \n", " p "), ("", "")]
        {
            assert_eq!(super::line(given.as_bytes()), expected.as_bytes());
        }
    }
}
