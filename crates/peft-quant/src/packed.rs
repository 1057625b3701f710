//! Tensors of 4-bit codes with a scale for each block: `w ≈ code[q]·absmax`. Dettmers et al. 2023, arXiv:2305.14314, section 3.
//!
//! The arithmetic follows bitsandbytes on the CPU, so that the same weights give the same bytes: a whole block is multiplied by the
//! reciprocal of its scale, the last short one is divided by it.

use crate::code::Nearest;
use crate::mean::mean;
use crate::{Code4, dynamic_map};

/// Blocks of statistics that share a second scale.
const NESTED_BLOCK: usize = 256;

/// Block sizes that bitsandbytes knows.
const BLOCKS: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// The smallest scale, so that a block of zeros is not divided by zero.
const SMALLEST: f32 = 1e-38;

/// Why values cannot be packed, or a packed tensor is none.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A block size that the format does not have.
    #[error("block size: expected a power of two in 32..=4096, found {0}")]
    Block(usize),
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
    /// A weight that is no number.
    #[error("value {index} is {value}; only finite weights can be packed")]
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
}

/// Packed values in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Packed {
    code: Code4,
    block: usize,
    len: usize,
    codes: Vec<u8>,
    statistics: Statistics,
}

impl Packed {
    /// Packs `values` in blocks of `block`; `nested` packs the block statistics as well.
    ///
    /// # Errors
    /// When `block` is none that exists or a value is not finite.
    pub fn pack(values: &[f32], code: Code4, block: usize, nested: bool) -> Result<Self, Error> {
        check_block(block)?;
        if let Some((index, value)) = values.iter().enumerate().find(|(_, value)| !value.is_finite()) {
            return Err(Error::NotFinite { index, value: *value });
        }
        let nearest = code.nearest();
        let (mut absmax, mut each) =
            (Vec::with_capacity(values.len().div_ceil(block)), Vec::with_capacity(values.len() + 1));
        for values in values.chunks(block) {
            let largest = values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
            if values.len() == block {
                let reciprocal = 1.0 / largest.max(SMALLEST);
                absmax.push(largest);
                each.extend(values.iter().map(|value| nearest.code((value * reciprocal).clamp(-1.0, 1.0))));
            } else {
                let scale = largest.max(SMALLEST);
                absmax.push(scale);
                each.extend(values.iter().map(|value| nearest.code((value / scale).clamp(-1.0, 1.0))));
            }
        }
        if values.len() % 2 == 1 {
            each.push(nearest.code(0.0));
        }
        let codes = each.as_chunks::<2>().0.iter().map(|[first, second]| first << 4 | second).collect();
        let statistics = if nested { nest(&absmax) } else { Statistics::Plain(absmax) };
        Ok(Self { code, block, len: values.len(), codes, statistics })
    }

    /// A packed tensor of `len` values out of its parts, for instance those of a file.
    ///
    /// # Errors
    /// When a part has not the length that `len` and `block` ask for.
    pub fn from_parts(
        code: Code4,
        block: usize,
        len: usize,
        codes: Vec<u8>,
        statistics: Statistics,
    ) -> Result<Self, Error> {
        check_block(block)?;
        let blocks = len.div_ceil(block);
        let length = |what, expected, found| {
            if expected == found { Ok(()) } else { Err(Error::Length { what, expected, found }) }
        };
        length("bytes of codes", len.div_ceil(2), codes.len())?;
        match &statistics {
            Statistics::Plain(absmax) => length("block scales", blocks, absmax.len())?,
            Statistics::Nested { codes, scales, .. } => {
                length("packed block scales", blocks, codes.len())?;
                length("scales of block scales", blocks.div_ceil(NESTED_BLOCK), scales.len())?;
            }
        }
        Ok(Self { code, block, len, codes, statistics })
    }

