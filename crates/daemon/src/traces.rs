//! Traces: a span for each snapshot call, image that is resolved, layer that is mounted and range that is fetched.
//!
//! Spans are `tracing`'s, of level debug and of [`TARGET`]: nobody but the exporter listens to that target, so without it a
//! span costs one comparison. They name the image, the layer or zTOC, and the outcome, nothing else. A span without an
//! outcome was given up by whoever asked. Events never become part of a span, since their texts are for operators.
//!
//! Built with the feature `otlp`, the daemon exports them where the environment says so, as OpenTelemetry has it:
//! `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, or `OTEL_EXPORTER_OTLP_ENDPOINT`. Built without it, it says that it does not.

#[cfg(feature = "otlp")]
mod export;

use std::collections::HashMap;
use std::fmt;

use soci_oci::{Digest, ImageRef, labels};
use tonic::Code;
use tracing::field::{debug, display};
use tracing::{Instrument as _, Span};
use tracing_subscriber::layer::Layer;

/// Target of all spans that are exported.
pub const TARGET: &str = "traces";
/// Where spans are sent to, in order of precedence.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];

/// What listens to spans, beneath the log.
pub type SpanLayer = Box<dyn Layer<tracing_subscriber::Registry> + Send + Sync>;

/// The export of spans, if there is any.
#[derive(Debug)]
pub struct Traces {
    state: State,
}

#[derive(Debug)]
enum State {
    /// Nobody asked for it.
    Off,
    /// This cannot be done, for this reason.
    Refused(String),
    #[cfg(feature = "otlp")]
    On(export::Export),
}

impl Traces {
    /// Returns the export that the environment asks for, and what is to listen to spans. Logs nothing, so that it can be
    /// called before there is a log; connects to nothing.
    pub fn open(environment: &dyn Fn(&str) -> Option<String>) -> (Self, Option<SpanLayer>) {
        let (state, layer) = match wanted(environment) {
            None => (State::Off, None),
            Some(name) => start(name, environment),
        };
        (Self { state }, layer)
    }

    /// Logs what becomes of the spans.
    pub fn announce(&self) {
        match &self.state {
            State::Off => {}
            State::Refused(reason) => tracing::warn!(reason, "no traces are exported: {reason}"),
            #[cfg(feature = "otlp")]
            State::On(export) => export.announce(),
        }
    }

    /// Sends what has not been sent yet, within a second, and ends the export. Blocks; not for a thread of the runtime.
    pub fn flush(self) {
        match self.state {
            State::Off | State::Refused(_) => {}
            #[cfg(feature = "otlp")]
            State::On(export) => export.flush(),
        }
    }
}

/// Returns the variable that names the endpoint, unless there is none or another one switches the export off.
fn wanted(environment: &dyn Fn(&str) -> Option<String>) -> Option<&'static str> {
    let is =
        |name: &str, value: &str| environment(name).is_some_and(|set| set.trim().eq_ignore_ascii_case(value));
    if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
        return None;
    }
    // Set to nothing is as not set.
    ENDPOINTS.into_iter().find(|name| environment(name).is_some_and(|set| !set.trim().is_empty()))
}

#[cfg(feature = "otlp")]
fn start(name: &str, environment: &dyn Fn(&str) -> Option<String>) -> (State, Option<SpanLayer>) {
    match export::Export::start(environment) {
        Ok((export, layer)) => (State::On(export), Some(layer)),
        Err(error) => {
            let error = soci_oci::with_causes(&error);
            (State::Refused(format!("{name} is set, but {error}")), None)
        }
    }
}

#[cfg(not(feature = "otlp"))]
fn start(name: &str, _: &dyn Fn(&str) -> Option<String>) -> (State, Option<SpanLayer>) {
    let reason = format!("{name} is set, but this binary was built without it: build with --features otlp");
    (State::Refused(reason), None)
}

/// A span of a call that containerd makes.
macro_rules! snapshot_span {
    ($name:literal) => {
        tracing::debug_span!(
            target: $crate::traces::TARGET,
            $name,
            otel.kind = "server",
            image = tracing::field::Empty,
            layer = tracing::field::Empty,
            outcome = tracing::field::Empty,
            otel.status_code = tracing::field::Empty
        )
    };
}
pub(crate) use snapshot_span;

/// Notes which image and layer a call is about, where its labels say so in a form that we understand.
pub(crate) fn label(span: &Span, labels: &HashMap<String, String>) {
    if span.is_disabled() {
        return;
    }
    if let Some(Ok(image)) = labels.get(labels::IMAGE_REF).map(|text| text.parse::<ImageRef>()) {
        span.record("image", display(image));
    }
    if let Some(Ok(layer)) = labels.get(labels::LAYER_DIGEST).map(|text| text.parse::<Digest>()) {
        span.record("layer", display(layer));
    }
}

/// Does `work` within `span`, and notes its outcome there: `ok`, or the word that `told` has for the error, and whether
/// that is a fault.
pub(crate) async fn within<T, E, W: fmt::Debug>(
    span: Span,
    work: impl Future<Output = Result<T, E>>,
    told: impl Fn(&E) -> (W, bool),
) -> Result<T, E> {
    let done = work.instrument(span.clone()).await;
    match &done {
        Ok(_) => {
            span.record("outcome", "ok");
        }
        Err(error) => {
            let (word, fault) = told(error);
            span.record("outcome", debug(word));
            if fault {
                span.record("otel.status_code", "ERROR");
            }
        }
    }
    done
}

/// Whether an answer is the daemon's fault rather than one that containerd expects, such as a layer that exists already.
pub(crate) fn is_fault(code: Code) -> bool {
    matches!(code, Code::Unknown | Code::Internal | Code::Unavailable | Code::Unimplemented)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(set: &[(&str, &str)]) -> Option<&'static str> {
        wanted(&|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn the_endpoint_for_traces_goes_before_the_general_one_and_empty_is_unset() {
        let [traces, general] = ENDPOINTS;
        assert_eq!(asks(&[]), None);
        assert_eq!(asks(&[(traces, ""), (general, " ")]), None);
        assert_eq!(asks(&[(traces, ""), (general, "http://c:4318")]), Some(general));
        assert_eq!(asks(&[(traces, "http://c:4318/v1/traces"), (general, "http://c:4318")]), Some(traces));
        assert_eq!(asks(&[(general, "http://c:4318"), ("OTEL_SDK_DISABLED", "TRUE")]), None);
        assert_eq!(asks(&[(general, "http://c:4318"), ("OTEL_TRACES_EXPORTER", "none")]), None);
    }

    #[test]
    fn answers_that_containerd_expects_are_no_faults() {
        for code in [Code::AlreadyExists, Code::NotFound, Code::InvalidArgument, Code::FailedPrecondition] {
            assert!(!is_fault(code), "{code:?}");
        }
        assert!(is_fault(Code::Unknown) && is_fault(Code::Unavailable));
    }

    #[cfg(not(feature = "otlp"))]
    #[test]
    fn a_binary_without_the_feature_says_so() {
        let (traces, layer) =
            Traces::open(&|name| (name == ENDPOINTS[1]).then(|| "http://c:4318".to_owned()));
        assert!(layer.is_none());
        let State::Refused(reason) = traces.state else { panic!("not refused") };
        assert!(reason.contains(ENDPOINTS[1]) && reason.contains("--features otlp"), "{reason}");
    }
}
