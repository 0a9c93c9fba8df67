//! The `hosts.toml` of a containerd hosts directory: parsed strictly, every key of it, and nothing done yet.
//!
//! Keys that are not known are named in a warning by the caller, not refused: containerd ignores them. A key of the wrong
//! type, an unknown capability or a duplicate table is an error with its line, since a half-read list of hosts would send
//! requests where the operator did not mean them to go.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use soci_auth::Origin;
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};
use url::Url;

use crate::settings::{Verify, api_root, without_query};

/// The largest file that is read, in bytes.
pub(crate) const MAX_FILE: u64 = 1 << 20;
/// More hosts than this in one file are refused.
const MAX_HOSTS: usize = 64;

/// A parsed file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct HostsFile {
    /// The `[host."…"]` tables in the order of the file.
    pub(crate) hosts: Vec<HostTable>,
    /// `server` with the keys at the top; its address is absent when the file names none.
    pub(crate) server: HostTable,
    /// Keys that mean nothing, as `table.key`.
    pub(crate) unknown: Vec<String>,
}

/// The keys of one host.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct HostTable {
    pub(crate) address: Option<Address>,
    pub(crate) capabilities: Option<Capabilities>,
    pub(crate) ca: Vec<PathBuf>,
    /// Certificate and key; the key is in the same file when absent.
    pub(crate) client: Vec<(PathBuf, Option<PathBuf>)>,
    pub(crate) verify: Option<Verify>,
    pub(crate) headers: HeaderMap,
    pub(crate) dial_timeout: Option<Duration>,
}

/// Where a host's API is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) origin: Origin,
    /// Path without a slash at the end.
    pub(crate) root: String,
}

/// What a host may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capabilities {
    pub(crate) pull: bool,
    pub(crate) resolve: bool,
    pub(crate) push: bool,
    pub(crate) referrers: bool,
}

/// A file that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}:{line}: {message}", path.display())]
pub(crate) struct HostsTomlError {
    pub(crate) path: PathBuf,
    /// Counted from 1.
    pub(crate) line: usize,
    pub(crate) message: String,
}

impl Capabilities {
    pub(crate) const ALL: Self = Self { pull: true, resolve: true, push: true, referrers: true };
    /// What mirrors of `[resolver.host]` are for.
    pub(crate) const READ: Self = Self { pull: true, resolve: true, push: false, referrers: true };
    const NONE: Self = Self { pull: false, resolve: false, push: false, referrers: false };
}

/// Finds lines and makes errors.
struct Source<'a> {
    text: &'a str,
    path: &'a Path,
}

impl Source<'_> {
    fn error(&self, span: Range<usize>, message: impl Into<String>) -> HostsTomlError {
        let line = self.text.get(..span.start).map_or(1, |before| before.matches('\n').count() + 1);
        HostsTomlError { path: self.path.to_owned(), line, message: message.into() }
    }

    fn wrong<T>(&self, key: &str, value: &Spanned<DeValue<'_>>, expected: &str) -> Result<T, HostsTomlError> {
        let found = value.get_ref().type_str();
        Err(self.error(value.span(), format!("{key} is of type {found} instead of {expected}")))
    }

    fn string<'v>(&self, key: &str, value: &'v Spanned<DeValue<'_>>) -> Result<&'v str, HostsTomlError> {
        match value.get_ref().as_str() {
            Some(text) => Ok(text),
            None => self.wrong(key, value, "string"),
        }
    }

    fn boolean(&self, key: &str, value: &Spanned<DeValue<'_>>) -> Result<bool, HostsTomlError> {
        match value.get_ref().as_bool() {
            Some(found) => Ok(found),
            None => self.wrong(key, value, "boolean"),
        }
    }

    /// A string or a list of strings.
    fn strings<'v>(
        &self,
        key: &str,
        value: &'v Spanned<DeValue<'_>>,
    ) -> Result<Vec<&'v str>, HostsTomlError> {
        match value.get_ref() {
            DeValue::String(text) => Ok(vec![text.as_ref()]),
            DeValue::Array(list) => list.iter().map(|one| self.string(key, one)).collect(),
            _ => self.wrong(key, value, "string or list of strings"),
        }
    }
}

