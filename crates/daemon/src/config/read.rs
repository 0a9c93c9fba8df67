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

use super::checked::CheckError;
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

/// A file that was read.
#[derive(Debug)]
pub struct Parsed {
    /// What it says.
    pub raw: Raw,
    /// What of it has no effect, in the order of the file.
    pub findings: Vec<Finding>,
    /// Where it says what.
    pub places: Places,
}

/// Where each value of a file stands.
#[derive(Debug, Default)]
pub struct Places(Vec<Place>);

/// A value of the file.
#[derive(Debug)]
struct Place {
    span: Range<usize>,
    line: usize,
    /// The names of tables and keys that lead to it; one of a list is named by its number from zero.
    path: Vec<String>,
    /// The same as it is shown, e.g. `[http] MaxRetries`.
    key: String,
}

impl Places {
    /// Returns the line of the key that `path` leads to; `None` where the file does not have it.
    pub fn line(&self, path: &[&str]) -> Option<usize> {
        self.0.iter().find(|place| place.path == path).map(|place| place.line)
    }

    /// Says where the value stands that `error` is about: at the key itself, else at the table around it.
    pub fn locate(&self, CheckError { path, what }: CheckError) -> ReadError {
        let around = self.0.iter().filter(|place| path.starts_with(&place.path));
        match around.max_by_key(|place| place.path.len()) {
            Some(place) => ReadError { line: place.line, key: place.key.clone(), what },
            None => ReadError { line: 1, key: path.join("."), what },
        }
    }
}

/// Parses the text of a configuration file.
///
/// # Errors
/// [`ReadError`] when it is not TOML or a key has a value of another type.
pub fn parse(text: &str) -> Result<Parsed, ReadError> {
    let document = DeTable::parse(text).map_err(|error| error_at(text, None, &error))?;
    let (mut findings, mut unused, mut places) = (Vec::new(), Vec::new(), Places::default());
    let mut walk = Walk { text, findings: &mut findings, unused: &mut unused, places: &mut places.0 };
    let span = document.span();
    let table = walk.table(document.into_inner(), Raw::keys(), &Path::default())?;
    let deserializer = Spanned::new(span, table).into_deserializer();
    let raw = Raw::deserialize(deserializer).map_err(|error| error_at(text, Some(&places), &error))?;
    let (given, default) = (toml::Table::try_from(&raw), toml::Table::try_from(Raw::default()));
    if let (Ok(given), Ok(default)) = (given, default) {
        // The sample file spells out every default: only what was changed can disappoint.
        unused.retain(|(path, _)| lookup(&given, path) != lookup(&default, path));
    }
    findings.extend(unused.into_iter().map(|(_, finding)| finding));
    findings.sort_by_key(|finding| finding.line);
    Ok(Parsed { raw, findings, places })
}

fn lookup<'a>(table: &'a toml::Table, path: &[String]) -> Option<&'a toml::Value> {
    let (first, rest) = path.split_first()?;
    match (table.get(first)?, rest) {
        (value, []) => Some(value),
        (toml::Value::Table(table), rest) => lookup(table, rest),
        _ => None,
    }
}

/// The way to a table.
#[derive(Clone, Default)]
struct Path {
    /// As it is written in a file.
    names: Vec<String>,
    /// With the number of each that stands in a list.
    exact: Vec<String>,
}

impl Path {
    fn name(&self, name: &str) -> Self {
        let mut inner = self.item(name);
        inner.names.push(name.to_owned());
        inner
    }

    fn item(&self, number: &str) -> Self {
        let mut inner = self.clone();
        inner.exact.push(number.to_owned());
        inner
    }

    fn spell(&self, name: &str) -> String {
        let table = self.names.join(".");
        if table.is_empty() { name.to_owned() } else { format!("[{table}] {name}") }
    }
}

struct Walk<'a> {
    text: &'a str,
    findings: &'a mut Vec<Finding>,
    /// Keys without effect, by where they are.
    unused: &'a mut Vec<(Vec<String>, Finding)>,
    places: &'a mut Vec<Place>,
}

impl Walk<'_> {
    fn note(&mut self, span: Range<usize>, line: usize, path: &Path, key: String) {
        self.places.push(Place { span, line, path: path.exact.clone(), key });
    }

    fn table<'i>(
        &mut self,
        table: DeTable<'i>,
        keys: &'static [Key],
        path: &Path,
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
                self.findings.push(Finding { line, key: path.spell(name.get_ref()), what });
                continue;
            };
            if !seen.insert(key.name) {
                let what = "stands there twice, in different case".to_owned();
                return Err(ReadError { line: line(self.text, at.start), key: path.spell(key.name), what });
            }
            let inner = path.name(key.name);
            if let Support::Unused(why) = key.support {
                let what = format!("has no effect: {why}");
                let line = line(self.text, at.start);
                self.unused.push((inner.names.clone(), Finding { line, key: path.spell(key.name), what }));
            }
            self.note(value.span(), line(self.text, at.start), &inner, path.spell(key.name));
            let span = value.span();
            let value = self.value(value.into_inner(), key.kind, &inner)?;
            result.insert(Spanned::new(at, key.name.into()), Spanned::new(span, value));
        }
        Ok(result)
    }

    fn value<'i>(&mut self, value: DeValue<'i>, kind: Kind, path: &Path) -> Result<DeValue<'i>, ReadError> {
        Ok(match (value, kind) {
            (DeValue::Table(table), Kind::Table(keys)) => DeValue::Table(self.table(table, keys(), path)?),
            (DeValue::Table(table), Kind::Map(keys)) => {
                let mut result = DeTable::new();
                for (name, value) in table {
                    let inner = path.name(name.get_ref());
                    let at = line(self.text, name.span().start);
                    self.note(value.span(), at, &inner, format!("[{}]", inner.names.join(".")));
                    let span = value.span();
                    let value = self.value(value.into_inner(), Kind::Table(keys), &inner)?;
                    result.insert(name, Spanned::new(span, value));
                }
                DeValue::Table(result)
            }
            (DeValue::Array(mut list), Kind::List(keys)) => {
                for (number, value) in list.iter_mut().enumerate() {
                    let item = path.item(&number.to_string());
                    let at = line(self.text, value.span().start);
                    self.note(value.span(), at, &item, format!("[{}]", path.names.join(".")));
                    let inner = std::mem::replace(value.get_mut(), DeValue::Boolean(false));
                    *value.get_mut() = self.value(inner, Kind::Table(keys), &item)?;
                }
                DeValue::Array(list)
            }
            (value, _) => value,
        })
    }
}

fn line(text: &str, at: usize) -> usize {
    text.as_bytes().iter().take(at).filter(|&&byte| byte == b'\n').count() + 1
}

fn error_at(text: &str, places: Option<&Places>, error: &toml::de::Error) -> ReadError {
    let span = error.span().unwrap_or_default();
    // The innermost value that holds the fault.
    let places = places.map(|Places(places)| places.as_slice()).unwrap_or_default();
    let around = places.iter().filter(|place| place.span.start <= span.start && span.end <= place.span.end);
    let key = around.min_by_key(|place| place.span.len()).map(|place| place.key.clone()).unwrap_or_default();
    let what = error.message().lines().next().unwrap_or_default().to_owned();
    ReadError { line: line(text, span.start), key, what }
}
