//! Measures of answers, as scikit-learn and `scipy` define them.
//!
//! - precision `hits / found`, recall `hits / support`, `F1 = 2·hits / (found + support)`; 0 where nothing is divided
//! - macro: the mean over labels; micro: of the sums over labels
//! - Matthews, for any number of labels (Gorodkin 2004): `(c·s − Σ p·t) / √((s² − Σ p²)(s² − Σ t²))` with `s` answers, `c` right ones,
//!   `p` and `t` how often a label was found and was true
//! - Pearson: covariance over the product of standard deviations; Spearman: that of the ranks, equal values sharing the mean of theirs

use serde::Serialize;

/// How one label fared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Found where it is true.
    pub hits: usize,
    /// Found.
    pub found: usize,
    /// True.
    pub support: usize,
}

fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

impl Tally {
    /// Counts one answer.
    pub fn count(&mut self, found: bool, truth: bool) {
        self.hits += usize::from(found && truth);
        self.found += usize::from(found);
        self.support += usize::from(truth);
    }

    /// Part of what was found that is true.
    pub fn precision(&self) -> f64 {
        ratio(self.hits, self.found)
    }

    /// Part of what is true that was found.
    pub fn recall(&self) -> f64 {
        ratio(self.hits, self.support)
    }

    /// Harmonic mean of the two.
    pub fn f1(&self) -> f64 {
        ratio(2 * self.hits, self.found + self.support)
    }
}

/// Mean of the F1 of labels.
pub fn f1_macro<'a>(tallies: impl IntoIterator<Item = &'a Tally>) -> f64 {
    let (sum, count) = tallies.into_iter().fold((0.0, 0_usize), |(sum, count), tally| (sum + tally.f1(), count + 1));
    sum / count.max(1) as f64
}

/// F1 of all labels together.
pub fn f1_micro<'a>(tallies: impl IntoIterator<Item = &'a Tally>) -> f64 {
    let sum = tallies.into_iter().fold(Tally::default(), |sum, tally| Tally {
        hits: sum.hits + tally.hits,
        found: sum.found + tally.found,
        support: sum.support + tally.support,
    });
    sum.f1()
}

/// Which label was found how often for which.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Confusion {
    labels: Vec<String>,
    /// A row for each true label, a column for each that was found.
    counts: Vec<Vec<usize>>,
}

impl Confusion {
    /// No answers yet.
    pub fn new(labels: &[String]) -> Self {
        Self { labels: labels.to_vec(), counts: vec![vec![0; labels.len()]; labels.len()] }
    }

    /// Counts one answer, by the numbers of labels.
    pub fn count(&mut self, found: usize, truth: usize) {
        self.counts[truth][found] += 1;
    }

    /// Names of the labels.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// A row for each true label, a column for each that was found.
    pub fn counts(&self) -> &[Vec<usize>] {
        &self.counts
    }

    fn total(&self) -> usize {
        self.counts.iter().flatten().sum()
    }

    fn hits(&self) -> usize {
        (0..self.labels.len()).map(|at| self.counts[at][at]).sum()
    }

    /// How each label fared.
    pub fn tallies(&self) -> Vec<Tally> {
        let tally = |at: usize| Tally {
            hits: self.counts[at][at],
            found: self.counts.iter().map(|row| row[at]).sum(),
            support: self.counts[at].iter().sum(),
        };
        (0..self.labels.len()).map(tally).collect()
    }

    /// Part of the answers that are right.
    pub fn accuracy(&self) -> f64 {
        ratio(self.hits(), self.total())
    }

    /// Mean F1 of the labels that occur in the data or in the answers.
    pub fn f1_macro(&self) -> f64 {
        f1_macro(self.tallies().iter().filter(|tally| tally.found + tally.support > 0))
    }

    /// Matthews' correlation of what was found with what is true; 0 where one of them never changes.
    pub fn matthews(&self) -> f64 {
        let sum = |of: fn(&Tally) -> f64| self.tallies().iter().map(of).sum::<f64>();
        let square = (self.total() as f64).powi(2);
        let both = sum(|t| t.found as f64 * t.support as f64);
        let (found, truth) = (sum(|t| (t.found as f64).powi(2)), sum(|t| (t.support as f64).powi(2)));
        let spread = ((square - found) * (square - truth)).sqrt();
        if spread > 0.0 { ((self.hits() * self.total()) as f64 - both) / spread } else { 0.0 }
    }
}