/// Parses the text of `path`, whose directory relative file names are taken from.
pub(crate) fn parse(text: &str, path: &Path) -> Result<HostsFile, HostsTomlError> {
    let source = Source { text, path };
    let root = DeTable::parse(text)
        .map_err(|error| source.error(error.span().unwrap_or_default(), error.message().trim().to_owned()))?;
    let mut unknown = Vec::new();
    let mut server = nothing();
    let mut server_address = None;
    let mut hosts: Vec<(usize, HostTable)> = Vec::new();
    let override_path = overrides(&source, root.get_ref())?;
    for (key, value) in root.get_ref() {
        match key.get_ref().as_ref() {
            "server" => {
                let text = source.string("server", value)?;
                if !text.is_empty() {
                    let found = address(text, override_path);
                    server_address = Some(found.map_err(|message| source.error(value.span(), message))?);
                }
            }
            "host" => {
                let DeValue::Table(tables) = value.get_ref() else {
                    return source.wrong("host", value, "table");
                };
                if tables.len() > MAX_HOSTS {
                    let message = format!("{} hosts are more than the limit of {MAX_HOSTS}", tables.len());
                    return Err(source.error(value.span(), message));
                }
                for (name, value) in tables {
                    hosts.push((name.span().start, host(&source, name, value, &mut unknown)?));
                }
            }
            name => {
                if !set(&source, &mut server, name, value)? {
                    unknown.push(name.to_owned());
                }
            }
        }
    }
    server.address = server_address;
    hosts.sort_by_key(|(at, _)| *at);
    unknown.sort();
    Ok(HostsFile { hosts: hosts.into_iter().map(|(_, host)| host).collect(), server, unknown })
}

/// Reads `override_path`, on which the meaning of an address depends.
fn overrides(source: &Source<'_>, table: &DeTable<'_>) -> Result<bool, HostsTomlError> {
    let found = table.iter().find(|(key, _)| key.get_ref().as_ref() == "override_path");
    found.map_or(Ok(false), |(_, value)| source.boolean("override_path", value))
}

fn host(
    source: &Source<'_>,
    name: &Spanned<DeString<'_>>,
    value: &Spanned<DeValue<'_>>,
    unknown: &mut Vec<String>,
) -> Result<HostTable, HostsTomlError> {
    let DeValue::Table(keys) = value.get_ref() else {
        return source.wrong("a host", value, "table");
    };
    let mut table = nothing();
    let found = address(name.get_ref(), overrides(source, keys)?);
    table.address = Some(found.map_err(|message| source.error(name.span(), message))?);
    for (key, value) in keys {
        let key = key.get_ref().as_ref();
        if !set(source, &mut table, key, value)? {
            unknown.push(format!("host.{:?}.{key}", name.get_ref()));
        }
    }
    Ok(table)
}

/// Sets one key of a host; returns whether it is known.
fn set(
    source: &Source<'_>,
    table: &mut HostTable,
    key: &str,
    value: &Spanned<DeValue<'_>>,
) -> Result<bool, HostsTomlError> {
    let base = source.path.parent().unwrap_or(Path::new(""));
    match key {
        "capabilities" => table.capabilities = capabilities(source, value)?,
        "ca" => table.ca = source.strings(key, value)?.iter().map(|file| base.join(file)).collect(),
        "client" => table.client = clients(source, value, base)?,
        "skip_verify" => {
            table.verify = Some(if source.boolean(key, value)? { Verify::Skip } else { Verify::Yes });
        }
        "header" => table.headers = headers(source, value)?,
        "dial_timeout" => {
            let text = source.string(key, value)?;
            let found = duration(text);
            if found.is_none() && !text.is_empty() {
                let message =
                    format!("dial_timeout {text:?} is not a positive duration such as 500ms, 3s or 1m30s");
                return Err(source.error(value.span(), message));
            }
            table.dial_timeout = found;
        }
        "override_path" => {}
        _ => return Ok(false),
    }
    Ok(true)
}

fn capabilities(
    source: &Source<'_>,
    value: &Spanned<DeValue<'_>>,
) -> Result<Option<Capabilities>, HostsTomlError> {
    let names = source.strings("capabilities", value)?;
    let mut found = Capabilities::NONE;
    for name in &names {
        match name.to_ascii_lowercase().as_str() {
            "pull" => found.pull = true,
            "resolve" => found.resolve = true,
            "push" => found.push = true,
            "referrers" => found.referrers = true,
            _ => {
                let message = format!("unknown capability {name:?}: use pull, resolve, push or referrers");
                return Err(source.error(value.span(), message));
            }
        }
    }
    Ok((!names.is_empty()).then_some(found))
}

