//! Kernels: a group of threads goes through a row, three times at most, which a cache serves.

use burn::backend::tensor::FloatTensor;
use burn::cubecl;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::into_contiguous;

use crate::cube::{UNITS, empty, groups, sum_of_group};

use super::Norm;

/// The mean, zero unless it is taken away.
#[cube]
fn mean_of(x: &Tensor<f32>, start: usize, width: usize, #[comptime] centred: bool) -> f32 {
    let mut mean = 0.0f32;
    if comptime!(centred) {
        let mut sum = 0.0f32;
        let mut at = UNIT_POS_X as usize;
        while at < width {
            sum += x[start + at];
            at += comptime!(UNITS);
        }
        mean = sum_of_group(sum) / width as f32;
    }
    mean
}

/// `1/σ`
#[cube]
fn inverse_of(x: &Tensor<f32>, start: usize, width: usize, mean: f32, epsilon: f32) -> f32 {
    let mut sum = 0.0f32;
    let mut at = UNIT_POS_X as usize;
    while at < width {
        let centred = x[start + at] - mean;
        sum += centred * centred;
        at += comptime!(UNITS);
    }
    (sum_of_group(sum) / width as f32 + epsilon).inverse_sqrt()
}

#[cube(launch)]
fn norm_kernel(
    x: &Tensor<f32>,
    gamma: &Tensor<f32>,
    y: &mut Tensor<f32>,
    rows: u32,
    epsilon: f32,
    #[comptime] centred: bool,
) {
    let (row, width) = (CUBE_POS, gamma.len());
    if row >= rows as usize {
        terminate!();
    }
    let start = row * width;
    let mean = mean_of(x, start, width, centred);
    let inverse = inverse_of(x, start, width, mean, epsilon);
    let mut at = UNIT_POS_X as usize;
    while at < width {
        y[start + at] = (x[start + at] - mean) * inverse * gamma[at];
        at += comptime!(UNITS);
    }
}

#[cube(launch)]
fn norm_backward_kernel(
    grad: &Tensor<f32>,
    x: &Tensor<f32>,
    gamma: &Tensor<f32>,
    x_grad: &mut Tensor<f32>,
    rows: u32,
    epsilon: f32,
    #[comptime] centred: bool,
) {
    let (row, width) = (CUBE_POS, gamma.len());
    if row >= rows as usize {
        terminate!();
    }
    let (start, unit) = (row * width, UNIT_POS_X as usize);
    let mean = mean_of(x, start, width, centred);
    let inverse = inverse_of(x, start, width, mean, epsilon);
    let mut along = 0.0f32;
    let mut level = 0.0f32;
    let mut at = unit;
    while at < width {
        let g = grad[start + at] * gamma[at];
        along += g * (x[start + at] - mean);
        level += g;
        at += comptime!(UNITS);
    }
    let along = sum_of_group(along) * inverse / width as f32;
    let mut offset = 0.0f32;
    if comptime!(centred) {
        offset = sum_of_group(level) / width as f32;
    }
    let mut at = unit;
    while at < width {
        let normed = (x[start + at] - mean) * inverse;
        x_grad[start + at] = (grad[start + at] * gamma[at] - offset - normed * along) * inverse;
        at += comptime!(UNITS);
    }
}

pub(super) fn norm(
    x: FloatTensor<CubeBackend>,
    gamma: FloatTensor<CubeBackend>,
    norm: Norm,
) -> FloatTensor<CubeBackend> {
    let (rows, width, client) = (x.meta.shape()[0], x.meta.shape()[1], x.client.clone());
    let y = empty(&x, [rows, width], DType::F32);
    norm_kernel::launch(
        &client,
        groups(rows),
        CubeDim::new_1d(UNITS as u32),
        into_contiguous(x).into_tensor_arg(),
        into_contiguous(gamma).into_tensor_arg(),
        y.clone().into_tensor_arg(),
        rows as u32,
        norm.epsilon as f32,
        norm.centred,
    );
    y
}

pub(super) fn norm_backward(
    grad: FloatTensor<CubeBackend>,
    x: FloatTensor<CubeBackend>,
    gamma: FloatTensor<CubeBackend>,
    norm: Norm,
) -> FloatTensor<CubeBackend> {
    let (rows, width, client) = (x.meta.shape()[0], x.meta.shape()[1], x.client.clone());
    let x_grad = empty(&x, [rows, width], DType::F32);
    norm_backward_kernel::launch(
        &client,
        groups(rows),
        CubeDim::new_1d(UNITS as u32),
        into_contiguous(grad).into_tensor_arg(),
        into_contiguous(x).into_tensor_arg(),
        into_contiguous(gamma).into_tensor_arg(),
        x_grad.clone().into_tensor_arg(),
        rows as u32,
        norm.epsilon as f32,
        norm.centred,
    );
    x_grad
}
