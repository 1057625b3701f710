//! The path on the CPU where many gates are open: products with all factors at once.

use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;

use crate::host::product::{Threads, new_product};
use crate::host::{Host, Matrix};

/// Whether more than a quarter of the gates is open: products with the factors of all experts, wide as they are, take about as long as a
/// quarter of the pairs one by one.
pub(super) fn pays<B: Host>(gates: &FloatTensor<B>) -> bool {
    let gates = B::values(gates);
    4 * gates.iter().filter(|gate| **gate != 0.0).count() > gates.len()
}

pub(super) fn experts<B: Host>(
    x: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    gates: FloatTensor<B>,
    scale: f64,
) -> FloatTensor<B> {
    let [rows, inner, d_out] = [x.shape()[0], b.shape()[0], b.shape()[1]];
    let mut h = new_product(&B::matrix(&x), &B::matrix(&a), 1.0, Threads::All);
    gate(&mut h, &B::values(&gates));
    let y = new_product(&Matrix::contiguous(h, rows, inner), &B::matrix(&b), scale as f32, Threads::All);
    B::tensor(y, Shape::new([rows, d_out]))
}

pub(super) fn experts_backward<B: Host>(
    grad: FloatTensor<B>,
    x: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    gates: FloatTensor<B>,
    scale: f64,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let shapes = [&x, &a, &b, &gates].map(TensorMetadata::shape);
    let (rows, inner, scale) = (x.shape()[0], b.shape()[0], scale as f32);
    let ([grad, x, a, b], gates) = ([&grad, &x, &a, &b].map(B::matrix), B::values(&gates));
    let mut h = new_product(&x, &a, 1.0, Threads::All);
    let mut u = new_product(&grad, &b.transposed(), scale, Threads::All);
    let rank = inner * rows / gates.len().max(1);
    let pairs = h.chunks(rank.max(1)).zip(u.chunks(rank.max(1))).zip(&*gates);
    let along = |((h, u), gate): ((&[f32], &[f32]), &f32)| match *gate {
        0.0 => 0.0,
        _ => h.iter().zip(u).map(|(h, u)| h * u).sum(),
    };
    let gates_grad = pairs.map(along).collect();
    [&mut h, &mut u].into_iter().for_each(|each| gate(each, &gates));
    let [h, u] = [h, u].map(|each| Matrix::contiguous(each, rows, inner));
    let grads = [
        new_product(&u, &a.transposed(), 1.0, Threads::All),
        new_product(&x.transposed(), &u, 1.0, Threads::All),
        new_product(&h.transposed(), &grad, scale, Threads::All),
        gates_grad,
    ];
    let [x, a, b, gates] = grads;
    let [of_x, of_a, of_b, of_gates] = shapes;
    (B::tensor(x, of_x), B::tensor(a, of_a), B::tensor(b, of_b), B::tensor(gates, of_gates))
}

/// Each expert's part of a row times its gate.
fn gate(h: &mut [f32], gates: &[f32]) {
    let rank = h.len() / gates.len().max(1);
    h.chunks_mut(rank.max(1)).zip(gates).for_each(|(part, gate)| part.iter_mut().for_each(|value| *value *= gate));
}
