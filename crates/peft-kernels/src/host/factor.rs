//! The frozen factor of a product, in the type in which it is kept.

use std::ops::Range;

use half::bf16;

use super::bfloat::{self, Runs};
use super::product::{Matrix, Threads, Write, new_product, product};

/// A frozen matrix.
pub(crate) enum Factor<'a> {
    /// In f32: the product is one of f32.
    Single(Matrix<'a>),
    /// In bfloat16: the other factor is rounded to it, and sums are in f32.
    Half(Matrix<'a, bf16>),
}

impl Factor<'_> {
    pub(crate) fn dims(&self) -> [usize; 2] {
        match self {
            Self::Single(weight) => [weight.rows, weight.columns],
            Self::Half(weight) => [weight.rows, weight.columns],
        }
    }

    pub(crate) fn transposed(&self) -> Factor<'_> {
        match self {
            Self::Single(weight) => Factor::Single(weight.transposed()),
            Self::Half(weight) => Factor::Half(weight.transposed()),
        }
    }

    /// Some rows and columns.
    pub(crate) fn block(&self, rows: Range<usize>, columns: Range<usize>) -> Factor<'_> {
        match self {
            Self::Single(weight) => Factor::Single(weight.block(rows, columns)),
            Self::Half(weight) => Factor::Half(weight.block(rows, columns)),
        }
    }

    /// `x·W`
    pub(crate) fn applied_to(&self, x: &Matrix<'_>) -> Vec<f32> {
        match self {
            Self::Single(weight) => new_product(x, weight, 1.0, Threads::All),
            Self::Half(weight) => {
                let mut out = vec![0.0; x.rows * weight.columns];
                half_product(&mut out, x, weight);
                out
            }
        }
    }

    /// `out = x·W`
    pub(crate) fn apply(&self, out: &mut [f32], x: &Matrix<'_>) {
        match self {
            Self::Single(weight) => product((out, weight.columns), x, weight, 1.0, Write::Replace, Threads::All),
            Self::Half(weight) => half_product(out, x, weight),
        }
    }
}

fn half_product(out: &mut [f32], x: &Matrix<'_>, weight: &Matrix<'_, bf16>) {
    assert!(weight.fits(), "a factor is too short for its shape");
    let Matrix { values, rows, columns, row, column } = weight;
    let read = |start: usize, out: &mut [bf16]| out.copy_from_slice(&values[start..start + out.len()]);
    bfloat::product(out, x, &Runs { rows: *rows, columns: *columns, row: *row, column: *column, read: &read });
}
