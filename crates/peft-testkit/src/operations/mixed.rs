//! Products of f32 with frozen matrices in 16 bits, against the same products with the same matrices in f32.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use peft_core::kernels::{Groups, PackedLayout, Weight, grouped_linear, linear, linear_cross_entropy, low_rank_linear};

use super::packed::{Sample, Scales};
use super::{HALF, Operation, ROUNDING, rounded};
use crate::state::{deviation, normal, worse};
use crate::{Failure, Finding, read};

/// Whole and odd in blocks of 32, with more rows of the matrix than a block of it has.
const SIZES: [[usize; 3]; 3] = [[6, 7, 9], [64, 544, 160], [45, 70, 137]];

pub(super) fn checks() -> Vec<Operation> {
    let low_rank = |x: Tensor<2>, weight: Tensor<2>| {
        let [d_in, d_out] = weight.dims();
        let factor = |shape: [usize; 2]| matrix(shape, 5, &x.device(), DType::F32);
        low_rank_linear(x.clone(), Weight::Dense(&weight), factor([d_in, 4]), factor([4, d_out]), 0.5)
    };
    let transposed = |x: Tensor<2>, weight: Tensor<2>| {
        // The same matrix, by columns.
        linear(x, weight.transpose().mul_scalar(1.0).transpose())
    };
    let losses = |x: Tensor<2>, weight: Tensor<2>| {
        let tokens = x.dims()[0];
        let targets: Vec<i64> = (0..tokens as i64).map(|token| token % 5 - 1).collect();
        let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [tokens]), &x.device());
        linear_cross_entropy(x, weight, targets, 0.1).losses.unsqueeze_dim(1)
    };
    let grouped = |x: Tensor<2>, weight: Tensor<2>| {
        // Three experts with the same layer; the second has no rows.
        let groups = Groups::new(3, &(0..x.dims()[0]).map(|row| row % 5 / 3 * 2).collect::<Vec<_>>());
        grouped_linear(x, weight.transpose().unsqueeze::<3>().repeat_dim(0, 3), &groups)
    };
    vec![
        check("linear bf16", DType::BF16, true, dense(linear, DType::BF16)),
        check("linear f16", DType::F16, true, dense(linear, DType::F16)),
        check("linear transposed bf16", DType::BF16, true, dense(transposed, DType::BF16)),
        check("low_rank_linear over bf16", DType::BF16, true, dense(low_rank, DType::BF16)),
        check("grouped_linear over bf16", DType::BF16, true, dense(grouped, DType::BF16)),
        // The gradient of the logits is rounded on its way back.
        check("linear_cross_entropy over bf16", DType::BF16, false, dense(losses, DType::BF16)),
        check("packed_linear in bf16", DType::BF16, false, packed),
    ]
}

/// A check that the device allows; `exact` where nothing is rounded when the inputs are not.
fn check(
    name: &str,
    dtype: DType,
    exact: bool,
    pair: impl Fn([usize; 3], &Device, bool) -> Result<[Vec<f64>; 2], Failure> + 'static,
) -> Operation {
    let measure = move |device: &Device| {
        if !device.supports_dtype(dtype) {
            return Ok(Finding::Skipped(format!("the device has no {dtype:?}")));
        }
        let mut worst = 0.0;
        for size in SIZES {
            let (half, single) = (pair(size, device, true)?, pair(size, device, false)?);
            worst = half.iter().zip(&single).fold(worst, |worst, (half, single)| worse(worst, deviation(half, single)));
        }
        // Only this backend adds up in f32 and leaves it so.
        let sums_in_f32 = format!("{device:?}").contains("Flex");
        Ok(Finding::Measured { deviation: worst, bound: if exact && sums_in_f32 { ROUNDING } else { HALF } })
    };
    (name.to_owned(), Box::new(measure))
}

/// Output and gradient of the input over a matrix in 16 bits, or over the same numbers in f32.
fn dense(
    operation: impl Fn(Tensor<2>, Tensor<2>) -> Tensor<2>,
    dtype: DType,
) -> impl Fn([usize; 3], &Device, bool) -> Result<[Vec<f64>; 2], Failure> {
    move |[rows, d_in, d_out], device, half| {
        let weight = matrix([d_in, d_out], 2, device, if half { dtype } else { DType::F32 });
        both(matrix([rows, d_in], 1, &device.clone().autodiff(), DType::F32), |x| operation(x, weight.clone()))
    }
}

/// The same over a packed matrix.
fn packed([rows, d_in, d_out]: [usize; 3], device: &Device, half: bool) -> Result<[Vec<f64>; 2], Failure> {
    let weight = Sample::new(PackedLayout { d_out, d_in, bits: 4, block: 32 }, Scales::Nested, device).weight;
    let weight = if half { weight.in_bf16() } else { weight };
    both(matrix([rows, d_in], 1, &device.clone().autodiff(), DType::F32), |x| weight.linear(x))
}

fn both(x: Tensor<2>, operation: impl Fn(Tensor<2>) -> Tensor<2>) -> Result<[Vec<f64>; 2], Failure> {
    let x = x.require_grad();
    let y = operation(x.clone());
    let dy = matrix(y.dims(), 3, &x.device(), DType::F32);
    let tape = (y.clone() * dy).sum().backward();
    Ok([read(y)?, read(x.grad(&tape).ok_or("the input has no gradient")?)?])
}

/// Numbers that bfloat16 holds.
fn matrix(shape: [usize; 2], seed: u64, device: &Device, dtype: DType) -> Tensor<2> {
    let data = rounded(&normal(shape[0] * shape[1], 1.0, seed), DType::BF16).convert_dtype(dtype);
    Tensor::<1>::from_data(data, (device, dtype)).reshape(shape)
}
