//! How long a lookup takes among ten thousand secrets in a thousand namespaces, and whether it is right.
//!
//! Prints one JSON object for `cargo xtask bench`: `{"p50_us":…,"p99_us":…,"wrong":0}`.
#![expect(clippy::print_stdout, reason = "a program for a terminal")]

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use soci_auth::keychain::{Keychain, Rejected};
use soci_auth::{AuthBoard, Credential, CredentialScope, Origin, Scheme};
use soci_kubernetes::{Environment, SecretsKeychain, Settings};
use soci_oci::ImageRef;
use soci_testkit::kube_api::KubeApi;

const NAMESPACES: usize = 1000;
const PER_NAMESPACE: usize = 10;
const LOOKUPS: usize = 100_000;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let api = KubeApi::start("t").await?;
    for at in 0..NAMESPACES * PER_NAMESPACE {
        let (namespace, number) = (at % NAMESPACES, at / NAMESPACES);
        let user = format!("{namespace:04}-{number}");
        let auths = json!({ "auths": { "reg.example": { "username": user, "password": "p" } } }).to_string();
        let data = [(".dockerconfigjson", auths.as_str())];
        let (namespace, name) = (format!("ns{namespace:04}"), format!("pull{number}"));
        api.put(&namespace, &name, "kubernetes.io/dockerconfigjson", &data);
    }
    let directory = tempfile::tempdir()?;
    let kubeconfig = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig, api.kubeconfig(&json!({ "token": "t" })))?;
    let settings = Settings { kubeconfig: Some(kubeconfig), ..Settings::new(Environment::default()) };
    let keychain = SecretsKeychain::start(settings, Arc::new(AuthBoard::new()));
    keychain.ready().await;
    if keychain.len() != NAMESPACES * PER_NAMESPACE {
        return Err(format!("{} secrets are synced: {:?}", keychain.len(), keychain.progress()).into());
    }
    let image: ImageRef = "reg.example/team/project/app:1".parse()?;
    let mut scope = CredentialScope::new(Origin::of_registry(Scheme::Https, image.registry()), image);
    let (mut times, mut wrong) = (Vec::with_capacity(LOOKUPS), 0);
    for at in 0..LOOKUPS {
        // A stride that meets every namespace in no particular order.
        let namespace = at * 7919 % NAMESPACES;
        scope.namespace = Some(format!("ns{namespace:04}"));
        let start = Instant::now();
        let lookup = keychain.lookup(&scope, &Rejected::default()).await?;
        times.push(start.elapsed());
        let first = lookup.candidates.first().map(|candidate| &candidate.credential);
        let expected = format!("{namespace:04}-");
        let right =
            matches!(first, Some(Credential::Basic { username, .. }) if username.starts_with(&expected));
        wrong += usize::from(!right);
    }
    times.sort_unstable();
    let micros = |per_cent: usize| times[times.len() * per_cent / 100].as_secs_f64() * 1e6;
    println!("{}", json!({ "p50_us": micros(50), "p99_us": micros(99), "wrong": wrong }));
    Ok(())
}
