//! Numbers by row and side, and their medians.

use std::collections::BTreeMap;

/// What was measured: for each row and side, one number a round.
#[derive(Debug, Default)]
pub(crate) struct Samples(BTreeMap<(&'static str, &'static str), Vec<f64>>);

impl Samples {
    pub(crate) fn add(&mut self, row: &'static str, side: &'static str, value: f64) {
        eprintln!("    {row}: {value:.3}");
        self.0.entry((row, side)).or_default().push(value);
    }

    /// Returns median, least and most.
    pub(crate) fn summary(&self, row: &'static str, side: &'static str) -> Option<[f64; 3]> {
        summary(self.0.get(&(row, side))?)
    }
}

/// Returns median, least and most.
pub(crate) fn summary(values: &[f64]) -> Option<[f64; 3]> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (first, last) = (*sorted.first()?, *sorted.last()?);
    let middle = sorted.len() / 2;
    let median = if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    };
    Some([median, first, last])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_count_is_between() {
        assert_eq!(summary(&[4.0, 1.0, 2.0, 3.0]), Some([2.5, 1.0, 4.0]));
        assert_eq!(summary(&[3.0, 1.0, 2.0]), Some([2.0, 1.0, 3.0]));
        assert_eq!(summary(&[]), None);
    }
}
