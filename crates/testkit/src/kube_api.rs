//! An API server that knows secrets only: list with paging, watch with bookmarks, and the ways both fail.
//!
//! It speaks TLS with a certificate of its own authority and wants a bearer token or a client certificate. Every change
//! gets the next resource version; what it forgets with [`KubeApi::forget_history`] answers 410 to a watch from before.
//! How a watch breaks is in `breaks`.

mod breaks;

use std::collections::{BTreeMap, BTreeSet};
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

pub use self::breaks::WatchBreak;
use crate::http::serve::{Handled, Handler, Server, bind};
use crate::http::{Line, ReplyBody};
use crate::tls::{ClientCertificates, Identity, TestCa};

/// A running API server; stops when dropped.
pub struct KubeApi {
    shared: Arc<Shared>,
    tls: TlsAcceptor,
    server: Server,
    address: SocketAddr,
}

#[derive(Debug)]
struct Shared {
    ca: TestCa,
    state: Mutex<State>,
    /// Wakes those who stream.
    moved: watch::Sender<Moved>,
}

/// What an open watch waits for.
#[derive(Debug, Clone, Copy, Default)]
struct Moved {
    /// The newest resource version.
    version: u64,
    /// How often watches were broken, and how the last time.
    breaks: u64,
    how: WatchBreak,
}

/// Who may ask.
#[derive(Debug)]
enum Users {
    Token(String),
    /// Those with this certificate; nobody while there is none.
    Certificate(Option<Arc<[u8]>>),
}

/// How an answer fails to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hang {
    /// The request is taken and not answered.
    Head,
    /// The answer begins and does not go on.
    Body,
}

/// An answer that is an error.
#[derive(Debug, Clone, Default)]
struct Refusal {
    status: u16,
    retry_after: Option<u64>,
    /// What is answered in place of a `Status`.
    page: Option<String>,
}

#[derive(Debug)]
struct State {
    secrets: BTreeMap<(String, String), Value>,
    history: Vec<(u64, Value)>,
    version: u64,
    /// Watches from before this version answer 410.
    oldest: u64,
    users: Users,
    /// Namespaces, empty for all of them together, that may not be looked at.
    denied: BTreeSet<String>,
    denied_everywhere: bool,
    failures: Vec<Refusal>,
    page_failures: Vec<u16>,
    hanging: BTreeMap<&'static str, Hang>,
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
    /// Whether bookmarks are asked for.
    pub bookmarks: bool,
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

    /// The same at an address, so that a server that went away can come back as another.
    ///
    /// # Errors
    /// When the address cannot be bound or no certificate made.
    pub async fn start_at(address: SocketAddr, token: &str) -> io::Result<Self> {
        Self::serve(address, Users::Token(token.to_owned()), ClientCertificates::Ignored).await
    }

