//! An API server that knows secrets only: list with paging, watch with bookmarks, and the ways both fail.
//!
//! It speaks TLS with a certificate of its own authority and wants a bearer token. Every change gets the next resource
//! version; what it forgets with [`KubeApi::forget_history`] answers 410 to a watch from before.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use crate::http::serve::{Handled, Handler, Server, bind};
use crate::http::{Line, ReplyBody};
use crate::tls::{ClientCertificates, TestCa};

/// A running API server; stops when dropped.
#[derive(Debug)]
pub struct KubeApi {
    shared: Arc<Shared>,
    server: Server,
    address: SocketAddr,
}

#[derive(Debug)]
struct Shared {
    ca: TestCa,
    state: Mutex<State>,
    /// The newest resource version, and how often watches were cut: wakes those who stream.
    moved: watch::Sender<(u64, u64)>,
}

#[derive(Debug, Default)]
struct State {
    secrets: BTreeMap<(String, String), Value>,
    history: Vec<(u64, Value)>,
    version: u64,
    /// Watches from before this version answer 410.
    oldest: u64,
    token: String,
    denied: bool,
    failures: Vec<(u16, Option<u64>)>,
    page_delay: Duration,
    log: Vec<Logged>,
}

/// One request as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logged {
    /// `list` or `watch`, or the path of anything else.
    pub verb: String,
    /// The namespace, empty for all.
    pub namespace: String,
    /// The `fieldSelector`, decoded.
    pub selector: String,
    /// The `resourceVersion` asked for.
    pub version: Option<String>,
    /// The status answered.
    pub status: u16,
}

