//! Background work while a reader comes again and again.
//!
//! A program that loads waits for one place after the other, with hardly a pause between: background work that keeps out of
//! its way gets no turn, and yet the line stands still while each of its requests is answered. So as much as the line
//! carries in that time is always on its way, one span after the other: of the layer that a reader waited for last, what is
//! likely to be wanted next. It does not step aside, for most of it is here before the bytes are that a reader asks for
//! now.
//!
//! There is none under a bandwidth limit, and none is begun while a pull waits, or once there was no reader for a moment:
//! then [`crate::background`] goes on, with longer ranges.

use std::sync::{Arc, Weak};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use soci_oci::FetchClass;
use soci_ztoc::SpanId;

use crate::core::LayerCore;
use crate::pool::Shared;
use crate::slot::SpanForm;
use crate::{background, fetch};

/// What it works at.
#[derive(Debug, Default)]
pub(crate) struct Fill(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// What a reader waited for last.
    layer: Weak<LayerCore>,
    /// Set by a reader who had to wait.
    called: bool,
    /// Whether there is a task.
    runs: bool,
}

/// Has `core` filled for a while, since a reader of it had to wait. Returns at once.
///
/// A call while the task ends may be lost; the reader's next wait makes up for it.
pub(crate) fn call(core: &Arc<LayerCore>) {
    let shared = &core.shared;
    if !core.is_hurried() {
        return;
    }
    let mut state = shared.fill.0.lock();
    state.layer = Arc::downgrade(core);
    state.called = true;
    if !std::mem::replace(&mut state.runs, true) {
        let task = Task(Arc::clone(shared));
        shared.handle.spawn(async move { task.run().await });
    }
}

/// The task, which has ended when this is dropped.
struct Task(Arc<Shared>);

impl Task {
    async fn run(&self) {
        let Shared { line, demand, .. } = &*self.0;
        let mut ranges = FuturesUnordered::new();
        let mut next: Option<(Arc<LayerCore>, SpanId)> = None;
        let mut failed = false;
        loop {
            let moved = line.moved();
            if failed || !demand.is_a_readers() {
                next = None;
            } else if next.is_none() || self.was_called() {
                next = self.choose();
            }
            let fits =
                |(core, span): &mut (Arc<LayerCore>, SpanId)| line.has_room(core.compressed_len(*span));
            if let Some((core, span)) = next.take_if(fits) {
                if let Some(permit) = core.bring(span, SpanForm::Compressed, FetchClass::Background) {
                    ranges.push(fetch::steadily(core, permit));
                }
                continue;
            }
            if next.is_none() && ranges.is_empty() {
                return;
            }
            tokio::select! {
                Some(done) = ranges.next() => failed |= done.is_err(),
                () = moved, if next.is_some() => {}
                () = demand.quiet(), if next.is_some() => {}
            }
        }
    }

    fn was_called(&self) -> bool {
        std::mem::take(&mut self.0.fill.0.lock().called)
    }

    fn choose(&self) -> Option<(Arc<LayerCore>, SpanId)> {
        let core = self.0.fill.0.lock().layer.upgrade().filter(|core| !core.closed.is_cancelled())?;
        let span = background::likeliest(&core)?;
        let room = self.0.cache.has_room(core.compressed_len(span), FetchClass::Background);
        room.then_some((core, span))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.fill.0.lock().runs = false;
    }
}
