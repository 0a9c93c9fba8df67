//! From permits to bytes.
//!
//! Spans that are led together and lie side by side become one range: a request costs more than a span. The range is
//! opened once and cut into spans as its bytes arrive; each complete span goes to a worker while the next arrives. A
//! span takes its share of the byte budget before its first byte is taken from the stream, so a full budget holds the
//! other side up. Neighbouring spans may share one byte.
//!
//! A range that breaks off is opened again where its first incomplete span starts. A source that has not got the bytes
//! or refuses them is passed over for the next one. Each span gets the error of its own failure: what was complete
//! before stays good.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use futures::StreamExt;
use soci_oci::{BlobSource, BlobStream, FetchClass, FetchContext, FetchError, FetchErrorKind};
use soci_ztoc::Window;
use tokio::task::JoinHandle;
use tracing::Instrument as _;
use tracing::field::{Empty, debug};

use crate::ReadError;
use crate::budget::Grant;
use crate::core::LayerCore;
use crate::demand::patiently;
use crate::finish::{self, Arrived, Origin};
use crate::hold::Hold;
use crate::inflating::Inflating;
use crate::line::{Asked, Expected};
use crate::meters::Event;
use crate::slot::{FetchPermit, SpanForm};
use crate::sources::SourceId;
use crate::{fill, tail};

/// How often a range is opened again after it broke off without a single span in between.
const REOPEN: u32 = 2;

/// Sets work on `permits` going, in tasks of its own. Spans that the cache has compressed are inflated from there.
pub(crate) fn lead(core: &Arc<LayerCore>, mut permits: Vec<FetchPermit>) {
    permits.sort_by_key(FetchPermit::id);
    let (cached, missing): (Vec<_>, Vec<_>) =
        permits.into_iter().partition(|permit| core.has(permit.id(), SpanForm::Compressed));
    for permit in cached {
        let core = Arc::clone(core);
        let task = Arc::clone(&core);
        core.shared.handle.spawn(async move {
            let grant = acquire(&task, &permit).await;
            let arrived = Arrived { permit, grant, bytes: Bytes::new(), begun: None, origin: Origin::Cache };
            finish::submit(&task, arrived);
        });
    }
    for mut range in join(core, missing, core.shared.settings.max_range) {
        if let [alone] = range.make_contiguous() {
            let behind = tail::behind(core, alone);
            range.extend(behind);
        }
        spawn(core, range, None);
    }
}

/// Brings what `permits` stand for, one range after another. Returns when the last span was handed to a worker, or with the
/// first failure, which was told to all who wait; later ranges are fetched all the same.
pub(crate) async fn bring(
    core: &Arc<LayerCore>,
    permits: Vec<FetchPermit>,
    most: u64,
) -> Result<(), ReadError> {
    let (cached, missing): (Vec<_>, Vec<_>) =
        permits.into_iter().partition(|permit| core.has(permit.id(), SpanForm::Compressed));
    lead(core, cached);
    let mut first = Ok(());
    for range in join(core, missing, most) {
        first = first.and(run(core, range, Manner::default()).await);
    }
    first
}

/// Brings one span that nobody waits for, without standing still for those who wait for others; its bytes count as asked for
/// from now on. As for the result, see [`bring`].
pub(crate) fn steadily(
    core: Arc<LayerCore>,
    permit: FetchPermit,
) -> impl Future<Output = Result<(), ReadError>> + use<> {
    let expected = Some(core.shared.line.expect(core.compressed_len(permit.id())));
    async move { run(&core, VecDeque::from([permit]), Manner { expected, ..Manner::default() }).await }
}

/// Splits permits, in order, into runs of neighbours of at most `most` compressed bytes each.
fn join(core: &LayerCore, permits: Vec<FetchPermit>, most: u64) -> Vec<VecDeque<FetchPermit>> {
    let mut runs: Vec<VecDeque<FetchPermit>> = Vec::new();
    let mut bytes = 0_u64;
    for permit in permits {
        let len = core.compressed_len(permit.id());
        let follows =
            runs.last().and_then(VecDeque::back).is_some_and(|last| last.id().0 + 1 == permit.id().0);
        match runs.last_mut() {
            Some(run) if follows && bytes.saturating_add(len) <= most => {
                bytes += len;
                run.push_back(permit);
            }
            _ => {
                bytes = len;
                runs.push(VecDeque::from([permit]));
            }
        }
    }
    runs
}

