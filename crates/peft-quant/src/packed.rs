//! Tensors of codes with a scale for each block: `w ≈ code[q]·absmax`. Dettmers et al. 2023, arXiv:2305.14314, section 3.
//!
//! For NF4 and FP4 the arithmetic follows bitsandbytes on the CPU, so that the same weights give the same bytes: a whole block is multiplied by the
//! reciprocal of its scale, the last short one is divided by it.

use std::borrow::Cow;

use rayon::prelude::*;

use crate::code::Nearest;
use crate::mean::mean;
use crate::{Code, dynamic_map};

/// Blocks of statistics that share a second scale.
pub(crate) const NESTED_BLOCK: usize = 256;

/// Block sizes that bitsandbytes knows.
const BLOCKS: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// The smallest scale, so that a block of zeros is not divided by zero.
const SMALLEST: f32 = 1e-38;

/// Why values cannot be packed, or a packed tensor is none.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A block size that the format does not have.
    #[error("block size: expected {expected}, found {found}")]
    Block {
        /// What the code allows.
        expected: &'static str,
        /// What was asked for.
        found: usize,
    },
    /// Statistics that the code has not.
    #[error("{0:?} has other block statistics")]
    Statistics(Code),
    /// A checkpoint lacks a tensor.
    #[error("{name} is missing")]
    Missing {
        /// Its name.
        name: String,
    },
    /// A packed weight of a checkpoint that makes no sense.
    #[error("{name}: {what}")]
    Malformed {
        /// Its name.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// A number that the code has no value for.
    #[error("the number {0} stands for no value")]
    Number(u8),
    /// A part that does not fit the rest.
    #[error("{what}: expected {expected}, found {found}")]
    Length {
        /// Which part.
        what: &'static str,
        /// How many it must have.
        expected: usize,
        /// How many it has.
        found: usize,
    },
    /// A side of a matrix, a rank or a count of which there must be one at least.
    #[error("{what}: expected at least 1, found 0")]
    Zero {
        /// Which.
        what: &'static str,
    },
    /// What packing leaves over of a weight has no singular values in f32.
    #[error("what packing leaves over cannot be decomposed; its values are too large for f32")]
    Decomposition,
    /// A weight, or the scale of a block, that is no number.
    #[error("value {index} is {value}; weights and their scales must be finite")]
    NotFinite {
        /// Its place.
        index: usize,
        /// The value.
        value: f32,
    },
}

/// The scale of each block.
#[derive(Clone, Debug, PartialEq)]
pub enum Statistics {
    /// Largest magnitudes in f32.
    Plain(Vec<f32>),
    /// Double quantisation: `absmax = map[codes]·scales + offset`, with [`dynamic_map`] and a scale for every 256 blocks.
    Nested {
        /// One for each block.
        codes: Vec<u8>,
        /// One for each 256 blocks.
        scales: Vec<f32>,
        /// The mean of the largest magnitudes.
        offset: f32,
    },
    /// For [`Code::Int4Affine`]: `w ≈ code[q]·range + low`.
    Affine {
        /// Distance from the smallest to the largest value of each block.
        ranges: Vec<f32>,
        /// The smallest value of each block.
        lows: Vec<f32>,
    },
}

/// Packed values in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Packed {
    code: Code,
    block: usize,
    len: usize,
    codes: Vec<u8>,
    statistics: Statistics,
}

