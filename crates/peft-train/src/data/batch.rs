//! Batches in a seeded order, resumable from two numbers.

use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::encode::Sample;
use super::plan::{Plan, bucketed, packed};
use super::shuffle::Shuffler;
use crate::{Error, Result};

/// How samples become batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Rows of a batch; the last of an epoch may have fewer.
    pub batch_size: usize,
    /// Put several samples into one row, up to this many tokens, instead of padding each.
    pub pack: Option<usize>,
    /// Decides the order, together with the epoch.
    pub seed: u64,
    /// The id that fills up short rows.
    pub pad: u32,
}

/// Where training stands: all that is needed to resume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// From zero.
    pub epoch: usize,
    /// The next batch of that epoch, from zero.
    pub batch: usize,
}

/// What batches are made of.
pub trait Example {
    /// Several of them.
    type Batch;

    /// How much of a row it takes; examples that take alike meet in a batch.
    fn length(&self) -> usize;

    /// A batch of rows, each with one example, or with several where they are [packed](BatchOptions::pack).
    fn batch(rows: &[Vec<&Self>], options: &BatchOptions) -> Self::Batch;
}

/// An endless source of batches, epoch after epoch. Each epoch has every sample exactly once, and all have equally many
/// batches. The order depends on seed, epoch and samples alone.
#[derive(Clone, Debug)]
pub struct Batches<E = Sample> {
    samples: Vec<E>,
    options: BatchOptions,
    position: Position,
    plan: Plan,
}

impl<E: Example> Batches<E> {
    /// From the first batch of epoch 0.
    ///
    /// # Errors
    /// When there is no sample, `batch_size` is 0 or a sample is longer than a packed row.
    pub fn new(samples: Vec<E>, options: BatchOptions) -> Result<Self> {
        if samples.is_empty() {
            return Err(Error::setting("samples", "there are none; give data with something to learn"));
        }
        if options.batch_size == 0 {
            return Err(Error::setting("batch_size", "is 0; expected at least 1"));
        }
        let longest = samples.iter().map(E::length).max().unwrap_or(0);
        if let Some(capacity) = options.pack.filter(|&capacity| capacity < longest) {
            let what =
                format!("a packed row holds {capacity} tokens, but a sample has {longest}; use the same max_len");
            return Err(Error::setting("pack", what));
        }
        let plan = plan(&samples, &options, 0);
        Ok(Self { samples, options, position: Position::default(), plan })
    }

    /// Batches in an epoch.
    pub fn per_epoch(&self) -> usize {
        self.plan.len()
    }

    /// The samples, in the order given.
    pub fn samples(&self) -> &[E] {
        &self.samples
    }

    /// The batch that comes next.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Continues from there.
    ///
    /// # Errors
    /// When an epoch has no such batch: the position belongs to other data or options.
    pub fn seek(&mut self, position: Position) -> Result<()> {
        if position.batch >= self.per_epoch() {
            let what = format!(
                "batch {} of an epoch that has {}; resume with the data and options of the first run",
                position.batch,
                self.per_epoch()
            );
            return Err(Error::setting("position", what));
        }
        if position.epoch != self.position.epoch {
            self.plan = plan(&self.samples, &self.options, position.epoch);
        }
        self.position = position;
        Ok(())
    }

    /// The next batch; after the last of an epoch comes the first of the next.
    pub fn next_batch(&mut self) -> E::Batch {
        let batch = self.batch(&self.plan[self.position.batch]);
        self.position.batch += 1;
        if self.position.batch == self.plan.len() {
            self.position = Position { epoch: self.position.epoch + 1, batch: 0 };
            self.plan = plan(&self.samples, &self.options, self.position.epoch);
        }
        batch
    }

    /// All batches of the current epoch from its start, as an evaluation wants them. The position does not move.
    pub fn epoch(&self) -> impl Iterator<Item = E::Batch> {
        self.plan.iter().map(|rows| self.batch(rows))
    }

    fn batch(&self, rows: &[Vec<usize>]) -> E::Batch {
        let rows: Vec<Vec<&E>> =
            rows.iter().map(|row| row.iter().map(|&sample| &self.samples[sample]).collect()).collect();
        E::batch(&rows, &self.options)
    }
}

fn plan<E: Example>(samples: &[E], options: &BatchOptions, epoch: usize) -> Plan {
    let lengths: Vec<usize> = samples.iter().map(E::length).collect();
    let mut shuffler = Shuffler::new(options.seed, epoch as u64);
    match options.pack {
        Some(capacity) => packed(&lengths, options.batch_size, capacity, &mut shuffler),
        None => bucketed(&lengths, options.batch_size, &mut shuffler),
    }
}