fn spawn(core: &Arc<LayerCore>, permits: VecDeque<FetchPermit>, avoid: Option<SourceId>) {
    let task = Arc::clone(core);
    let waited_for = permits.iter().any(|permit| permit.priority().class() == FetchClass::OnDemand);
    let asked = waited_for.then(|| core.shared.line.ask());
    core.shared.handle.spawn(async move {
        let _error_was_told = run(&task, permits, Manner { avoid, asked, expected: None }).await;
    });
}

/// Fetches one span whose cached form turned out to be of no use.
pub(crate) fn anew(core: &Arc<LayerCore>, permit: FetchPermit) {
    spawn(core, VecDeque::from([permit]), None);
}

/// Fetches one span again whose bytes were wrong, from another source if there is one.
pub(crate) fn again(core: &Arc<LayerCore>, permit: FetchPermit, avoid: SourceId) {
    spawn(core, VecDeque::from([permit]), Some(avoid));
}

/// How a range is fetched.
#[derive(Default)]
struct Manner {
    /// A source that gave wrong bytes.
    avoid: Option<SourceId>,
    /// Held until what it was asked for is here; what is taken along comes behind that.
    asked: Option<Asked>,
    /// What is to come of it. Work that nobody waits for stands still for others where this is not known.
    expected: Option<Expected>,
}

/// Fetches neighbouring spans. Returns when the last of them was handed to a worker, or with what ended the fetch, which
/// was told to all who wait for what is missing. Ends without a word when the layer closes.
async fn run(core: &Arc<LayerCore>, permits: VecDeque<FetchPermit>, manner: Manner) -> Result<(), ReadError> {
    let class =
        permits.iter().map(|permit| permit.priority().class()).max().unwrap_or(FetchClass::Background);
    let context = core.context(class);
    permits.iter().for_each(|permit| permit.part_of(&context.priority));
    let (begun, first, count) = (Instant::now(), permits.front().map(|permit| permit.id().0), permits.len());
    // Of its own: what waits for a span did not always start its fetch, and may be gone before it ends.
    let span = tracing::debug_span!(
        target: "traces",
        parent: None,
        "range.fetch",
        ztoc = %core.ztoc,
        spans = count,
        class = ?class,
        outcome = Empty,
        otel.status_code = Empty
    );
    let steady = class > FetchClass::Background || manner.expected.is_some();
    let mut range = Range { core, permits, context, manner, class, steady };
    let (done, outcome) = tokio::select! {
        () = core.closed.cancelled() => (Ok(()), "closed"),
        done = range.fetch().instrument(span.clone()) => (done, "ok"),
    };
    match &done {
        Ok(()) => span.record("outcome", outcome),
        Err(error) => span.record("outcome", debug(error.kind())).record("otel.status_code", "ERROR"),
    };
    drop(span);
    tracing::debug!(
        ztoc = %core.ztoc.short(),
        first,
        spans = count,
        missing = range.permits.len(),
        class = ?class,
        elapsed_us = begun.elapsed().as_micros(),
        "fetched a range of spans"
    );
    let Err(error) = done else { return Ok(()) };
    core.barren.store(true, Ordering::Relaxed);
    let mut last = None;
    for permit in range.permits.drain(..).filter(|permit| !is_tail(permit, class)) {
        let class = permit.priority().class();
        core.meter.count(Event::SpansFailed(class), 1);
        let error = ReadError::fetch(format!("fetching {}", core.name(permit.id())), error.clone());
        permit.fail(&error);
        last = Some(error);
    }
    last.map_or(Ok(()), Err)
}

/// Whether a span in a range that began with `class` was taken along for nobody, as is true to this moment.
fn is_tail(permit: &FetchPermit, class: FetchClass) -> bool {
    class > FetchClass::Background && permit.priority().class() == FetchClass::Background
}

async fn acquire(core: &LayerCore, permit: &FetchPermit) -> Grant {
    let plain = if permit.want() == SpanForm::Plain { core.plain_len(permit.id()) } else { 0 };
    let bytes = core.compressed_len(permit.id()).saturating_add(plain);
    core.shared.budget.acquire(bytes, permit.priority().clone()).await
}

/// Neighbouring spans on their way.
struct Range<'a> {
    core: &'a Arc<LayerCore>,
    /// What has not arrived yet.
    permits: VecDeque<FetchPermit>,
    context: FetchContext,
    manner: Manner,
    /// How urgent it was at first.
    class: FetchClass,
    /// Whether it stands still for nobody.
    steady: bool,
}

