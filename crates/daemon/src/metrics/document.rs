//! `docs/metrics.md`: every family that the endpoint may show.

use std::fmt::Write;

use super::names::ALL;
use super::text::Kind;

const HEAD: &str = "\
# Metrics

`GET /metrics` at `metrics_address` (with `metrics_network = \"unix\"` a socket for root alone) answers in Prometheus' text
format. Names and operation types that the Go SOCI snapshotter has are its own, so dashboards go on working. Series of a layer
or an image disappear with it.

| family | type | labels | what it counts |
| --- | --- | --- | --- |
";

/// Returns the document.
pub fn document() -> String {
    let mut text = HEAD.to_owned();
    for family in ALL {
        let kind = match family.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let labels: Vec<String> = family.labels.iter().map(|label| format!("`{label}`")).collect();
        let help = family.help.replace('|', "\\|");
        let _ = writeln!(text, "| `{}` | {kind} | {} | {help} |", family.name, labels.join(", "));
    }
    text.push_str("\nHistograms have buckets at powers of two.\n");
    text
}