    /// Starts a server that knows its clients by certificates: nobody until [`accept_only`](Self::accept_only).
    ///
    /// # Errors
    /// When no port can be bound or no certificate made.
    pub async fn start_with_certificates() -> io::Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Self::serve(address, Users::Certificate(None), ClientCertificates::Required).await
    }

    async fn serve(address: SocketAddr, users: Users, clients: ClientCertificates) -> io::Result<Self> {
        let ca = TestCa::new("kube-api CA")?;
        let identity = ca.issue(&[])?;
        let tls = TlsAcceptor::from(Arc::new(ca.server_config(&identity, clients)?));
        let (listener, address) = bind(address).await?;
        let state = Mutex::new(State::new(users));
        let moved = watch::Sender::new(Moved { version: 1, ..Moved::default() });
        let shared = Arc::new(Shared { ca, state, moved });
        let server = Server::spawn(listener, Some(tls.clone()), Arc::new(Front(Arc::clone(&shared))));
        Ok(Self { shared, tls, server, address })
    }

    /// Stops listening and closes every connection.
    pub async fn shutdown(mut self) {
        self.server.shutdown().await;
    }

    /// Stops listening and closes every connection until [`reopen`](Self::reopen).
    pub async fn close(&mut self) {
        self.server.shutdown().await;
    }

    /// Listens again at the same address, with the same content, versions and certificates.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn reopen(&mut self) -> io::Result<()> {
        let (listener, _) = bind(self.address).await?;
        let front = Arc::new(Front(Arc::clone(&self.shared)));
        self.server = Server::spawn(listener, Some(self.tls.clone()), front);
        Ok(())
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

    /// Returns the certificate by which it is trusted.
    pub fn ca_pem(&self) -> &str {
        self.shared.ca.pem()
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

    /// Sends a bookmark with a new version to the watches, and returns the version.
    pub fn bookmark(&self) -> u64 {
        let mut state = self.shared.state.lock();
        state.version += 1;
        let version = state.version;
        let metadata = json!({ "resourceVersion": version.to_string(), "creationTimestamp": null });
        let object = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": metadata });
        state.history.push((version, json!({ "type": "BOOKMARK", "object": object })));
        drop(state);
        self.shared.tell(version);
        version
    }

    /// Closes every watch, cleanly.
    pub fn cut_watches(&self) {
        self.break_watches(WatchBreak::Close);
    }

    /// Breaks every watch that is open, in the middle of the event that is due, if one is.
    pub fn break_watches(&self, how: WatchBreak) {
        self.shared.moved.send_modify(|moved| {
            moved.breaks += 1;
            moved.how = how;
        });
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
        self.shared.state.lock().users = Users::Token(token.to_owned());
    }

    /// Issues a client certificate that the handshake takes.
    ///
    /// # Errors
    /// When none can be made.
    pub fn issue_client(&self) -> io::Result<Identity> {
        self.shared.ca.issue(&[])
    }

    /// Answers only clients with this certificate, all others 401.
    pub fn accept_only(&self, client: &Identity) {
        self.shared.state.lock().users = Users::Certificate(Some(client.der().into()));
    }

    /// Answers 403 to everything while `denied`.
    pub fn set_denied(&self, denied: bool) {
        self.shared.state.lock().denied_everywhere = denied;
    }

    /// Answers 403 to lists and watches of one namespace while `denied`.
    pub fn set_denied_in(&self, namespace: &str, denied: bool) {
        let mut state = self.shared.state.lock();
        match denied {
            true => state.denied.insert(namespace.to_owned()),
            false => state.denied.remove(namespace),
        };
    }

    /// Answers the next request with `status` and, where given, asks to wait `retry_after` seconds.
    pub fn fail_next(&self, status: u16, retry_after: Option<u64>) {
        let refusal = Refusal { status, retry_after, page: None };
        self.shared.state.lock().failures.push(refusal);
    }

    /// Answers the next request as a proxy does that stands before the server: with a page, and with the header alone to ask
    /// to wait `retry_after` seconds.
    pub fn fail_next_as_proxy(&self, status: u16, retry_after: Option<u64>, page: &str) {
        let refusal = Refusal { status, retry_after, page: Some(page.to_owned()) };
        self.shared.state.lock().failures.push(refusal);
    }

    /// Answers the next request for a further page of a list with `status`.
    pub fn fail_next_page(&self, status: u16) {
        self.shared.state.lock().page_failures.push(status);
    }

    /// Lets every `list` or `watch` hang from here on, or no more.
    pub fn set_hanging(&self, verb: &'static str, hang: Option<Hang>) {
        let mut state = self.shared.state.lock();
        match hang {
            Some(hang) => state.hanging.insert(verb, hang),
            None => state.hanging.remove(verb),
        };
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

impl State {
    fn new(users: Users) -> Self {
        Self {
            secrets: BTreeMap::new(),
            history: Vec::new(),
            version: 1,
            oldest: 0,
            users,
            denied: BTreeSet::new(),
            denied_everywhere: false,
            failures: Vec::new(),
            page_failures: Vec::new(),
            hanging: BTreeMap::new(),
            page_delay: Duration::ZERO,
            log: Vec::new(),
        }
    }
}

impl std::fmt::Debug for KubeApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KubeApi").field("address", &self.address).finish_non_exhaustive()
    }
}

struct Front(Arc<Shared>);

impl Handler for Front {
    fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        line: Line,
    ) -> Pin<Box<dyn Future<Output = Handled> + Send>> {
        let shared = Arc::clone(&self.0);
        Box::pin(async move { Some(shared.answer(&request, line).await) })
    }
}

/// What a request asks for.
struct Asked {
    logged: Logged,
    /// Where a further page begins.
    page: Option<usize>,
    limit: usize,
    version: u64,
    /// When the server is to end a watch.
    timeout: Duration,
}

impl Asked {
    fn of(request: &Request<Incoming>) -> Self {
        let query: BTreeMap<String, String> =
            url::form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes())
                .into_owned()
                .collect();
        let path = request.uri().path();
        let namespace = match path.strip_prefix("/api/v1/") {
            Some("secrets") => Some(""),
            Some(rest) => rest.strip_prefix("namespaces/").and_then(|rest| rest.strip_suffix("/secrets")),
            None => None,
        };
        let verb = match namespace {
            None => path,
            Some(_) if query.get("watch").is_some_and(|watch| watch == "true") => "watch",
            Some(_) => "list",
        };
        let logged = Logged {
            verb: verb.to_owned(),
            namespace: namespace.unwrap_or_default().to_owned(),
            selector: query.get("fieldSelector").cloned().unwrap_or_default(),
            version: query.get("resourceVersion").cloned(),
            bookmarks: query.get("allowWatchBookmarks").is_some_and(|asked| asked == "true"),
            status: 200,
        };
        let number = |name: &str| query.get(name).and_then(|text| text.parse::<u64>().ok());
        let size = |name: &str| number(name).and_then(|number| usize::try_from(number).ok());
        Self {
            page: size("continue"),
            limit: size("limit").unwrap_or(usize::MAX),
            version: number("resourceVersion").unwrap_or(0),
            timeout: Duration::from_secs(number("timeoutSeconds").unwrap_or(3600)),
            logged,
        }
    }
}

