//! `docs/config.md`: every key of the file with its type, default and effect, from the list that the reader uses.

use std::fmt::Write;

use super::dump::spell;
use super::raw::Raw;
use super::schema::{Key, Kind, Support, Table};

const HEAD: &str = "\
# Configuration

The daemon reads one TOML file when it starts: `/etc/soci-snapshotter-grpc/config.toml`, or what `--config` names. Only the
default path may be absent. The keys are those of the Go SOCI snapshotter, so its file loads as it is.

- `soci-snapshotter-grpc config default` prints this file with every default; `config dump` prints what is in effect.
- A file that is not TOML, or a value that cannot be meant, stops the start; the message names file, line and key.
- A key that is unknown, or has no effect here and is not at its default, is warned about once.
- Keys are found whatever their case. Zero means \"the default\" for durations and counts.
- What may be said on the command line and in the environment is in [cli.md](cli.md).
";

/// Returns the document.
pub fn document() -> String {
    let mut text = HEAD.to_owned();
    section(&mut text, "Before any table", "", Raw::keys());
    tables(&mut text, Raw::keys(), "");
    text
}

fn tables(text: &mut String, keys: &[Key], path: &str) {
    for key in keys {
        let inner = if path.is_empty() { key.name.to_owned() } else { format!("{path}.{}", key.name) };
        let (inner, title, keys) = match key.kind {
            Kind::Value(_) => continue,
            Kind::Table(keys) => (inner.clone(), format!("`[{inner}]`"), keys()),
            Kind::Map(keys) => {
                let inner = format!("{inner}.\"NAME\"");
                (inner.clone(), format!("`[{inner}]`"), keys())
            }
            Kind::List(keys) => (inner.clone(), format!("`[[{inner}]]`"), keys()),
        };
        section(text, &title, key.effect, keys);
        tables(text, keys, &inner);
    }
}

fn section(text: &mut String, title: &str, about: &str, keys: &[Key]) {
    let mut values = keys.iter().filter(|key| matches!(key.kind, Kind::Value(_))).peekable();
    if values.peek().is_none() {
        return;
    }
    let _ = writeln!(text, "\n## {title}\n");
    if !about.is_empty() {
        let _ = writeln!(text, "{}\n", about.trim());
    }
    let _ = writeln!(text, "| key | type | default | effect |\n| --- | --- | --- | --- |");
    for key in values {
        let Kind::Value(kind) = key.kind else { continue };
        let default = (key.default)().map_or_else(String::new, |value| format!("`{}`", spell(&value)));
        let effect = match key.support {
            Support::Used => key.effect.trim().to_owned(),
            Support::Unused(why) => format!("No effect: {why}."),
        };
        let cells = [format!("`{}`", key.name), kind.to_owned(), default, effect];
        let _ = writeln!(text, "| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_and_its_defaults_are_there() {
        let text = document();
        for line in [
            "| `MaxRetries` | integer | `8` | Attempts after the first; negative for none. |",
            "| `metrics_network` | string | `'tcp'` | `tcp`, `tcp4` or `tcp6` for addresses of that kind alone, or `unix`. |",
            "## `[[resolver.host.\"NAME\".mirrors]]`",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