/// A file, or a list of files and pairs of files.
fn clients(
    source: &Source<'_>,
    value: &Spanned<DeValue<'_>>,
    base: &Path,
) -> Result<Vec<(PathBuf, Option<PathBuf>)>, HostsTomlError> {
    let DeValue::Array(list) = value.get_ref() else {
        return Ok(vec![(base.join(source.string("client", value)?), None)]);
    };
    let mut found = Vec::new();
    for entry in list {
        found.push(match entry.get_ref() {
            DeValue::Array(_) => match source.strings("client", entry)?.as_slice() {
                [certificate, key] => (base.join(certificate), Some(base.join(key))),
                _ => return Err(source.error(entry.span(), "a client pair is a certificate and a key")),
            },
            _ => (base.join(source.string("client", entry)?), None),
        });
    }
    Ok(found)
}

fn headers(source: &Source<'_>, value: &Spanned<DeValue<'_>>) -> Result<HeaderMap, HostsTomlError> {
    let DeValue::Table(table) = value.get_ref() else {
        return source.wrong("header", value, "table");
    };
    let mut found = HeaderMap::new();
    for (key, value) in table {
        let text = key.get_ref();
        let name = HeaderName::from_bytes(text.as_bytes())
            .map_err(|_| source.error(key.span(), format!("{text:?} is not the name of a header")))?;
        for one in source.strings("a header", value)? {
            // The value may be a secret: it is not shown.
            let mut one = HeaderValue::from_str(one).map_err(|_| {
                let message =
                    format!("the value of header {text:?} holds characters that no header may have");
                source.error(value.span(), message)
            })?;
            one.set_sensitive(true);
            found.append(name.clone(), one);
        }
    }
    Ok(found)
}

/// Returns a host without any key.
pub(crate) fn nothing() -> HostTable {
    HostTable {
        address: None,
        capabilities: None,
        ca: Vec::new(),
        client: Vec::new(),
        verify: None,
        headers: HeaderMap::new(),
        dial_timeout: None,
    }
}

fn address(text: &str, override_path: bool) -> Result<Address, String> {
    let shown = without_query(text);
    let full = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let url = Url::parse(&full).map_err(|error| format!("host {shown:?}: {error}"))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("a host's address holds credentials: put them into the Docker config".to_owned());
    }
    let origin =
        Origin::of_url(&url).ok_or_else(|| format!("host {shown:?}: only http and https are supported"))?;
    let root = if override_path { url.path().trim_end_matches('/').to_owned() } else { api_root(url.path()) };
    Ok(Address { origin, root })
}

/// Parses Go's notation of durations: decimal numbers with units, positive, at most a day.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut seconds = 0f64;
    while !rest.is_empty() {
        let unit_at = rest.find(|character: char| !character.is_ascii_digit() && character != '.')?;
        let number: f64 = rest.get(..unit_at)?.parse().ok()?;
        rest = rest.get(unit_at..)?;
        let units =
            [("ms", 1e-3), ("us", 1e-6), ("µs", 1e-6), ("ns", 1e-9), ("h", 3600.0), ("m", 60.0), ("s", 1.0)];
        let (unit, factor) = units.into_iter().find(|(unit, _)| rest.starts_with(unit))?;
        rest = rest.get(unit.len()..)?;
        seconds += number * factor;
    }
    (seconds > 0.0 && seconds <= 86_400.0).then(|| Duration::from_secs_f64(seconds))
}

/// Body of the fuzz target `hosts_toml`: any text is a file or an error.
#[doc(hidden)]
pub fn fuzz_hosts_toml(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if text.len() as u64 > MAX_FILE {
        return;
    }
    match parse(text, Path::new("/etc/containerd/certs.d/x/hosts.toml")) {
        Ok(file) => {
            assert!(file.hosts.len() <= MAX_HOSTS);
            assert!(file.hosts.iter().all(|host| host.address.is_some()));
        }
        Err(error) => assert!(error.line >= 1),
    }
}

#[cfg(test)]
mod tests;
