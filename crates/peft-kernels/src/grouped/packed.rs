//! The layers of experts whose weights are packed.

use burn::tensor::{Int, Tensor, TensorData};

use super::Groups;
use crate::PackedMatrix;

/// Each row of `x` through the packed layer of its expert: [`grouped_linear`](crate::grouped_linear) over weights `[d_out, d_in]` that stay packed. The matrix of an expert without rows is
/// not read.
///
/// # Shapes
/// `x`: `[rows, d_in]`; result `[rows, d_out]`
///
/// # Panics
/// As [`PackedMatrix::linear`]; when there are no rows, or not as many matrices as experts.
pub fn grouped_packed(x: Tensor<2>, weights: &[PackedMatrix], groups: &Groups) -> Tensor<2> {
    let ([rows, _], experts) = (x.dims(), groups.starts.len() - 1);
    assert!(
        rows > 0 && rows == groups.order.len() && weights.len() == experts,
        "grouped linear: an input {:?} and {} packed matrices for {} rows of {experts} experts",
        x.dims(),
        weights.len(),
        groups.order.len()
    );
    let device = x.device();
    let places = |rows: &[usize]| {
        let rows: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
        Tensor::<1, Int>::from_data(TensorData::new(rows.clone(), [rows.len()]), &device)
    };
    let active: Vec<(usize, usize)> = groups.active().map(|(expert, range)| (expert, range.len())).collect();
    through(x.select(0, places(&groups.order)), weights, &active).select(0, places(&groups.back()))
}

/// Rows by expert, so many for each, through their layers. In halves: the gradient of a part of a tensor takes the room of the whole, so that taking each expert's rows out of all
/// would cost `experts · rows`, and this costs `log(experts) · rows`.
fn through(x: Tensor<2>, weights: &[PackedMatrix], active: &[(usize, usize)]) -> Tensor<2> {
    if let [(expert, _)] = active {
        return weights[*expert].linear(x);
    }
    let (first, second) = active.split_at(active.len() / 2);
    let count: usize = first.iter().map(|(_, rows)| rows).sum();
    let halves = [(x.clone().slice([..count]), first), (x.slice([count..]), second)];
    Tensor::cat(halves.map(|(x, active)| through(x, weights, active)).into(), 0)
}
