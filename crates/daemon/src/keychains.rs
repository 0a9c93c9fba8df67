//! The options by which registry logins are found, in the order of the contract.
//!
//! This list is the only place that knows the order: Docker config, then what the kubelet's pulls carry, then Kubernetes
//! secrets. The first that has a candidate is used, and the next is not tried because a registry refused it.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;

use soci_auth::explain::HostReport;
use soci_auth::keychain::cri::CriStore;
use soci_auth::keychain::docker_config::{self, DockerConfigKeychain};
use soci_auth::{AuthBoard, Keychain, KeychainChain, Secret};
use soci_kubernetes::SecretsKeychain;

use crate::Config;
use crate::metrics::Metrics;

/// The options that are on.
#[derive(Debug)]
pub struct Keychains {
    /// All of them, in order.
    pub chain: KeychainChain,
    /// What pulls leave their credentials in, where that option is on.
    pub pulls: Option<Arc<CriStore>>,
    /// The synced secrets, where that option is on.
    pub secrets: Option<Arc<SecretsKeychain>>,
    /// The options that are off.
    pub off: Vec<Off>,
}

/// An option that the configuration has off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Off {
    /// Its place among all options.
    pub place: usize,
    /// Its name.
    pub name: &'static str,
    /// How it is put on.
    pub how: &'static str,
}

/// All options in the order of the contract, and how those are put on that can be off.
pub const OPTIONS: [(&str, &str); 3] = [
    ("docker-config", ""),
    ("cri", "it is off; [cri_keychain] enable_keychain = true puts it on"),
    ("kubernetes-secrets", "it is off; [kubeconfig_keychain] enable_keychain = true puts it on"),
];

/// Adds the options that are off to a report, each in its place.
pub fn show_off(report: &mut HostReport, off: &[Off]) {
    off.iter().for_each(|off| report.insert_off(off.place, off.name, off.how));
}

/// Returns the options that `config` asks for. Reads the environment that `variable` returns; starts to sync secrets where
/// that is on, so it must be called inside a tokio runtime. Waits for nobody.
pub fn open(
    config: &Config,
    board: &Arc<AuthBoard>,
    metrics: &Metrics,
    variable: &dyn Fn(&str) -> Option<OsString>,
) -> Keychains {
    let environment = docker_config::Environment {
        home: variable("HOME").map(Into::into),
        docker_config: variable("DOCKER_CONFIG").map(Into::into),
        path: variable("PATH"),
        docker_auth_config: variable("DOCKER_AUTH_CONFIG").map(|text| Secret::new(text.into_vec())),
    };
    let home = environment.home_dir();
    let docker = DockerConfigKeychain::new(
        environment,
        Arc::clone(board),
        docker_config::Settings { meters: Arc::new(metrics.clone()), ..docker_config::Settings::default() },
    );
    let pulls = config.cri.is_some().then(|| CriStore::new(Arc::clone(board)));
    let secrets = config.kubernetes.as_ref().map(|kubernetes| {
        let listed = variable("KUBECONFIG").unwrap_or_default();
        let settings = soci_kubernetes::Settings {
            kubeconfig: kubernetes.kubeconfig.clone(),
            namespaces: kubernetes.namespaces.clone(),
            legacy_dockercfg: kubernetes.legacy_dockercfg,
            ..soci_kubernetes::Settings::new(soci_kubernetes::Environment {
                kubeconfig: std::env::split_paths(&listed).filter(|path| *path != PathBuf::new()).collect(),
                home: home.unwrap_or_default(),
                in_cluster: variable("KUBERNETES_SERVICE_HOST").is_some(),
                proxies: soci_kubernetes::Proxies::of(variable),
            })
        };
        SecretsKeychain::start(settings, Arc::clone(board))
    });
    let options: [Option<Arc<dyn Keychain>>; 3] = [
        Some(Arc::new(docker)),
        pulls.clone().map(|pulls| pulls as Arc<dyn Keychain>),
        secrets.clone().map(|secrets| secrets as Arc<dyn Keychain>),
    ];
    let places = OPTIONS.iter().zip(&options).enumerate();
    let off = places.filter(|(_, (_, option))| option.is_none());
    let off = off.map(|(place, ((name, how), _))| Off { place, name, how }).collect();
    Keychains { chain: KeychainChain::new(options.into_iter().flatten().collect()), pulls, secrets, off }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Raw;

    fn names(text: &str) -> Vec<&'static str> {
        let raw: Raw = toml::from_str(text).unwrap();
        let config = Config::check(&raw).unwrap();
        let home = tempfile::tempdir().unwrap();
        let keychains = open(&config, &Arc::new(AuthBoard::new()), &Metrics::default(), &|name| {
            (name == "HOME").then(|| home.path().as_os_str().to_owned())
        });
        assert_eq!(keychains.pulls.is_some(), config.cri.is_some());
        let names = keychains.chain.names();
        let mut all = names.clone();
        keychains.off.iter().for_each(|off| all.insert(off.place, off.name));
        assert_eq!(all, OPTIONS.map(|(name, _)| name));
        names
    }

    #[tokio::test]
    async fn t14_t15_r3_r4_r7_r8_the_order_is_the_contracts_whatever_is_on() {
        let (cri, secrets) =
            ("[cri_keychain]\nenable_keychain = true\n", "[kubeconfig_keychain]\nenable_keychain = true\n");
        assert_eq!(names(""), ["docker-config"]);
        assert_eq!(names(cri), ["docker-config", "cri"]);
        assert_eq!(names(secrets), ["docker-config", "kubernetes-secrets"]);
        for text in [format!("{cri}{secrets}"), format!("{secrets}{cri}")] {
            assert_eq!(names(&text), ["docker-config", "cri", "kubernetes-secrets"]);
        }
    }
}
