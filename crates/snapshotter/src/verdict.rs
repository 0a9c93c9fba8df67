//! One verdict per pull: what became of an image's layers, and why.
//!
//! Layers of a pull arrive one by one. The verdict is given as soon as it is certain: when each layer of the manifest has
//! an outcome, when an image is left to containerd as a whole, or when nothing more came for [`IDLE`] and no layer is being
//! made, which may take minutes where it is unpacked. It is given once;
//! an image pulled again gets a new one: later, or at once when a layer is made that was made already. A refusal or a
//! failure ends its pull: whatever comes next is another.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use soci_oci::Digest;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::plan::{LayerRequest, Reason};

/// How long to wait for further layers of a pull.
pub const IDLE: Duration = Duration::from_secs(10);

/// What became of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// Mounted lazily.
    Lazy,
    /// Mounted lazily before, for another pull.
    Mounted,
    /// There already, unpacked.
    Present,
    /// Unpacked by us.
    Unpacked(Reason),
    /// Left to containerd.
    Left(Reason),
    /// Refused, under `strict`.
    Refused(Reason),
    /// Could not be made nor left to containerd: the pull fails.
    Failed,
}

impl Outcome {
    /// Whether it ends the pull.
    fn ends(self) -> bool {
        matches!(self, Self::Refused(_) | Self::Failed)
    }

    /// Whether the layer was found as an earlier pull left it.
    fn found(self) -> bool {
        matches!(self, Self::Mounted | Self::Present)
    }
}

/// What became of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// containerd namespace of the pull.
    pub namespace: String,
    /// The image.
    pub image: String,
    /// Digest of its manifest; none where the labels do not say which image it is.
    pub manifest: Option<Digest>,
    /// Layers mounted lazily.
    pub lazy: usize,
    /// Layers mounted lazily before.
    pub mounted: usize,
    /// Layers that were there already, unpacked.
    pub present: usize,
    /// Layers unpacked by us.
    pub unpacked: usize,
    /// Layers left to containerd.
    pub left: usize,
    /// Layers refused.
    pub refused: usize,
    /// Layers that failed the pull.
    pub failed: usize,
    /// Why layers are not lazy, the weightiest reason first.
    pub reasons: Vec<Reason>,
    /// The first error that led to a fallback.
    pub cause: Option<String>,
    /// From the first layer to the last.
    pub elapsed: Duration,
}

impl Verdict {
    /// Returns the verdict in one word or two: a bounded set, fit for a metric's label.
    pub fn word(&self) -> &'static str {
        let lazy = self.lazy + self.mounted;
        if self.failed > 0 {
            return "failed";
        }
        match (lazy, self.unpacked, self.present, self.left, self.refused) {
            (_, _, _, _, 1..) => "refused",
            (0, 0, 0, _, _) => "left to containerd",
            (_, _, _, 1.., _) => "partly left to containerd",
            (1.., _, _, _, _) => "lazy",
            (0, 1.., _, _, _) => "unpacked",
            (0, 0, _, _, _) => "present",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image {}: {}", self.image, self.word())?;
        let counts = [
            (self.lazy, "lazy"),
            (self.mounted, "lazy before"),
            (self.present, "present"),
            (self.unpacked, "unpacked"),
            (self.left, "left to containerd"),
            (self.refused, "refused"),
            (self.failed, "failed"),
        ];
        let counts: Vec<String> = counts
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        write!(f, " ({})", counts.join(", "))?;
        if let Some(reason) = self.reasons.first() {
            write!(f, ", because of {reason}")?;
        }
        Ok(())
    }
}

/// Called with each verdict.
pub type Observer = Arc<dyn Fn(&Verdict) + Send + Sync>;

/// Collects outcomes until a verdict can be given.
pub struct Verdicts {
    pulls: Arc<Mutex<HashMap<Key, Pull>>>,
    observer: Observer,
    tracker: TaskTracker,
    stop: CancellationToken,
}

type Key = (String, Digest);

struct Pull {
    image: String,
    outcomes: HashMap<Digest, Outcome>,
    layers: Option<usize>,
    cause: Option<String>,
    first: Instant,
    last: Instant,
    given: bool,
    /// Held by each of its layers that is being made.
    making: Arc<()>,
}

