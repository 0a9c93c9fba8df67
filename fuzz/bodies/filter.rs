//! What the fuzz target of containerd's filters does with its input, so that an ordinary test replays its corpus.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "a test")]

use soci_snapshotter::{Filter, Kind, Subject};

/// Takes each line of `data` as a filter. Of several filters any may hold, and a value that is quoted as Go quotes selects
/// what it says.
pub fn filter(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let labels = [("plain", "a"), ("containerd.io/snapshot.ref", "sha256:aa"), ("said", text)];
    let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let subject = Subject { name: text, parent: text.lines().next(), kind: Kind::Committed, labels: &labels };
    let filters: Vec<&str> = text.lines().collect();
    if let Ok(filter) = Filter::parse(&filters) {
        let alone = |filter: &&str| Filter::parse(&[filter]).unwrap().matches(&subject);
        assert_eq!(filter.matches(&subject), filters.is_empty() || filters.iter().any(alone));
    }
    let mut quoted = String::new();
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            '\n' => quoted.push_str("\\n"),
            _ => quoted.push(character),
        }
    }
    for (field, operator, expected) in
        [("name", "==", true), ("labels.said", "==", true), ("name", "!=", false)]
    {
        match Filter::parse(&[format!("{field}{operator}\"{quoted}\"")]) {
            Ok(filter) => assert_eq!(filter.matches(&subject), expected),
            Err(error) => assert!(quoted.len() > 60_000, "only a filter that is too long: {error}"),
        }
    }
}
