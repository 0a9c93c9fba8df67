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

const TRACES: &str = "
# Traces

A daemon built with `cargo build --release -p soci-snapshotter-grpc --features otlp` exports spans by OTLP (protobuf over
HTTP, `service.name` is `soci-snapshotter-grpc`) when `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`
names a collector; with neither set nothing is exported. Without the feature it warns that the variable has no effect.

| span | what it covers | attributes |
| --- | --- | --- |
| `snapshot.prepare`, `.view`, `.mounts`, `.commit`, `.remove`, `.update`, `.cleanup` | A call of containerd. | `image` and `layer` where its labels name them, `outcome`: `ok` or the gRPC code |
| `image.resolve` | Finding an image's index. | `image`, `outcome` |
| `layer.mount` | Mounting a layer, its zTOC included. | `image`, `layer`, `outcome` |
| `range.fetch` | Neighbouring spans of a layer, by one request as a rule; a trace of its own. | `ztoc`, `spans`, `class`, `outcome` |

A span without an outcome was given up by whoever asked. Spans are sent in batches from a thread of their own; a full queue
drops them, a collector that is away costs one warning a minute, and the last ones have a second at shutdown. Honoured beside
the endpoint: `OTEL_EXPORTER_OTLP_HEADERS` and `_TIMEOUT` (at most a minute) with their `TRACES` forms, `OTEL_BSP_*`,
`OTEL_TRACES_SAMPLER`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_EXPORTER=none` and `OTEL_SDK_DISABLED=true`. Certificates
are checked against the system's, or `SSL_CERT_FILE`. There is no gRPC transport and no compression.
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
    text.push_str(TRACES);
    text
}
