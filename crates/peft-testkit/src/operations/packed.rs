//! Products with packed matrices.

use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::kernels::{BlockScales, PackedData, PackedLayout, PackedMatrix};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{HALVES, Operation, SINGLE, in_types};
use crate::state::{deviation, normal, worse};
use crate::{Failure, read};

/// Blocks of packed scales.
const NESTED: usize = 256;

/// How the scales of a matrix are given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scales {
    Plain,
    Affine,
    Nested,
}

/// A check for every kind of packed matrix: few rows and many.
pub(super) fn checks() -> Vec<Operation> {
    let mut checks = Vec::new();
    for bits in [4, 8] {
        for scales in [Scales::Plain, Scales::Affine, Scales::Nested] {
            let name = format!("packed_linear {bits} bits {scales:?}");
            checks.extend(in_types(&name, SINGLE, move |dtype, device| packed(bits, scales, dtype, device)));
        }
    }
    checks.extend(in_types("packed_linear", HALVES, |dtype, device| packed(4, Scales::Nested, dtype, device)));
    checks
}

fn packed(bits: usize, scales: Scales, dtype: DType, device: &Device) -> Result<f64, Failure> {
    let mut worst: f64 = 0.0;
    // Odd in both directions with blocks over the ends of rows; and whole.
    for (d_out, d_in, block) in [(9, 75, 32), (160, 128, 64)] {
        let sample = Sample::new(PackedLayout { d_out, d_in, bits, block }, scales, device);
        worst = worse(worst, deviation(&read(sample.weight.unpack())?, &sample.dense));
        for rows in [1, 3, 21] {
            worst = worse(worst, sample.product(rows, dtype, device)?);
        }
    }
    Ok(worst)
}

/// A packed matrix, and what it stands for.
pub(super) struct Sample {
    pub(super) weight: PackedMatrix,
    pub(super) dense: Vec<f64>,
}

impl Sample {
    pub(super) fn new(layout: PackedLayout, scales: Scales, device: &Device) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let (values, blocks) = (layout.len(), layout.blocks());
        let numbers: Vec<u8> = (0..values).map(|_| rng.random_range(0..1_u16 << layout.bits) as u8).collect();
        let bytes = if layout.bits == 4 {
            numbers.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).copied().unwrap_or(0)).collect()
        } else {
            numbers.clone()
        };
        let table = normal(1 << layout.bits, 1.0, 6);
        let mut positive = |count: usize| (0..count).map(|_| rng.random_range(0.5..2.0_f32)).collect::<Vec<_>>();
        let (each, lows) = (positive(blocks), positive(blocks));
        let (map, outer, offset) = (normal(256, 1.0, 7), positive(blocks.div_ceil(NESTED)), 0.75);
        let scale_numbers: Vec<u8> = (0..blocks).map(|at| (at * 37 % 256) as u8).collect();
        let scale = |at: usize| match scales {
            Scales::Nested => map[usize::from(scale_numbers[at])] * outer[at / NESTED] + offset,
            Scales::Plain | Scales::Affine => each[at],
        };
        let low = |at: usize| if scales == Scales::Affine { lows[at] } else { 0.0 };
        let value = |(at, number): (usize, &u8)| {
            let block = at / layout.block;
            f64::from(table[usize::from(*number)]) * f64::from(scale(block)) + f64::from(low(block))
        };
        let dense = numbers.iter().enumerate().map(value).collect();
        let scales = match scales {
            Scales::Plain => BlockScales::Plain(each),
            Scales::Affine => BlockScales::Affine { scales: each, lows },
            Scales::Nested => BlockScales::Nested { numbers: scale_numbers, map: map.into(), scales: outer, offset },
        };
        let weight = PackedMatrix::new(PackedData { layout, bytes, table: table.into(), scales }, device);
        Self { weight, dense }
    }

    /// The largest deviation of `y = x·Wᵀ` and of its gradient, without and with autodiff.
    fn product(&self, rows: usize, dtype: DType, device: &Device) -> Result<f64, Failure> {
        let PackedLayout { d_out, d_in, .. } = self.weight.layout();
        let (x, dy) = (normal(rows * d_in, 1.0, 8), normal(rows * d_out, 1.0, 9));
        let tensor = |values: &[f32], width: usize, device: &Device| {
            Tensor::<2>::from_data(TensorData::new(values.to_vec(), [rows, width]), (device, dtype))
        };
        let weight = |o: usize, i: usize| self.dense[o * d_in + i];
        let y = |at: usize| (0..d_in).map(|i| f64::from(x[at / d_out * d_in + i]) * weight(at % d_out, i)).sum();
        let dx = |at: usize| (0..d_out).map(|o| f64::from(dy[at / d_in * d_out + o]) * weight(o, at % d_in)).sum();
        let y: Vec<f64> = (0..rows * d_out).map(y).collect();
        let dx: Vec<f64> = (0..rows * d_in).map(dx).collect();
        let plain = deviation(&read(self.weight.linear(tensor(&x, d_in, device)))?, &y);
        let autodiff = device.clone().autodiff();
        let input = tensor(&x, d_in, &autodiff).require_grad();
        let output = self.weight.linear(input.clone());
        let tape = (output.clone() * tensor(&dy, d_out, &autodiff)).sum().backward();
        let gradient = read(input.grad(&tape).ok_or("the input has no gradient")?)?;
        Ok(worse(worse(plain, deviation(&read(output)?, &y)), deviation(&gradient, &dx)))
    }
}
