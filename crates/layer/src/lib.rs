//! One layer's bytes: any verified range of it, or its whole tar stream; the span cache.
//!
//! A [`LayerPool`] opens layers by their zTOC; a [`LayerReader`] reads one. A read goes through these steps, one file each:
//! `reader` finds the spans and admits each (`slot`), what is missing is fetched in joined ranges (`fetch`) from the
//! sources of the layer (`sources`) within a byte budget (`budget`), then on worker threads (`workers`) verified
//! (`verify`), inflated (`inflating`) and served part by part, and stored (`finish`, `span_cache`). `readahead`, `tail`,
//! `fill` and `background` enter at `slot`.
//!
//! What holds everywhere: no byte is served that was not verified; no wait is without a deadline; a reader that leaves
//! cancels nothing that others share; nothing of the network happens on behalf of a layer that is closed.

mod background;
mod budget;
mod buffers;
mod core;
mod demand;
mod error;
mod fetch;
mod fill;
mod finish;
mod hold;
mod inflating;
mod line;
mod mend;
mod meters;
mod pool;
mod read;
mod readahead;
mod reader;
mod recent;
mod settings;
mod slot;
mod sources;
mod span_cache;
mod sync;
mod tail;
mod tar_stream;
mod touched;
pub mod unpack;
mod verify;
mod window;
mod workers;

pub use error::{ReadError, ReadErrorKind};
pub use mend::ZtocFile;
pub use meters::{Event, LayerMeter, MeterFactory, Meters};
pub use pool::{Gauges, LayerPool, LayerSpec};
pub use read::{RangeRead, ReadChunks};
pub use reader::LayerReader;
pub use settings::{BackgroundSettings, Settings};
pub use slot::SpanForm;
pub use span_cache::{CacheSettings, SpanCache, SpanKey, Stored, is_full};
pub use tar_stream::TarStream;
