//! A layer with its zTOC, and a source that does as a script says.
#![allow(
    dead_code,
    clippy::unwrap_used,
    unreachable_pub,
    missing_debug_implementations,
    missing_docs,
    reason = "each test program uses a part of it"
)]

use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use soci_layer::{
    CacheSettings, Gauges, LayerPool, LayerReader, LayerSpec, Meters, RangeRead, Settings, SpanCache,
};
use soci_oci::{BlobSource, BlobStream, Digest, FetchContext, FetchError, FetchErrorKind};
use soci_ztoc::{BuildOptions, Compression, DecodeLimits, SpanId, SpanTable, Ztoc, ZtocBuilder};

/// A layer in all its forms.
pub struct Layer {
    pub tar: Vec<u8>,
    pub blob: Bytes,
    pub ztoc: Bytes,
    pub digest: Digest,
    pub spans: Arc<SpanTable>,
}

/// Returns bytes that compress to about a third.
pub fn text(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(len + 16);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = state % 4096;
        out.extend_from_slice(
            format!("{:x}{} ", word * 7919, ["ab", "ion", "the", "xyz"][(word % 4) as usize]).as_bytes(),
        );
    }
    out.truncate(len);
    out
}

/// Returns a tar of files of these sizes.
pub fn tar_of(sizes: &[usize]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (number, size) in sizes.iter().enumerate() {
        let mut header = tar::Header::new_gnu();
        header.set_size(*size as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder
            .append_data(&mut header, format!("dir/file{number}"), &text(*size, number as u64 + 1)[..])
            .unwrap();
    }
    builder.into_inner().unwrap()
}

impl Layer {
    pub fn gzip(tar: Vec<u8>, span_size: u64) -> Self {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(4));
        std::io::Write::write_all(&mut encoder, &tar).unwrap();
        let blob = encoder.finish().unwrap();
        Self::new(tar, blob, Compression::Gzip, span_size)
    }

    pub fn plain(tar: Vec<u8>, span_size: u64) -> Self {
        Self::new(tar.clone(), tar, Compression::Uncompressed, span_size)
    }

    fn new(tar: Vec<u8>, blob: Vec<u8>, compression: Compression, span_size: u64) -> Self {
        let mut builder =
            ZtocBuilder::new(compression, BuildOptions { span_size, build_tool: "test".into() }).unwrap();
        builder.push(&blob).unwrap();
        let built = builder.finish().unwrap();
        let ztoc = Bytes::from(built.bytes);
        let spans = Arc::clone(Ztoc::decode(ztoc.clone(), &DecodeLimits::default()).unwrap().spans());
        Self { tar, blob: blob.into(), ztoc, digest: built.digest, spans }
    }

    pub fn spec(&self, dir: &Path) -> LayerSpec {
        let file = dir.join(format!("{}.ztoc", self.digest.short()));
        std::fs::write(&file, &self.ztoc).unwrap();
        LayerSpec { ztoc: self.digest, ztoc_file: Arc::new(file), spans: Arc::clone(&self.spans) }
    }

    pub fn source(&self) -> Arc<Script> {
        Script::new(self.blob.clone())
    }
}

/// What a source does with one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Refuse to open.
    Refuse(FetchErrorKind),
    /// Refuse for want of a credential, and wait for a better one as long as that is allowed.
    RefusePatiently,
    /// End cleanly after this many bytes.
    Short(u64),
    /// Fail after this many bytes.
    Break(u64),
    /// Flip a bit of this byte of the range (taken modulo its length).
    Corrupt(u64),
    /// Send nothing more after this many bytes.
    Stall(u64),
}

/// Bytes of a chunk: spans and chunks end at different places.
const CHUNK: usize = 10_007;

#[derive(Debug)]
pub struct Script {
    blob: Bytes,
    chunk: usize,
    /// How far away it is: how long an answer takes. Its chunks then come one by one.
    far: Option<Duration>,
    state: Mutex<State>,
    gate: tokio::sync::watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    faults: VecDeque<Fault>,
    always: Option<Fault>,
    opened: Vec<Range<u64>>,
    waited: Vec<Instant>,
}

/// How long a source waits for better credentials.
pub const PATIENCE: Duration = Duration::from_secs(2);

impl Script {
    pub fn new(blob: Bytes) -> Arc<Self> {
        Self::with_chunk(blob, CHUNK)
    }

    pub fn with_chunk(blob: Bytes, chunk: usize) -> Arc<Self> {
        Self::make(blob, chunk, None)
    }

    /// Returns a source that is a road of that long away.
    pub fn far(blob: Bytes, answer: Duration) -> Arc<Self> {
        Self::make(blob, CHUNK, Some(answer))
    }

    fn make(blob: Bytes, chunk: usize, far: Option<Duration>) -> Arc<Self> {
        let gate = tokio::sync::watch::Sender::new(true);
        Arc::new(Self { blob, chunk, far, state: Mutex::default(), gate })
    }

    pub fn next(&self, fault: Fault) {
        self.state.lock().unwrap().faults.push_back(fault);
    }

    pub fn always(&self, fault: Fault) {
        self.state.lock().unwrap().always = Some(fault);
    }