impl Packed {
    /// Packs `values` in blocks of `block`; `nested` packs the block statistics as well.
    ///
    /// `block` is a power of two in `32..=4096`; for [`Code::Int8`] it may also be any other, for instance the length of a row.
    ///
    /// # Errors
    /// When `block` is none of these, a value is not finite, or `nested` is asked of [`Code::Int4Affine`].
    pub fn pack(values: &[f32], code: Code, block: usize, nested: bool) -> Result<Self, Error> {
        check_block(code, block)?;
        check_finite(values)?;
        if code == Code::Int4Affine && nested {
            return Err(Error::Statistics(code));
        }
        let nearest = code.nearest();
        let numbers = |value: f32| nearest.code(value);
        // Blocks in whole bytes, so that threads can share the work.
        let mut codes = vec![0; values.len().div_ceil(8 / code.bits())];
        let blocks: Vec<(f32, f32)> = values
            .par_chunks(block)
            .zip(codes.par_chunks_mut(block * code.bits() / 8))
            .map(|(values, codes)| {
                if code == Code::Int4Affine {
                    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
                    let range = values.iter().copied().fold(f32::NEG_INFINITY, f32::max) - low;
                    fill(codes, code, values.iter().map(|value| numbers((value - low) / range.max(SMALLEST))));
                    return (range, low);
                }
                let largest = largest(values);
                let scale = largest.max(SMALLEST);
                let whole = values.len() == block;
                let reciprocal = 1.0 / scale;
                let scaled = |value: &f32| if whole { value * reciprocal } else { value / scale };
                fill(codes, code, values.iter().map(|value| numbers(scaled(value).clamp(-1.0, 1.0))));
                (if whole { largest } else { scale }, 0.0)
            })
            .collect();
        let (scales, lows): (Vec<f32>, Vec<f32>) = blocks.into_iter().unzip();
        // The distance of two finite values need not be finite.
        check_finite(&scales)?;
        let statistics = match code {
            Code::Int4Affine => Statistics::Affine { ranges: scales, lows },
            _ if nested => nest(&scales),
            _ => Statistics::Plain(scales),
        };
        Ok(Self { code, block, len: values.len(), codes, statistics })
    }

    /// A packed tensor of `len` values out of its parts, for instance those of a file.
    ///
    /// # Errors
    /// When a part has not the length that `len` and `block` ask for, or a number has no value.
    pub fn from_parts(
        code: Code,
        block: usize,
        len: usize,
        codes: Vec<u8>,
        statistics: Statistics,
    ) -> Result<Self, Error> {
        check_block(code, block)?;
        let blocks = len.div_ceil(block);
        let length = |what, expected, found| {
            if expected == found { Ok(()) } else { Err(Error::Length { what, expected, found }) }
        };
        length("bytes of codes", len.div_ceil(8 / code.bits()), codes.len())?;
        match &statistics {
            Statistics::Affine { ranges, lows } if code == Code::Int4Affine => {
                length("ranges", blocks, ranges.len())?;
                length("smallest values", blocks, lows.len())?;
            }
            Statistics::Plain(absmax) if code != Code::Int4Affine => length("block scales", blocks, absmax.len())?,
            Statistics::Nested { codes, scales, .. } if code != Code::Int4Affine => {
                length("packed block scales", blocks, codes.len())?;
                length("scales of block scales", blocks.div_ceil(NESTED_BLOCK), scales.len())?;
            }
            _ => return Err(Error::Statistics(code)),
        }
        match &statistics {
            Statistics::Plain(scales) => check_finite(scales)?,
            Statistics::Affine { ranges, lows } => {
                [ranges, lows].into_iter().try_for_each(|values| check_finite(values))?;
            }
            Statistics::Nested { scales, offset, .. } => {
                check_finite(scales).and_then(|()| check_finite(&[*offset]))?;
            }
        }
        if let Some(number) =
            codes.iter().find(|number| code == Code::Int8 && usize::from(**number) >= code.values().len())
        {
            return Err(Error::Number(*number));
        }
        Ok(Self { code, block, len, codes, statistics })
    }

    /// The values.
    pub fn unpack(&self) -> Vec<f32> {
        let values = self.code.values();
        let (scales, lows) = self.statistics.scales_and_lows();
        let value = |(at, number): (usize, u8)| {
            let product = values[usize::from(number)] * scales[at / self.block];
            lows.map_or(product, |lows| product + lows[at / self.block])
        };
        if self.code.bits() == 8 {
            self.codes.iter().copied().enumerate().map(value).collect()
        } else {
            let each = self.codes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
            each.take(self.len).enumerate().map(value).collect()
        }
    }

    /// What the numbers stand for.
    pub fn code(&self) -> Code {
        self.code
    }

