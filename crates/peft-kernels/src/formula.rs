//! Arithmetic on a backend's floats, so that the bodies that run everywhere read as the formulas they are.

use std::ops::{Add, Div, Mul, Neg, Range, Sub};

use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, Scalar, Shape, Slice};

/// A float tensor with operators; shapes broadcast.
#[derive(Clone, Debug)]
pub(crate) struct Float<B: Backend>(pub(crate) FloatTensor<B>);

impl<B: Backend> Float<B> {
    pub(crate) fn shape(&self) -> Shape {
        self.0.shape()
    }

    pub(crate) fn exp(self) -> Self {
        Self(B::float_exp(self.0))
    }

    pub(crate) fn log(self) -> Self {
        Self(B::float_log(self.0))
    }

    pub(crate) fn erf(self) -> Self {
        Self(B::float_erf(self.0))
    }

    pub(crate) fn sigmoid(self) -> Self {
        Self(B::sigmoid(self.0))
    }

    pub(crate) fn square(self) -> Self {
        self.clone() * self
    }

    pub(crate) fn root(self) -> Self {
        Self(B::float_sqrt(self.0))
    }

    /// `1 / √x`
    pub(crate) fn inverse_root(self) -> Self {
        Self(B::float_recip(self.root().0))
    }

    /// The sum over a dimension, which stays with length one.
    pub(crate) fn sum(self, dim: usize) -> Self {
        Self(B::float_sum_dim(self.0, dim))
    }

    /// The mean over a dimension, which stays with length one.
    pub(crate) fn mean(self, dim: usize) -> Self {
        Self(B::float_mean_dim(self.0, dim))
    }

    /// The largest value over a dimension, which stays with length one.
    pub(crate) fn max(self, dim: usize) -> Self {
        Self(B::float_max_dim(self.0, dim))
    }

    pub(crate) fn matmul(self, other: Self) -> Self {
        Self(B::float_matmul(self.0, other.0))
    }

    /// The product with a frozen matrix that may be of another type: in that type, and back.
    pub(crate) fn times_frozen(self, weight: Self) -> Self {
        let dtype = self.dtype();
        self.cast(weight.dtype()).matmul(weight).cast(dtype)
    }

    pub(crate) fn swap(self, left: usize, right: usize) -> Self {
        Self(B::float_swap_dims(self.0, left, right))
    }

    pub(crate) fn reshape<const D: usize>(self, shape: [usize; D]) -> Self {
        Self(B::float_reshape(self.0, Shape::new(shape)))
    }

    /// Some places of a dimension.
    pub(crate) fn narrow(self, dim: usize, places: Range<usize>) -> Self {
        let mut slices = vec![Slice::full(); self.shape().rank()];
        slices[dim] = Slice::from(places);
        Self(B::float_slice(self.0, &slices))
    }

    pub(crate) fn fill(self, mask: BoolTensor<B>, value: f32) -> Self {
        Self(B::float_mask_fill(self.0, mask, Scalar::from(value)))
    }

    pub(crate) fn dtype(&self) -> DType {
        self.0.dtype()
    }

    pub(crate) fn cast(self, dtype: DType) -> Self {
        if self.dtype() == dtype { self } else { Self(B::float_cast(self.0, dtype.into())) }
    }
}

macro_rules! operator {
    ($trait:ident $method:ident $tensors:ident $scalar:ident) => {
        impl<B: Backend> $trait for Float<B> {
            type Output = Self;

            fn $method(self, other: Self) -> Self {
                Self(B::$tensors(self.0, other.0))
            }
        }

        impl<B: Backend> $trait<f64> for Float<B> {
            type Output = Self;

            fn $method(self, other: f64) -> Self {
                Self(B::$scalar(self.0, Scalar::from(other)))
            }
        }
    };
}

operator!(Add add float_add float_add_scalar);
operator!(Sub sub float_sub float_sub_scalar);
operator!(Mul mul float_mul float_mul_scalar);
operator!(Div div float_div float_div_scalar);

impl<B: Backend> Neg for Float<B> {
    type Output = Self;

    fn neg(self) -> Self {
        Self(B::float_neg(self.0))
    }
}