    pub fn heal(&self) {
        let mut state = self.state.lock().unwrap();
        state.faults.clear();
        state.always = None;
    }

    /// Ranges opened so far.
    pub fn opened(&self) -> Vec<Range<u64>> {
        self.state.lock().unwrap().opened.clone()
    }

    /// When it began to count how long it may wait for better credentials, for each time it did.
    pub fn waited(&self) -> Vec<Instant> {
        self.state.lock().unwrap().waited.clone()
    }

    /// While closed no byte is sent.
    pub fn gate(&self, open: bool) {
        self.gate.send_replace(open);
    }
}

#[async_trait::async_trait]
impl BlobSource for Script {
    async fn open(&self, range: Range<u64>, context: &FetchContext) -> Result<BlobStream, FetchError> {
        let fault = {
            let mut state = self.state.lock().unwrap();
            state.opened.push(range.clone());
            state.always.or_else(|| state.faults.pop_front()).unwrap_or(Fault::None)
        };
        let far = self.far;
        if let Some(answer) = far {
            tokio::time::sleep(answer).await;
        }
        if let Fault::Refuse(kind) = fault {
            return Err(FetchError::new(kind, "refused by the script"));
        }
        if fault == Fault::RefusePatiently {
            if let Some(since) = context.patient_since {
                self.state.lock().unwrap().waited.push(since);
                tokio::time::sleep_until((since + PATIENCE).into()).await;
            }
            let healed = self.state.lock().unwrap().always != Some(fault);
            if !healed || context.patient_since.is_none() {
                return Err(FetchError::new(FetchErrorKind::Denied, "refused by the script"));
            }
        }
        let whole =
            self.blob.slice(usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap());
        let mut bytes = whole.to_vec();
        let len = bytes.len() as u64;
        let mut tail = None;
        match fault {
            Fault::None | Fault::Refuse(_) | Fault::RefusePatiently => {}
            Fault::Short(after) => bytes.truncate(usize::try_from(after % len).unwrap()),
            Fault::Break(after) => {
                bytes.truncate(usize::try_from(after % len).unwrap());
                tail = Some(false);
            }
            Fault::Stall(after) => {
                bytes.truncate(usize::try_from(after % len).unwrap());
                tail = Some(true);
            }
            Fault::Corrupt(at) => bytes[usize::try_from(at % len).unwrap()] ^= 4,
        }
        let chunks: Vec<_> =
            bytes.chunks(self.chunk).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
        let gate = self.gate.subscribe();
        let stream = futures::stream::iter(chunks).then(move |chunk| {
            let mut gate = gate.clone();
            async move {
                drop(gate.wait_for(|open| *open).await);
                if far.is_some() {
                    tokio::task::yield_now().await;
                }
                chunk
            }
        });
        Ok(match tail {
            None => stream.boxed(),
            Some(true) => stream.chain(futures::stream::pending()).boxed(),
            Some(false) => stream
                .chain(futures::stream::iter([Err(FetchError::new(
                    FetchErrorKind::Unavailable,
                    "connection reset",
                ))]))
                .boxed(),
        })
    }
}

/// Settings that make small layers behave as large ones.
pub fn settings() -> Settings {
    Settings {
        max_range: 256 << 10,
        in_flight: 4 << 20,
        reserve: 1 << 20,
        recent: 256 << 10,
        workers: 2,
        ..Settings::default()
    }
}

pub struct Rig {
    pub dir: tempfile::TempDir,
    pub pool: Arc<LayerPool>,
}

impl Rig {
    pub fn new(settings: Settings) -> Self {
        Self::with_cache(settings, CacheSettings::default())
    }

    pub fn with_cache(settings: Settings, cache: CacheSettings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cache = SpanCache::open(&dir.path().join("cache"), cache).unwrap();
        Self { pool: LayerPool::new(cache, settings, Meters::default()), dir }
    }

    pub fn open(&self, layer: &Layer, source: &Arc<Script>) -> Arc<LayerReader> {
        self.pool.open(layer.spec(self.dir.path()), Arc::clone(source) as Arc<dyn BlobSource>)
    }

    /// Waits until nothing is in flight.
    pub async fn quiet(&self) {
        until("nothing is in flight", || Gauges { layers: 0, ..self.pool.gauges() } == Gauges::default())
            .await;
    }
}

/// A layer that is open and far away.
pub struct Case {
    pub layer: Layer,
    pub rig: Rig,
    pub source: Arc<Script>,
    pub reader: Arc<LayerReader>,
}

impl Case {
    pub fn open(layer: Layer, rig: Rig, answer: Duration) -> Self {
        let source = Script::far(layer.blob.clone(), answer);
        let reader = rig.open(&layer, &source);
        Self { layer, rig, source, reader }
    }

    /// Reads the begin of a span. Whether it is what the layer has there.
    pub async fn read(&self, span: u32) -> bool {
        let part = self.layer.spans.uncompressed(SpanId(span));
        let read = self.reader.read_at(part.start, 100, soon()).await.unwrap();
        let from = usize::try_from(part.start.0).unwrap();
        read.into_bytes() == self.layer.tar[from..from + 100]
    }
}

/// Waits until `condition` holds; fails after a while.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "waited too long until {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}