/// Rows of equal length, filled up at their ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Tokens.
    pub ids: Vec<Vec<u32>>,
    /// Which tokens are learnt; never the first of a sample, never what fills up.
    pub mask: Vec<Vec<bool>>,
    /// When packed: the sample of its row that a token belongs to, from 1, and 0 for what fills up. A token may attend
    /// only to its own segment.
    pub segments: Option<Vec<Vec<u32>>>,
    /// When packed: a token's place in its own sample, from 0, and 0 for what fills up.
    pub positions: Option<Vec<Vec<u32>>>,
    /// The task of each row; of several samples in one, that of the first.
    pub tasks: Vec<usize>,
    /// What fills up.
    pub pad: u32,
}

impl Example for Sample {
    type Batch = Batch;

    fn length(&self) -> usize {
        self.ids().len()
    }

    fn batch(rows: &[Vec<&Self>], options: &BatchOptions) -> Batch {
        Batch::new(rows, options.pad, options.pack.is_some())
    }
}

impl Batch {
    fn new(rows: &[Vec<&Sample>], pad: u32, packed: bool) -> Self {
        let width = rows.iter().map(|row| row.iter().map(|s| s.ids().len()).sum()).max().unwrap_or(0);
        let build = |of: &dyn Fn(usize, &Sample) -> Vec<u32>, fill: u32| -> Vec<Vec<u32>> {
            let row = |row: &Vec<&Sample>| {
                let mut values: Vec<u32> = row.iter().enumerate().flat_map(|(i, sample)| of(i, sample)).collect();
                values.resize(width, fill);
                values
            };
            rows.iter().map(row).collect()
        };
        let mask = |row: &Vec<&Sample>| {
            let mut mask: Vec<bool> = row.iter().flat_map(|sample| sample.mask()).copied().collect();
            mask.resize(width, false);
            mask
        };
        Self {
            ids: build(&|_, sample| sample.ids().to_vec(), pad),
            mask: rows.iter().map(mask).collect(),
            segments: packed.then(|| build(&|index, sample| vec![index as u32 + 1; sample.ids().len()], 0)),
            positions: packed.then(|| build(&|_, sample| (0..sample.ids().len() as u32).collect(), 0)),
            tasks: rows.iter().map(|row| row.first().map_or(0, |sample| sample.task())).collect(),
            pad,
        }
    }

    /// How many tokens are learnt: what a loss over several batches is averaged over.
    pub fn trained(&self) -> usize {
        self.mask.iter().flatten().filter(|&&learnt| learnt).count()
    }

    /// The batch on a device, for next-token prediction. With rows of `n + 1` tokens all tensors are `[rows, n]`: inputs
    /// are tokens `0..n`, targets tokens `1..=n`.
    pub fn tensors(&self, device: &Device) -> BatchTensors {
        let length = self.ids.first().map_or(0, |row| row.len().saturating_sub(1));
        let shape = [self.ids.len(), length];
        let ints = |rows: &[Vec<u32>], skip: usize| {
            // Token ids are far below 2^31.
            let values: Vec<i32> = rows.iter().flat_map(|row| &row[skip..skip + length]).map(|&id| id as i32).collect();
            Tensor::<2, Int>::from_data(TensorData::new(values, shape), device)
        };
        let learnt = self.mask.iter().flat_map(|row| &row[1..=length]);
        let weights: Vec<f32> = learnt.map(|&learnt| f32::from(u8::from(learnt))).collect();
        BatchTensors {
            ids: ints(&self.ids, 0),
            targets: ints(&self.ids, 1),
            weights: Tensor::from_data(TensorData::new(weights, shape), device),
            segments: self.segments.as_ref().map(|rows| ints(rows, 0)),
            positions: self.positions.as_ref().map(|rows| ints(rows, 0)),
        }
    }
}

/// A batch on a device; all `[rows, length]`.
#[derive(Clone, Debug)]
pub struct BatchTensors {
    /// Input tokens.
    pub ids: Tensor<2, Int>,
    /// The token after each input.
    pub targets: Tensor<2, Int>,
    /// 1 where the target is learnt, else 0.
    pub weights: Tensor<2>,
    /// See [`Batch::segments`].
    pub segments: Option<Tensor<2, Int>>,
    /// See [`Batch::positions`].
    pub positions: Option<Tensor<2, Int>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(count: u32) -> Vec<Sample> {
        // Token 0 never occurs, so that it can mark what fills up.
        let sample = |i: u32| {
            let length = 2 + i * 7 % 23;
            Sample::new(
                (0..length).map(|t| 1 + i * 100 + t).collect(),
                (0..length).map(|t| t == 1 || !(t + i).is_multiple_of(3)).collect(),
            )
        };
        (0..count).map(|i| sample(i).unwrap()).collect()
    }

