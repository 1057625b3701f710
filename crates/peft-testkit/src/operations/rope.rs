//! The rotary position embedding.

use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::kernels::rope;

use super::{ALL, Input, Operation, by_differences, in_types};
use crate::Failure;
use crate::state::normal;

const SHAPE: [usize; 4] = [2, 5, 3, 6];
const PAIRS: usize = SHAPE[3] / 2;

pub(super) fn checks() -> Vec<Operation> {
    let each = |(name, rows): (&str, usize)| in_types(name, ALL, move |dtype, device| deviation(rows, dtype, device));
    [("rope", 1), ("rope of each row", SHAPE[0])].into_iter().flat_map(each).collect()
}

/// With angles of their own for so many rows.
fn deviation(rows: usize, dtype: DType, device: &Device) -> Result<f64, Failure> {
    let [_, seq, heads, head_dim] = SHAPE;
    let turns = normal(rows * seq * PAIRS, 3.0, 2);
    let inputs = [Input::trained(normal(SHAPE.iter().product(), 1.0, 1))];
    let operation = |[x]: [Tensor<1>; 1]| {
        let angles = TensorData::new(angles(&turns), [rows, seq, 1, head_dim]);
        // Angles may stay in f32, whatever is computed in.
        let angles = Tensor::from_data(angles, (&x.device(), DType::F32));
        rope(x.reshape(SHAPE), angles)
    };
    let reference = |[x]: [&[f64]; 1]| {
        let value = |at: usize| {
            let (head, pair) = (at - at % head_dim, at % PAIRS);
            let turn = turns[at / (heads * head_dim) % (rows * seq) * PAIRS + pair];
            let ((sin, cos), x, y) = (f64::from(turn).sin_cos(), x[head + pair], x[head + PAIRS + pair]);
            if at % head_dim < PAIRS { x * cos - y * sin } else { y * cos + x * sin }
        };
        (0..x.len()).map(value).collect()
    };
    by_differences(&inputs, dtype, device, operation, reference)
}

/// Of each position the cosines, then the sines.
fn angles(turns: &[f32]) -> Vec<f32> {
    let position = |turns: &[f32]| -> Vec<f32> {
        let cosines = turns.iter().map(|turn| turn.cos());
        cosines.chain(turns.iter().map(|turn| turn.sin())).collect()
    };
    turns.chunks(PAIRS).flat_map(position).collect()
}