impl Range<'_> {
    async fn fetch(&mut self) -> Result<(), FetchError> {
        let mut broken = 0;
        while !self.permits.is_empty() {
            let before = self.permits.len();
            let (asked, window) = (Instant::now(), self.window());
            let bytes = self.permits.iter().map(|permit| self.core.compressed_len(permit.id())).sum();
            let mut expected = self.steady.then(|| self.core.shared.line.expect(bytes));
            self.manner.expected = None;
            let opened = self.core.demanding(self.context.priority.class(), self.open());
            // No bytes are reckoned with once the answer takes longer than answers do.
            let opened = patiently(opened, || expected.iter_mut().for_each(Expected::let_go));
            let (source, stream) = opened.await?;
            self.manner.expected = expected;
            let Err(error) = self.receive(source, stream, asked.elapsed(), window).await else { continue };
            if self.permits.iter().all(|permit| is_tail(permit, self.class)) {
                return Ok(());
            }
            if self.permits.len() < before {
                broken = 0;
                self.context.patient_since = Some(Instant::now());
            } else {
                broken += 1;
            }
            let hopeless = match error.kind() {
                FetchErrorKind::Unavailable | FetchErrorKind::Protocol => false,
                FetchErrorKind::NotFound
                | FetchErrorKind::Denied
                | FetchErrorKind::Integrity
                | FetchErrorKind::Local => true,
            };
            if hopeless || broken > REOPEN || self.context.remaining().is_zero() {
                return Err(error);
            }
            tracing::debug!(ztoc = %self.core.ztoc, %error, "a range broke off, opening it again");
        }
        Ok(())
    }

    /// Opens what is missing at the first source that has it.
    ///
    /// Nobody waits for better credentials before all were asked; then those that refused do, at the same time.
    async fn open(&self) -> Result<(SourceId, BlobStream), FetchError> {
        let (Some(first), Some(last)) = (self.permits.front(), self.permits.back()) else {
            return Ok((0, Box::pin(futures::stream::empty())));
        };
        let spans = &self.core.spans;
        let range = spans.compressed(first.id()).start.0..spans.compressed(last.id()).end.0;
        let sources = self.core.sources.in_order(self.manner.avoid);
        let weary = self.core.sources.weary();
        let patient = !weary && sources.len() == 1;
        let context = if patient { self.context.clone() } else { self.context.impatient() };
        let mut refused = Vec::new();
        let mut other: Option<FetchError> = None;
        for source in &sources {
            match self.open_at(source, &range, &context).await {
                Ok(opened) => return Ok(opened),
                Err(error) if error.kind() == FetchErrorKind::Denied => refused.push((source, error)),
                Err(error) => other = other.or(Some(error)),
            }
        }
        // A refusal outranks the rest: it is what the operator can mend.
        let Some((_, mut error)) = refused.last().cloned() else {
            let nowhere = || FetchError::new(FetchErrorKind::NotFound, "the layer has no source left");
            return Err(other.unwrap_or_else(nowhere));
        };
        if !patient && !weary {
            let waiting = refused.iter().map(|(source, _)| self.open_at(source, &range, &self.context));
            match futures::future::select_ok(waiting.map(Box::pin)).await {
                Ok((opened, _)) => return Ok(opened),
                Err(last) => error = last,
            }
        }
        if !weary && context.priority.class() == FetchClass::OnDemand {
            self.core.sources.waited_in_vain();
        }
        Err(error)
    }

    async fn open_at(
        &self,
        (id, source): &(SourceId, Arc<dyn BlobSource>),
        range: &std::ops::Range<u64>,
        context: &FetchContext,
    ) -> Result<(SourceId, BlobStream), FetchError> {
        self.core.meter.count(Event::Requests, 1);
        let stream = within(context.deadline, source.open(range.clone(), context)).await?;
        self.core.sources.prefer(*id);
        for permit in &self.permits {
            self.core.meter.count(Event::SpansRequested(permit.priority().class()), 1);
        }
        Ok((*id, stream))
    }

    /// Cuts `stream`, which came after `answer`, into spans. The first one, of which `window` is coming, is inflated as it
    /// arrives.
    async fn receive(
        &mut self,
        source: SourceId,
        mut stream: BlobStream,
        answer: Duration,
        mut window: Option<JoinHandle<Option<Window>>>,
    ) -> Result<(), FetchError> {
        let core = Arc::clone(self.core);
        let answered = core.shared.line.now();
        let mut rest = Bytes::new();
        let mut position = match self.permits.front() {
            Some(first) => core.spans.compressed(first.id()).start.0,
            None => return Ok(()),
        };
        // The last byte that was taken: the next span may start with it.
        let mut edge = 0;
        while let Some(permit) = self.permits.front() {
            let id = permit.id();
            if is_tail(permit, self.class) {
                self.manner.asked = None;
            }
            let grant = acquire(&core, permit).await;
            let urgent = core.is_pressing(self.context.priority.class());
            let mut hold = Hold::new(grant, Arc::clone(&core.shared.demand), urgent);
            let wanted = core.spans.compressed(id);
            let len = usize::try_from(core.compressed_len(id))
                .map_err(|_| FetchError::new(FetchErrorKind::Local, "a span does not fit into memory"))?;
            // Bytes are copied out of the connection's buffers, which it then uses again; holding pieces of them would
            // cost memory that no budget knows of.
            let mut span = core.shared.buffers.take(len);
            let mut filled = 0;
            if wanted.start.0 < position && len > 0 {
                span[0] = edge;
                filled = 1;
            }
            let mut begun = match window.take() {
                Some(window) => {
                    window.await.ok().flatten().and_then(|window| Inflating::new(&core, id, &window).ok())
                }
                None => None,
            };
            while filled < len {
                if rest.is_empty() {
                    let next = self.next(&mut stream, &mut hold);
                    rest = match &mut begun {
                        Some(begun) => begun.meanwhile(&span[..filled], next).await?,
                        None => next.await?,
                    };
                }
                let taken = rest.len().min(len - filled);
                span[filled..filled + taken].copy_from_slice(&rest[..taken]);
                filled += taken;
                position += taken as u64;
                edge = rest[taken - 1];
                rest.advance(taken);
            }
            if self.manner.asked.is_some() {
                core.shared.line.note(answer, answered);
                fill::call(&core);
            }
            if let Some(permit) = self.permits.pop_front() {
                let grant = hold.complete();
                let (bytes, origin) = (span.freeze(), self.origin(source));
                let arrived = Arrived { permit, grant, bytes, begun, origin };
                finish::submit(&core, arrived);
            }
        }
        Ok(())
    }

    /// Has the window read, while the answer is on its way, of the first span if somebody waits for it.
    fn window(&self) -> Option<JoinHandle<Option<Window>>> {
        let first = self.permits.front()?;
        let waited_for = first.priority().class() == FetchClass::OnDemand && first.want() == SpanForm::Plain;
        let (core, id) = (Arc::clone(self.core), first.id());
        // A window that cannot be had is seen to when the span is here.
        waited_for.then(|| core.shared.handle.clone().spawn_blocking(move || core.window(id).ok()))
    }

    fn origin(&self, source: SourceId) -> Origin {
        match self.manner.avoid {
            Some(_) => Origin::Fresh(source),
            None => Origin::Source(source),
        }
    }

    /// Returns the next bytes, not empty. Work that steps aside waits here while anybody else wants the network, which
    /// takes nothing from its time.
    async fn next(&mut self, stream: &mut BlobStream, hold: &mut Hold) -> Result<Bytes, FetchError> {
        let shared = &self.core.shared;
        let priority = self.context.priority.clone();
        if !self.steady {
            let asked = Instant::now();
            shared.demand.turn_of(&priority).await;
            self.context.deadline += asked.elapsed();
            hold.was_aside(asked.elapsed());
        }
        let deadline = self.context.deadline.min(Instant::now() + shared.settings.stall_timeout);
        let mut next = pin!(some(stream));
        let next = match tokio::time::timeout_at(hold.due().min(deadline).into(), next.as_mut()).await {
            Ok(next) => next?,
            Err(_) => {
                hold.let_go();
                self.manner.expected.iter_mut().for_each(Expected::let_go);
                within(deadline, next).await?
            }
        };
        self.core.barren.store(false, Ordering::Relaxed);
        self.manner.expected.iter_mut().for_each(|expected| expected.came(next.len()));
        hold.came(next.len(), priority.class() > FetchClass::Background);
        tokio::select! {
            biased;
            // A reader who joins does not wait for the bandwidth limit.
            () = priority.reaches(FetchClass::Prefetch) => {}
            () = shared.background.pace(next.len()) => {}
        }
        Ok(next)
    }
}

/// Returns the next bytes of a stream that are any.
async fn some(stream: &mut BlobStream) -> Result<Bytes, FetchError> {
    loop {
        match stream.next().await {
            Some(Ok(bytes)) if bytes.has_remaining() => return Ok(bytes),
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error),
            None => return Err(FetchError::new(FetchErrorKind::Protocol, "the body ended too early")),
        }
    }
}

/// Bounds `work`, whatever the source makes of its deadline.
async fn within<T>(
    deadline: Instant,
    work: impl Future<Output = Result<T, FetchError>>,
) -> Result<T, FetchError> {
    match tokio::time::timeout_at(deadline.into(), work).await {
        Ok(done) => done,
        Err(_) => Err(FetchError::new(FetchErrorKind::Unavailable, "no bytes arrived in time")),
    }
}
