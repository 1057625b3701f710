//! Code books: what the numbers of a packed tensor stand for, in the numbers of bitsandbytes.

use std::cmp::Ordering;
use std::sync::LazyLock;

/// What the number of a packed value stands for; a block's scale multiplies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// 4 bits: quantiles of a normal distribution, with an exact zero. Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E.
    Nf4,
    /// 4 bits: one of sign, two of exponent, one of mantissa, as bitsandbytes scales and orders them.
    Fp4,
    /// 4 bits: 16 equal levels from the negative to the positive scale; none of them is zero.
    Int4,
    /// 4 bits: 16 equal levels from the block's smallest to its largest value.
    Int4Affine,
    /// 8 bits: `q / 127` for the signed number `q` in `-127..=127`, stored as `q + 127`.
    Int8,
}

const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Twelfths.
const FP4: [f32; 16] = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0];

/// Everything that packing and unpacking needs of a code.
struct Table {
    values: Vec<f32>,
    nearest: Nearest,
}

impl Table {
    fn new(values: impl IntoIterator<Item = f32>) -> Self {
        let values: Vec<f32> = values.into_iter().collect();
        Self { nearest: Nearest::of(&values), values }
    }
}

impl Code {
    fn table(self) -> &'static Table {
        // In the order of the variants.
        static TABLES: LazyLock<[Table; 5]> = LazyLock::new(|| {
            let level = |level: u8| f32::from(level) / 15.0;
            [
                Table::new(NF4),
                Table::new(FP4.map(|twelfths| twelfths / 12.0)),
                Table::new((0..16).map(|code| 2.0 * level(code) - 1.0)),
                Table::new((0..16).map(level)),
                Table::new((0..255_u8).map(|code| (f32::from(code) - 127.0) / 127.0)),
            ]
        });
        &TABLES[self as usize]
    }

    /// The value of each number.
    pub fn values(self) -> &'static [f32] {
        &self.table().values
    }

    /// The name by which the command line and checkpoints call it.
    pub fn name(self) -> &'static str {
        ["nf4", "fp4", "int4", "int4-affine", "int8"][self as usize]
    }

    /// Bits of a number.
    pub fn bits(self) -> usize {
        if self == Self::Int8 { 8 } else { 4 }
    }

    /// For finding the nearest number.
    pub(crate) fn nearest(self) -> &'static Nearest {
        &self.table().nearest
    }
}

/// The map of 8 bits with which block statistics are packed: seven decades, finer towards one, both signs. Dettmers 2015, arXiv:1511.04561.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
        let mut values = vec![0.0, 1.0];
        for decade in 0..7_u8 {
            let count = 1_u16 << decade;
            // Evenly spaced from both ends with fused multiply-adds, as PyTorch's linspace is: otherwise 21 values are off in their last bit.
            let step = (1.0_f32 - 0.1) / f32::from(count);
            let half = count.div_ceil(2);
            let edge = |k: u16| {
                if k < half { step.mul_add(f32::from(k), 0.1) } else { (-step).mul_add(f32::from(count - k), 1.0) }
            };
            let scale = 10.0_f64.powi(i32::from(decade) - 6) as f32;
            values.extend((0..count).flat_map(|k| {
                let middle = (edge(k) + edge(k + 1)) / 2.0 * scale;
                [middle, -middle]
            }));
        }
        values.sort_by(f32::total_cmp);
        let mut map = [0.0; 256];
        map.copy_from_slice(&values);
        map
    });
    &MAP
}

/// Finds nearest codes: midpoints between the values in their order, and the code of each place in that order.
#[derive(Debug)]
pub(crate) struct Nearest {
    midpoints: Vec<f32>,
    order: Vec<u8>,
}

impl Nearest {
    pub(crate) fn of(values: &[f32]) -> Self {
        let mut order: Vec<u8> = (0..=u8::MAX).take(values.len()).collect();
        let at = |code: u8| values[usize::from(code)];
        // Equal values keep their order: FP4 has two zeros, and the first is taken.
        order.sort_by(|a, b| at(*a).partial_cmp(&at(*b)).unwrap_or(Ordering::Equal));
        let midpoints = order.windows(2).map(|pair| (at(pair[0]) + at(pair[1])) / 2.0).collect();
        Self { midpoints, order }
    }

    /// The code whose value is nearest; of two that are equally near, the lower.
    pub(crate) fn code(&self, value: f32) -> u8 {
        self.order[self.midpoints.partition_point(|midpoint| *midpoint < value)]
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    fn sha256(values: &[f32]) -> String {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn tables_are_those_of_bitsandbytes_bit_for_bit() {
        assert_eq!(sha256(&NF4), "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a");
        assert_eq!(sha256(dynamic_map()), "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c");
    }

    #[test]
    fn every_value_is_its_own_nearest() {
        for code in [Code::Nf4, Code::Int4, Code::Int4Affine, Code::Int8] {
            let numbers = code.values().iter().map(|value| usize::from(code.nearest().code(*value)));
            assert!(numbers.eq(0..code.values().len()), "{code:?}");
            assert!(code.values().len() <= 1 << code.bits());
        }
        assert_eq!([Code::Int4.values()[0], Code::Int4.values()[15], Code::Int8.values()[127]], [-1.0, 1.0, 0.0]);
    }

    #[test]
    fn nearest_is_nearest_and_ties_go_down() {
        let nf4 = Code::Nf4.nearest();
        assert_eq!([nf4.code(-2.0), nf4.code((NF4[7] + NF4[8]) / 2.0), nf4.code(2.0)], [0, 7, 15]);
        let fp4 = Code::Fp4.nearest();
        for value in [-1.0, -0.4, -0.1, -0.001, 0.0, 0.003, 0.2, 0.9] {
            let distance = |code: u8| (Code::Fp4.values()[usize::from(code)] - value).abs();
            let best = (0..16).map(distance).fold(f32::INFINITY, f32::min);
            assert_eq!(distance(fp4.code(value)), best, "{value}");
        }
    }
}
