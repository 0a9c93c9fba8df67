//! A resolver that leaves out addresses to which no credential of a registry goes.
//!
//! The check stands where the connection is made: a name that passes a check first and resolves to something else a
//! moment later gains nothing.

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use soci_auth::{Origin, policy};

/// Resolves names for token requests on behalf of one registry.
#[derive(Debug)]
pub(crate) struct GuardedResolver {
    registry: Origin,
}

impl GuardedResolver {
    pub(crate) fn new(registry: Origin) -> Self {
        Self { registry }
    }
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let registry = self.registry.clone();
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let mut refused = None;
            let mut allowed = Vec::new();
            for address in found {
                match policy::check_address(&registry, address.ip()) {
                    Ok(()) => allowed.push(address),
                    Err(error) => refused = Some(error),
                }
            }
            match refused {
                Some(error) if allowed.is_empty() => Err(error.into()),
                _ => Ok(Box::new(allowed.into_iter()) as Addrs),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn t114_names_that_resolve_to_this_machine_are_refused_for_other_registries() {
        let name = || "localhost".parse::<Name>().unwrap();
        let registry = |url: &str| Origin::of_url(&url.parse().unwrap()).unwrap();
        let other = GuardedResolver::new(registry("https://reg.example"));
        let error = other.resolve(name()).await.err().unwrap().to_string();
        assert!(error.contains("loopback"), "{error}");
        let own = GuardedResolver::new(registry("https://127.0.0.1:5000"));
        assert!(own.resolve(name()).await.unwrap().next().is_some());
    }
}
