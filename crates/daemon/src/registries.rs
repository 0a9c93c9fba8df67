//! The registry client as the configuration wants it.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context;
use soci_auth::{AuthBoard, Authenticator, KeychainChain};
use soci_registry::settings::{BlobSettings, HttpSettings, Mirror, MirrorCredentials, Retries};
use soci_registry::{Registry, Settings};

use crate::Config;
use crate::config::checked::{Http, Limit};
use crate::metrics::Metrics;

/// Returns the client of all registries. Opens no connection.
///
/// # Errors
/// With the setting that makes no sense.
pub fn client(
    config: &Config,
    chain: KeychainChain,
    board: Arc<AuthBoard>,
    metrics: &Metrics,
) -> anyhow::Result<Registry> {
    let authenticator = Authenticator::new(
        chain,
        board,
        soci_auth::Settings { meters: Arc::new(metrics.clone()), ..soci_auth::Settings::default() },
    );
    Registry::new(settings(config)?, authenticator, Arc::new(metrics.clone())).context("registry settings")
}

fn settings(config: &Config) -> anyhow::Result<Settings> {
    let mut mirrors = BTreeMap::new();
    for (host, configured) in &config.mirrors {
        let mut list = Vec::new();
        for mirror in configured {
            let credentials = match mirror.forward_credentials {
                true => MirrorCredentials::Forwarded,
                false => MirrorCredentials::Own,
            };
            let parsed = Mirror::parse(&mirror.host, mirror.insecure)?.credentials(credentials);
            list.push(match mirror.request {
                None => parsed,
                Some(Limit::None) => parsed.request_timeout(-1),
                Some(Limit::Within(time)) => {
                    parsed.request_timeout(i64::try_from(time.as_secs()).unwrap_or(i64::MAX))
                }
            });
        }
        mirrors.insert(host.clone(), list);
    }
    let defaults = Settings::default();
    Ok(Settings {
        http: HttpSettings {
            dial_timeout: config.http.dial,
            response_header_timeout: config.http.headers,
            request_timeout: config.http.request,
            retries: retries(&config.http),
        },
        blob: BlobSettings {
            fetching_timeout: config.blob.request,
            retries: retries(&config.blob),
            ..BlobSettings::default()
        },
        mirrors,
        hosts_dirs: config.hosts_dir.iter().cloned().collect(),
        ..defaults
    })
}

fn retries(http: &Http) -> Retries {
    // The longest pause may be set below the shortest default.
    let (shortest, longest) = http.pause;
    Retries { max: http.retries, min_wait: shortest.min(longest), max_wait: longest }
}