/// A layer that is being made: its pull is not over until this is dropped.
#[derive(Debug)]
pub struct Making(#[expect(dead_code, reason = "it is there to be dropped")] Arc<()>);

impl Verdicts {
    /// Returns a collector that tells `observer`, with its timers counted by `tracker` until `stop`.
    pub fn new(observer: Observer, tracker: TaskTracker, stop: CancellationToken) -> Self {
        Self { pulls: Arc::default(), observer, tracker, stop }
    }

    /// Notes that `layer` is being made until the result is dropped, which is to be after [`Self::note`].
    pub fn making(&self, layer: &LayerRequest) -> Making {
        let key = (layer.namespace.clone(), layer.manifest);
        Making(Arc::clone(&self.pull(&mut self.pulls.lock(), &key, layer).making))
    }

    /// Returns the pull that `layer` is of, which begins if it is the first of it.
    fn pull<'a>(&self, pulls: &'a mut HashMap<Key, Pull>, key: &Key, layer: &LayerRequest) -> &'a mut Pull {
        if !pulls.contains_key(key) {
            // It looks once it can have the lock.
            self.watch(key.clone());
        }
        pulls.entry(key.clone()).or_insert_with(|| Pull::of(layer))
    }

    /// Notes what became of `layer`, of an image of `layers` layers where that is known.
    pub fn note(&self, layer: &LayerRequest, outcome: Outcome, layers: Option<usize>, cause: Option<String>) {
        let key = (layer.namespace.clone(), layer.manifest);
        let now = Instant::now();
        let verdict = {
            let mut pulls = self.pulls.lock();
            let pull = self.pull(&mut pulls, &key, layer);
            if pull.given && !outcome.found() && pull.outcomes.contains_key(&layer.layer) {
                // The image was removed meanwhile, or its pull is tried again.
                *pull = Pull { making: Arc::clone(&pull.making), ..Pull::of(layer) };
            }
            pull.last = now;
            pull.layers = layers.or(pull.layers);
            if outcome.found() {
                // By another pull beside, perhaps: what this one did to it counts.
                pull.outcomes.entry(layer.layer).or_insert(outcome);
            } else {
                pull.outcomes.insert(layer.layer, outcome);
            }
            pull.cause = pull.cause.take().or(cause);
            let whole = matches!(outcome, Outcome::Left(_)) && pull.layers.is_none();
            let over = whole || outcome.ends();
            let complete = over || pull.layers.is_some_and(|layers| pull.outcomes.len() >= layers);
            let verdict = (complete && !pull.given).then(|| {
                pull.given = true;
                pull.verdict(&key.0, Some(key.1))
            });
            if outcome.ends() {
                pulls.remove(&key);
            }
            verdict
        };
        if let Some(verdict) = verdict {
            (self.observer)(&verdict);
        }
    }

    /// Gives the verdict on a pull whose labels do not name the image. Called for its lowest layer, so that it is one.
    pub fn unlabelled(&self, namespace: Option<&str>, outcome: Outcome, cause: String) {
        let now = Instant::now();
        let pull = Pull {
            image: String::new(),
            outcomes: HashMap::from([(Digest::of(b""), outcome)]),
            layers: None,
            cause: Some(cause),
            first: now,
            last: now,
            given: true,
            making: Arc::default(),
        };
        (self.observer)(&pull.verdict(namespace.unwrap_or_default(), None));
    }

    fn watch(&self, key: Key) {
        let (pulls, observer, stop) =
            (Arc::clone(&self.pulls), Arc::clone(&self.observer), self.stop.clone());
        self.tracker.spawn(async move {
            let verdict = loop {
                let Some(until) = pulls.lock().get(&key).map(Pull::lasts_until) else { return };
                tokio::select! {
                    () = tokio::time::sleep_until(until) => {}
                    () = stop.cancelled() => return,
                }
                let mut pulls = pulls.lock();
                if pulls.get(&key).is_none_or(|pull| pull.lasts_until() <= Instant::now()) {
                    break pulls
                        .remove(&key)
                        .filter(|pull| !pull.given && !pull.outcomes.is_empty())
                        .map(|pull| pull.verdict(&key.0, Some(key.1)));
                }
            };
            if let Some(verdict) = verdict {
                observer(&verdict);
            }
        });
    }
}

impl fmt::Debug for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verdicts").finish_non_exhaustive()
    }
}

