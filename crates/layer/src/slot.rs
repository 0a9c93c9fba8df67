//! Work in flight, one slot per span.
//!
//! A slot exists while one task fetches or inflates its span, and no longer: what is done is in the cache or in memory.
//! Whoever wants a span is *admitted*: it is ready, or one joins the work, or one leads it. Because whether it is ready
//! is asked under the lock that also ends a slot, a span is never fetched by two.
//!
//! A leader gives out parts of the span as they become valid. It works in a task of its own, so a reader that leaves
//! cancels nothing. A leader that is dropped before it ended tells those who wait to come again, and the first of them
//! leads. A joiner raises the priority of the work, and of the request the span is part of.
//!
//! Lock order: `Slots::map`, then `Slot::state`. Nothing is sent to a waiter under either.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use soci_oci::{FetchClass, Priority};
use soci_ztoc::SpanId;
use tokio::sync::oneshot;

use crate::sync::Mutex;
use crate::{ReadChunks, ReadError};

/// In which form a span is wanted or stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SpanForm {
    /// As it is in the blob.
    Compressed,
    /// Inflated.
    Plain,
}

/// The slots of one layer.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    map: Mutex<HashMap<SpanId, Arc<Slot>>>,
}

#[derive(Debug)]
struct Slot {
    /// How urgent this span is.
    priority: Priority,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What the span has to become.
    want: SpanForm,
    /// How urgent the request is that the span is part of.
    request: Option<Priority>,
    /// Who waits, and for which part of the inflated span.
    waiters: Vec<(Range<usize>, oneshot::Sender<Parted>)>,
    /// The inflated span, once it is whole.
    whole: Option<Bytes>,
}

/// What became of a wait.
#[derive(Debug)]
pub(crate) enum Parted {
    /// The part.
    Chunks(ReadChunks),
    /// The span cannot be had.
    Failed(ReadError),
    /// The leader vanished: ask again.
    Again,
}

/// Waits for a part of a span. Dropping it leaves the work alone.
#[derive(Debug)]
pub(crate) struct FetchWaiter(oneshot::Receiver<Parted>);

/// The right and the duty to bring a span; dropping it ends the slot.
#[derive(Debug)]
pub(crate) struct FetchPermit {
    slots: Arc<Slots>,
    slot: Arc<Slot>,
    id: SpanId,
}

/// The answer to one who wants a span.
#[derive(Debug)]
pub(crate) enum Admission<R> {
    /// It is there.
    Ready(R),
    /// Someone brings it. A waiter is there when a part was asked for.
    Join(Option<FetchWaiter>),
    /// The caller brings it. A waiter is there when a part was asked for.
    Lead(FetchPermit, Option<FetchWaiter>),
}

impl Slots {
    /// Asks for `part` (half open, inside the inflated span) of span `id`, or with no part for the span to be brought in
    /// the form `want`. `ready` says whether it is there; it is called under the lock, so it must be quick.
    pub(crate) fn admit<R>(
        self: &Arc<Self>,
        id: SpanId,
        want: SpanForm,
        part: Option<Range<usize>>,
        class: FetchClass,
        ready: impl FnOnce() -> Option<R>,
    ) -> Admission<R> {
        let mut map = self.map.lock();
        if let Some(slot) = map.get(&id) {
            return Admission::Join(slot.join(want, part, class));
        }
        if let Some(ready) = ready() {
            return Admission::Ready(ready);
        }
        let state = Mutex::new(State { want, request: None, waiters: Vec::new(), whole: None });
        let slot = Arc::new(Slot { priority: Priority::new(class), state });
        let waiter = slot.join(want, part, class);
        map.insert(id, Arc::clone(&slot));
        Admission::Lead(FetchPermit { slots: Arc::clone(self), slot, id }, waiter)
    }

    /// Whether work on span `id` is in flight.
    pub(crate) fn busy(&self, id: SpanId) -> bool {
        self.map.lock().contains_key(&id)
    }

    /// Returns how many spans are in flight.
    pub(crate) fn len(&self) -> usize {
        self.map.lock().len()
    }
}

