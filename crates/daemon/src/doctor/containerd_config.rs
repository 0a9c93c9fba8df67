//! containerd's configuration as containerd puts it together: the file, then what it imports, each value with its place.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

/// The largest file that is read, in bytes.
const MAX_SIZE: u64 = 1 << 20;
/// Files that are read in all.
const MAX_FILES: usize = 100;

/// A configuration that cannot be put together. containerd does not start with it either.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unreadable {
    pub(super) place: String,
    pub(super) why: String,
}

/// The values in effect.
#[derive(Debug, Default)]
pub(super) struct ContainerdConfig {
    values: toml::Table,
    /// File and line of each key, by its path.
    places: HashMap<Vec<String>, (PathBuf, usize)>,
    pub(super) files: Vec<PathBuf>,
}

impl ContainerdConfig {
    /// Reads `path` and what it imports.
    pub(super) fn load(path: &Path) -> Result<Self, Unreadable> {
        let mut config = Self::default();
        let mut seen = HashSet::new();
        let mut pending = VecDeque::from([path.to_owned()]);
        while let Some(path) = pending.pop_front() {
            if !seen.insert(path.clone()) {
                continue;
            }
            if seen.len() > MAX_FILES {
                let why = format!("more than {MAX_FILES} files are imported");
                return Err(Unreadable { place: path.display().to_string(), why });
            }
            pending.extend(config.add(&path)?);
        }
        Ok(config)
    }

    /// Adds a file; returns those that it imports.
    fn add(&mut self, path: &Path) -> Result<Vec<PathBuf>, Unreadable> {
        let place = || path.display().to_string();
        let text = read(path).map_err(|error| Unreadable { place: place(), why: error.to_string() })?;
        let line = |at: usize| text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1;
        let malformed = |error: toml::de::Error| {
            let at = error.span().map_or(0, |span| span.start);
            let why = error.message().lines().next().unwrap_or_default().to_owned();
            Unreadable { place: format!("{}:{}", path.display(), line(at)), why }
        };
        let document = DeTable::parse(&text).map_err(malformed)?;
        let values: toml::Table = toml::from_str(&text).map_err(malformed)?;
        mark(document.get_ref(), &mut Vec::new(), &mut |keys, at| {
            self.places.insert(keys.to_vec(), (path.to_owned(), line(at)));
        });
        let imports = values.get("imports").and_then(toml::Value::as_array).cloned().unwrap_or_default();
        let version = values.get("version").and_then(toml::Value::as_integer).unwrap_or(1);
        merge(&mut self.values, values, version < 3, &mut Vec::new());
        self.files.push(path.to_owned());
        let parent = path.parent().unwrap_or(Path::new("/"));
        let patterns = imports.iter().filter_map(toml::Value::as_str);
        Ok(patterns.flat_map(|pattern| expand(&parent.join(pattern))).collect())
    }

    /// Returns the value at a path of keys.
    pub(super) fn get(&self, keys: &[&str]) -> Option<&toml::Value> {
        let (last, tables) = keys.split_last()?;
        let mut table = &self.values;
        for key in tables {
            table = table.get(*key)?.as_table()?;
        }
        table.get(*last)
    }

    /// Returns a text.
    pub(super) fn text(&self, keys: &[&str]) -> Option<&str> {
        self.get(keys)?.as_str()
    }

    /// Returns a switch.
    pub(super) fn switch(&self, keys: &[&str]) -> Option<bool> {
        self.get(keys)?.as_bool()
    }

    /// Returns a table's entries.
    pub(super) fn table(&self, keys: &[&str]) -> impl Iterator<Item = (&String, &toml::Value)> {
        self.get(keys).and_then(toml::Value::as_table).into_iter().flatten()
    }

