//! What `docs/SEMANTICS.md` promises is proved by tests that exist.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Collects the names of the tests below `directory`.
fn tests(directory: &Path, names: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            tests(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let mut marked = false;
            for line in text.lines().map(str::trim) {
                let function = line.trim_start_matches("async ").strip_prefix("fn ");
                match function.and_then(|rest| rest.split(['(', '<']).next()) {
                    Some(name) if marked => drop(names.insert(name.to_owned())),
                    _ => {}
                }
                // Further attributes may stand between.
                marked = line.starts_with("#[test]")
                    || line.starts_with("#[tokio::test")
                    || (marked && line.starts_with("#["));
            }
        }
    }
}

#[test]
fn each_promise_names_tests_that_exist() {
    let document = std::fs::read_to_string(root().join("docs/SEMANTICS.md")).unwrap();
    let mut promises = 0;
    let mut wrong = Vec::new();
    for line in document.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| promise |")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [promise, proof] = cells.as_slice() else { panic!("not a promise and its proof: {line}") };
        if promise.starts_with("---") {
            continue;
        }
        promises += 1;
        let named: Vec<&str> = proof.split('`').skip(1).step_by(2).collect();
        assert!(!named.is_empty(), "no test proves: {promise}");
        for name in named {
            let (package, test) = name.split_once("::").unwrap_or_else(|| panic!("not crate::test: {name}"));
            let directory = match package {
                "e2e" => root().join("tests/e2e"),
                package => root().join("crates").join(package),
            };
            let mut names = BTreeSet::new();
            tests(&directory, &mut names);
            if !names.contains(test) {
                wrong.push(name);
            }
        }
    }
    assert!(promises > 40, "{promises} promises");
    assert!(wrong.is_empty(), "no such tests: {wrong:#?}");
}
