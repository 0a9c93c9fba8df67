//! The export of spans by OTLP: protobuf over HTTP, in batches, from a thread of its own.
//!
//! The SDK's queue is bounded and a span that finds it full is dropped, so no call waits for the collector. The variables of
//! OpenTelemetry set its size and pace (`OTEL_BSP_*`), which spans are taken (`OTEL_TRACES_SAMPLER`), headers and timeout.
//! Requests are driven by a runtime of one thread, the exporter's, so that a busy daemon does not delay them and they do not
//! delay the daemon. A collector that is away costs one line a minute.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_http::{Bytes, HttpClient, HttpError};
use opentelemetry_otlp::{ExporterBuildError, Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use parking_lot::Mutex;
use rustls::{ClientConfig, RootCertStore};
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::layer::Layer;

use super::{ENDPOINTS, SpanLayer, TARGET};

const SERVICE: &str = "soci-snapshotter-grpc";
/// How long the last spans may take at shutdown.
const FLUSH: Duration = Duration::from_secs(1);
/// How long a request may take where no variable says so, and the most that one may say.
const TIMEOUT: Duration = Duration::from_secs(10);
const MAX_TIMEOUT: Duration = Duration::from_secs(60);
/// The time between two complaints about the collector.
const QUIET: Duration = Duration::from_secs(60);
/// The largest answer of a collector that is read, in bytes.
const MAX_ANSWER: usize = 64 << 10;

/// Spans that cannot be exported.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExportError {
    /// The thread's runtime.
    #[error("the exporter cannot start")]
    Start(#[source] std::io::Error),
    /// TLS.
    #[error("TLS to the collector cannot be set up")]
    Tls(#[source] rustls::Error),
    /// The client.
    #[error("no HTTP client for the collector can be made")]
    Client(#[source] reqwest::Error),
    /// A variable. Its value may hold a secret and is not shown.
    #[error("the exporter refuses OTEL_EXPORTER_OTLP_*: {0}")]
    Variables(&'static str),
}

/// A running export.
#[derive(Debug)]
pub(super) struct Export {
    provider: SdkTracerProvider,
    /// Said at the start about variables that are not honoured.
    protocol: Option<String>,
}

impl Export {
    /// Starts the exporter's thread. Connects to nothing.
    pub(super) fn start(
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<(Self, SpanLayer), ExportError> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_http_client(Collector::new(environment)?)
            .build()
            .map_err(|error| {
                ExportError::Variables(match error {
                    ExporterBuildError::InvalidConfiguration(_) => {
                        "the endpoint is a URL such as http://collector:4318, and compression is not built in"
                    }
                    _ => "the exporter cannot be made",
                })
            })?;
        let provider =
            SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource()).build();
        let layer = tracing_opentelemetry::layer()
            .with_tracer(provider.tracer(SERVICE))
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_tracked_inactivity(false)
            .with_context_activation(false)
            .with_filter(
                filter_fn(|metadata| metadata.is_span() && metadata.target() == TARGET)
                    .with_max_level_hint(LevelFilter::DEBUG),
            )
            .boxed();
        let asked = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"];
        let protocol = asked.into_iter().find_map(environment).filter(|asked| asked != "http/protobuf");
        Ok((Self { provider, protocol }, layer))
    }

    pub(super) fn announce(&self) {
        if let Some(protocol) = &self.protocol {
            tracing::warn!(
                protocol,
                "traces are exported by http/protobuf only: name the collector's HTTP port, 4318 as a rule"
            );
        }
        tracing::info!("traces are exported by OTLP over HTTP");
    }

    pub(super) fn flush(self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH) {
            tracing::debug!(%error, "the last spans are not exported");
        }
    }
}

/// What the collector is told about us; `OTEL_RESOURCE_ATTRIBUTES` adds to it.
fn resource() -> Resource {
    Resource::builder()
        .with_service_name(SERVICE)
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build()
}

/// The way to the collector. Called by the exporter's thread alone, which it blocks.
struct Collector {
    runtime: tokio::runtime::Runtime,
    client: reqwest::Client,
    complained: Mutex<Option<Instant>>,
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collector").finish_non_exhaustive()
    }
}

impl Collector {
    fn new(environment: &dyn Fn(&str) -> Option<String>) -> Result<Self, ExportError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(1)
            .build()
            .map_err(ExportError::Start)?;
        let encrypted =
            ENDPOINTS.into_iter().filter_map(environment).any(|endpoint| endpoint.starts_with("https:"));
        #[expect(clippy::disallowed_methods, reason = "a collector of traces is no registry")]
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls(encrypted)?)
            .http1_only()
            // Headers may hold a token: it goes to the endpoint and nowhere else.
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            // Nobody looks after a connection between two batches.
            .pool_max_idle_per_host(0)
            .timeout(timeout(environment))
            .user_agent(concat!("soci-snapshotter-grpc/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(ExportError::Client)?;
        Ok(Self { runtime, client, complained: Mutex::default() })
    }

    async fn send(&self, request: http::Request<Bytes>) -> Result<http::Response<Bytes>, HttpError> {
        let request = reqwest::Request::try_from(request).map_err(reqwest::Error::without_url)?;
        let mut answer = self.client.execute(request).await.map_err(reqwest::Error::without_url)?;
        let mut head = http::Response::new(());
        *head.status_mut() = answer.status();
        *head.headers_mut() = std::mem::take(answer.headers_mut());
        let mut body = Vec::new();
        while let Some(part) = answer.chunk().await.map_err(reqwest::Error::without_url)? {
            if body.len() + part.len() > MAX_ANSWER {
                return Err(format!("the answer is longer than {MAX_ANSWER} bytes").into());
            }
            body.extend_from_slice(&part);
        }
        Ok(head.map(|()| body.into()))
    }

    /// Says why spans are lost, unless that was said a moment ago.
    fn complain(&self, error: &str) {
        let now = Instant::now();
        let mut complained = self.complained.lock();
        if complained.is_some_and(|then| now.duration_since(then) < QUIET) {
            return;
        }
        *complained = Some(now);
        drop(complained);
        tracing::warn!(
            error,
            "spans cannot be exported and are dropped: look at the collector that OTEL_EXPORTER_OTLP_* names"
        );
    }
}

#[async_trait::async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: http::Request<Bytes>) -> Result<http::Response<Bytes>, HttpError> {
        let sent = self.runtime.block_on(self.send(request));
        match &sent {
            Ok(answer) if answer.status().is_success() => {}
            Ok(answer) => self.complain(&format!("the collector answered {}", answer.status())),
            Err(error) => self.complain(&soci_oci::with_causes(&**error)),
        }
        sent
    }
}

/// Returns the trust of the system, or none where no connection is encrypted.
fn tls(encrypted: bool) -> Result<ClientConfig, ExportError> {
    let mut roots = RootCertStore::empty();
    if encrypted {
        // Honours SSL_CERT_FILE and SSL_CERT_DIR.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(ExportError::Tls)?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

/// Returns how long a request may take; variables count in milliseconds.
fn timeout(environment: &dyn Fn(&str) -> Option<String>) -> Duration {
    ["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"]
        .into_iter()
        .find_map(|name| environment(name)?.trim().parse().ok())
        .map_or(TIMEOUT, |milliseconds| Duration::from_millis(milliseconds).min(MAX_TIMEOUT))
}
