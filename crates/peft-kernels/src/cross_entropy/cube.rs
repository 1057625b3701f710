//! A kernel: a group of threads scores a row of logits and leaves the gradient in its place. The products are the backend's own.

use std::ops::Range;

use burn::backend::ops::{FloatTensorOps as _, IntTensorOps as _};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::cubecl;
use burn::tensor::{DType, Shape, Slice};
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use crate::cube::{UNITS, empty, groups, sum_of_group};
use crate::formula;

use super::{chunks, plain};

/// Loss and likeliest entry of each row; its gradient in place of the row, if that is wanted.
#[cube(launch)]
fn score_kernel(
    z: &mut Tensor<f32>,
    targets: &Tensor<i32>,
    losses: &mut Tensor<f32>,
    best: &mut Tensor<i32>,
    vocab: u32,
    smoothing: f32,
    #[comptime] gradient: bool,
) {
    let (row, vocab, unit) = (CUBE_POS, vocab as usize, UNIT_POS_X as usize);
    if row >= targets.len() {
        terminate!();
    }
    let start = row * vocab;
    let place = likeliest(z, start, vocab);
    let highest = z[start + place];
    let mut total = 0.0f32;
    let mut mean = 0.0f32;
    let mut at = unit;
    while at < vocab {
        let shifted = z[start + at] - highest;
        total += shifted.exp();
        mean += shifted;
        at += comptime!(UNITS);
    }
    let total = sum_of_group(total);
    let mean = sum_of_group(mean) / vocab as f32;
    let target = targets[row];
    if unit == 0 {
        best[row] = place as i32;
        losses[row] = 0.0f32;
        if target >= 0 {
            let at_target = z[start + target as usize] - highest;
            losses[row] = total.ln() - (1.0f32 - smoothing) * at_target - smoothing * mean;
        }
    }
    if comptime!(gradient) {
        // The first thread has read what the others are about to write over.
        sync_cube();
        let level = smoothing / vocab as f32;
        let mut at = unit;
        while at < vocab {
            let mut value = 0.0f32;
            if target >= 0 {
                value = (z[start + at] - highest).exp() / total - level;
                if at == target as usize {
                    value -= 1.0f32 - smoothing;
                }
            }
            z[start + at] = value;
            at += comptime!(UNITS);
        }
    }
}

/// The first place of the largest value of a row, for all threads of the group.
#[cube]
fn likeliest(z: &mut Tensor<f32>, start: usize, vocab: usize) -> usize {
    let unit = UNIT_POS_X as usize;
    let mut values = Shared::<[f32]>::new_slice(comptime!(UNITS));
    let mut places = Shared::<[u32]>::new_slice(comptime!(UNITS));
    // A thread beyond the row stands for its first value, which never wins against an equal one of a smaller place.
    let mut highest = z[start];
    let mut place = 0usize;
    let mut at = unit;
    while at < vocab {
        if z[start + at] > highest {
            highest = z[start + at];
            place = at;
        }
        at += comptime!(UNITS);
    }
    values[unit] = highest;
    places[unit] = place as u32;
    sync_cube();
    let mut half = comptime!(UNITS / 2).runtime();
    while half > 0 {
        if unit < half {
            let (value, other) = (values[unit], values[unit + half]);
            let (here, there) = (places[unit], places[unit + half]);
            if other > value || (other == value && there < here) {
                values[unit] = other;
                places[unit] = there;
            }
        }
        sync_cube();
        half /= 2;
    }
    places[0] as usize
}

/// Loss and likeliest entry of each row of a chunk.
struct Scored {
    /// The gradient of the logits where it was asked for.
    z: formula::Float<CubeBackend>,
    losses: CubeTensor,
    best: CubeTensor,
}

