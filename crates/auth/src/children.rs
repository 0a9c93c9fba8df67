//! Programs that are run for a credential: credential helpers, and the exec plugins of a kubeconfig.

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
