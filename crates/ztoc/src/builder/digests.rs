//! The digests of a layer and of its spans, taken while it passes by.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use soci_oci::{Digest, Hasher};

use super::BuildError;

/// A span begins.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// Position in the layer of the span's first whole byte.
    pub(super) input: u64,
    /// Bits of the byte before that belong to the span: if not 0, that byte is hashed for both spans.
    pub(super) bits: u8,
}

/// The hashers themselves.
#[derive(Debug)]
struct Digests {
    layer: Option<Hasher>,
    /// Of the span in progress; bytes before the first span belong to none.
    span: Option<Hasher>,
    done: Vec<Digest>,
    position: u64,
    /// The byte before `position`.
    previous: u8,
}

impl Digests {
    fn push(&mut self, bytes: &[u8], cuts: &[Cut]) {
        if let Some(layer) = &mut self.layer {
            layer.update(bytes);
        }
        let mut from = 0;
        for cut in cuts {
            let to = usize::try_from(cut.input.saturating_sub(self.position))
                .unwrap_or(usize::MAX)
                .min(bytes.len());
            if let Some(mut span) = self.span.take() {
                span.update(&bytes[from..to]);
                self.done.push(span.finish());
            }
            let mut span = Hasher::sha256();
            if cut.bits != 0 {
                span.update(&[if to == 0 { self.previous } else { bytes[to - 1] }]);
            }
            self.span = Some(span);
            from = to;
        }
        if let Some(span) = &mut self.span {
            span.update(&bytes[from..]);
        }
        self.position += bytes.len() as u64;
        self.previous = bytes.last().copied().unwrap_or(self.previous);
    }

    fn finish(mut self) -> (Option<Digest>, Vec<Digest>) {
        self.done.extend(self.span.map(Hasher::finish));
        (self.layer.map(Hasher::finish), self.done)
    }
}

struct Job {
    bytes: Vec<u8>,
    cuts: Vec<Cut>,
}

/// Jobs under way at most; each is a piece of the layer.
const QUEUE: usize = 4;

/// Below this many bytes a thread costs more than it brings.
const WORTH_A_THREAD: u64 = 1 << 20;

#[derive(Debug)]
enum Place {
    Here(Box<Digests>),
    There {
        jobs: SyncSender<Job>,
        used: Receiver<Vec<u8>>,
        thread: JoinHandle<Box<Digests>>,
    },
    /// Only while changing place, and after an error.
    Nowhere,
}

/// Hashes here at first, and on a thread of its own once the layer turns out to be large.
#[derive(Debug)]
pub(super) struct Hashing {
    place: Place,
    pushed: u64,
}

impl Hashing {
    /// `layer` is whether the digest of the whole layer is wanted, too.
    pub(super) fn new(layer: bool) -> Self {
        let layer = layer.then(Hasher::sha256);
        let digests = Digests { layer, span: None, done: Vec::new(), position: 0, previous: 0 };
        Self { place: Place::Here(Box::new(digests)), pushed: 0 }
    }

    /// Hashes `piece`, in which the spans of `cuts` begin.
    pub(super) fn push(&mut self, piece: &[u8], cuts: Vec<Cut>) -> Result<(), BuildError> {
        self.pushed += piece.len() as u64;
        if self.pushed > WORTH_A_THREAD {
            self.move_there();
        }
        match &mut self.place {
            Place::Here(digests) => {
                digests.push(piece, &cuts);
                Ok(())
            }
            Place::There { jobs, used, .. } => {
                let mut bytes = used.try_recv().unwrap_or_default();
                bytes.clear();
                bytes.extend_from_slice(piece);
                jobs.send(Job { bytes, cuts }).map_err(|_| BuildError::Hashing)
            }
            Place::Nowhere => Err(BuildError::Hashing),
        }
    }

    fn move_there(&mut self) {
        if !matches!(self.place, Place::Here(_))
            || std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() < 2)
        {
            return;
        }
        let (jobs, todo) = sync_channel::<Job>(QUEUE);
        let (done, used) = sync_channel::<Vec<u8>>(QUEUE + 1);
        let (give, take) = sync_channel::<Box<Digests>>(1);
        let work = move || -> Box<Digests> {
            // The sender gives the hashers before it goes on, or there is no thread.
            let mut digests = match take.recv() {
                Ok(digests) => digests,
                Err(_) => {
                    Box::new(Digests { layer: None, span: None, done: Vec::new(), position: 0, previous: 0 })
                }
            };
            for job in todo {
                digests.push(&job.bytes, &job.cuts);
                // With nobody to use the buffer again it is dropped.
                let _ = done.try_send(job.bytes);
            }
            digests
        };
        // Without a thread the work stays here.
        let Ok(thread) = std::thread::Builder::new().name("ztoc-hash".into()).spawn(work) else { return };
        if let Place::Here(digests) = std::mem::replace(&mut self.place, Place::Nowhere)
            && give.send(digests).is_ok()
        {
            self.place = Place::There { jobs, used, thread };
        }
    }

    /// The digest of the layer (if wanted) and those of the spans.
    pub(super) fn finish(mut self) -> Result<(Option<Digest>, Vec<Digest>), BuildError> {
        match std::mem::replace(&mut self.place, Place::Nowhere) {
            Place::Here(digests) => Ok(digests.finish()),
            Place::There { jobs, used: _, thread } => {
                drop(jobs);
                thread.join().map(|digests| digests.finish()).map_err(|_| BuildError::Hashing)
            }
            Place::Nowhere => Err(BuildError::Hashing),
        }
    }
}

impl Drop for Hashing {
    fn drop(&mut self) {
        if let Place::There { jobs, used: _, thread } = std::mem::replace(&mut self.place, Place::Nowhere) {
            drop(jobs);
            // At most the queue is left to hash; a panic there has no one to be told.
            let _ = thread.join();
        }
    }
}
