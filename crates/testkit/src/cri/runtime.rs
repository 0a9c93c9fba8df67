//! Pods and containers: the runtime service, on the host's network, so that no network plugin is needed.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::Channel;

use super::api::runtime_service_client::RuntimeServiceClient;
use super::{Connection, api, connect, spec};
use crate::wait;

/// How long a container may take to end.
const END: Duration = Duration::from_secs(60);

/// A connection to a socket that speaks `runtime.v1.RuntimeService`. Calls block; not for use on an async thread.
#[derive(Debug)]
pub struct RuntimeService(Connection);

/// A running pod. Dropping it stops and removes it.
#[derive(Debug)]
pub struct Pod<'a> {
    service: &'a RuntimeService,
    config: api::PodSandboxConfig,
    id: String,
    logs: PathBuf,
}

impl RuntimeService {
    /// Connects to a socket when the first call is made.
    ///
    /// # Errors
    /// Where no runtime can be made for the calls.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Ok(Self(connect(socket)?))
    }

    /// Runs a pod on the host's network, whose containers log beneath `logs`.
    ///
    /// # Errors
    /// What the service answers.
    pub fn run_pod(&self, name: &str, logs: &Path) -> Result<Pod<'_>, tonic::Status> {
        // Control groups are the machine's: the name is ours alone.
        let unique = format!("{name}-{}", std::process::id());
        let config = api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: unique.clone(),
                uid: unique.clone(),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            log_directory: logs.display().to_string(),
            linux: Some(api::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{unique}"),
                security_context: Some(api::LinuxSandboxSecurityContext {
                    namespace_options: host_network(),
                }),
            }),
        };
        let request = api::RunPodSandboxRequest { config: Some(config.clone()) };
        let id = self.0.runtime.block_on(self.client().run_pod_sandbox(request))?.into_inner().pod_sandbox_id;
        Ok(Pod { service: self, config, id, logs: logs.to_owned() })
    }

    fn client(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.0.channel.clone())
    }
}

fn host_network() -> Option<api::NamespaceOption> {
    Some(api::NamespaceOption { network: api::NamespaceMode::Node.into() })
}

impl Pod<'_> {
    /// Runs a container of an image to its end and returns its exit code and what it printed.
    ///
    /// # Errors
    /// What the service answers, or that the container does not end.
    pub fn run(&self, name: &str, image: &str, command: &[&str]) -> Result<(i32, String), tonic::Status> {
        let log = format!("{name}.log");
        let linux = api::LinuxContainerSecurityContext { namespace_options: host_network() };
        let config = api::ContainerConfig {
            metadata: Some(api::ContainerMetadata { name: name.to_owned() }),
            image: Some(spec(image)),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            args: Vec::new(),
            log_path: log.clone(),
            linux: Some(api::LinuxContainerConfig { security_context: Some(linux) }),
        };
        let request = api::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let (runtime, mut client) = (&self.service.0.runtime, self.service.client());
        let container_id = runtime.block_on(client.create_container(request))?.into_inner().container_id;
        let start = api::StartContainerRequest { container_id: container_id.clone() };
        runtime.block_on(client.start_container(start))?;
        let mut trouble = None;
        let ended = wait::until(END, || {
            let request = api::ContainerStatusRequest { container_id: container_id.clone() };
            match runtime.block_on(client.container_status(request)) {
                Ok(answer) => {
                    let status = answer.into_inner().status?;
                    (status.state() == api::ContainerState::Exited).then_some(status.exit_code)
                }
                Err(status) => {
                    trouble = Some(status);
                    None
                }
            }
        });
        let Some(code) = ended else {
            return Err(
                trouble.unwrap_or_else(|| tonic::Status::deadline_exceeded("the container does not end"))
            );
        };
        // Each line is `<time> <stream> <F or P> <text>`.
        let text = std::fs::read_to_string(self.logs.join(log)).unwrap_or_default();
        let lines = text.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
        Ok((code, lines.map(|line| format!("{line}\n")).collect()))
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        let (runtime, mut client) = (&self.service.0.runtime, self.service.client());
        let pod_sandbox_id = self.id.clone();
        // What does not go is killed with its containerd.
        let _ = runtime.block_on(client.stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id }));
        let pod_sandbox_id = self.id.clone();
        let _ = runtime.block_on(client.remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id }));
    }
}