    /// The values.
    pub fn unpack(&self) -> Vec<f32> {
        let values = self.code.values();
        let absmax = self.statistics.absmax();
        let each = self.codes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        each.take(self.len).enumerate().map(|(at, code)| values[usize::from(code)] * absmax[at / self.block]).collect()
    }

    /// What the codes stand for.
    pub fn code(&self) -> Code4 {
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

    /// Two codes a byte, the first in the upper half.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The scale of each block.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// Bytes that the tensor takes: codes and statistics.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.statistics.bytes()
    }
}

impl Statistics {
    /// The scale of each block in f32.
    pub fn absmax(&self) -> Vec<f32> {
        match self {
            Self::Plain(absmax) => absmax.clone(),
            Self::Nested { codes, scales, offset } => {
                let value =
                    |(at, code): (usize, &u8)| dynamic_map()[usize::from(*code)] * scales[at / NESTED_BLOCK] + offset;
                codes.iter().enumerate().map(value).collect()
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Plain(absmax) => 4 * absmax.len(),
            Self::Nested { codes, scales, .. } => codes.len() + 4 * scales.len() + 4,
        }
    }
}

fn check_block(block: usize) -> Result<(), Error> {
    if BLOCKS.contains(&block) { Ok(()) } else { Err(Error::Block(block)) }
}

/// Packs block statistics: their mean is taken off, the rest goes through the 8-bit map.
fn nest(absmax: &[f32]) -> Statistics {
    let nearest = Nearest::of(dynamic_map());
    let offset = if absmax.is_empty() { 0.0 } else { mean(absmax) };
    let (mut codes, mut scales) = (Vec::with_capacity(absmax.len()), Vec::new());
    for block in absmax.chunks(NESTED_BLOCK) {
        let rest: Vec<f32> = block.iter().map(|value| value - offset).collect();
        let largest = rest.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
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
            (Code4::Nf4, [0.067_746, 0.072_798, 0.076_831, 0.080_337, 0.083_547, 0.086_610, 0.089_592, 0.092_547]),
            (Code4::Fp4, [0.088_925, 0.096_543, 0.102_969, 0.108_684, 0.114_115, 0.119_333, 0.124_556, 0.129_536]),
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
        let packed = Packed::pack(&normal(1 << 20), Code4::Nf4, 64, true).unwrap();
        assert_eq!(packed.bytes(), 524_288 + 16_384 + 256 + 4);
        assert!(8.0 * packed.bytes() as f64 / packed.len() as f64 - 4.127 < 1e-3);
    }

    #[test]
    fn zeros_stay_zeros_and_what_cannot_be_packed_is_refused() {
        for nested in [false, true] {
            assert_eq!(Packed::pack(&[0.0; 75], Code4::Nf4, 64, nested).unwrap().unpack(), [0.0; 75]);
        }
        assert!(Packed::pack(&[], Code4::Nf4, 64, true).unwrap().unpack().is_empty());
        assert_eq!(Packed::pack(&[0.0], Code4::Nf4, 48, false), Err(Error::Block(48)));
        let error = Packed::pack(&[0.0, f32::INFINITY], Code4::Nf4, 64, false).unwrap_err().to_string();
        assert_eq!(error, "value 1 is inf; only finite weights can be packed");
    }

    #[test]
    fn parts_must_fit() {
        let packed = Packed::pack(&normal(91), Code4::Nf4, 32, true).unwrap();
        let again =
            |len, codes: &[u8]| Packed::from_parts(Code4::Nf4, 32, len, codes.to_vec(), packed.statistics().clone());
        assert_eq!(again(91, packed.codes()).unwrap(), packed);
        assert!(
            again(91, &packed.codes()[1..]).unwrap_err().to_string().contains("bytes of codes: expected 46, found 45")
        );
        let short = Statistics::Plain(vec![1.0]);
        assert!(Packed::from_parts(Code4::Nf4, 32, 91, packed.codes().to_vec(), short).is_err());
    }
}
