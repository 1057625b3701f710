//! Norms over the last dimension.

use burn::tensor::Tensor;
use peft_core::kernels::{layer_norm, rms_norm};

use super::{ALL, Input, Operation, SINGLE, by_differences, in_types};
use crate::Failure;
use crate::state::{normal, worse};

/// Large, so that its place in the formula matters.
const EPSILON: f64 = 0.1;

/// Rows and widths: both odd, the second with more values than lanes add up at once.
const SHAPES: [[usize; 2]; 2] = [[3, 37], [2, 131]];

pub(super) fn checks() -> Vec<Operation> {
    let each = |(suffix, dtypes, trained): (&str, _, bool)| {
        let step = trained.then_some(1);
        let gamma = move |width: usize| Input { values: normal(width, 1.0, 2), step };
        let rms = in_types(&format!("rms_norm{suffix}"), dtypes, move |dtype, device| {
            over_shapes(|rows, width| {
                let inputs = [Input::trained(normal(rows * width, 1.0, 1)), gamma(width)];
                let operation = |[x, gamma]: [Tensor<1>; 2]| rms_norm(x.reshape([rows, width]), gamma, EPSILON);
                by_differences(&inputs, dtype, device, operation, |[x, gamma]| normed(x, gamma, false))
            })
        });
        let layer = in_types(&format!("layer_norm{suffix}"), dtypes, move |dtype, device| {
            over_shapes(|rows, width| {
                let beta = Input::trained(normal(width, 1.0, 3));
                let inputs = [Input::trained(normal(rows * width, 1.0, 1)), gamma(width), beta];
                let operation =
                    |[x, gamma, beta]: [Tensor<1>; 3]| layer_norm(x.reshape([rows, width]), gamma, Some(beta), EPSILON);
                let reference = |[x, gamma, beta]: [&[f64]; 3]| {
                    normed(x, gamma, true).iter().zip(beta.iter().cycle()).map(|(y, beta)| y + beta).collect()
                };
                by_differences(&inputs, dtype, device, operation, reference)
            })
        });
        rms.into_iter().chain(layer)
    };
    [("", ALL, true), (" frozen", SINGLE, false)].into_iter().flat_map(each).collect()
}

fn over_shapes(deviation: impl Fn(usize, usize) -> Result<f64, Failure>) -> Result<f64, Failure> {
    SHAPES.into_iter().try_fold(0.0, |worst, [rows, width]| Ok(worse(worst, deviation(rows, width)?)))
}

fn normed(x: &[f64], gamma: &[f64], centred: bool) -> Vec<f64> {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let row = |row: &[f64]| {
        let middle = if centred { mean(row) } else { 0.0 };
        let moved: Vec<f64> = row.iter().map(|x| x - middle).collect();
        let squares: Vec<f64> = moved.iter().map(|x| x * x).collect();
        let deviation = (mean(&squares) + EPSILON).sqrt();
        moved.into_iter().zip(gamma).map(move |(x, gamma)| x / deviation * gamma).collect::<Vec<_>>()
    };
    x.chunks(gamma.len()).flat_map(row).collect()
}