/// Scores the tokens of a chunk; `targets` are I32.
fn score(
    chunk: Range<usize>,
    x: &CubeTensor,
    weight: &CubeTensor,
    targets: &CubeTensor,
    smoothing: f64,
    gradient: bool,
) -> Scored {
    let (rows, count) = (Slice::from(chunk.clone()), chunk.len());
    let z = formula::Float::<CubeBackend>(x.clone()).narrow(0, chunk).times_frozen(formula::Float(weight.clone()));
    let (z, vocab) = (into_contiguous(z.0), weight.meta.shape()[1]);
    let losses = empty(&z, [count], DType::F32);
    let best = empty(&z, [count], DType::I32);
    score_kernel::launch(
        &z.client.clone(),
        groups(count),
        CubeDim::new_1d(UNITS as u32),
        z.clone().into_tensor_arg(),
        into_contiguous(CubeBackend::int_slice(targets.clone(), &[rows])).into_tensor_arg(),
        losses.clone().into_tensor_arg(),
        best.clone().into_tensor_arg(),
        vocab as u32,
        smoothing as f32,
        gradient,
    );
    Scored { z: formula::Float(z), losses, best }
}

pub(super) fn linear_cross_entropy(
    x: FloatTensor<CubeBackend>,
    weight: FloatTensor<CubeBackend>,
    targets: IntTensor<CubeBackend>,
    smoothing: f64,
    gradient: bool,
) -> (FloatTensor<CubeBackend>, IntTensor<CubeBackend>, FloatTensor<CubeBackend>) {
    let ([tokens, width], vocab) = ([x.meta.shape()[0], x.meta.shape()[1]], weight.meta.shape()[1]);
    if tokens == 0 {
        return plain::linear_cross_entropy::<CubeBackend>(x, weight, targets, smoothing, gradient);
    }
    let back = formula::Float::<CubeBackend>(weight.clone()).swap(0, 1);
    let (ints, targets) = (targets.dtype, CubeBackend::int_cast(targets, DType::I32.into()));
    let (mut losses, mut best, mut x_grads) = (Vec::new(), Vec::new(), Vec::new());
    for chunk in chunks(tokens, vocab) {
        let scored = score(chunk, &x, &weight, &targets, smoothing, gradient);
        losses.push(scored.losses);
        best.push(scored.best);
        if gradient {
            x_grads.push(scored.z.times_frozen(back.clone()).0);
        }
    }
    let x_grad = match x_grads.is_empty() {
        true => CubeBackend::float_zeros(Shape::new([0, width]), &x.device, DType::F32.into()),
        false => CubeBackend::float_cat(x_grads, 0),
    };
    let best = CubeBackend::int_cast(CubeBackend::int_cat(best, 0), ints.into());
    (CubeBackend::float_cat(losses, 0), best, x_grad)
}

pub(super) fn linear_cross_entropy_weight(
    grad: FloatTensor<CubeBackend>,
    x: FloatTensor<CubeBackend>,
    weight: FloatTensor<CubeBackend>,
    targets: IntTensor<CubeBackend>,
    smoothing: f64,
) -> FloatTensor<CubeBackend> {
    let (tokens, vocab) = (x.meta.shape()[0], weight.meta.shape()[1]);
    if tokens == 0 {
        return plain::linear_cross_entropy_weight::<CubeBackend>(grad, x, weight, targets, smoothing);
    }
    let targets = CubeBackend::int_cast(targets, DType::I32.into());
    let of_chunk = |chunk: Range<usize>| {
        let each = formula::Float::<CubeBackend>(grad.clone()).narrow(0, chunk.clone()).reshape([chunk.len(), 1]);
        let rows = formula::Float::<CubeBackend>(x.clone()).narrow(0, chunk.clone());
        let z_grad = score(chunk, &x, &weight, &targets, smoothing, true).z;
        rows.swap(0, 1).matmul(z_grad * each)
    };
    let sum = chunks(tokens, vocab).map(of_chunk).reduce(|sum, each| sum + each);
    sum.expect("a chunk at least").0
}
