//! Burn's own matrix product on the device: where it is wrong, everything after it is, and the fault is not this workspace's.

use burn::tensor::{Device, Tensor, TensorData};
use peft_testkit::{Failure, Finding, Matrix, Outcome, difference, read};

/// Rows, inner dimension and columns, as adapters have them: a device may take another kernel for each.
const SHAPES: [[usize; 3]; 3] = [[32, 4, 16], [8, 16, 32], [64, 64, 64]];

/// Products of small whole numbers, which every sum in f32 holds exactly.
pub(crate) fn matmul(device: &Device) -> Outcome {
    let mut wrong = Vec::new();
    for [m, k, n] in SHAPES {
        let values =
            |count: usize, step: usize| (0..count).map(|at| ((at * step) % 7) as f64 - 3.0).collect::<Vec<_>>();
        let (a, b) = (Matrix::new(m, k, values(m * k, 3))?, Matrix::new(k, n, values(k * n, 5))?);
        let tensor = |matrix: &Matrix| {
            let data = TensorData::new(matrix.values().to_vec(), [matrix.rows(), matrix.columns()]);
            Tensor::<2>::from_data(data.convert::<f32>(), device)
        };
        let off = difference(&read(tensor(&a).matmul(tensor(&b)))?, a.times(&b)?.values());
        if off != 0.0 {
            wrong.push(format!("[{m}, {k}] x [{k}, {n}] is off by {off:.1e}"));
        }
    }
    let fault =
        |wrong: &[String]| Failure::from(format!("Burn's own product is wrong on this device: {}", wrong.join(", ")));
    if wrong.is_empty() { Ok(Finding::Holds) } else { Err(fault(&wrong)) }
}
