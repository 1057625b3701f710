//! Backends whose tensors lie in this machine's memory, and what their paths are made of: slices, threads, vector lanes, products.
pub(crate) mod bfloat;
pub(crate) mod dots;
mod factor;
pub(crate) mod lanes;
mod process;
pub(crate) mod product;

use std::borrow::Cow;
use std::ops::Range;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata as _};
use burn::tensor::{DType, Shape};
use rayon::prelude::*;

pub(crate) use factor::Factor;
pub use process::prepare_process;
pub(crate) use product::Matrix;

/// Values of a piece of work that another thread may take: enough to be worth waking it.
pub(crate) const PIECE: usize = 16 * 1024;

/// A backend whose floats are slices in memory.
pub(crate) trait Host: Backend {
    /// The values in row-major order; borrowed where they lie so.
    fn values(tensor: &FloatTensor<Self>) -> Cow<'_, [f32]>;

    /// The values in row-major order, without a copy where nobody else has them.
    fn into_values(tensor: FloatTensor<Self>) -> Vec<f32>;

    /// A matrix as it lies, transposed or not.
    fn matrix(tensor: &FloatTensor<Self>) -> Matrix<'_>;

    /// A frozen matrix as it lies where it is one of f32 or bfloat16.
    fn factor(tensor: &FloatTensor<Self>) -> Factor<'_> {
        Factor::Single(Self::matrix(tensor))
    }

    /// A tensor of these values.
    fn tensor(values: Vec<f32>, shape: Shape) -> FloatTensor<Self>;

    /// The integers in row-major order.
    fn ints(tensor: IntTensor<Self>) -> Vec<i64>;

    /// Integers as the backend has them.
    fn int_tensor(values: Vec<i64>, shape: Shape) -> IntTensor<Self>;

    /// Whether the paths of this module compute these tensors: those in f32.
    fn computes(tensors: &[&FloatTensor<Self>]) -> bool {
        tensors.iter().all(|tensor| tensor.dtype() == DType::F32)
    }
}

/// Fills `out` piece by piece on all threads; `width` values belong together.
pub(crate) fn fill(out: &mut [f32], width: usize, work: impl Fn(Range<usize>, &mut [f32]) + Sync) {
    let width = width.max(1);
    let piece = (PIECE / width).max(1) * width;
    let pieces = out.par_chunks_mut(piece).enumerate();
    pieces.for_each(|(at, out)| work(at * piece..at * piece + out.len(), out));
}

/// Fills two outputs of the same length.
pub(crate) fn fill_both(
    left: &mut [f32],
    right: &mut [f32],
    width: usize,
    work: impl Fn(Range<usize>, &mut [f32], &mut [f32]) + Sync,
) {
    let width = width.max(1);
    let piece = (PIECE / width).max(1) * width;
    let pieces = left.par_chunks_mut(piece).zip(right.par_chunks_mut(piece)).enumerate();
    pieces.for_each(|(at, (left, right))| work(at * piece..at * piece + left.len(), left, right));
}

#[cfg(feature = "flex")]
mod flex {
    use burn::backend::Flex;
    use burn::backend::ops::{FloatTensorOps as _, IntTensorOps as _};
    use burn::tensor::{FloatDType, IntDType, TensorData};
    use burn_flex::FlexTensor;

    use super::*;

