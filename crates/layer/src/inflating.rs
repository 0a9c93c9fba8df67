//! Hashing and inflating one span, as far as its bytes are there.
//!
//! A span that somebody waits for begins while it arrives, in the pauses that the line leaves: when its last byte is here
//! most of the work is done. Nothing of that is served before the digest of all of its bytes was checked.

use std::pin::pin;
use std::task::Poll;

use bytes::Bytes;
use soci_oci::Hasher;
use soci_ztoc::{InflateError, SpanId, SpanInflate, Window};

use crate::buffers::Buffer;
use crate::core::LayerCore;
use crate::{ReadError, ReadErrorKind, verify};

/// What is taken of the compressed span at a time: half a millisecond of work.
const STEP: usize = 32 << 10;

/// A span whose first bytes were hashed and inflated.
#[derive(Debug)]
pub(crate) struct Inflating {
    id: SpanId,
    hasher: Hasher,
    /// Compressed bytes that were hashed.
    hashed: usize,
    inflater: SpanInflate,
    /// Compressed bytes that were inflated.
    taken: usize,
    out: Buffer,
    /// Bytes of `out` that came of them.
    valid: usize,
    /// What came in the way of inflating.
    fault: Option<InflateError>,
}

impl Inflating {
    /// Returns the inflating of span `id`, which starts from `window`; nothing is done yet.
    pub(crate) fn new(core: &LayerCore, id: SpanId, window: &Window) -> Result<Self, ReadError> {
        let len = usize::try_from(core.plain_len(id)).map_err(|_| {
            ReadError::new(ReadErrorKind::Local, format!("{} does not fit into memory", core.name(id)))
        })?;
        let inflater = SpanInflate::new(&core.spans, id, window).map_err(|fault| wrong(core, id, fault))?;
        Ok(Self {
            id,
            hasher: core.spans.digest(id).hasher(),
            hashed: 0,
            inflater,
            taken: 0,
            out: core.shared.buffers.take(len),
            valid: 0,
            fault: None,
        })
    }

    /// Waits for `next`, and works meanwhile on what is there of the compressed span, `arrived`.
    pub(crate) async fn meanwhile<T>(&mut self, arrived: &[u8], next: impl Future<Output = T>) -> T {
        let mut next = pin!(next);
        loop {
            if let Poll::Ready(done) = futures::poll!(next.as_mut()) {
                return done;
            }
            if self.hashed < arrived.len() {
                let end = arrived.len().min(self.hashed + STEP);
                self.hasher.update(&arrived[self.hashed..end]);
                self.hashed = end;
            } else if self.taken < arrived.len() && self.fault.is_none() {
                self.step(arrived);
            } else {
                return next.await;
            }
            // The runtime sees to its sockets only between two tasks.
            tokio::task::yield_now().await;
        }
    }

    fn step(&mut self, compressed: &[u8]) {
        let end = compressed.len().min(self.taken + STEP);
        match self.inflater.feed(&compressed[self.taken..end], &mut self.out) {
            Ok(valid) => (self.taken, self.valid) = (end, valid),
            Err(fault) => self.fault = Some(fault),
        }
    }

    /// Whether `compressed` are the bytes of the span, of which the first ones were hashed before.
    pub(crate) fn verifies(&self, core: &LayerCore, compressed: &[u8]) -> bool {
        verify::completes(self.hasher.clone(), &core.spans, self.id, compressed, self.hashed)
    }

    /// Inflates what is left of the whole and verified span, and shows `serve` how far it came at each step.
    pub(crate) fn finish(
        mut self,
        core: &LayerCore,
        compressed: &[u8],
        serve: impl Fn(&[u8]),
    ) -> Result<Bytes, ReadError> {
        loop {
            serve(&self.out[..self.valid.min(self.out.len())]);
            if self.fault.is_some() || self.taken >= compressed.len() {
                break;
            }
            self.step(compressed);
        }
        let finished = match self.fault {
            Some(fault) => Err(fault),
            None => self.inflater.finish(&self.out),
        };
        finished.map_err(|fault| wrong(core, self.id, fault))?;
        Ok(self.out.freeze())
    }
}

