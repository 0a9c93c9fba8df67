//! Everything that is printed, and only here: results to standard output, all else to standard error.
//!
//! Bars are shown while layers are read, blobs sent and layouts written, if standard error is a terminal; results then appear above them.

use std::collections::HashMap;
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::SystemTime;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use parking_lot::Mutex;
use serde::Serialize;
use soci_index::{Observer, Work};
use soci_oci::{Descriptor, Digest, go_json};

use crate::duration;

/// Width that a column has at least, and the space after its widest cell.
const MIN_WIDTH: usize = 8;
const PADDING: usize = 4;

/// Where results go.
pub(crate) struct Output {
    bars: Option<MultiProgress>,
    running: Mutex<HashMap<Digest, ProgressBar>>,
}

impl Output {
    /// Returns an output that shows bars if somebody can see them.
    pub(crate) fn new() -> Self {
        let bars = io::stderr().is_terminal().then(MultiProgress::new);
        Self { bars, running: Mutex::new(HashMap::new()) }
    }

    /// Prints `text` as it is. A reader that went away (`| head`) is no error.
    pub(crate) fn text(&self, text: &str) {
        self.bytes(text.as_bytes());
    }

    /// Prints bytes as they are; returns whether anybody still reads.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> bool {
        let print = || {
            let mut out = io::stdout().lock();
            out.write_all(bytes).and_then(|()| out.flush()).is_ok()
        };
        match &self.bars {
            Some(bars) => bars.suspend(print),
            None => print(),
        }
    }

    /// Prints one line.
    pub(crate) fn line(&self, text: &str) {
        self.text(&format!("{text}\n"));
    }

    /// Prints a warning to standard error.
    pub(crate) fn warn(&self, text: &str) {
        let print = || {
            // Nothing can be done about a standard error that is gone.
            let _ = writeln!(io::stderr().lock(), "soci: warning: {text}");
        };
        match &self.bars {
            Some(bars) => bars.suspend(print),
            None => print(),
        }
    }

    /// Prints the error that ends the program and returns its exit code.
    pub(crate) fn fail(&self, message: &str) -> ExitCode {
        if let Some(bars) = &self.bars {
            // Nothing can be done about a terminal that is gone.
            let _ = bars.clear();
        }
        let _ = writeln!(io::stderr().lock(), "soci: {message}");
        ExitCode::FAILURE
    }

    /// Prints rows below a header, in columns.
    pub(crate) fn table(&self, header: &[&str], rows: &[Vec<String>]) {
        self.text(&table(header, rows));
    }

    /// Prints `value` as JSON with two spaces of indentation.
    pub(crate) fn json<T: Serialize + ?Sized>(&self, value: &T) -> anyhow::Result<()> {
        let bytes = go_json::to_vec(value)?;
        self.line(&indent(&String::from_utf8_lossy(&bytes)));
        Ok(())
    }
}

impl Observer for Output {
    fn line(&self, text: &str) {
        Output::line(self, text);
    }

    fn warn(&self, text: &str) {
        Output::warn(self, text);
    }

    fn begins(&self, work: Work, blob: &Descriptor) {
        let Some(bars) = &self.bars else { return };
        let style = ProgressStyle::with_template(
            "{prefix} {wide_bar} {bytes:>10} of {total_bytes:<10} {bytes_per_sec:>12} {eta:>4}",
        );
        let bar = bars.add(ProgressBar::new(blob.size));
        if let Ok(style) = style {
            bar.set_style(style);
        }
        let what = match work {
            Work::Index => "layer",
            Work::Upload => "upload",
            Work::Write => "write",
        };
        bar.set_prefix(format!("{what} {}", blob.digest.short()));
        // Drawn at once: the first bytes of an upload may take their time.
        bar.tick();
        self.running.lock().insert(blob.digest, bar);
    }

    fn advances(&self, blob: &Digest, bytes: u64) {
        if self.bars.is_some()
            && let Some(bar) = self.running.lock().get(blob)
        {
            bar.inc(bytes);
        }
    }

    fn ends(&self, blob: &Digest) {
        if let Some(bar) = self.running.lock().remove(blob) {
            bar.finish_and_clear();
        }
    }
}