    /// Values of a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The numbers: of 4 bits, two to a byte, the first in the upper half.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The scale of each block.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// The numbers and the scales.
    pub(crate) fn into_parts(self) -> (Vec<u8>, Statistics) {
        (self.codes, self.statistics)
    }

    /// Bytes that the tensor takes: codes and statistics.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.statistics.bytes()
    }
}

impl Statistics {
    /// The scale of each block in f32, and its smallest value where that is not the negative scale.
    pub fn scales_and_lows(&self) -> (Cow<'_, [f32]>, Option<&[f32]>) {
        match self {
            Self::Plain(absmax) => (Cow::Borrowed(absmax), None),
            Self::Affine { ranges, lows } => (Cow::Borrowed(ranges), Some(lows)),
            Self::Nested { codes, scales, offset } => {
                let value =
                    |(at, code): (usize, &u8)| dynamic_map()[usize::from(*code)] * scales[at / NESTED_BLOCK] + offset;
                (codes.iter().enumerate().map(value).collect(), None)
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Plain(absmax) => 4 * absmax.len(),
            Self::Affine { ranges, lows } => 4 * (ranges.len() + lows.len()),
            Self::Nested { codes, scales, .. } => codes.len() + 4 * scales.len() + 4,
        }
    }
}

/// Numbers into bytes: of 4 bits two, the first in the upper half; a last one alone goes with the number of zero.
fn fill(bytes: &mut [u8], code: Code, mut numbers: impl Iterator<Item = u8>) {
    let eight = code.bits() == 8;
    for byte in bytes {
        let Some(first) = numbers.next() else { return };
        *byte = if eight { first } else { first << 4 | numbers.next().unwrap_or_else(|| code.nearest().code(0.0)) };
    }
}

fn check_block(code: Code, block: usize) -> Result<(), Error> {
    let expected = match code {
        _ if BLOCKS.contains(&block) => return Ok(()),
        Code::Int8 if block > 0 => return Ok(()),
        Code::Int8 => "a positive number",
        _ => "a power of two in 32..=4096",
    };
    Err(Error::Block { expected, found: block })
}

fn check_finite(values: &[f32]) -> Result<(), Error> {
    match values.iter().enumerate().find(|(_, value)| !value.is_finite()) {
        Some((index, value)) => Err(Error::NotFinite { index, value: *value }),
        None => Ok(()),
    }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

/// Packs block statistics: their mean is taken off, the rest goes through the 8-bit map.
fn nest(absmax: &[f32]) -> Statistics {
    let nearest = Nearest::of(dynamic_map());
    let offset = if absmax.is_empty() { 0.0 } else { mean(absmax) };
    let (mut codes, mut scales) = (Vec::with_capacity(absmax.len()), Vec::new());
    for block in absmax.chunks(NESTED_BLOCK) {
        let rest: Vec<f32> = block.iter().map(|value| value - offset).collect();
        let largest = largest(&rest);
        let reciprocal = 1.0 / largest.max(SMALLEST);
        scales.push(largest);
        codes.extend(rest.iter().map(|value| nearest.code(value * reciprocal)));
    }
    Statistics::Nested { codes, scales, offset }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use rand_distr::StandardNormal;

    use super::*;

    fn normal(count: usize) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        (0..count).map(|_| rng.sample(StandardNormal)).collect()
    }

    /// Mean absolute errors on normal values that the tests of bitsandbytes publish, for blocks of 32 to 4096.
    #[test]
    fn errors_are_those_that_bitsandbytes_publishes() {
        let published = [
            (Code::Nf4, [0.067_746, 0.072_798, 0.076_831, 0.080_337, 0.083_547, 0.086_610, 0.089_592, 0.092_547]),
            (Code::Fp4, [0.088_925, 0.096_543, 0.102_969, 0.108_684, 0.114_115, 0.119_333, 0.124_556, 0.129_536]),
        ];
        let values = normal(1 << 20);
        for (code, errors) in published {
            for (block, expected) in BLOCKS.into_iter().zip(errors) {
                let unpacked = Packed::pack(&values, code, block, false).unwrap().unpack();
                let sum: f64 = values.iter().zip(unpacked).map(|(a, b)| f64::from((a - b).abs())).sum();
                let error = sum / values.len() as f64;
                // Seven standard deviations: that of blocks of 64 is published, and larger blocks are fewer.
                let bound = 7.0 * 7.4e-5 * (block as f64 / 64.0).sqrt();
                assert!((error - expected).abs() < bound, "{code:?} {block}: {error} instead of {expected}");
            }
        }
    }

    #[test]
    fn double_quantisation_takes_4_127_bits() {
        let packed = Packed::pack(&normal(1 << 20), Code::Nf4, 64, true).unwrap();
        assert_eq!(packed.bytes(), 524_288 + 16_384 + 256 + 4);
        assert!(8.0 * packed.bytes() as f64 / packed.len() as f64 - 4.127 < 1e-3);
    }

    #[test]
    fn zeros_stay_zeros_and_what_cannot_be_packed_is_refused() {
        for nested in [false, true] {
            assert_eq!(Packed::pack(&[0.0; 75], Code::Nf4, 64, nested).unwrap().unpack(), [0.0; 75]);
        }
        assert!(Packed::pack(&[], Code::Nf4, 64, true).unwrap().unpack().is_empty());
        assert_eq!(
            Packed::pack(&[0.0], Code::Nf4, 48, false),
            Err(Error::Block { expected: "a power of two in 32..=4096", found: 48 })
        );
        let error = Packed::pack(&[0.0, f32::INFINITY], Code::Nf4, 64, false).unwrap_err().to_string();
        assert_eq!(error, "value 1 is inf; weights and their scales must be finite");
    }

    /// No value is further off than half a step of its block; an affine step is the smaller one where a block has one sign.
    #[test]
    fn equal_levels_are_off_by_half_a_step_at_most() {
        let values: Vec<f32> = normal(1000).iter().map(|value| 3.0 + value).collect();
        for (code, block, steps) in
            [(Code::Int4, 64, 15.0 / 2.0), (Code::Int4Affine, 32, 15.0), (Code::Int8, 100, 127.0)]
        {
            let packed = Packed::pack(&values, code, block, false).unwrap();
            let (scales, _) = packed.statistics().scales_and_lows();
            for (at, (value, unpacked)) in values.iter().zip(packed.unpack()).enumerate() {
                let half = scales[at / block] / steps / 2.0;
                assert!((value - unpacked).abs() <= half * 1.0001, "{code:?} at {at}: {value} became {unpacked}");
            }
        }
        assert_eq!(Packed::pack(&values, Code::Int4Affine, 64, true), Err(Error::Statistics(Code::Int4Affine)));
        let odd = Packed::pack(&values[..5], Code::Int8, 5, true).unwrap();
        assert_eq!((odd.codes().len(), odd.unpack().len()), (5, 5));
        let number = Packed::from_parts(Code::Int8, 5, 1, vec![255], Statistics::Plain(vec![1.0]));
        assert_eq!(number, Err(Error::Number(255)));
    }

    #[test]
    fn parts_must_fit() {
        let packed = Packed::pack(&normal(91), Code::Nf4, 32, true).unwrap();
        let again =
            |len, codes: &[u8]| Packed::from_parts(Code::Nf4, 32, len, codes.to_vec(), packed.statistics().clone());
        assert_eq!(again(91, packed.codes()).unwrap(), packed);
        assert!(
            again(91, &packed.codes()[1..]).unwrap_err().to_string().contains("bytes of codes: expected 46, found 45")
        );
        // A block beyond the end of the weight, as a file may claim, takes no room.
        let huge = Packed::from_parts(Code::Int8, 1 << 40, 4, vec![0; 4], Statistics::Plain(vec![1.0])).unwrap();
        assert_eq!(huge.into_matrix([2, 2]).unwrap().layout.block, 4);
        let short = Statistics::Plain(vec![1.0]);
        assert!(Packed::from_parts(Code::Nf4, 32, 91, packed.codes().to_vec(), short).is_err());
    }
}
