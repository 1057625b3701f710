//! The low-rank updates of several experts.

use burn::tensor::{DType, Device, Tensor};
use peft_core::kernels::low_rank_experts;

use super::{ALL, Input, Operation, compare, in_types};
use crate::Failure;
use crate::state::{normal, worse};

const SCALE: f64 = 0.5;
const D_IN: usize = 21;
const D_OUT: usize = 9;
const RANK: usize = 3;
const EXPERTS: usize = 4;

pub(super) fn checks() -> Vec<Operation> {
    let each = |(name, active): (&str, usize)| {
        in_types(&format!("low_rank_experts {name}"), ALL, move |dtype, device| {
            let of = |rows| deviation(rows, active, dtype, device);
            // The last: more rows of an expert than a piece of work has on the CPU, one of four gates being open.
            [1, 21, 520].into_iter().try_fold(0.0, |worst, rows| Ok(worse(worst, of(rows)?)))
        })
    };
    [("dense", EXPERTS), ("two of four", 2), ("one of four", 1), ("none", 0)].into_iter().flat_map(each).collect()
}

/// `active` gates of each row are open, others shut.
fn deviation(rows: usize, active: usize, dtype: DType, device: &Device) -> Result<f64, Failure> {
    let open = |at: usize| (at % EXPERTS + at / EXPERTS) % EXPERTS < active;
    let gates = normal(rows * EXPERTS, 1.0, 4).into_iter().enumerate();
    let gates = gates.map(|(at, gate)| if open(at) { gate } else { 0.0 }).collect();
    let inputs = [
        Input::trained(normal(rows * D_IN, 1.0, 1)),
        Input::trained(normal(D_IN * EXPERTS * RANK, 1.0, 2)),
        Input::trained(normal(EXPERTS * RANK * D_OUT, 1.0, 3)),
        Input::trained(gates),
    ];
    let operation = |[x, a, b, gates]: [Tensor<1>; 4]| {
        let (a, b) = (a.reshape([D_IN, EXPERTS * RANK]), b.reshape([EXPERTS * RANK, D_OUT]));
        low_rank_experts(x.reshape([rows, D_IN]), a, b, gates.reshape([rows, EXPERTS]), SCALE)
    };
    compare(&inputs, dtype, device, operation, forward, backward)
}

/// `hₑ = x·Aₑ` of one row, by expert and place.
fn inner(x: &[f64], a: &[f64]) -> Vec<f64> {
    let width = EXPERTS * RANK;
    (0..width).map(|j| (0..D_IN).map(|i| x[i] * a[i * width + j]).sum()).collect()
}

fn forward([x, a, b, gates]: [&[f64]; 4]) -> Vec<f64> {
    let row = |(x, gates): (&[f64], &[f64])| {
        let h = inner(x, a);
        let y = |o: usize| SCALE * (0..h.len()).map(|j| gates[j / RANK] * h[j] * b[j * D_OUT + o]).sum::<f64>();
        (0..D_OUT).map(y).collect::<Vec<_>>()
    };
    x.chunks(D_IN).zip(gates.chunks(EXPERTS)).flat_map(row).collect()
}

fn backward([x, a, b, gates]: [&[f64]; 4], dy: &[f64]) -> [Option<Vec<f64>>; 4] {
    let width = EXPERTS * RANK;
    let (mut dx, mut da, mut db, mut dgates) = (Vec::new(), vec![0.0; a.len()], vec![0.0; b.len()], Vec::new());
    for ((x, gates), dy) in x.chunks(D_IN).zip(gates.chunks(EXPERTS)).zip(dy.chunks(D_OUT)) {
        let h = inner(x, a);
        let u: Vec<f64> =
            (0..width).map(|j| SCALE * (0..D_OUT).map(|o| dy[o] * b[j * D_OUT + o]).sum::<f64>()).collect();
        dx.extend((0..D_IN).map(|i| (0..width).map(|j| gates[j / RANK] * u[j] * a[i * width + j]).sum::<f64>()));
        for j in 0..width {
            let gate = gates[j / RANK];
            (0..D_IN).for_each(|i| da[i * width + j] += x[i] * gate * u[j]);
            (0..D_OUT).for_each(|o| db[j * D_OUT + o] += SCALE * gate * h[j] * dy[o]);
        }
        dgates.extend((0..EXPERTS).map(|e| {
            let sum: f64 = (e * RANK..(e + 1) * RANK).map(|j| h[j] * u[j]).sum();
            // One that is shut has none.
            if gates[e] == 0.0 { 0.0 } else { sum }
        }));
    }
    [Some(dx), Some(da), Some(db), Some(dgates)]
}