impl KubeApi {
    /// Starts a server without secrets that accepts `token`.
    ///
    /// # Errors
    /// When no port can be bound or no certificate made.
    pub async fn start(token: &str) -> io::Result<Self> {
        Self::start_at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), token).await
    }

    /// The same at an address, so that a server that went away can come back.
    ///
    /// # Errors
    /// When the address cannot be bound or no certificate made.
    pub async fn start_at(address: SocketAddr, token: &str) -> io::Result<Self> {
        let ca = TestCa::new("kube-api CA")?;
        let identity = ca.issue(&[])?;
        let tls = TlsAcceptor::from(Arc::new(ca.server_config(&identity, ClientCertificates::Ignored)?));
        let (listener, address) = bind(address).await?;
        let state = State { token: token.to_owned(), version: 1, ..State::default() };
        let moved = watch::Sender::new((1, 0));
        let shared = Arc::new(Shared { ca, state: Mutex::new(state), moved });
        let server = Server::spawn(listener, Some(tls), Arc::new(Front(Arc::clone(&shared))));
        Ok(Self { shared, server, address })
    }

    /// Stops listening and closes every connection.
    pub async fn shutdown(mut self) {
        self.server.shutdown().await;
    }

    /// Returns where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns a kubeconfig whose user is `user`, the fields of a kubeconfig's `user` as JSON.
    pub fn kubeconfig(&self, user: &Value) -> String {
        let ca = base64::engine::general_purpose::STANDARD.encode(self.shared.ca.pem());
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
            "clusters": [{ "name": "test", "cluster": {
                "server": format!("https://127.0.0.1:{}", self.address.port()),
                "certificate-authority-data": ca,
            } }],
            "users": [{ "name": "test", "user": user }],
        })
        .to_string()
    }

    /// Creates or replaces a secret of `kind` with `data` (not yet base64) and tells the watches.
    pub fn put(&self, namespace: &str, name: &str, kind: &str, data: &[(&str, &str)]) {
        let mut state = self.shared.state.lock();
        state.version += 1;
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let data: serde_json::Map<_, _> =
            data.iter().map(|(key, text)| ((*key).to_owned(), Value::from(encode(text)))).collect();
        let key = (namespace.to_owned(), name.to_owned());
        let created = match state.secrets.get(&key) {
            Some(old) => old["metadata"]["creationTimestamp"].clone(),
            None => Value::from(format!(
                "2026-01-01T00:{:02}:{:02}Z",
                state.version / 60 % 60,
                state.version % 60
            )),
        };
        let object = json!({
            "apiVersion": "v1", "kind": "Secret", "type": kind, "data": data,
            "metadata": {
                "namespace": namespace, "name": name, "uid": format!("{namespace}-{name}"),
                "resourceVersion": state.version.to_string(), "creationTimestamp": created,
            },
        });
        let change = if state.secrets.insert(key, object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        let version = state.version;
        state.history.push((version, json!({ "type": change, "object": object })));
        drop(state);
        self.shared.tell(version);
    }

    /// Deletes a secret and tells the watches.
    pub fn delete(&self, namespace: &str, name: &str) {
        let mut state = self.shared.state.lock();
        let Some(mut object) = state.secrets.remove(&(namespace.to_owned(), name.to_owned())) else { return };
        state.version += 1;
        let version = state.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        state.history.push((version, json!({ "type": "DELETED", "object": object })));
        drop(state);
        self.shared.tell(version);
    }

    /// Sends a bookmark with a new version to the watches.
    pub fn bookmark(&self) {
        let mut state = self.shared.state.lock();
        state.version += 1;
        let version = state.version;
        let metadata = json!({ "resourceVersion": version.to_string(), "creationTimestamp": null });
        let object = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": metadata });
        state.history.push((version, json!({ "type": "BOOKMARK", "object": object })));
        drop(state);
        self.shared.tell(version);
    }

    /// Closes every watch, cleanly.
    pub fn cut_watches(&self) {
        self.shared.moved.send_modify(|(_, cuts)| *cuts += 1);
    }

    /// Forgets what happened so far: a watch from an older version answers 410.
    pub fn forget_history(&self) {
        let mut state = self.shared.state.lock();
        state.version += 1;
        state.oldest = state.version;
        state.history.clear();
    }

    /// Accepts another token from now on.
    pub fn set_token(&self, token: &str) {
        self.shared.state.lock().token = token.to_owned();
    }

    /// Answers 403 to everything while `denied`.
    pub fn set_denied(&self, denied: bool) {
        self.shared.state.lock().denied = denied;
    }

    /// Answers the next request with `status` and, where given, `Retry-After` seconds.
    pub fn fail_next(&self, status: u16, retry_after: Option<u64>) {
        self.shared.state.lock().failures.push((status, retry_after));
    }

    /// Waits this long before each page of a list.
    pub fn set_page_delay(&self, delay: Duration) {
        self.shared.state.lock().page_delay = delay;
    }

    /// Returns the requests so far.
    pub fn log(&self) -> Vec<Logged> {
        self.shared.state.lock().log.clone()
    }
}

impl Shared {
    fn tell(&self, version: u64) {
        self.moved.send_modify(|(newest, _)| *newest = version);
    }
}

struct Front(Arc<Shared>);

impl Handler for Front {
    fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        _line: Line,
    ) -> Pin<Box<dyn Future<Output = Handled> + Send>> {
        let shared = Arc::clone(&self.0);
        Box::pin(async move { Some(shared.answer(&request).await) })
    }
}

