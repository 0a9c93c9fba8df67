//! Log lines as the Go daemon writes them: one JSON object per line on stderr.
//!
//! `level` (`trace` `debug` `info` `warning` `error` `fatal`), `msg` and `time` are always there; every other field is a
//! string, since tools that read these lines expect strings. The message comes from our own crates only, unless the level
//! is trace: libraries do not write for operators.

use std::fmt;
use std::io::Write;

use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use crate::traces::SpanLayer;

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verbosity(LevelFilter);

/// A level that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a valid log level: {0:?}; one of trace, debug, info, warn, error, fatal, panic")]
pub struct LevelError(String);

impl std::str::FromStr for Verbosity {
    type Err = LevelError;

    fn from_str(text: &str) -> Result<Self, LevelError> {
        Ok(Self(match text.to_ascii_lowercase().as_str() {
            "trace" => LevelFilter::TRACE,
            "debug" => LevelFilter::DEBUG,
            "info" => LevelFilter::INFO,
            "warn" | "warning" => LevelFilter::WARN,
            "error" => LevelFilter::ERROR,
            "fatal" | "panic" => LevelFilter::OFF,
            _ => return Err(LevelError(text.to_owned())),
        }))
    }
}

/// Sends events of this process to stderr from here on, and spans to `traces`, if there is any.
pub fn install(verbosity: Verbosity, traces: Option<SpanLayer>) {
    let others = if verbosity.0 == LevelFilter::TRACE { LevelFilter::DEBUG } else { LevelFilter::ERROR };
    let filter = Targets::new().with_target("soci", verbosity.0).with_default(others.min(verbosity.0));
    let registry = tracing_subscriber::registry();
    // Fails only when a test has installed one already.
    let _ = match traces {
        Some(traces) => {
            tracing::subscriber::set_global_default(registry.with(traces).with(Lines.with_filter(filter)))
        }
        None => tracing::subscriber::set_global_default(registry.with(Lines.with_filter(filter))),
    };
}

/// Writes the last line of a process that cannot go on.
pub fn fatal(message: &str) {
    let mut fields = Map::new();
    write(&mut fields, "fatal", message);
}

struct Lines;

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut collected = Fields::default();
        event.record(&mut collected);
        let level = match *event.metadata().level() {
            Level::TRACE => "trace",
            Level::DEBUG => "debug",
            Level::INFO => "info",
            Level::WARN => "warning",
            Level::ERROR => "error",
        };
        write(&mut collected.fields, level, &collected.message);
    }
}

fn write(fields: &mut Map<String, Value>, level: &str, message: &str) {
    fields.insert("level".into(), level.into());
    fields.insert("msg".into(), message.into());
    let time = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
    fields.insert("time".into(), time.into());
    let mut line = Value::Object(std::mem::take(fields)).to_string();
    line.push('\n');
    // One write, so that lines of several threads do not mix. There is nowhere to report that stderr is gone.
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

#[derive(Default)]
struct Fields {
    fields: Map<String, Value>,
    message: String,
}

impl Fields {
    fn put(&mut self, field: &Field, value: String) {
        if field.name() == "message" {
            self.message = value;
        } else {
            self.fields.insert(field.name().trim_start_matches("r#").to_owned(), Value::String(value));
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_the_references() {
        for level in ["trace", "debug", "info", "warn", "warning", "error", "fatal", "panic", "INFO"] {
            assert!(level.parse::<Verbosity>().is_ok(), "{level}");
        }
        let error = "loud".parse::<Verbosity>().unwrap_err();
        assert!(error.to_string().contains("not a valid log level: \"loud\""), "{error}");
    }
}
