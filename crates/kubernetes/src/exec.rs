//! Exec plugins: a program that prints a token or a certificate for the API server.
//!
//! kube's own runner waits for the program without limit and takes a token without expiry for permanent. So this crate
//! runs the program itself, with a deadline and without input, and gives kube the result only; a 401 or the end of its
//! lifetime runs it again.

use std::process::Stdio;
use std::time::Duration;

use kube::config::{Cluster, ExecAuthCluster, ExecConfig, ExecInteractiveMode, KubeconfigError};
use serde::{Deserialize, Serialize};
use soci_auth::children::{Group, NOT_INHERITED, unprotect};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::AsyncReadExt;
use tokio::process::Command;
use zeroize::{Zeroize, Zeroizing};

/// The most output that is read, in bytes.
const MAX_OUTPUT: u64 = 1 << 20;

/// What a plugin is told of its cluster, where the kubeconfig wants that.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Described {
    /// The address, the authority also where it is a file, and what the kubeconfig has for plugins of this cluster.
    #[serde(flatten)]
    pub cluster: ExecAuthCluster,
    #[serde(skip_serializing_if = "Option::is_none")]
    disable_compression: Option<bool>,
}

impl Described {
    /// Describes a cluster. Blocks on the disk.
    ///
    /// # Errors
    /// When its authority cannot be read.
    pub(crate) fn of(cluster: &Cluster) -> Result<Self, KubeconfigError> {
        let disable_compression = cluster.disable_compression;
        Ok(Self { cluster: ExecAuthCluster::try_from(cluster)?, disable_compression })
    }
}

/// What an exec plugin printed.
pub(crate) struct ExecCredential {
    /// A bearer token.
    pub token: Option<Zeroizing<String>>,
    /// A client certificate and its key, PEM.
    pub certificate: Option<(String, Zeroizing<String>)>,
    /// When to run the program again.
    pub expires: Option<OffsetDateTime>,
}

impl std::fmt::Debug for ExecCredential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExecCredential").field("expires", &self.expires).finish_non_exhaustive()
    }
}

/// An exec plugin that gave no credential.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecError {
    /// The kubeconfig names no program.
    #[error("exec plugin without a command")]
    NoCommand,
    /// The plugin wants to ask a person.
    #[error("exec plugin {command} has interactiveMode Always, which a daemon cannot serve")]
    Interactive {
        /// The program.
        command: String,
    },
    /// An API version this is not written for.
    #[error(
        "exec plugin {command} speaks {version:?}; client.authentication.k8s.io/v1 and v1beta1 are supported"
    )]
    Version {
        /// The program.
        command: String,
        /// What the kubeconfig says.
        version: String,
    },
    /// The program cannot be started.
    #[error("exec plugin {command} cannot be started{hint}")]
    Start {
        /// The program.
        command: String,
        /// `installHint` of the kubeconfig, where there is one.
        hint: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// It took too long and was killed with its children.
    #[error("exec plugin {command} did not finish within {limit:?}")]
    Timeout {
        /// The program.
        command: String,
        /// The deadline.
        limit: Duration,
    },
    /// It failed.
    #[error("exec plugin {command} ended with {status}")]
    Failed {
        /// The program.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
    },
    /// It printed something else. The output is never shown: it may hold a token.
    #[error("exec plugin {command} printed no usable ExecCredential: {what}")]
    Output {
        /// The program.
        command: String,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl ExecError {
    /// Returns what a person can do about it.
    pub(crate) fn advice(&self) -> &'static str {
        match self {
            Self::NoCommand => "name its command in the kubeconfig, or give the user a token instead",
            Self::Interactive { .. } => "set it to IfAvailable, where the plugin works without a person",
            Self::Version { .. } => "set apiVersion of the plugin in the kubeconfig to one of them",
            Self::Start { .. } => "install it, or correct its command in the kubeconfig",
            Self::Timeout { .. } | Self::Failed { .. } | Self::Output { .. } => "run it by hand to see why",
        }
    }
}

#[derive(Deserialize)]
struct Printed {
    #[serde(default, rename = "apiVersion")]
    api_version: String,
    status: Option<Status>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    token: Option<Zeroizing<String>>,
    client_certificate_data: Option<String>,
    client_key_data: Option<Zeroizing<String>>,
    expiration_timestamp: Option<String>,
}

/// Runs the plugin of a kubeconfig and returns what it printed.
///
/// The program gets no input, its own process group, the daemon's environment with `env` of the kubeconfig and
/// `KUBERNETES_EXEC_INFO`. When `limit` has passed, or this future is dropped, the whole group is killed.
///
/// # Errors
/// [`ExecError`], which never quotes the output.
pub(crate) async fn run(
    exec: &ExecConfig,
    cluster: &Described,
    limit: Duration,
) -> Result<ExecCredential, ExecError> {
    let command = exec.command.clone().filter(|command| !command.is_empty()).ok_or(ExecError::NoCommand)?;
    if exec.interactive_mode == Some(ExecInteractiveMode::Always) {
        return Err(ExecError::Interactive { command });
    }
    let version = exec.api_version.clone().unwrap_or_default();
    if !matches!(version.as_str(), "client.authentication.k8s.io/v1" | "client.authentication.k8s.io/v1beta1")
    {
        return Err(ExecError::Version { command, version });
    }
    let mut child =
        process(&command, exec, cluster, &version).spawn().map_err(|source| ExecError::Start {
            command: command.clone(),
            hint: exec.install_hint.as_deref().map(|hint| format!(" ({hint})")).unwrap_or_default(),
            source,
        })?;
    if let Some(process) = child.id() {
        unprotect(process);
    }
    let mut group = Group::of(&child);
    let mut output = Zeroizing::new(Vec::with_capacity(8192));
    let finished = tokio::time::timeout(limit, async {
        if let Some(stdout) = child.stdout.take() {
            // A read error shows as missing output below.
            let _ = stdout.take(MAX_OUTPUT + 1).read_to_end(&mut output).await;
        }
        if output.len() as u64 > MAX_OUTPUT {
            return Ok(None);
        }
        group.kill_at_the_end().await;
        child.wait().await.map(Some)
    });
    let status = match finished.await {
        Ok(Ok(None)) => return Err(ExecError::Output { command, what: "more than 1 MiB of output" }),
        Ok(Ok(Some(status))) => status,
        Ok(Err(source)) => return Err(ExecError::Start { command, hint: String::new(), source }),
        Err(_) => return Err(ExecError::Timeout { command, limit }),
    };
    if !status.success() {
        return Err(ExecError::Failed { command, status });
    }
    parse(&output, &version).map_err(|what| ExecError::Output { command, what })
}

fn process(command: &str, exec: &ExecConfig, cluster: &Described, version: &str) -> Command {
    let mut process = Command::new(command);
    for ours in NOT_INHERITED {
        process.env_remove(ours);
    }
    process
        .args(exec.args.iter().flatten())
        .env("KUBERNETES_EXEC_INFO", request(exec, cluster, version))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true);
    for variable in exec.env.iter().flatten() {
        if let (Some(name), Some(value)) = (variable.get("name"), variable.get("value")) {
            process.env(name, value);
        }
    }
    process
}

