//! How long a lookup takes among ten thousand secrets in a thousand namespaces, and whether it is right: with a login for
//! each secret, and with one that all of them have.
//!
//! Prints one JSON object for `cargo xtask bench`: `{"p50_us":…,"p99_us":…,"copies_p99_us":…,"wrong":0}`.
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

/// Times in microseconds, and how many answers were not as they should be.
struct Figures {
    p50: f64,
    p99: f64,
    wrong: usize,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let own = measure(
        |namespace, number| format!("{namespace:04}-{number}"),
        |namespace| format!("{namespace:04}-"),
    )
    .await?;
    let copies = measure(|_, _| "shared".to_owned(), |_| "shared".to_owned()).await?;
    let figures = json!({
        "p50_us": own.p50,
        "p99_us": own.p99,
        "copies_p99_us": copies.p99,
        "wrong": own.wrong + copies.wrong,
    });
    println!("{figures}");
    Ok(())
}

/// Looks up among secrets with the login that `user` says for namespace and number, where what is found first must be for a
/// user whose name begins as `expected` says for the namespace.
async fn measure(
    user: impl Fn(usize, usize) -> String,
    expected: impl Fn(usize) -> String,
) -> Result<Figures, Box<dyn Error>> {
    let api = KubeApi::start("t").await?;
    for at in 0..NAMESPACES * PER_NAMESPACE {
        let (namespace, number) = (at % NAMESPACES, at / NAMESPACES);
        let user = user(namespace, number);
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
        let expected = expected(namespace);
        let right =
            matches!(first, Some(Credential::Basic { username, .. }) if username.starts_with(&expected));
        wrong += usize::from(!right);
    }
    times.sort_unstable();
    let micros = |per_cent: usize| times[times.len() * per_cent / 100].as_secs_f64() * 1e6;
    Ok(Figures { p50: micros(50), p99: micros(99), wrong })
}
