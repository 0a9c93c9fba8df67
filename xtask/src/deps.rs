//! Asserts which crate may depend on which (the table in ARCHITECTURE.md).
//!
//! Dependencies point to lower tiers only, and within what the table names; what only tests use may also come from the
//! test kit. A crate that the table does not know is an error, so that a new one is a decision.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};

use crate::run::metadata;

/// The crates and what each may use of the others when it ships.
const ALLOWED: &[(&str, &[&str])] = &[
    ("soci-oci", &[]),
    ("soci-ztoc", &["soci-oci"]),
    ("soci-auth", &["soci-oci"]),
    ("soci-kubernetes", &["soci-oci", "soci-auth"]),
    ("soci-registry", &["soci-oci", "soci-auth"]),
    ("soci-store", &["soci-oci"]),
    ("soci-index", &["soci-oci", "soci-ztoc", "soci-registry", "soci-store"]),
    ("soci-layer", &["soci-oci", "soci-ztoc", "soci-registry", "soci-store"]),
    ("soci-fs", &["soci-oci", "soci-ztoc", "soci-layer"]),
    ("soci-snapshotter", &["soci-oci"]),
    (
        "soci-snapshotter-grpc",
        &[
            "soci-oci",
            "soci-ztoc",
            "soci-auth",
            "soci-kubernetes",
            "soci-registry",
            "soci-store",
            "soci-index",
            "soci-layer",
            "soci-fs",
            "soci-snapshotter",
        ],
    ),
    (
        "soci",
        &["soci-oci", "soci-ztoc", "soci-auth", "soci-registry", "soci-store", "soci-index", "soci-layer"],
    ),
    // These never ship; they use the binaries, not the crates.
    ("soci-testkit", &[]),
    ("soci-e2e", &["soci-testkit"]),
    ("xtask", &[]),
];

/// Crates that stand below every product crate: libraries that would pull effects into them.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("soci-oci", &["tokio", "reqwest", "hyper", "anyhow"]),
    ("soci-ztoc", &["tokio", "reqwest", "hyper", "anyhow"]),
    ("soci-auth", &["reqwest", "hyper", "kube", "anyhow"]),
    ("soci-kubernetes", &["anyhow"]),
    ("soci-registry", &["kube", "anyhow"]),
    ("soci-store", &["reqwest", "kube", "anyhow"]),
    ("soci-index", &["reqwest", "hyper", "kube", "anyhow"]),
    ("soci-layer", &["reqwest", "hyper", "kube", "anyhow"]),
    ("soci-fs", &["reqwest", "hyper", "tonic", "kube", "anyhow"]),
    ("soci-snapshotter", &["reqwest", "hyper", "tonic", "kube", "anyhow"]),
];

/// Runs the verb.
pub(crate) fn deps() -> Result<()> {
    let found = read(&metadata()?)?;
    let faults = faults(&found);
    if !faults.is_empty() {
        bail!("crate directions:\n  {}", faults.join("\n  "));
    }
    Ok(())
}

/// A dependency: its name, and whether only tests use it.
type Uses = Vec<(String, bool)>;

fn read(metadata: &serde_json::Value) -> Result<BTreeMap<String, Uses>> {
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let mut found = BTreeMap::new();
    for package in packages {
        let name = package["name"].as_str().context("a package has no name")?;
        let dependencies = package["dependencies"].as_array().context("a package has no dependencies")?;
        let uses = dependencies
            .iter()
            .map(|dependency| {
                let name = dependency["name"].as_str().unwrap_or_default().to_owned();
                (name, dependency["kind"].as_str() == Some("dev"))
            })
            .collect();
        found.insert(name.to_owned(), uses);
    }
    Ok(found)
}

fn faults(found: &BTreeMap<String, Uses>) -> Vec<String> {
    let mut faults = Vec::new();
    for (name, uses) in found {
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| known == name) else {
            faults.push(format!("{name} is not in the table: say what it is for and what it may use"));
            continue;
        };
        let forbidden = FORBIDDEN.iter().find(|(known, _)| known == name).map_or(&[][..], |(_, list)| list);
        for (used, only_tests) in uses {
            let used = used.as_str();
            let ours = ALLOWED.iter().any(|(known, _)| *known == used);
            if ours && !allowed.contains(&used) && !(*only_tests && used == "soci-testkit") {
                faults.push(format!("{name} may not depend on {used}"));
            }
            if !only_tests && forbidden.contains(&used) {
                faults.push(format!("{name} may not depend on {used}: see the rules of direction"));
            }
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(entries: &[(&str, &[(&str, bool)])]) -> BTreeMap<String, Uses> {
        let uses =
            |list: &[(&str, bool)]| list.iter().map(|(name, dev)| ((*name).to_owned(), *dev)).collect();
        entries.iter().map(|(name, list)| ((*name).to_owned(), uses(list))).collect()
    }

    #[test]
    fn upward_unknown_and_forbidden_dependencies_are_named() {
        let bad = table(&[
            ("soci-ztoc", &[("soci-layer", false), ("tokio", false)]),
            ("soci-new", &[]),
            ("soci-fs", &[("soci-testkit", false)]),
        ]);
        let faults = faults(&bad);
        assert_eq!(faults.len(), 4, "{faults:?}");
    }

    #[test]
    fn tests_may_use_the_test_kit_and_nothing_above() {
        let good = table(&[("soci-fs", &[("soci-testkit", true), ("soci-layer", false), ("tokio", false)])]);
        assert_eq!(faults(&good), Vec::<String>::new());
        let bad = table(&[("soci-fs", &[("soci-snapshotter-grpc", true)])]);
        assert_eq!(faults(&bad).len(), 1);
    }

    #[test]
    fn the_table_itself_points_downwards() {
        for (at, (name, allowed)) in ALLOWED.iter().enumerate() {
            for used in *allowed {
                let position = ALLOWED.iter().position(|(known, _)| known == used);
                assert!(position.is_some_and(|below| below < at), "{name} uses {used}");
            }
        }
    }
}