impl Shared {
    fn tell(&self, version: u64) {
        self.moved.send_modify(|moved| moved.version = version);
    }

    async fn answer(self: Arc<Self>, request: &Request<Incoming>, line: Line) -> Response<ReplyBody> {
        let mut asked = Asked::of(request);
        let refusal = self.refusal(request, &asked, &line);
        if let Some(refusal) = &refusal {
            asked.logged.status = refusal.status;
        }
        let hang = {
            let mut state = self.state.lock();
            state.log.push(asked.logged.clone());
            state.hanging.get(asked.logged.verb.as_str()).copied()
        };
        if hang == Some(Hang::Head) {
            std::future::pending::<()>().await;
        }
        match refusal {
            Some(refusal) => failure(refusal),
            None if asked.logged.verb == "watch" => self.watch(asked, line),
            None => self.list(&asked, hang).await,
        }
    }

    fn refusal(&self, request: &Request<Incoming>, asked: &Asked, line: &Line) -> Option<Refusal> {
        let of = |status| Some(Refusal { status, ..Refusal::default() });
        let mut state = self.state.lock();
        let sent = request.headers().get("authorization").and_then(|value| value.to_str().ok());
        let known = match &state.users {
            Users::Token(token) => sent.and_then(|sent| sent.strip_prefix("Bearer ")) == Some(token),
            Users::Certificate(accepted) => accepted.is_some() && line.client == *accepted,
        };
        if !known {
            return of(401);
        }
        let verb = asked.logged.verb.as_str();
        if state.denied_everywhere
            || state.denied.contains(&asked.logged.namespace)
            || !["list", "watch"].contains(&verb)
        {
            return of(403);
        }
        if !state.failures.is_empty() {
            return Some(state.failures.remove(0));
        }
        if asked.page.is_some() && !state.page_failures.is_empty() {
            return of(state.page_failures.remove(0));
        }
        if verb == "watch" && asked.version < state.oldest { of(410) } else { None }
    }

    async fn list(&self, asked: &Asked, hang: Option<Hang>) -> Response<ReplyBody> {
        let delay = self.state.lock().page_delay;
        tokio::time::sleep(delay).await;
        let state = self.state.lock();
        let from = asked.page.unwrap_or(0);
        let all: Vec<&Value> = state.secrets.values().filter(|object| selected(asked, object)).collect();
        let end = from.saturating_add(asked.limit).min(all.len());
        let mut metadata = json!({ "resourceVersion": state.version.to_string() });
        if end < all.len() {
            metadata["continue"] = end.to_string().into();
        }
        let items = all.get(from..end).unwrap_or_default();
        let body = json!({ "apiVersion": "v1", "kind": "SecretList", "metadata": metadata, "items": items });
        let mut text = body.to_string();
        if hang == Some(Hang::Body) {
            text.truncate(text.len() / 2);
            let half = futures::stream::once(async move { Ok(Bytes::from(text)) });
            let rest = futures::stream::pending();
            return respond(StatusCode::OK, ReplyBody::stream(futures::StreamExt::chain(half, rest)));
        }
        respond(StatusCode::OK, single(text))
    }

    fn watch(self: Arc<Self>, asked: Asked, line: Line) -> Response<ReplyBody> {
        let ends = tokio::time::Instant::now() + asked.timeout;
        let events = breaks::events(self, asked, line, ends);
        respond(StatusCode::OK, ReplyBody::stream(events))
    }

    /// The lines of what happened after version `seen`, as far as it is asked for.
    fn lines_after(&self, seen: u64, asked: &Asked) -> String {
        let state = self.state.lock();
        let mut lines = String::new();
        for (_, event) in state.history.iter().filter(|(version, _)| *version > seen) {
            if event["type"] == "BOOKMARK" || selected(asked, &event["object"]) {
                lines.push_str(&event.to_string());
                lines.push('\n');
            }
        }
        lines
    }
}

fn selected(asked: &Asked, object: &Value) -> bool {
    let asked = &asked.logged;
    let kind = asked.selector.strip_prefix("type=");
    kind.is_none_or(|kind| object["type"] == kind)
        && (asked.namespace.is_empty() || object["metadata"]["namespace"] == asked.namespace.as_str())
}

/// An error as the API server words it.
fn status_object(status: u16, retry_after: Option<u64>) -> Value {
    let reason = match status {
        401 => "Unauthorized",
        403 => "Forbidden",
        410 => "Expired",
        429 => "TooManyRequests",
        _ => "InternalError",
    };
    let mut object = json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
        "reason": reason, "message": reason, "code": status,
    });
    if let Some(seconds) = retry_after {
        object["details"] = json!({ "retryAfterSeconds": seconds });
    }
    object
}

fn failure(Refusal { status, retry_after, page }: Refusal) -> Response<ReplyBody> {
    let body = page.unwrap_or_else(|| status_object(status, retry_after).to_string());
    let code = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = respond(code, single(body));
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
