//! Prints a configuration as the Go daemon does: keys in the order of its sample file, tables indented.

use std::fmt::Write;

use super::raw::Raw;
use super::schema::{Key, Kind, Table};

/// Returns `raw` as the text of a file that loads to the same.
///
/// # Errors
/// When a value cannot be TOML.
pub fn dump(raw: &Raw) -> Result<String, toml::ser::Error> {
    let value = toml::Table::try_from(raw)?;
    let mut text = String::new();
    table(&mut text, &value, Raw::keys(), &[]);
    Ok(text)
}

fn table(text: &mut String, values: &toml::Table, keys: &[Key], path: &[&str]) {
    // Values of a table come before its tables, or they would belong to those.
    let indent = "  ".repeat(path.len());
    for key in keys.iter().filter(|key| matches!(key.kind, Kind::Value(_))) {
        if let Some(value) = values.get(key.name) {
            let _ = writeln!(text, "{indent}{} = {}", key.name, spell(value));
        }
    }
    for key in keys {
        let inner: Vec<&str> = path.iter().copied().chain([key.name]).collect();
        match (values.get(key.name), key.kind) {
            (Some(toml::Value::Table(values)), Kind::Table(keys)) => section(text, values, keys(), &inner),
            (Some(toml::Value::Table(entries)), Kind::Map(keys)) => {
                for (name, values) in entries {
                    let name = spell(&toml::Value::String(name.clone()));
                    let inner: Vec<&str> = inner.iter().copied().chain([name.as_str()]).collect();
                    if let toml::Value::Table(values) = values {
                        section(text, values, keys(), &inner);
                    }
                }
            }
            (Some(toml::Value::Array(entries)), Kind::List(keys)) => {
                for values in entries.iter().filter_map(toml::Value::as_table) {
                    let _ = writeln!(text, "\n{}[[{}]]", "  ".repeat(path.len()), inner.join("."));
                    table(text, values, keys(), &inner);
                }
            }
            _ => {}
        }
    }
}

fn section(text: &mut String, values: &toml::Table, keys: &[Key], path: &[&str]) {
    let _ = writeln!(text, "\n{}[{}]", "  ".repeat(path.len() - 1), path.join("."));
    table(text, values, keys, path);
}

/// Returns a value as it is written in a file.
pub(super) fn spell(value: &toml::Value) -> String {
    match value {
        toml::Value::String(plain)
            if !plain.chars().any(|character| character == '\'' || character.is_control()) =>
        {
            format!("'{plain}'")
        }
        other => other.to_string(),
    }
}
