//! Linear layers with a low-rank update.

use burn::tensor::{DType, Device, Tensor};
use peft_core::kernels::{PackedLayout, Weight, low_rank_linear};

use super::packed::{Sample, Scales};
use super::{ALL, Input, Operation, SINGLE, by_differences, in_types};
use crate::Failure;
use crate::state::{normal, worse};

const SCALE: f64 = 0.5;
const RANK: usize = 3;
const LAYOUT: PackedLayout = PackedLayout { d_out: 9, d_in: 21, bits: 4, block: 16 };

/// How the weight is given.
#[derive(Clone, Copy, Debug)]
enum Form {
    Dense,
    Transposed,
    Packed,
}

pub(super) fn checks() -> Vec<Operation> {
    let each = |(form, dtypes): (Form, _)| {
        in_types(&format!("low_rank_linear {form:?}"), dtypes, move |dtype, device| {
            [1, 21].into_iter().try_fold(0.0, |worst, rows| Ok(worse(worst, deviation(form, rows, dtype, device)?)))
        })
    };
    [(Form::Dense, ALL), (Form::Transposed, SINGLE), (Form::Packed, ALL)].into_iter().flat_map(each).collect()
}

fn deviation(form: Form, rows: usize, dtype: DType, device: &Device) -> Result<f64, Failure> {
    let PackedLayout { d_out, d_in, .. } = LAYOUT;
    let sample = Sample::new(LAYOUT, Scales::Affine, device);
    // Of a dense weight as it is, the values lie by input; of the others, by output.
    let weight = |w: &[f64], i: usize, o: usize| match form {
        Form::Dense => w[i * d_out + o],
        Form::Transposed | Form::Packed => w[o * d_in + i],
    };
    let inputs = [
        Input::trained(normal(rows * d_in, 1.0, 1)),
        Input::frozen(sample.dense.iter().map(|w| *w as f32).collect()),
        Input::trained(normal(d_in * RANK, 1.0, 2)),
        Input::trained(normal(RANK * d_out, 1.0, 3)),
    ];
    let operation = |[x, w, a, b]: [Tensor<1>; 4]| {
        let (x, a, b) = (x.reshape([rows, d_in]), a.reshape([d_in, RANK]), b.reshape([RANK, d_out]));
        match form {
            Form::Dense => low_rank_linear(x, Weight::Dense(&w.reshape([d_in, d_out])), a, b, SCALE),
            Form::Transposed => low_rank_linear(x, Weight::Dense(&w.reshape([d_out, d_in]).transpose()), a, b, SCALE),
            Form::Packed => low_rank_linear(x, Weight::Packed(&sample.weight), a, b, SCALE),
        }
    };
    let reference = |[x, w, a, b]: [&[f64]; 4]| {
        let row = |x: &[f64]| {
            let h = |r: usize| (0..d_in).map(|i| x[i] * a[i * RANK + r]).sum::<f64>();
            let h: Vec<f64> = (0..RANK).map(h).collect();
            let y = |o: usize| {
                let base: f64 = (0..d_in).map(|i| x[i] * weight(w, i, o)).sum();
                base + SCALE * (0..RANK).map(|r| h[r] * b[r * d_out + o]).sum::<f64>()
            };
            (0..d_out).map(y).collect::<Vec<_>>()
        };
        x.chunks(d_in).flat_map(row).collect()
    };
    by_differences(&inputs, dtype, device, operation, reference)
}