impl Slot {
    fn join(&self, want: SpanForm, part: Option<Range<usize>>, class: FetchClass) -> Option<FetchWaiter> {
        self.priority.raise(class);
        let mut state = self.state.lock();
        state.want = state.want.max(want);
        if let Some(request) = &state.request {
            request.raise(class);
        }
        let part = part?;
        let (sender, receiver) = oneshot::channel();
        if let Some(whole) = &state.whole {
            drop(sender.send(cut(whole, part)));
        } else {
            if state.waiters.len() >= 64 {
                state.waiters.retain(|(_, waiter)| !waiter.is_closed());
            }
            state.waiters.push((part, sender));
        }
        Some(FetchWaiter(receiver))
    }
}

fn cut(whole: &Bytes, part: Range<usize>) -> Parted {
    let end = part.end.min(whole.len());
    Parted::Chunks(whole.slice(part.start.min(end)..end).into())
}

impl FetchWaiter {
    /// Waits for the part.
    pub(crate) async fn part(self) -> Parted {
        self.0.await.unwrap_or(Parted::Again)
    }
}

impl FetchPermit {
    /// Returns the span to be brought.
    pub(crate) fn id(&self) -> SpanId {
        self.id
    }

    /// Returns how urgent the span is; shared, and may rise.
    pub(crate) fn priority(&self) -> &Priority {
        &self.slot.priority
    }

    /// Makes the span part of a request, whose priority rises with the span's from here on.
    pub(crate) fn part_of(&self, request: &Priority) {
        let mut state = self.slot.state.lock();
        request.raise(self.slot.priority.class());
        state.request = Some(request.clone());
    }

    /// Returns what the span has to become, as far as is known now.
    pub(crate) fn want(&self) -> SpanForm {
        self.slot.state.lock().want
    }

    /// Serves those who wait for a part of `valid`, the beginning of the verified, inflated span.
    pub(crate) fn serve(&self, valid: &[u8]) {
        let mut served = Vec::new();
        let mut state = self.slot.state.lock();
        let mut at = 0;
        while at < state.waiters.len() {
            if state.waiters[at].0.end <= valid.len() {
                served.push(state.waiters.swap_remove(at));
            } else {
                at += 1;
            }
        }
        drop(state);
        for (part, waiter) in served {
            drop(waiter.send(Parted::Chunks(Bytes::copy_from_slice(&valid[part]).into())));
        }
    }

    /// Serves all who wait, and all who join until the permit is dropped, from the verified, inflated span.
    pub(crate) fn whole(&self, bytes: &Bytes) {
        let mut state = self.slot.state.lock();
        state.whole = Some(bytes.clone());
        let waiters = std::mem::take(&mut state.waiters);
        drop(state);
        for (part, waiter) in waiters {
            drop(waiter.send(cut(bytes, part)));
        }
    }

    /// Ends the slot of a span that was stored compressed, unless someone wants it inflated: then the permit comes back.
    pub(crate) fn stored(self) -> Option<Self> {
        let mut map = self.slots.map.lock();
        let state = self.slot.state.lock();
        if state.want == SpanForm::Plain || !state.waiters.is_empty() {
            drop(state);
            drop(map);
            return Some(self);
        }
        map.remove(&self.id);
        None
    }

    /// Ends the slot: the span cannot be had. All who wait get `error`; who comes later tries again.
    pub(crate) fn fail(self, error: &ReadError) {
        self.end(|| Parted::Failed(error.clone()));
    }

    /// Takes the slot out of the map, if it is there still, and tells those who wait.
    fn end(&self, say: impl Fn() -> Parted) {
        let mut map = self.slots.map.lock();
        if map.get(&self.id).is_some_and(|slot| Arc::ptr_eq(slot, &self.slot)) {
            map.remove(&self.id);
        }
        let waiters = std::mem::take(&mut self.slot.state.lock().waiters);
        drop(map);
        for (_, waiter) in waiters {
            drop(waiter.send(say()));
        }
    }
}