    /// Returns file and line of a key, or of the innermost table around it, or the first file.
    pub(super) fn place(&self, keys: &[&str]) -> String {
        let mut keys: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
        while !keys.is_empty() {
            if let Some((file, line)) = self.places.get(&keys) {
                return format!("{}:{line}", file.display());
            }
            keys.pop();
        }
        self.files.first().map(|file| file.display().to_string()).unwrap_or_default()
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let size = File::open(path)?.take(MAX_SIZE + 1).read_to_string(&mut text)?;
    if size as u64 > MAX_SIZE {
        return Err(std::io::Error::other(format!("it is larger than {MAX_SIZE} bytes")));
    }
    Ok(text)
}

/// Tells where each key stands.
fn mark(table: &DeTable<'_>, keys: &mut Vec<String>, tell: &mut impl FnMut(&[String], usize)) {
    for (name, value) in table {
        keys.push(name.get_ref().to_string());
        tell(keys, name.span().start);
        if let DeValue::Table(table) = value.get_ref() {
            mark(table, keys, tell);
        }
        keys.pop();
    }
}

/// Later files win, lists grow. containerd 1.x takes the table of a plugin from the last file that has one.
fn merge(into: &mut toml::Table, from: toml::Table, whole_plugins: bool, keys: &mut Vec<String>) {
    for (key, value) in from {
        keys.push(key.clone());
        let whole = match keys.as_slice() {
            [first] => first == "imports",
            [first, _] => first == "proxy_plugins" || (whole_plugins && first == "plugins"),
            _ => false,
        };
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) if !whole => {
                merge(old, new, whole_plugins, keys);
            }
            (Some(toml::Value::Array(old)), toml::Value::Array(new)) if !whole => old.extend(new),
            (_, value) => drop(into.insert(key, value)),
        }
        keys.pop();
    }
}

/// Returns the files that an import means: itself, or those of its directory that match its stars.
fn expand(pattern: &Path) -> Vec<PathBuf> {
    let name = pattern.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if !name.contains('*') {
        return vec![pattern.to_owned()];
    }
    let directory = pattern.parent().unwrap_or(Path::new("/"));
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let matching = entries.filter(|entry| matches(&name, &entry.file_name().to_string_lossy()));
    let mut files: Vec<PathBuf> = matching.map(|entry| entry.path()).collect();
    files.sort();
    files
}

/// Whether `name` is `pattern`, whose stars stand for anything.
fn matches(pattern: &str, name: &str) -> bool {
    let parts: Vec<&str> = pattern.split('*').collect();
    let (Some(first), Some(last)) = (parts.first(), parts.last()) else { return false };
    let Some(rest) = name.strip_prefix(first) else { return false };
    if parts.len() == 1 {
        return rest.is_empty();
    }
    let Some(mut rest) = rest.strip_suffix(last) else { return false };
    for part in &parts[1..parts.len() - 1] {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_match_any_text() {
        for (pattern, name, expected) in [
            ("*.toml", "a.toml", true),
            ("*.toml", "a.tom", false),
            ("10-*.toml", "10-soci.toml", true),
            ("10-*.toml", "20-soci.toml", false),
            ("a*b*c", "abc", true),
            ("a*b*c", "axxbxxc", true),
            ("a*b*c", "acb", false),
            ("aba*aba", "aba", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn imports_win_and_say_where_a_value_stands() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("config.toml");
        std::fs::create_dir(dir.path().join("conf.d")).unwrap();
        let drop_in = dir.path().join("conf.d/soci.toml");
        let text = "version = 3\nimports = [\"conf.d/*.toml\", \"config.toml\"]\n[plugins.a]\nx = 1\ny = 2\n";
        std::fs::write(&main, text).unwrap();
        std::fs::write(&drop_in, "version = 3\n\n[plugins.a]\nx = 5\n").unwrap();
        let config = ContainerdConfig::load(&main).unwrap();
        assert_eq!(config.get(&["plugins", "a", "x"]).and_then(toml::Value::as_integer), Some(5));
        assert_eq!(config.get(&["plugins", "a", "y"]).and_then(toml::Value::as_integer), Some(2));
        assert_eq!(config.place(&["plugins", "a", "x"]), format!("{}:4", drop_in.display()));
        assert_eq!(config.place(&["plugins", "a", "y"]), format!("{}:5", main.display()));
        // containerd 1.x replaces the whole table of a plugin.
        std::fs::write(&drop_in, "version = 2\n[plugins.a]\nx = 5\n").unwrap();
        let config = ContainerdConfig::load(&main).unwrap();
        assert_eq!(config.get(&["plugins", "a", "y"]), None);
    }

    #[test]
    fn a_file_that_containerd_would_not_read_is_named_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("config.toml");
        std::fs::write(&main, "version = 2\nx = [\n").unwrap();
        let error = ContainerdConfig::load(&main).unwrap_err();
        assert!(error.place.starts_with(&format!("{}:", main.display())), "{error:?}");
        std::fs::write(&main, "version = 2\nimports = [\"/nonexistent/a.toml\"]\n").unwrap();
        assert_eq!(ContainerdConfig::load(&main).unwrap_err().place, "/nonexistent/a.toml");
    }
}