fn wrong(core: &LayerCore, id: SpanId, fault: InflateError) -> ReadError {
    ReadError::because(ReadErrorKind::Integrity, format!("inflating {}", core.name(id)), fault)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::sync::Arc;

    use flate2::write::GzEncoder;
    use soci_ztoc::{BuildOptions, Compression, DecodeLimits, Ztoc, ZtocBuilder};

    use super::*;
    use crate::{CacheSettings, LayerPool, LayerSpec, Meters, Settings, SpanCache};

    /// A layer of one span.
    fn layer(dir: &tempfile::TempDir) -> (Arc<LayerCore>, Vec<u8>, Vec<u8>) {
        let mut tar = tar::Builder::new(Vec::new());
        let content: Vec<u8> = (0..900_000_u64).flat_map(|n| (n * n % 1009).to_le_bytes()).collect();
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_cksum();
        tar.append_data(&mut header, "file", &content[..]).unwrap();
        let tar = tar.into_inner().unwrap();
        let mut gzip = GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar).unwrap();
        let blob = gzip.finish().unwrap();
        let options = BuildOptions { span_size: 64 << 20, build_tool: "test".into() };
        let mut builder = ZtocBuilder::new(Compression::Gzip, options).unwrap();
        builder.push(&blob).unwrap();
        let built = builder.finish().unwrap();
        let file = dir.path().join("ztoc");
        std::fs::write(&file, &built.bytes).unwrap();
        let ztoc = Ztoc::decode(built.bytes.into(), &DecodeLimits::default()).unwrap();
        let cache = SpanCache::open(&dir.path().join("cache"), CacheSettings::default()).unwrap();
        let pool = LayerPool::new(cache, Settings::default(), Meters::default());
        let spec =
            LayerSpec { ztoc: built.digest, ztoc_file: Arc::new(file), spans: Arc::clone(ztoc.spans()) };
        let range = ztoc.spans().compressed(SpanId(0));
        let span = usize::try_from(range.start.0).unwrap()..usize::try_from(range.end.0).unwrap();
        (pool.core(spec), blob[span].to_vec(), tar)
    }

    /// Is ready when it was asked that often.
    async fn after(times: u32) {
        let mut left = times;
        std::future::poll_fn(|context| {
            left = left.saturating_sub(1);
            context.waker().wake_by_ref();
            if left == 0 { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    fn begin(core: &LayerCore) -> Inflating {
        Inflating::new(core, SpanId(0), &core.window(SpanId(0)).unwrap()).unwrap()
    }

    #[tokio::test]
    async fn pauses_are_used_and_the_rest_is_done_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (core, span, tar) = layer(&dir);
        assert!(span.len() > 6 * STEP);
        let mut begun = begin(&core);
        begun.meanwhile(&span[..3 * STEP + 7], after(1)).await;
        assert_eq!((begun.hashed, begun.taken), (0, 0), "what is there at once is not waited for");
        begun.meanwhile(&span[..3 * STEP + 7], after(1000)).await;
        assert_eq!((begun.hashed, begun.taken), (3 * STEP + 7, 3 * STEP + 7));
        begun.meanwhile(&span[..5 * STEP], after(2)).await;
        assert_eq!((begun.hashed, begun.taken), (4 * STEP + 7, 3 * STEP + 7));
        let valid = begun.valid;
        assert!(begun.verifies(&core, &span));
        let seen = std::cell::RefCell::new(Vec::new());
        let whole = begun.finish(&core, &span, |valid| seen.borrow_mut().push(valid.len())).unwrap();
        assert!(whole == tar[..whole.len()] && whole.len() >= tar.len() - 1024);
        let seen = seen.into_inner();
        assert_eq!((seen[0], *seen.last().unwrap()), (valid, whole.len()));
    }

    #[tokio::test]
    async fn a_wrong_byte_is_found_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let (core, span, _) = layer(&dir);
        for at in [0, STEP, 3 * STEP, span.len() - 1] {
            let mut wrong = span.clone();
            wrong[at] ^= 1;
            let mut begun = begin(&core);
            begun.meanwhile(&wrong[..2 * STEP], after(1000)).await;
            assert!(!begun.verifies(&core, &wrong), "a wrong byte at {at}");
        }
        let mut begun = begin(&core);
        begun.meanwhile(&span[..2 * STEP], after(1000)).await;
        assert!(!begun.verifies(&core, &span[..span.len() - 1]));
        let mut begun = begin(&core);
        begun.meanwhile(&span, after(1000)).await;
        assert!(!begun.verifies(&core, &span[..STEP]), "fewer than were hashed");
    }
}