fn request(exec: &ExecConfig, cluster: &Described, version: &str) -> String {
    let mut spec = serde_json::json!({ "interactive": false });
    if exec.provide_cluster_info {
        spec["cluster"] = serde_json::json!(cluster);
    }
    serde_json::json!({ "kind": "ExecCredential", "apiVersion": version, "spec": spec }).to_string()
}

fn parse(output: &[u8], version: &str) -> Result<ExecCredential, &'static str> {
    let printed: Printed = serde_json::from_slice(output).map_err(|_| "not the JSON of an ExecCredential")?;
    if printed.api_version != version {
        return Err("another apiVersion than the kubeconfig asks for");
    }
    let mut status = printed.status.ok_or("no status")?;
    let expires = match status.expiration_timestamp.as_deref() {
        None => None,
        Some(text) => {
            Some(OffsetDateTime::parse(text, &Rfc3339).map_err(|_| "expirationTimestamp is not RFC 3339")?)
        }
    };
    let token = status.token.take().map(|mut token| {
        let trimmed = Zeroizing::new(token.trim().to_owned());
        token.zeroize();
        trimmed
    });
    let token = token.filter(|token| !token.is_empty());
    let certificate = match (status.client_certificate_data, status.client_key_data) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        _ => return Err("a certificate without a key, or a key without a certificate"),
    };
    if token.is_none() && certificate.is_none() {
        return Err("neither a token nor a certificate");
    }
    Ok(ExecCredential { token, certificate, expires })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const V1: &str = "client.authentication.k8s.io/v1";

    fn config(script: &str) -> (tempfile::TempDir, ExecConfig) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plugin");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let json =
            serde_json::json!({ "apiVersion": V1, "command": path, "env": [{"name": "WHO", "value": "me"}] });
        (dir, serde_json::from_value(json).unwrap())
    }

    async fn run_script(script: &str, limit: Duration) -> Result<ExecCredential, ExecError> {
        let (_dir, config) = config(script);
        run(&config, &Described::default(), limit).await
    }

    const LONG: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_token_is_trimmed_and_the_environment_is_passed() {
        let script = r#"test -n "$KUBERNETES_EXEC_INFO" || exit 1
            printf '{"apiVersion":"client.authentication.k8s.io/v1","status":{"token":" %s ",' "$WHO"
            echo '"expirationTimestamp":"2030-01-02T03:04:05Z"}}'"#;
        let credential = run_script(script, LONG).await.unwrap();
        assert_eq!(credential.token.unwrap().as_str(), "me");
        assert_eq!(credential.expires.unwrap().year(), 2030);
    }

    #[test]
    fn what_the_service_manager_tells_the_daemon_is_not_inherited() {
        let (_dir, config) = config("true");
        let process = process("true", &config, &Described::default(), V1);
        let variables: Vec<_> = process.as_std().get_envs().collect();
        for ours in ["DOCKER_AUTH_CONFIG", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "WATCHDOG_USEC"] {
            assert!(variables.contains(&(ours.as_ref(), None)), "{ours} in {variables:?}");
        }
        assert!(variables.contains(&("WHO".as_ref(), Some("me".as_ref()))));
    }

    #[test]
    fn a_plugin_that_wants_it_is_told_all_of_its_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let authority = dir.path().join("ca.crt");
        std::fs::write(&authority, "PEM\n").unwrap();
        let cluster: Cluster = serde_json::from_value(serde_json::json!({
            "server": "https://api.example:6443", "certificate-authority": authority, "proxy-url": "http://p:1",
            "tls-server-name": "name.example", "disable-compression": true,
            "extensions": [
                { "name": "other", "extension": 1 },
                { "name": "client.authentication.k8s.io/exec", "extension": { "audience": "cluster" } },
            ],
        }))
        .unwrap();
        let described = Described::of(&cluster).unwrap();
        let (_dir, mut config) = config("true");
        let told = |config: &ExecConfig, described| -> serde_json::Value {
            let request: serde_json::Value = serde_json::from_str(&request(config, described, V1)).unwrap();
            request["spec"].clone()
        };
        assert_eq!(told(&config, &described), serde_json::json!({ "interactive": false }));
        config.provide_cluster_info = true;
        let expected = serde_json::json!({
            "server": "https://api.example:6443", "certificate-authority-data": "UEVNCg==",
            "proxy-url": "http://p:1", "tls-server-name": "name.example", "disable-compression": true,
            "config": { "audience": "cluster" },
        });
        assert_eq!(told(&config, &described)["cluster"], expected);
        let bare: Cluster = serde_json::from_value(serde_json::json!({ "server": "https://a" })).unwrap();
        let expected = serde_json::json!({ "server": "https://a" });
        assert_eq!(told(&config, &Described::of(&bare).unwrap())["cluster"], expected);
    }

    #[tokio::test]
    async fn a_plugin_that_hangs_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("sleep 600 & echo $! > {}; wait", pid.display());
        let error = run_script(&script, Duration::from_millis(500)).await.unwrap_err();
        assert!(matches!(error, ExecError::Timeout { .. }), "{error}");
        let child: i32 = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        let child = rustix::process::Pid::from_raw(child).unwrap();
        let deadline = std::time::Instant::now() + LONG;
        while rustix::process::test_kill_process(child).is_ok() && !zombie(child) {
            assert!(std::time::Instant::now() < deadline, "the child is still alive");
            tokio::task::yield_now().await;
        }
    }

    fn zombie(pid: rustix::process::Pid) -> bool {
        std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))
            .is_ok_and(|stat| stat.contains(") Z"))
    }

    #[tokio::test]
    async fn output_is_never_quoted() {
        for script in
            ["echo hunter2", "echo '{\"status\":{\"token\":7,\"x\":\"hunter2\"}}'", "echo hunter2; exit 3"]
        {
            let error = run_script(script, LONG).await.unwrap_err();
            let text = format!("{error} {error:?}");
            assert!(!text.contains("hunter2"), "{text}");
        }
        let flood = run_script("yes hunter2", LONG).await.unwrap_err();
        assert!(matches!(flood, ExecError::Output { what: "more than 1 MiB of output", .. }), "{flood}");
    }

    #[tokio::test]
    async fn what_a_daemon_cannot_serve_is_refused() {
        let (_dir, mut config) = config("true");
        config.interactive_mode = Some(ExecInteractiveMode::Always);
        let error = run(&config, &Described::default(), LONG).await.unwrap_err();
        assert!(matches!(error, ExecError::Interactive { .. }));
        config.interactive_mode = None;
        config.api_version = Some("client.authentication.k8s.io/v1alpha1".into());
        let error = run(&config, &Described::default(), LONG).await.unwrap_err();
        assert!(matches!(error, ExecError::Version { .. }));
    }
}