impl Drop for FetchPermit {
    fn drop(&mut self) {
        self.end(|| Parted::Again);
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use futures::FutureExt;

    use super::*;
    use crate::ReadErrorKind;

    const SPAN: SpanId = SpanId(3);

    fn admit(slots: &Arc<Slots>, part: Range<usize>) -> Admission<()> {
        slots.admit(SPAN, SpanForm::Plain, Some(part), FetchClass::OnDemand, || None)
    }

    fn now(waiter: FetchWaiter) -> Option<Parted> {
        waiter.part().now_or_never()
    }

    #[test]
    fn a_part_is_served_before_the_span_is_whole() {
        let slots = Arc::new(Slots::default());
        let Admission::Lead(permit, Some(early)) = admit(&slots, 0..4) else { panic!() };
        let Admission::Join(Some(late)) = admit(&slots, 4..8) else { panic!() };
        permit.serve(b"abcdef");
        assert!(matches!(now(early), Some(Parted::Chunks(chunks)) if chunks.clone().into_bytes() == "abcd"));
        let mut late = Box::pin(late.part());
        assert!(late.as_mut().now_or_never().is_none());
        permit.whole(&Bytes::from_static(b"abcdefgh"));
        assert!(
            matches!(late.now_or_never(), Some(Parted::Chunks(chunks)) if chunks.clone().into_bytes() == "efgh")
        );
        let Admission::Join(Some(after)) = admit(&slots, 1..2) else { panic!() };
        assert!(matches!(now(after), Some(Parted::Chunks(chunks)) if chunks.clone().into_bytes() == "b"));
        drop(permit);
        assert_eq!(slots.len(), 0);
    }

    #[test]
    fn a_leader_that_vanishes_is_replaced() {
        let slots = Arc::new(Slots::default());
        let Admission::Lead(permit, Some(first)) = admit(&slots, 0..1) else { panic!() };
        let Admission::Join(Some(second)) = admit(&slots, 0..1) else { panic!() };
        drop(permit);
        assert!(matches!(now(first), Some(Parted::Again)));
        assert!(matches!(now(second), Some(Parted::Again)));
        assert!(matches!(admit(&slots, 0..1), Admission::Lead(..)));
    }

    #[test]
    fn every_waiter_gets_the_error_and_the_next_one_tries_again() {
        let slots = Arc::new(Slots::default());
        let Admission::Lead(permit, Some(first)) = admit(&slots, 0..1) else { panic!() };
        let Admission::Join(Some(second)) = admit(&slots, 0..1) else { panic!() };
        permit.fail(&ReadError::new(ReadErrorKind::Denied, "refused"));
        for waiter in [first, second] {
            let Some(Parted::Failed(error)) = now(waiter) else { panic!() };
            assert_eq!(error.kind(), ReadErrorKind::Denied);
        }
        assert!(matches!(admit(&slots, 0..1), Admission::Lead(..)));
    }

    #[test]
    fn a_joiner_raises_the_request_and_the_form() {
        let slots = Arc::new(Slots::default());
        let admission = slots.admit(SPAN, SpanForm::Compressed, None, FetchClass::Background, || None::<()>);
        let Admission::Lead(permit, None) = admission else { panic!() };
        let request = Priority::new(FetchClass::Background);
        permit.part_of(&request);
        assert_eq!((permit.want(), request.class()), (SpanForm::Compressed, FetchClass::Background));
        let Admission::Join(Some(waiter)) = admit(&slots, 0..1) else { panic!() };
        assert_eq!((permit.want(), request.class()), (SpanForm::Plain, FetchClass::OnDemand));
        let permit = permit.stored().expect("someone waits");
        permit.whole(&Bytes::from_static(b"x"));
        assert!(matches!(now(waiter), Some(Parted::Chunks(_))));
    }

    #[test]
    fn what_is_stored_unwanted_ends_the_slot() {
        let slots = Arc::new(Slots::default());
        let admission = slots.admit(SPAN, SpanForm::Compressed, None, FetchClass::Background, || None::<()>);
        let Admission::Lead(permit, None) = admission else { panic!() };
        assert!(permit.stored().is_none());
        assert_eq!(slots.len(), 0);
        assert!(matches!(
            slots.admit(SPAN, SpanForm::Plain, None, FetchClass::OnDemand, || Some(7)),
            Admission::Ready(7)
        ));
    }
}

/// Run by `cargo test -p soci-layer --features shuttle races`.
#[cfg(all(test, feature = "shuttle"))]
mod races {
    use shuttle::sync::atomic::{AtomicUsize, Ordering};
    use shuttle::thread;

