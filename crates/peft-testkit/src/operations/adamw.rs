//! The optimizer's step.

use burn::tensor::{DType, Device, Tensor};
use peft_core::kernels::{AdamW, AdamWStep, adamw};

use super::{Operation, SINGLE, exact, in_types, rounded};
use crate::state::{deviation, normal, worse};
use crate::{Failure, read};

/// Odd, and more than a piece of work on a CPU.
const COUNT: usize = 20_011;
const STEPS: usize = 3;

pub(super) fn checks() -> Vec<Operation> {
    in_types("adamw", SINGLE, check)
}

/// The deviation of the parameter and of its moments after some steps.
fn check(dtype: DType, device: &Device) -> Result<f64, Failure> {
    let settings = AdamW { beta_1: 0.9, beta_2: 0.99, epsilon: 1e-3, weight_decay: 0.1 };
    let step = |time| AdamWStep { adamw: settings, learning_rate: 0.05, factor: 0.5, time };
    let start = rounded(&normal(COUNT, 1.0, 1), dtype);
    let grads: Vec<_> = (0..STEPS as u64).map(|seed| rounded(&normal(COUNT, 1.0, 2 + seed), dtype)).collect();

    let mut value = Tensor::<1>::from_data(start.clone(), (device, dtype));
    let zeros = || Tensor::zeros([COUNT], (device, dtype));
    let mut moments = (zeros(), zeros());
    let mut expected = [exact(&start), vec![0.0; COUNT], vec![0.0; COUNT]];
    for (grad, time) in grads.iter().zip(1..) {
        (value, moments) = adamw(value, Tensor::from_data(grad.clone(), (device, dtype)), moments, step(time));
        reference(&mut expected, &exact(grad), step(time));
    }
    let found = [value, moments.0, moments.1];
    found
        .into_iter()
        .zip(&expected)
        .try_fold(0.0, |worst, (found, expected)| Ok(worse(worst, deviation(&read(found)?, expected))))
}

fn reference([w, m, v]: &mut [Vec<f64>; 3], grad: &[f64], step: AdamWStep) {
    let AdamWStep { adamw: AdamW { beta_1, beta_2, epsilon, weight_decay }, learning_rate, factor, time } = step;
    for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(grad) {
        let g = g * factor;
        *m = beta_1 * *m + (1.0 - beta_1) * g;
        *v = beta_2 * *v + (1.0 - beta_2) * g * g;
        let (m, v) = (*m / (1.0 - beta_1.powi(time as i32)), *v / (1.0 - beta_2.powi(time as i32)));
        *w -= learning_rate * (weight_decay * *w + m / (v.sqrt() + epsilon));
    }
}
