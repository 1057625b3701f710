//! Linear layers, trained and frozen.

use burn::tensor::{DType, Device, Tensor};
use peft_core::kernels::linear;

use super::{ALL, Input, Operation, SINGLE, by_differences, in_types};
use crate::Failure;
use crate::state::{normal, worse};

const D_IN: usize = 21;
const D_OUT: usize = 9;

/// What has a gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trained {
    Both,
    Input,
    Weight,
}

pub(super) fn checks() -> Vec<Operation> {
    let each = |(trained, transposed, dtypes): (Trained, bool, _)| {
        let order = if transposed { " transposed" } else { "" };
        in_types(&format!("linear trained {trained:?}{order}"), dtypes, move |dtype, device| {
            let of = |rows| deviation(trained, transposed, rows, dtype, device);
            [1, 21].into_iter().try_fold(0.0, |worst, rows| Ok(worse(worst, of(rows)?)))
        })
    };
    let forms = [
        (Trained::Both, false, ALL),
        (Trained::Both, true, SINGLE),
        (Trained::Input, false, SINGLE),
        (Trained::Weight, false, SINGLE),
    ];
    forms.into_iter().flat_map(each).collect()
}

/// `transposed`: the weight lies by columns.
fn deviation(trained: Trained, transposed: bool, rows: usize, dtype: DType, device: &Device) -> Result<f64, Failure> {
    let input = |values, frozen| if trained == frozen { Input::frozen(values) } else { Input::trained(values) };
    let inputs =
        [input(normal(rows * D_IN, 1.0, 1), Trained::Weight), input(normal(D_IN * D_OUT, 1.0, 2), Trained::Input)];
    let operation = |[x, w]: [Tensor<1>; 2]| {
        let w = if transposed { w.reshape([D_OUT, D_IN]).transpose() } else { w.reshape([D_IN, D_OUT]) };
        linear(x.reshape([rows, D_IN]), w)
    };
    let weight = |w: &[f64], i: usize, o: usize| if transposed { w[o * D_IN + i] } else { w[i * D_OUT + o] };
    let reference = |[x, w]: [&[f64]; 2]| {
        let row = |x: &[f64]| {
            let y = |o: usize| (0..D_IN).map(|i| x[i] * weight(w, i, o)).sum::<f64>();
            (0..D_OUT).map(y).collect::<Vec<_>>()
        };
        x.chunks(D_IN).flat_map(row).collect()
    };
    by_differences(&inputs, dtype, device, operation, reference)
}
