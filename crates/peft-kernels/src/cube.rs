//! What the CubeCL kernels of several operations share.

use burn::cubecl;
use burn::tensor::{DType, Shape};
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;

/// Threads of a group.
pub(crate) const UNITS: usize = 64;

/// The most groups of threads in a direction that every device allows.
pub(crate) const MOST_CUBES: usize = 65_535;

/// Whether the kernels are for these tensors. In f16 and bf16 a matrix product has instructions of its own on many devices, which bodies of Burn's operations
/// reach.
pub(crate) fn computes(tensors: &[&CubeTensor]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype == DType::F32)
}

/// A tensor without values yet. A backend may pad rows unless it is told not to, and the kernels count without.
pub(crate) fn empty<const D: usize>(like: &CubeTensor, shape: [usize; D], dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), Shape::new(shape), dtype)
}

/// A group of threads for each of `count` things; [`CUBE_POS`] counts them, and the last row of groups may go beyond.
pub(crate) fn groups(count: usize) -> CubeCount {
    let across = count.clamp(1, MOST_CUBES);
    CubeCount::Static(across as u32, count.div_ceil(across) as u32, 1)
}

/// The sum of what each thread of a group of [`UNITS`] has, for all of them.
#[cube]
pub(crate) fn sum_of_group(value: f32) -> f32 {
    let unit = UNIT_POS_X as usize;
    let mut sums = Shared::<[f32]>::new_slice(comptime!(UNITS));
    sums[unit] = value;
    sync_cube();
    let mut half = comptime!(UNITS / 2).runtime();
    while half > 0 {
        if unit < half {
            let other = sums[unit + half];
            sums[unit] += other;
        }
        sync_cube();
        half /= 2;
    }
    sums[0]
}
