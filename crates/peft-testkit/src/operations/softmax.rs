//! The softmax over the largest of each row.

use burn::tensor::Tensor;
use peft_core::kernels::top_softmax;

use super::{Input, Operation, SINGLE, by_differences, in_types};
use crate::state::normal;

const SHAPE: [usize; 2] = [5, 37];

pub(super) fn checks() -> Vec<Operation> {
    let each = |k: usize| {
        in_types(&format!("top_softmax {k} of {}", SHAPE[1]), SINGLE, move |dtype, device| {
            let inputs = [Input::trained(normal(SHAPE[0] * SHAPE[1], 3.0, 1))];
            let reference = |[z]: [&[f64]; 1]| z.chunks(SHAPE[1]).flat_map(|z| row(z, k)).collect();
            by_differences(&inputs, dtype, device, |[z]: [Tensor<1>; 1]| top_softmax(z.reshape(SHAPE), k), reference)
        })
    };
    [1, 2, 36, 37].into_iter().flat_map(each).collect()
}

fn row(z: &[f64], k: usize) -> Vec<f64> {
    let mut order = z.to_vec();
    order.sort_by(|a, b| b.total_cmp(a));
    let e: Vec<f64> = z.iter().map(|z| if *z >= order[k - 1] { (z - order[0]).exp() } else { 0.0 }).collect();
    let total: f64 = e.iter().sum();
    e.into_iter().map(|e| e / total).collect()
}
