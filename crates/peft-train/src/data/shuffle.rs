//! Orders that depend on a seed alone, on every machine.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::{Error, Result};

/// A seeded source of orders. Fisher and Yates' method is written out, since a library may change its own between versions.
pub(super) struct Shuffler(ChaCha8Rng);

impl Shuffler {
    /// Independent for each pair of seed and stream.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Self(rng)
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            // The high half of a 64 by 64 bit product is uniform below `last + 1` but for a bias under 2^-32 for any
            // slice that fits in memory, and at most `last`, which is a usize.
            let choice = (u128::from(self.0.next_u64()) * (last as u128 + 1)) >> 64;
            items.swap(last, choice as usize);
        }
    }

    /// The numbers below `n` in random order.
    pub(super) fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        self.shuffle(&mut order);
        order
    }
}

/// Splits into training and held-out samples, the latter about `fraction` of all and each at least one. Both keep their
/// order.
///
/// # Errors
/// When there are fewer than two samples, or `fraction` is not between 0 and 1.
pub fn split<T>(samples: Vec<T>, fraction: f64, seed: u64) -> Result<(Vec<T>, Vec<T>)> {
    let count = samples.len();
    if !(fraction > 0.0 && fraction < 1.0) {
        return Err(Error::setting("fraction", format!("is {fraction}; expected a number between 0 and 1")));
    }
    if count < 2 {
        let what = format!("{count} samples cannot be split in two; give more data or hold nothing out");
        return Err(Error::setting("fraction", what));
    }
    let held_out = ((count as f64 * fraction).round() as usize).clamp(1, count - 1);
    let mut is_held_out = vec![false; count];
    // A stream of its own: epochs count up from zero.
    for index in Shuffler::new(seed, u64::MAX).permutation(count).into_iter().take(held_out) {
        is_held_out[index] = true;
    }
    let (mut train, mut held) = (Vec::with_capacity(count - held_out), Vec::with_capacity(held_out));
    for (sample, out) in samples.into_iter().zip(is_held_out) {
        if out { held.push(sample) } else { train.push(sample) }
    }
    Ok((train, held))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Sample;

    fn samples(count: u32) -> Vec<Sample> {
        (0..count).map(|i| Sample::new(vec![i, i], vec![true; 2]).unwrap()).collect()
    }

    #[test]
    fn the_order_is_pinned() {
        // These numbers are the promise that a run resumes in the same order on any machine and with any later version.
        assert_eq!(Shuffler::new(0, 0).permutation(10), [6, 1, 8, 3, 2, 9, 0, 5, 4, 7]);
        assert_eq!(Shuffler::new(7, 3).permutation(10), [4, 5, 8, 3, 9, 6, 2, 7, 0, 1]);
    }

    #[test]
    fn orders_are_uniform() {
        let mut counts = std::collections::BTreeMap::new();
        for seed in 0..6000 {
            *counts.entry(Shuffler::new(seed, 0).permutation(3)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|count| (880..1120).contains(count)), "{counts:?}");
    }

    #[test]
    fn a_split_loses_nothing_and_is_never_empty() {
        for count in 2..40 {
            for fraction in [0.001, 0.1, 0.5, 0.999] {
                let (train, held) = split(samples(count), fraction, u64::from(count)).unwrap();
                assert!(!train.is_empty() && !held.is_empty());
                let mut all: Vec<u32> = train.iter().chain(&held).map(|sample| sample.ids()[0]).collect();
                assert!(train.windows(2).all(|pair| pair[0].ids()[0] < pair[1].ids()[0]));
                all.sort_unstable();
                assert_eq!(all, (0..count).collect::<Vec<_>>());
            }
        }
        assert_eq!(split(samples(100), 0.1, 1).unwrap().1.len(), 10);
        assert_eq!(split(samples(100), 0.1, 1).unwrap(), split(samples(100), 0.1, 1).unwrap());
        assert_ne!(split(samples(100), 0.1, 1).unwrap(), split(samples(100), 0.1, 2).unwrap());
        assert!(split(samples(1), 0.1, 1).unwrap_err().to_string().contains("1 samples cannot be split"));
        assert!(split(samples(9), f64::NAN, 1).is_err());
    }
}