impl Pull {
    /// Returns a pull of the image of `layer` that begins now.
    fn of(layer: &LayerRequest) -> Self {
        let now = Instant::now();
        Self {
            image: layer.image.to_string(),
            outcomes: HashMap::new(),
            layers: None,
            cause: None,
            first: now,
            last: now,
            given: false,
            making: Arc::default(),
        }
    }

    /// Returns when it is over if nothing more comes. One with a layer that is being made has as long again each time.
    fn lasts_until(&self) -> Instant {
        let making = Arc::strong_count(&self.making) > 1;
        if making { Instant::now() + IDLE } else { self.last + IDLE }
    }

    fn verdict(&self, namespace: &str, manifest: Option<Digest>) -> Verdict {
        let mut verdict = Verdict {
            namespace: namespace.to_owned(),
            image: self.image.clone(),
            manifest,
            lazy: 0,
            mounted: 0,
            present: 0,
            unpacked: 0,
            left: 0,
            refused: 0,
            failed: 0,
            reasons: Vec::new(),
            cause: self.cause.clone(),
            elapsed: self.last - self.first,
        };
        let mut reasons = BTreeMap::new();
        for outcome in self.outcomes.values() {
            let (count, weight) = match outcome {
                Outcome::Lazy => (&mut verdict.lazy, None),
                Outcome::Mounted => (&mut verdict.mounted, None),
                Outcome::Present => (&mut verdict.present, None),
                Outcome::Unpacked(reason) => (&mut verdict.unpacked, Some((2, reason))),
                Outcome::Left(reason) => (&mut verdict.left, Some((1, reason))),
                Outcome::Refused(reason) => (&mut verdict.refused, Some((0, reason))),
                Outcome::Failed => (&mut verdict.failed, None),
            };
            *count += 1;
            if let Some((weight, reason)) = weight {
                let least = reasons.entry(*reason).or_insert(weight);
                *least = weight.min(*least);
            }
        }
        verdict.reasons = reasons.keys().copied().collect();
        verdict.reasons.sort_by_key(|reason| reasons.get(reason).copied());
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::layer;

    fn collect() -> (Verdicts, Arc<Mutex<Vec<Verdict>>>) {
        let given = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&given);
        let observer: Observer = Arc::new(move |verdict| sink.lock().push(verdict.clone()));
        (Verdicts::new(observer, TaskTracker::new(), CancellationToken::new()), given)
    }

