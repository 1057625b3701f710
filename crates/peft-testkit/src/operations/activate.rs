//! Nonlinearities.

use std::f64::consts::{FRAC_2_PI, PI};

use burn::tensor::Tensor;
use peft_core::kernels::{Nonlinearity, activate, gated};

use super::{ALL, Input, Operation, SINGLE, by_differences, in_types};
use crate::state::normal;

const SHAPE: [usize; 2] = [3, 37];

pub(super) fn checks() -> Vec<Operation> {
    let each = |f: Nonlinearity| {
        let alone = in_types(&format!("activate {f:?}"), SINGLE, move |dtype, device| {
            let inputs = [Input::trained(values(1))];
            let reference = |[x]: [&[f64]; 1]| x.iter().map(|x| value(f, *x)).collect();
            by_differences(&inputs, dtype, device, |[x]| activate(x.reshape(SHAPE), f), reference)
        });
        let gate = in_types(&format!("gated {f:?}"), ALL, move |dtype, device| {
            let inputs = [Input::trained(values(1)), Input::trained(values(2))];
            let reference = |[gate, up]: [&[f64]; 2]| gate.iter().zip(up).map(|(x, up)| value(f, *x) * up).collect();
            let operation = |[gate, up]: [Tensor<1>; 2]| gated(gate.reshape(SHAPE), up.reshape(SHAPE), f);
            by_differences(&inputs, dtype, device, operation, reference)
        });
        alone.into_iter().chain(gate)
    };
    let all = [Nonlinearity::Silu, Nonlinearity::Gelu, Nonlinearity::GeluTanh, Nonlinearity::Relu];
    all.into_iter().flat_map(each).collect()
}

/// Far enough out that everything saturates, and none where [`Nonlinearity::Relu`] has no derivative.
fn values(seed: u64) -> Vec<f32> {
    let [rows, width] = SHAPE;
    normal(rows * width, 3.0, seed).into_iter().map(|x| x + 0.01_f32.copysign(x)).collect()
}

fn value(f: Nonlinearity, x: f64) -> f64 {
    match f {
        Nonlinearity::Silu => x / (1.0 + (-x).exp()),
        Nonlinearity::Gelu => x * phi(x),
        Nonlinearity::GeluTanh => x / 2.0 * (1.0 + (FRAC_2_PI.sqrt() * (x + 0.044_715 * x.powi(3))).tanh()),
        Nonlinearity::Relu => x.max(0.0),
    }
}

/// The normal distribution, by a series without cancellation: Marsaglia 2004, doi:10.18637/jss.v011.i04.
fn phi(x: f64) -> f64 {
    let (mut term, mut sum, mut odd) = (x, x, 1.0);
    while term.abs() > sum.abs() * 1e-17 {
        odd += 2.0;
        term *= x * x / odd;
        sum += term;
    }
    0.5 + sum * (-x * x / 2.0).exp() / (2.0 * PI).sqrt()
}