    fn options(pack: Option<usize>) -> BatchOptions {
        BatchOptions { batch_size: 4, pack, seed: 11, pad: 0 }
    }

    #[test]
    fn no_token_and_no_mask_is_lost() {
        for pack in [None, Some(25), Some(64)] {
            let samples = samples(50);
            let trained: usize = samples.iter().map(Sample::trained).sum();
            let mut expected: Vec<u32> = samples.iter().flat_map(|sample| sample.ids().to_vec()).collect();
            expected.sort_unstable();
            let mut batches = Batches::new(samples, options(pack)).unwrap();
            for epoch in 0..3 {
                assert_eq!(batches.position(), Position { epoch, batch: 0 });
                let all: Vec<Batch> = (0..batches.per_epoch()).map(|_| batches.next_batch()).collect();
                let mut ids: Vec<u32> = all.iter().flat_map(|batch| batch.ids.concat()).filter(|&id| id != 0).collect();
                ids.sort_unstable();
                assert_eq!(ids, expected);
                assert_eq!(all.iter().map(Batch::trained).sum::<usize>(), trained);
            }
        }
    }

    #[test]
    fn packed_rows_keep_samples_apart() {
        let batches = Batches::new(samples(50), options(Some(64))).unwrap();
        for batch in batches.epoch() {
            let (segments, positions) = (batch.segments.unwrap(), batch.positions.unwrap());
            for (row, ids) in batch.ids.iter().enumerate() {
                for (place, &id) in ids.iter().enumerate() {
                    let (segment, position) = (segments[row][place], positions[row][place]);
                    assert_eq!(id == 0, segment == 0);
                    if id != 0 {
                        assert_eq!(position, (id - 1) % 100);
                    }
                    if position == 0 {
                        assert!(!batch.mask[row][place], "nothing predicts a sample's first token");
                    }
                    let same =
                        place > 0 && ids[place - 1] != 0 && id != 0 && (ids[place - 1] - 1) / 100 == (id - 1) / 100;
                    assert_eq!(same, place > 0 && id != 0 && segments[row][place - 1] == segment);
                }
            }
        }
    }

    #[test]
    fn resumes_anywhere() {
        for pack in [None, Some(64)] {
            let mut whole = Batches::new(samples(30), options(pack)).unwrap();
            for _ in 0..3 * whole.per_epoch() {
                let mut resumed = Batches::new(samples(30), options(pack)).unwrap();
                resumed.seek(whole.position()).unwrap();
                assert_eq!(resumed.next_batch(), whole.next_batch());
                assert_eq!(resumed.position(), whole.position());
            }
        }
        let mut batches = Batches::new(samples(30), options(None)).unwrap();
        let error = batches.seek(Position { epoch: 1, batch: 8 }).unwrap_err().to_string();
        assert!(error.contains("batch 8 of an epoch that has 8"), "{error}");
    }

    #[test]
    fn what_cannot_work_is_refused() {
        assert!(Batches::new(Vec::<Sample>::new(), options(None)).is_err());
        assert!(Batches::new(samples(3), BatchOptions { batch_size: 0, ..options(None) }).is_err());
        let error = Batches::new(samples(50), options(Some(10))).unwrap_err().to_string();
        assert!(error.contains("holds 10 tokens, but a sample has 24"), "{error}");
    }

    #[test]
    fn tensors_are_shifted_by_one() {
        let sample = |ids: &[u32], mask: &[bool]| Sample::new(ids.to_vec(), mask.to_vec()).unwrap();
        let (a, b) = (sample(&[1, 2, 3], &[false, false, true]), sample(&[4, 5], &[false, true]));
        let device = Device::default();
        let padded = Batch::new(&[vec![&a], vec![&b]], 9, false).tensors(&device);
        let ints = |tensor: Tensor<2, Int>| tensor.into_data().convert::<i64>().try_to_vec::<i64>().unwrap();
        assert_eq!(padded.ids.dims(), [2, 2]);
        assert_eq!(ints(padded.ids), [1, 2, 4, 5]);
        assert_eq!(ints(padded.targets), [2, 3, 5, 9]);
        assert_eq!(padded.weights.into_data().try_to_vec::<f32>().unwrap(), [0.0, 1.0, 1.0, 0.0]);
        assert!(padded.segments.is_none() && padded.positions.is_none());
        let packed = Batch::new(&[vec![&a, &b]], 9, true).tensors(&device);
        assert_eq!(ints(packed.targets), [2, 3, 4, 5]);
        assert_eq!(packed.weights.into_data().try_to_vec::<f32>().unwrap(), [0.0, 1.0, 0.0, 1.0]);
        assert_eq!(ints(packed.segments.unwrap()), [1, 1, 1, 2]);
        assert_eq!(ints(packed.positions.unwrap()), [0, 1, 2, 0]);
    }
}