    fn numbered(number: u8) -> LayerRequest {
        LayerRequest { layer: Digest::of(&[number]), ..layer() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_layer_that_takes_long_belongs_to_its_pull_however_long() {
        let (verdicts, given) = collect();
        let (first, second) = (verdicts.making(&numbered(1)), verdicts.making(&numbered(2)));
        verdicts.note(&numbered(1), Outcome::Lazy, Some(3), None);
        drop(first);
        tokio::time::sleep(7 * IDLE).await;
        assert_eq!(given.lock().len(), 0, "the second layer is being made");
        verdicts.note(&numbered(2), Outcome::Unpacked(Reason::NoZtoc), Some(3), None);
        drop(second);
        tokio::time::sleep(3 * IDLE).await;
        let begun = verdicts.making(&numbered(3));
        drop(begun);
        tokio::time::sleep(3 * IDLE).await;
        let given = given.lock();
        assert_eq!(given.len(), 1, "a layer without outcome is no pull");
        let said = given[0].to_string();
        assert_eq!(said, "image reg.example/a:1: lazy (1 lazy, 1 unpacked), because of no-ztoc");
        assert!(given[0].elapsed >= 7 * IDLE);
        assert!(verdicts.pulls.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_complete_image_has_its_verdict_at_once_and_once() {
        let (verdicts, given) = collect();
        verdicts.note(&numbered(1), Outcome::Lazy, Some(3), None);
        verdicts.note(&numbered(2), Outcome::Unpacked(Reason::NoZtoc), Some(3), None);
        assert_eq!(given.lock().len(), 0);
        verdicts.note(&numbered(3), Outcome::Lazy, Some(3), None);
        verdicts.note(&numbered(3), Outcome::Mounted, Some(3), None);
        tokio::time::sleep(3 * IDLE).await;
        let given = given.lock();
        assert_eq!(given.len(), 1);
        assert_eq!(
            given[0].to_string(),
            "image reg.example/a:1: lazy (2 lazy, 1 unpacked), because of no-ztoc"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_image_without_index_is_one_verdict_however_many_layers_come() {
        let (verdicts, given) = collect();
        for number in 0..50 {
            verdicts.note(&numbered(number), Outcome::Left(Reason::NoIndex), None, Some("no index".into()));
        }
        tokio::time::sleep(3 * IDLE).await;
        assert_eq!(given.lock().len(), 1);
        assert_eq!(given.lock()[0].word(), "left to containerd");
        assert_eq!(given.lock()[0].cause.as_deref(), Some("no index"));
        verdicts.note(&numbered(0), Outcome::Left(Reason::NoIndex), None, None);
        assert_eq!(given.lock().len(), 2, "pulled again later");
    }

    #[tokio::test(start_paused = true)]
    async fn an_image_removed_and_pulled_again_at_once_has_two_verdicts() {
        let (verdicts, given) = collect();
        for outcome in [Outcome::Lazy, Outcome::Unpacked(Reason::MountFailed)] {
            for number in 0..3 {
                verdicts.note(&numbered(number), outcome, Some(3), None);
                // Another pull of it beside, which finds the layers.
                verdicts.note(&numbered(number), Outcome::Mounted, None, None);
            }
        }
        tokio::time::sleep(3 * IDLE).await;
        let words: Vec<_> = given.lock().iter().map(Verdict::word).collect();
        assert_eq!(words, ["lazy", "unpacked"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pull_that_fails_is_not_called_lazy() {
        let (verdicts, given) = collect();
        verdicts.note(&numbered(1), Outcome::Lazy, Some(3), None);
        verdicts.note(&numbered(2), Outcome::Failed, Some(3), Some("disk full".to_owned()));
        tokio::time::sleep(3 * IDLE).await;
        let given = given.lock();
        assert_eq!(given.len(), 1);
        assert_eq!(given[0].to_string(), "image reg.example/a:1: failed (1 lazy, 1 failed)");
        assert_eq!(given[0].cause.as_deref(), Some("disk full"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_pull_that_is_tried_again_has_a_verdict_each_time() {
        let (verdicts, given) = collect();
        verdicts.note(&numbered(1), Outcome::Lazy, Some(2), None);
        for _ in 0..2 {
            verdicts.note(&numbered(2), Outcome::Refused(Reason::MountFailed), Some(2), None);
        }
        verdicts.note(&numbered(1), Outcome::Mounted, None, None);
        verdicts.note(&numbered(2), Outcome::Lazy, Some(2), None);
        tokio::time::sleep(3 * IDLE).await;
        let words: Vec<_> = given.lock().iter().map(Verdict::word).collect();
        assert_eq!(words, ["refused", "refused", "lazy"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_image_is_lazy_only_with_a_layer_that_is() {
        use Outcome::{Lazy, Left, Mounted, Present, Refused, Unpacked};
        let (small, no_index) = (Unpacked(Reason::Small), Left(Reason::NoIndex));
        for (outcomes, word) in [
            (vec![Mounted, Present], "lazy"),
            (vec![Lazy, small, Present], "lazy"),
            (vec![Present, Present], "present"),
            (vec![Present, small], "unpacked"),
            (vec![no_index, no_index], "left to containerd"),
            (vec![Present, no_index], "partly left to containerd"),
            (vec![Mounted, no_index], "partly left to containerd"),
            (vec![Present, Refused(Reason::NoIndex)], "refused"),
        ] {
            let (verdicts, given) = collect();
            for (number, outcome) in (0..).zip(&outcomes) {
                verdicts.note(&numbered(number), *outcome, Some(outcomes.len()), None);
            }
            tokio::time::sleep(2 * IDLE).await;
            assert_eq!(given.lock()[0].word(), word, "{outcomes:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pull_that_stops_midway_has_its_verdict_when_idle() {
        let (verdicts, given) = collect();
        verdicts.note(&numbered(1), Outcome::Lazy, Some(3), None);
        tokio::time::sleep(IDLE / 2).await;
        verdicts.note(&numbered(2), Outcome::Left(Reason::UnpackFailed), Some(3), None);
        tokio::time::sleep(IDLE / 2 + Duration::from_secs(1)).await;
        assert_eq!(given.lock().len(), 0);
        tokio::time::sleep(IDLE).await;
        assert_eq!(given.lock()[0].word(), "partly left to containerd");
    }
}
