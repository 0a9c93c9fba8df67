//! Prometheus' text format, and the two kinds of numbers that are kept between scrapes.
//!
//! Written here because the names must be the reference's, whose counters have no `_total`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

/// A family's kind, as Prometheus names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only rises.
    Counter,
    /// May fall.
    Gauge,
    /// Counts of values up to bounds.
    Histogram,
}

/// A name with what it means.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// What it counts, with the unit.
    pub help: &'static str,
    /// Names of its labels.
    pub labels: &'static [&'static str],
}

/// Upper bounds of a histogram are powers of two, from one; the last bucket has none.
#[derive(Debug)]
pub struct Histogram<const BUCKETS: usize> {
    buckets: [AtomicU64; BUCKETS],
    sum: AtomicU64,
}

impl<const BUCKETS: usize> Default for Histogram<BUCKETS> {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| AtomicU64::new(0)), sum: AtomicU64::new(0) }
    }
}

impl<const BUCKETS: usize> Histogram<BUCKETS> {
    /// Counts `value`.
    pub fn observe(&self, value: u64) {
        // The smallest power of two that is not less.
        let power = u64::BITS - value.saturating_sub(1).leading_zeros();
        let bucket = usize::try_from(power).unwrap_or(BUCKETS).min(BUCKETS - 1);
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    /// Returns the counts, not cumulated, and the sum.
    pub fn read(&self) -> (Vec<u64>, u64) {
        let counts = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        (counts, self.sum.load(Ordering::Relaxed))
    }
}

/// One scrape in the making. Values given twice for the same labels are added.
#[derive(Debug, Default)]
pub struct Scrape {
    numbers: Families<u64>,
    histograms: Families<(Vec<u64>, u64)>,
}

/// Values by label values, by family.
type Families<T> = BTreeMap<&'static str, (&'static Family, BTreeMap<Vec<String>, T>)>;

impl Scrape {
    /// Adds `value` to the number of `family` with these label values.
    pub fn add(&mut self, family: &'static Family, labels: &[&str], value: u64) {
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        let (_, series) = self.numbers.entry(family.name).or_insert_with(|| (family, BTreeMap::new()));
        *series.entry(labels).or_default() += value;
    }

    /// Adds the counts of a histogram.
    pub fn add_histogram(&mut self, family: &'static Family, labels: &[&str], read: (Vec<u64>, u64)) {
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        let (_, series) = self.histograms.entry(family.name).or_insert_with(|| (family, BTreeMap::new()));
        let (counts, sum) = series.entry(labels).or_insert_with(|| (vec![0; read.0.len()], 0));
        counts.iter_mut().zip(&read.0).for_each(|(count, more)| *count += more);
        *sum += read.1;
    }

    /// Returns the text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (family, series) in self.numbers.values() {
            head(&mut text, family);
            for (labels, value) in series {
                let _ = writeln!(text, "{}{} {value}", family.name, braces(family, labels, None));
            }
        }
        for (family, series) in self.histograms.values() {
            head(&mut text, family);
            for (labels, (counts, sum)) in series {
                let mut total = 0_u64;
                for (power, count) in counts.iter().enumerate() {
                    total += count;
                    let last = power + 1 == counts.len();
                    let bound = if last { "+Inf".to_owned() } else { (1_u64 << power).to_string() };
                    let braces = braces(family, labels, Some(&bound));
                    let _ = writeln!(text, "{}_bucket{braces} {total}", family.name);
                }
                let braces = braces(family, labels, None);
                let _ = writeln!(text, "{}_sum{braces} {sum}", family.name);
                let _ = writeln!(text, "{}_count{braces} {total}", family.name);
            }
        }
        text
    }
}

fn head(text: &mut String, family: &Family) {
    let kind = match family.kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram => "histogram",
    };
    let _ = writeln!(text, "# HELP {} {}\n# TYPE {} {kind}", family.name, family.help, family.name);
}

fn braces(family: &Family, values: &[String], bound: Option<&str>) -> String {
    let labels = family.labels.iter().copied().zip(values.iter().map(String::as_str));
    let pairs: Vec<String> = labels
        .chain(bound.map(|bound| ("le", bound)))
        .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
        .collect();
    if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    static NUMBER: Family = Family { name: "n", kind: Kind::Counter, help: "numbers", labels: &["a", "b"] };
    static TIME: Family = Family { name: "t", kind: Kind::Histogram, help: "times", labels: &["a"] };

    #[test]
    fn the_text_is_prometheus() {
        let mut scrape = Scrape::default();
        scrape.add(&NUMBER, &["x", "q\"\\"], 1);
        scrape.add(&NUMBER, &["x", "q\"\\"], 2);
        let histogram = Histogram::<4>::default();
        [0, 1, 2, 3, 4, 5, 1000].iter().for_each(|value| histogram.observe(*value));
        scrape.add_histogram(&TIME, &["x"], histogram.read());
        assert_eq!(
            scrape.text(),
            "# HELP n numbers\n# TYPE n counter\nn{a=\"x\",b=\"q\\\"\\\\\"} 3\n\
             # HELP t times\n# TYPE t histogram\nt_bucket{a=\"x\",le=\"1\"} 2\nt_bucket{a=\"x\",le=\"2\"} 3\n\
             t_bucket{a=\"x\",le=\"4\"} 5\nt_bucket{a=\"x\",le=\"+Inf\"} 7\nt_sum{a=\"x\"} 1015\nt_count{a=\"x\"} 7\n"
        );
    }
}