/// Lays out a table as the Go tool does: no borders, cells padded, the last one too.
fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut push = |cells: &mut dyn Iterator<Item = &str>| {
        for (cell, width) in cells.zip(&widths) {
            let width = (width + PADDING).max(MIN_WIDTH);
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', width.saturating_sub(cell.chars().count())));
        }
        text.push('\n');
    };
    push(&mut header.iter().copied());
    for row in rows {
        push(&mut row.iter().map(String::as_str));
    }
    text
}

/// Returns how long ago `at` was, as the listings say it.
pub(crate) fn ago(at: Option<SystemTime>) -> String {
    match at.map(|at| SystemTime::now().duration_since(at).unwrap_or_default()) {
        Some(age) => format!("{} ago", duration::format(age)),
        None => "n/a".to_owned(),
    }
}

/// Spreads compact JSON over lines, with two spaces of indentation, and leaves everything else as it is written.
pub(crate) fn indent(json: &str) -> String {
    let mut text = String::with_capacity(json.len() * 2);
    let mut depth: usize = 0;
    let mut characters = json.chars().filter(Filter::default().keep()).peekable();
    let (mut in_string, mut escaped) = (false, false);
    let line = |text: &mut String, depth: usize| {
        text.push('\n');
        text.extend(std::iter::repeat_n("  ", depth));
    };
    while let Some(character) = characters.next() {
        if in_string {
            text.push(character);
            in_string = escaped || character != '"';
            escaped = !escaped && character == '\\';
            continue;
        }
        match character {
            '{' | '[' => {
                text.push(character);
                match characters.peek() {
                    Some('}' | ']') => text.extend(characters.next()),
                    _ => {
                        depth += 1;
                        line(&mut text, depth);
                    }
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                line(&mut text, depth);
                text.push(character);
            }
            ',' => {
                text.push(character);
                line(&mut text, depth);
            }
            ':' => text.push_str(": "),
            other => {
                in_string = other == '"';
                text.push(other);
            }
        }
    }
    text
}

/// Leaves out the white space between the tokens of JSON.
#[derive(Default)]
struct Filter {
    in_string: bool,
    escaped: bool,
}

impl Filter {
    fn keep(mut self) -> impl FnMut(&char) -> bool {
        move |character| {
            if self.in_string {
                self.in_string = self.escaped || *character != '"';
                self.escaped = !self.escaped && *character == '\\';
                return true;
            }
            self.in_string = *character == '"';
            !character.is_ascii_whitespace()
        }
    }
}

/// Sends the libraries' log to standard error: warnings, or everything of ours when `verbose`.
pub(crate) fn log(verbose: bool) {
    let filter = if verbose {
        "warn,soci=debug,soci_index=debug,soci_registry=debug,soci_auth=debug,soci_store=debug"
    } else {
        "warn"
    };
    let subscriber = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .without_time()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter));
    // Fails only if there is one already, which then is good enough.
    let _ = subscriber.try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_equal_the_references() {
        let listing = include_str!("../../index/tests/fixtures/index-v1/cli-index-list.txt");
        let rows: Vec<Vec<String>> = listing
            .lines()
            .map(|line| {
                line.split("    ")
                    .map(|cell| cell.trim().to_owned())
                    .filter(|cell| !cell.is_empty())
                    .collect()
            })
            .collect();
        let header: Vec<&str> = rows[0].iter().map(String::as_str).collect();
        assert_eq!(header.len(), 7);
        assert_eq!(table(&header, &rows[1..]), listing);
        assert_eq!(table(&["A"], &[vec![String::new()]]), "A       \n        \n");
    }

    #[test]
    fn json_is_spread_as_go_does() {
        let pretty = include_str!("../../index/tests/fixtures/index-v1/cli-index-info.txt");
        let compact: serde_json::Value = serde_json::from_str(pretty).unwrap();
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&indent(&compact.to_string())).unwrap(),
            compact
        );
        assert_eq!(indent(pretty), pretty.trim_end());
        assert_eq!(
            indent("{\"a\":[],\"b\": {},\"c\":[1,{\"d\\\"{\":\"\\\\\"}],\"e f\":null}"),
            "{\n  \"a\": [],\n  \"b\": {},\n  \"c\": [\n    1,\n    {\n      \"d\\\"{\": \"\\\\\"\n    }\n  ],\n  \"e f\": null\n}"
        );
    }
}