impl Shared {
    async fn answer(self: Arc<Self>, request: &Request<Incoming>) -> Response<ReplyBody> {
        let query: BTreeMap<String, String> =
            url::form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes())
                .into_owned()
                .collect();
        let namespace = match request.uri().path().strip_prefix("/api/v1/") {
            Some("secrets") => Some(""),
            Some(rest) => rest.strip_prefix("namespaces/").and_then(|rest| rest.strip_suffix("/secrets")),
            None => None,
        };
        let watching = query.get("watch").is_some_and(|watch| watch == "true");
        let verb = match namespace {
            None => request.uri().path(),
            Some(_) if watching => "watch",
            Some(_) => "list",
        };
        let mut logged = Logged {
            verb: verb.to_owned(),
            namespace: namespace.unwrap_or_default().to_owned(),
            selector: query.get("fieldSelector").cloned().unwrap_or_default(),
            version: query.get("resourceVersion").cloned(),
            status: 200,
        };
        let refusal = self.refusal(request, namespace.is_some(), watching, &query);
        if let Some((status, _)) = refusal {
            logged.status = status;
        }
        self.state.lock().log.push(logged.clone());
        match refusal {
            Some((status, retry_after)) => failure(status, retry_after),
            None if watching => self.watch(logged, &query),
            None => self.list(&logged, &query).await,
        }
    }

    fn refusal(
        &self,
        request: &Request<Incoming>,
        known: bool,
        watching: bool,
        query: &BTreeMap<String, String>,
    ) -> Option<(u16, Option<u64>)> {
        let mut state = self.state.lock();
        let token = format!("Bearer {}", state.token);
        let sent = request.headers().get("authorization").and_then(|value| value.to_str().ok());
        if sent != Some(token.as_str()) {
            return Some((401, None));
        }
        if state.denied || !known {
            return Some((403, None));
        }
        if !state.failures.is_empty() {
            return Some(state.failures.remove(0));
        }
        let version: u64 = query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
        (watching && version < state.oldest).then_some((410, None))
    }

    async fn list(&self, asked: &Logged, query: &BTreeMap<String, String>) -> Response<ReplyBody> {
        let delay = self.state.lock().page_delay;
        tokio::time::sleep(delay).await;
        let state = self.state.lock();
        let from: usize = query.get("continue").and_then(|at| at.parse().ok()).unwrap_or(0);
        let limit: usize = query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
        let all: Vec<&Value> = state.secrets.values().filter(|object| selected(asked, object)).collect();
        let end = from.saturating_add(limit).min(all.len());
        let mut metadata = json!({ "resourceVersion": state.version.to_string() });
        if end < all.len() {
            metadata["continue"] = end.to_string().into();
        }
        let items = all.get(from..end).unwrap_or_default();
        let body = json!({ "apiVersion": "v1", "kind": "SecretList", "metadata": metadata, "items": items });
        respond(StatusCode::OK, single(body.to_string()))
    }

    fn watch(self: Arc<Self>, asked: Logged, query: &BTreeMap<String, String>) -> Response<ReplyBody> {
        let from: u64 = query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
        let mut moved = self.moved.subscribe();
        let cuts = moved.borrow_and_update().1;
        let events = futures::stream::unfold((self, from, moved), move |(shared, mut seen, mut moved)| {
            let asked = asked.clone();
            async move {
                loop {
                    let (version, cut) = *moved.borrow_and_update();
                    if cut != cuts {
                        return None;
                    }
                    let mut lines = String::new();
                    for (_, event) in
                        shared.state.lock().history.iter().filter(|(version, _)| *version > seen)
                    {
                        if event["type"] == "BOOKMARK" || selected(&asked, &event["object"]) {
                            lines.push_str(&event.to_string());
                            lines.push('\n');
                        }
                    }
                    seen = seen.max(version);
                    if !lines.is_empty() {
                        return Some((Ok(Bytes::from(lines)), (shared, seen, moved)));
                    }
                    if moved.changed().await.is_err() {
                        return None;
                    }
                }
            }
        });
        respond(StatusCode::OK, ReplyBody::stream(events))
    }
}

fn selected(asked: &Logged, object: &Value) -> bool {
    let kind = asked.selector.strip_prefix("type=");
    kind.is_none_or(|kind| object["type"] == kind)
        && (asked.namespace.is_empty() || object["metadata"]["namespace"] == asked.namespace.as_str())
}

fn failure(status: u16, retry_after: Option<u64>) -> Response<ReplyBody> {
    let reason = match status {
        401 => "Unauthorized",
        403 => "Forbidden",
        410 => "Expired",
        429 => "TooManyRequests",
        _ => "InternalError",
    };
    let body = json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
        "reason": reason, "message": reason, "code": status,
    });
    let code = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = respond(code, single(body.to_string()));
    if let Some(seconds) = retry_after {
        response.headers_mut().insert("retry-after", seconds.into());
    }
    response
}

fn respond(status: StatusCode, body: ReplyBody) -> Response<ReplyBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    response
}

fn single(text: String) -> ReplyBody {
    ReplyBody::stream(futures::stream::once(async move { Ok(Bytes::from(text)) }))
}