/// Pearson's correlation; 0 where one side never changes.
pub fn pearson(a: &[f64], b: &[f64]) -> f64 {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let sum = |of: &dyn Fn(f64, f64) -> f64| a.iter().zip(b).map(|(a, b)| of(a - mean_a, b - mean_b)).sum::<f64>();
    let spread = (sum(&|a, _| a * a) * sum(&|_, b| b * b)).sqrt();
    if spread > 0.0 { sum(&|a, b| a * b) / spread } else { 0.0 }
}

/// Spearman's correlation; 0 where one side never changes.
pub fn spearman(a: &[f64], b: &[f64]) -> f64 {
    pearson(&ranks(a), &ranks(b))
}

/// Ranks from 1; equal values share the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    for equal in order.chunk_by(|a, b| values[*a] == values[*b]) {
        let rank = start as f64 + (equal.len() + 1) as f64 / 2.0;
        equal.iter().for_each(|at| ranks[*at] = rank);
        start += equal.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found} {expected}");
    }

    fn confusion(labels: usize, truth: &[usize], found: &[usize]) -> Confusion {
        let names: Vec<String> = (0..labels).map(|at| at.to_string()).collect();
        let mut confusion = Confusion::new(&names);
        truth.iter().zip(found).for_each(|(truth, found)| confusion.count(*found, *truth));
        confusion
    }

    // What scikit-learn 1.7.2 and SciPy 1.17.1 give for the same numbers.

    #[test]
    fn two_labels_equal_scikit_learn() {
        let two = confusion(2, &[0, 1, 1, 0, 1, 1, 0, 0, 1, 1], &[0, 1, 0, 0, 1, 1, 1, 0, 0, 1]);
        let positive = two.tallies()[1];
        near(two.accuracy(), 0.7);
        near(positive.precision(), 0.8);
        near(positive.recall(), 0.666_666_666_666_666_6);
        near(positive.f1(), 0.727_272_727_272_727_3);
        near(two.f1_macro(), 0.696_969_696_969_697);
        near(two.matthews(), 0.408_248_290_463_863);
    }

    #[test]
    fn three_labels_equal_scikit_learn() {
        let truth = [0, 1, 2, 2, 1, 0, 2, 1, 0, 2, 2, 1, 2];
        let three = confusion(3, &truth, &[0, 2, 2, 1, 1, 0, 2, 1, 0, 2, 0, 0, 2]);
        assert_eq!(three.counts(), [vec![3, 0, 0], vec![1, 2, 1], vec![1, 1, 4]]);
        near(three.accuracy(), 0.692_307_692_307_692_3);
        near(three.f1_macro(), 0.682_900_432_900_432_9);
        near(f1_micro(&three.tallies()), 0.692_307_692_307_692_3);
        near(three.matthews(), 0.550_481_882_563_180_3);
    }

    #[test]
    fn a_label_that_never_occurs_counts_for_nothing() {
        let four = confusion(4, &[0, 1, 1, 0, 3], &[0, 1, 0, 0, 3]);
        near(four.f1_macro(), 0.822_222_222_222_222_2);
        near(four.matthews(), 0.734_968_415_259_167_1);
        near(confusion(2, &[1, 1], &[1, 1]).matthews(), 0.0);
        near(confusion(2, &[], &[]).accuracy(), 0.0);
    }

    #[test]
    fn any_number_of_labels_equal_scikit_learn() {
        let truth = [[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1]];
        let found = [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1]];
        let mut tallies = [Tally::default(); 3];
        for (truth, found) in truth.iter().zip(found) {
            (0..3).for_each(|at| tallies[at].count(found[at] == 1, truth[at] == 1));
        }
        near(f1_macro(&tallies), 0.722_222_222_222_222_2);
        near(f1_micro(&tallies), 0.769_230_769_230_769_2);
    }

    #[test]
    fn correlations_equal_scipy() {
        let (a, b) = ([0.5, 1.5, 3.0, 2.0, 4.5, 4.5, 1.0], [0.7, 1.0, 2.5, 2.5, 4.0, 3.0, 1.5]);
        near(pearson(&a, &b), 0.917_406_666_360_767_3);
        near(spearman(&a, &b), 0.945_454_545_454_545_4);
        near(pearson(&a, &[2.0; 7]), 0.0);
    }
}