    fn as_it_lies<T: Clone>(tensor: &FlexTensor, storage: fn(&FlexTensor) -> &[T]) -> Matrix<'_, T> {
        let layout = tensor.layout();
        let [rows, columns] = layout.shape()[..] else { panic!("a matrix of two dimensions") };
        match *layout.strides() {
            [row, column] if row >= 0 && column >= 0 && (row == 1 || column == 1) => {
                let values = Cow::Borrowed(&storage(tensor)[layout.start_offset()..]);
                Matrix { values, rows, columns, row: row as usize, column: column as usize }
            }
            _ => Matrix::contiguous(storage(&tensor.to_contiguous()).to_vec(), rows, columns),
        }
    }

    impl Host for Flex {
        fn values(tensor: &FlexTensor) -> Cow<'_, [f32]> {
            match tensor.as_slice::<f32>() {
                Some(values) => Cow::Borrowed(values),
                None => Cow::Owned(Self::into_values(tensor.to_contiguous())),
            }
        }

        fn into_values(tensor: FlexTensor) -> Vec<f32> {
            tensor.into_data().into_vec().expect("values in f32")
        }

        fn matrix(tensor: &FlexTensor) -> Matrix<'_> {
            as_it_lies(tensor, FlexTensor::storage)
        }

        fn factor(tensor: &FlexTensor) -> Factor<'_> {
            match tensor.dtype() {
                DType::BF16 => Factor::Half(as_it_lies(tensor, FlexTensor::storage)),
                DType::F32 => Factor::Single(Self::matrix(tensor)),
                _ => {
                    let [rows, columns] = tensor.layout().shape()[..] else { panic!("a matrix of two dimensions") };
                    let values = Self::into_values(Self::float_cast(tensor.clone(), FloatDType::F32));
                    Factor::Single(Matrix::contiguous(values, rows, columns))
                }
            }
        }

        fn tensor(values: Vec<f32>, shape: Shape) -> FlexTensor {
            FlexTensor::from_data(TensorData::new(values, shape))
        }

        fn ints(tensor: IntTensor<Self>) -> Vec<i64> {
            Self::int_cast(tensor, IntDType::I64).into_data().into_vec().expect("integers of 64 bits")
        }

        fn int_tensor(values: Vec<i64>, shape: Shape) -> IntTensor<Self> {
            FlexTensor::from_data(TensorData::new(values, shape))
        }
    }
}

#[cfg(feature = "ndarray")]
mod ndarray {
    use burn::backend::NdArray;
    use burn::backend::ops::IntTensorOps as _;
    use burn::tensor::{IntDType, TensorData};
    use burn_ndarray::NdArrayTensor;

    use super::*;

    impl Host for NdArray {
        fn values(tensor: &NdArrayTensor) -> Cow<'_, [f32]> {
            let NdArrayTensor::F32(storage) = tensor else { panic!("values in f32") };
            let view = storage.view();
            match view.to_slice() {
                Some(values) => Cow::Borrowed(values),
                None => Cow::Owned(view.iter().copied().collect()),
            }
        }

        fn into_values(tensor: NdArrayTensor) -> Vec<f32> {
            match tensor {
                NdArrayTensor::F32(storage) if storage.is_unique() && storage.view().is_standard_layout() => {
                    let (values, start) = storage.into_owned().into_owned().into_raw_vec_and_offset();
                    assert_eq!(start.unwrap_or(0), 0, "values from the beginning");
                    values
                }
                tensor => Self::values(&tensor).into_owned(),
            }
        }

        fn matrix(tensor: &NdArrayTensor) -> Matrix<'_> {
            let NdArrayTensor::F32(storage) = tensor else { panic!("values in f32") };
            let view = storage.view();
            let [rows, columns] = *view.shape() else { panic!("a matrix of two dimensions") };
            let transposed = view.clone().reversed_axes();
            match transposed.to_slice() {
                Some(values) => Matrix { values: Cow::Borrowed(values), rows, columns, row: 1, column: rows },
                None => Matrix::contiguous(Self::values(tensor), rows, columns),
            }
        }

        fn tensor(values: Vec<f32>, shape: Shape) -> NdArrayTensor {
            NdArrayTensor::from_data(TensorData::new(values, shape))
        }

        fn ints(tensor: IntTensor<Self>) -> Vec<i64> {
            let NdArrayTensor::I64(storage) = Self::int_cast(tensor, IntDType::I64) else {
                panic!("integers of 64 bits")
            };
            storage.view().iter().copied().collect()
        }

        fn int_tensor(values: Vec<i64>, shape: Shape) -> IntTensor<Self> {
            NdArrayTensor::from_data(TensorData::new(values, shape))
        }
    }
}
