//! Debian's `pass`, and the credential helper that keeps logins in it.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

/// A password store with a key of its own.
#[derive(Debug)]
pub struct Keyring<'a>(&'a Path);

impl<'a> Keyring<'a> {
    /// Makes a key, and a store that is encrypted with it, in a home directory.
    ///
    /// # Errors
    /// Where a program is missing or fails.
    pub fn new(home: &'a Path) -> Result<Self> {
        let keyring = Self(home);
        keyring.run(
            "gpg",
            &[
                "--batch",
                "--passphrase",
                "",
                "--quick-generate-key",
                "stage@soci.example",
                "default",
                "default",
                "never",
            ],
            None,
        )?;
        keyring.run("pass", &["init", "stage@soci.example"], None)?;
        Ok(keyring)
    }

    /// Returns the variables by which the programs find it.
    pub fn environment(&self) -> Vec<(String, std::ffi::OsString)> {
        vec![("HOME".to_owned(), self.0.into()), ("GNUPGHOME".to_owned(), self.0.join(".gnupg").into())]
    }

    /// Stores a login.
    ///
    /// # Errors
    /// Where the helper fails.
    pub fn store(&self, server: &str, user: &str, secret: &str) -> Result<()> {
        let entry = json!({ "ServerURL": server, "Username": user, "Secret": secret }).to_string();
        self.run("docker-credential-pass", &["store"], Some(&entry))
    }

    fn run(&self, program: &str, words: &[&str], input: Option<&str>) -> Result<()> {
        std::fs::create_dir_all(self.0.join(".gnupg"))?;
        std::fs::set_permissions(self.0.join(".gnupg"), std::fs::Permissions::from_mode(0o700))?;
        let mut command = Command::new(program);
        command
            .args(words)
            .envs(self.environment())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let package = "install the packages gpg, gpg-agent, pass and golang-docker-credential-helpers";
        let mut child = command.spawn().with_context(|| format!("{program} does not run: {package}"))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A program that does not read its input is no failure.
            let _ = stdin.write_all(input.unwrap_or_default().as_bytes());
        }
        let done = child.wait_with_output()?;
        if !done.status.success() {
            bail!("{program}: {}: {}", done.status, String::from_utf8_lossy(&done.stderr).trim());
        }
        Ok(())
    }
}

impl Drop for Keyring<'_> {
    fn drop(&mut self) {
        // Its agent stays otherwise.
        let _ = self.run("gpgconf", &["--kill", "all"], None);
    }
}
