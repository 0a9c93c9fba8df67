//! From the text of a file to [`Raw`], with the place of whatever is wrong.
//!
//! Keys are found whatever their case, as the Go daemon does. Unknown keys and keys without effect are findings, not
//! errors: a file of another version must load.

use std::collections::BTreeSet;
use std::ops::Range;

use serde::Deserialize;
use serde::de::IntoDeserializer;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::raw::Raw;
use super::schema::{Key, Kind, Support, Table};

/// The largest file that is read, in bytes.
pub const MAX_SIZE: u64 = 1 << 20;

/// Something in the file that has no effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Line, counted from one.
    pub line: usize,
    /// Where, e.g. `[http] MaxRetries`.
    pub key: String,
    /// What about it.
    pub what: String,
}

/// A file that does not load.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}{}: {what}", if key.is_empty() { String::new() } else { format!(", key {key}") })]
pub struct ReadError {
    /// Line, counted from one.
    pub line: usize,
    /// Where, e.g. `[http] MaxRetries`; empty when the text is not TOML.
    pub key: String,
    /// What is wrong.
    pub what: String,
}

/// Parses the text of a configuration file.
///
/// # Errors
/// [`ReadError`] when it is not TOML or a key has a value of another type.
pub fn parse(text: &str) -> Result<(Raw, Vec<Finding>), ReadError> {
    let document = DeTable::parse(text).map_err(|error| error_at(text, None, &error))?;
    let (mut findings, mut unused, mut places) = (Vec::new(), Vec::new(), Vec::new());
    let mut walk = Walk { text, findings: &mut findings, unused: &mut unused, places: &mut places };
    let span = document.span();
    let table = walk.table(document.into_inner(), Raw::keys(), &[])?;
    let deserializer = Spanned::new(span, table).into_deserializer();
    let raw = Raw::deserialize(deserializer).map_err(|error| error_at(text, Some(&places), &error))?;
    let (given, default) = (toml::Table::try_from(&raw), toml::Table::try_from(Raw::default()));
    if let (Ok(given), Ok(default)) = (given, default) {
        // The sample file spells out every default: only what was changed can disappoint.
        unused.retain(|(path, _)| lookup(&given, path) != lookup(&default, path));
    }
    findings.extend(unused.into_iter().map(|(_, finding)| finding));
    findings.sort_by_key(|finding| finding.line);
    Ok((raw, findings))
}

fn lookup<'a>(table: &'a toml::Table, path: &[String]) -> Option<&'a toml::Value> {
    let (first, rest) = path.split_first()?;
    match (table.get(first)?, rest) {
        (value, []) => Some(value),
        (toml::Value::Table(table), rest) => lookup(table, rest),
        _ => None,
    }
}

/// The span of a value and the key it stands at.
type Place = (Range<usize>, String);

struct Walk<'a> {
    text: &'a str,
    findings: &'a mut Vec<Finding>,
    /// Keys without effect, by where they are.
    unused: &'a mut Vec<(Vec<String>, Finding)>,
    places: &'a mut Vec<Place>,
}

impl Walk<'_> {
    fn table<'i>(
        &mut self,
        table: DeTable<'i>,
        keys: &'static [Key],
        path: &[String],
    ) -> Result<DeTable<'i>, ReadError> {
        let mut result = DeTable::new();
        let mut seen = BTreeSet::new();
        // In the order of the file, whatever order the parser keeps.
        let mut entries: Vec<_> = table.into_iter().collect();
        entries.sort_by_key(|(name, _)| name.span().start);
        for (name, value) in entries {
            let at = name.span();
            let known = keys.iter().find(|key| key.name.eq_ignore_ascii_case(name.get_ref()));
            let Some(key) = known else {
                let what = "is not a key of this daemon and has no effect".to_owned();
                let line = line(self.text, at.start);
                self.findings.push(Finding { line, key: spell(path, name.get_ref()), what });
                continue;
            };
            if !seen.insert(key.name) {
                let what = "stands there twice, in different case".to_owned();
                return Err(ReadError { line: line(self.text, at.start), key: spell(path, key.name), what });
            }
            let mut inner = path.to_vec();
            inner.push(key.name.to_owned());
            if let Support::Unused(why) = key.support {
                let what = format!("has no effect: {why}");
                let line = line(self.text, at.start);
                self.unused.push((inner.clone(), Finding { line, key: spell(path, key.name), what }));
            }
            self.places.push((value.span(), spell(path, key.name)));
            let span = value.span();
            let value = self.value(value.into_inner(), key.kind, &inner)?;
            result.insert(Spanned::new(at, key.name.into()), Spanned::new(span, value));
        }
        Ok(result)
    }

    fn value<'i>(
        &mut self,
        value: DeValue<'i>,
        kind: Kind,
        path: &[String],
    ) -> Result<DeValue<'i>, ReadError> {
        Ok(match (value, kind) {
            (DeValue::Table(table), Kind::Table(keys)) => DeValue::Table(self.table(table, keys(), path)?),
            (DeValue::Table(table), Kind::Map(keys)) => {
                let mut result = DeTable::new();
                for (name, value) in table {
                    let mut inner = path.to_vec();
                    inner.push(name.get_ref().to_string());
                    self.places.push((value.span(), format!("[{}]", inner.join("."))));
                    let span = value.span();
                    let value = self.value(value.into_inner(), Kind::Table(keys), &inner)?;
                    result.insert(name, Spanned::new(span, value));
                }
                DeValue::Table(result)
            }
            (DeValue::Array(mut list), Kind::List(keys)) => {
                for value in list.iter_mut() {
                    let inner = std::mem::replace(value.get_mut(), DeValue::Boolean(false));
                    *value.get_mut() = self.value(inner, Kind::Table(keys), path)?;
                }
                DeValue::Array(list)
            }
            (value, _) => value,
        })
    }
}

fn spell(path: &[String], name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("[{}] {name}", path.join(".")) }
}

fn line(text: &str, at: usize) -> usize {
    text.as_bytes().iter().take(at).filter(|&&byte| byte == b'\n').count() + 1
}

fn error_at(text: &str, places: Option<&[Place]>, error: &toml::de::Error) -> ReadError {
    let span = error.span().unwrap_or_default();
    // The innermost value that holds the fault.
    let around = places
        .unwrap_or_default()
        .iter()
        .filter(|(place, _)| place.start <= span.start && span.end <= place.end);
    let key = around.min_by_key(|(place, _)| place.len()).map(|(_, key)| key.clone()).unwrap_or_default();
    let what = error.message().lines().next().unwrap_or_default().to_owned();
    ReadError { line: line(text, span.start), key, what }
}
