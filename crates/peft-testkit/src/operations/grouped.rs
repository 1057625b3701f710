//! The linear layers of several experts.

use burn::tensor::{DType, Device, Tensor};
use peft_core::kernels::{Groups, PackedLayout, grouped_linear, grouped_packed};

use super::packed::{Sample, Scales};
use super::{ALL, Input, Operation, SINGLE, compare, in_types};
use crate::Failure;
use crate::state::{normal, worse};

/// Rows of each expert, and the width of input and output.
struct Case {
    counts: &'static [usize],
    d_in: usize,
    d_out: usize,
}

pub(super) fn checks() -> Vec<Operation> {
    /// One row, none, and more than a piece of work has on the CPU.
    const UNEVEN: Case = Case { counts: &[150, 0, 1, 12], d_in: 21, d_out: 9 };
    const SINGLE_ROW: Case = Case { counts: &[0, 0, 1], d_in: 5, d_out: 3 };
    /// More columns than a piece has, in both directions.
    const WIDE: Case = Case { counts: &[2, 1], d_in: 801, d_out: 799 };

    let uneven = in_types("grouped_linear", ALL, |dtype, device| {
        Ok(worse(UNEVEN.deviation(dtype, device)?, SINGLE_ROW.deviation(dtype, device)?))
    });
    let wide = in_types("grouped_linear wide", &[DType::F32], |dtype, device| WIDE.deviation(dtype, device));
    let packed = in_types("grouped_packed", SINGLE, |dtype, device| {
        Ok(worse(UNEVEN.packed(dtype, device)?, SINGLE_ROW.packed(dtype, device)?))
    });
    [uneven, wide, packed].into_iter().flatten().collect()
}

impl Case {
    fn deviation(&self, dtype: DType, device: &Device) -> Result<f64, Failure> {
        let (expert_of, experts) = (self.expert_of(), self.counts.len());
        let (rows, d_in, d_out) = (expert_of.len(), self.d_in, self.d_out);
        let inputs =
            [Input::trained(normal(rows * d_in, 1.0, 1)), Input::trained(normal(experts * d_out * d_in, 1.0, 2))];
        let operation = |[x, weights]: [Tensor<1>; 2]| {
            let groups = Groups::new(experts, &expert_of);
            grouped_linear(x.reshape([rows, d_in]), weights.reshape([experts, d_out, d_in]), &groups)
        };
        compare(
            &inputs,
            dtype,
            device,
            operation,
            |inputs| self.forward(inputs),
            |inputs, dy| self.backward(inputs, dy),
        )
    }

    /// The same over weights that are packed, which have no gradient.
    fn packed(&self, dtype: DType, device: &Device) -> Result<f64, Failure> {
        let (expert_of, experts) = (self.expert_of(), self.counts.len());
        let (rows, d_in, d_out) = (expert_of.len(), self.d_in, self.d_out);
        let layout = PackedLayout { d_out, d_in, bits: 4, block: 32 };
        // Of each expert another matrix: scales differ in kind.
        let scales = [Scales::Nested, Scales::Plain, Scales::Affine].into_iter().cycle().take(experts);
        let samples: Vec<Sample> = scales.map(|scales| Sample::new(layout, scales, device)).collect();
        let dense: Vec<f64> = samples.iter().flat_map(|sample| sample.dense.iter().copied()).collect();
        let weights: Vec<_> = samples.into_iter().map(|sample| sample.weight).collect();
        compare(
            &[Input::trained(normal(rows * d_in, 1.0, 1))],
            dtype,
            device,
            |[x]| grouped_packed(x.reshape([rows, d_in]), &weights, &Groups::new(experts, &expert_of)),
            |[x]| self.forward([x, &dense]),
            |[x], dy| {
                let [dx, _] = self.backward([x, &dense], dy);
                [dx]
            },
        )
    }

    /// Experts by turns, until the rows of each are used up.
    fn expert_of(&self) -> Vec<usize> {
        let most = self.counts.iter().copied().max().unwrap_or_default();
        let experts = 0..self.counts.len();
        (0..most).flat_map(|turn| experts.clone().filter(move |expert| turn < self.counts[*expert])).collect()
    }

    fn forward(&self, [x, weights]: [&[f64]; 2]) -> Vec<f64> {
        let row = |(x, expert): (&[f64], usize)| {
            let weight = &weights[expert * self.d_out * self.d_in..][..self.d_out * self.d_in];
            weight.chunks(self.d_in).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect::<Vec<f64>>()
        };
        x.chunks(self.d_in).zip(self.expert_of()).flat_map(row).collect()
    }

    fn backward(&self, [x, weights]: [&[f64]; 2], dy: &[f64]) -> [Option<Vec<f64>>; 2] {
        let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; weights.len()]);
        for (row, expert) in self.expert_of().into_iter().enumerate() {
            for o in 0..self.d_out {
                let (dy, start) = (dy[row * self.d_out + o], (expert * self.d_out + o) * self.d_in);
                for i in 0..self.d_in {
                    dx[row * self.d_in + i] += dy * weights[start + i];
                    dw[start + i] += dy * x[row * self.d_in + i];
                }
            }
        }
        [Some(dx), Some(dw)]
    }
}