    use super::*;

    /// Readers of one span, whose first leader vanishes: all are served and the span is brought once.
    #[test]
    fn readers_with_a_leader_that_vanishes() {
        shuttle::check_random(
            || {
                let slots = Arc::new(Slots::default());
                let cached = Arc::new(AtomicUsize::new(0));
                let brought = Arc::new(AtomicUsize::new(0));
                let vanished = Arc::new(AtomicUsize::new(0));
                let readers: Vec<_> = (0..3)
                    .map(|_| {
                        let (slots, cached) = (Arc::clone(&slots), Arc::clone(&cached));
                        let (brought, vanished) = (Arc::clone(&brought), Arc::clone(&vanished));
                        thread::spawn(move || {
                            shuttle::future::block_on(async {
                                loop {
                                    let ready = || (cached.load(Ordering::SeqCst) == 1).then_some(());
                                    let class = FetchClass::OnDemand;
                                    match slots.admit(SpanId(0), SpanForm::Plain, Some(0..1), class, ready) {
                                        Admission::Ready(()) => return,
                                        Admission::Join(waiter) => match waiter.unwrap().part().await {
                                            Parted::Chunks(chunks) => return assert_eq!(chunks.len(), 1),
                                            Parted::Failed(error) => panic!("{error}"),
                                            Parted::Again => {}
                                        },
                                        Admission::Lead(permit, waiter) => {
                                            if vanished.fetch_add(1, Ordering::SeqCst) == 0 {
                                                drop(permit);
                                                assert!(matches!(
                                                    waiter.unwrap().part().await,
                                                    Parted::Again
                                                ));
                                                continue;
                                            }
                                            brought.fetch_add(1, Ordering::SeqCst);
                                            permit.serve(b"x");
                                            permit.whole(&Bytes::from_static(b"x"));
                                            cached.store(1, Ordering::SeqCst);
                                        }
                                    }
                                }
                            });
                        })
                    })
                    .collect();
                readers.into_iter().for_each(|reader| reader.join().unwrap());
                assert_eq!((brought.load(Ordering::SeqCst), slots.len()), (1, 0));
            },
            3000,
        );
    }

    /// A background leader stores a span compressed while a reader comes: the reader joins or finds it, never neither.
    #[test]
    fn a_reader_comes_while_a_span_is_stored_compressed() {
        shuttle::check_random(
            || {
                let slots = Arc::new(Slots::default());
                let stored = Arc::new(AtomicUsize::new(0));
                let Admission::Lead(permit, None) =
                    slots.admit(SpanId(0), SpanForm::Compressed, None, FetchClass::Background, || None::<()>)
                else {
                    panic!()
                };
                let leader = {
                    let stored = Arc::clone(&stored);
                    thread::spawn(move || {
                        stored.store(1, Ordering::SeqCst);
                        if let Some(permit) = permit.stored() {
                            permit.whole(&Bytes::from_static(b"x"));
                        }
                    })
                };
                let ready = || (stored.load(Ordering::SeqCst) == 1).then_some(());
                match slots.admit(SpanId(0), SpanForm::Plain, Some(0..1), FetchClass::OnDemand, ready) {
                    Admission::Ready(()) => {}
                    Admission::Join(waiter) => {
                        let parted = shuttle::future::block_on(waiter.unwrap().part());
                        assert!(matches!(parted, Parted::Chunks(_)));
                    }
                    Admission::Lead(..) => panic!("fetched twice"),
                }
                leader.join().unwrap();
            },
            3000,
        );
    }
}
