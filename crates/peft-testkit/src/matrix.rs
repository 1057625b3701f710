//! Dense double-precision matrices for reference formulas.

use peft_core::{Error, Result};

/// A row-major matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    rows: usize,
    columns: usize,
    values: Vec<f64>,
}

impl Matrix {
    /// `values` in row-major order.
    ///
    /// # Errors
    /// When there are not `rows · columns` of them.
    pub fn new(rows: usize, columns: usize, values: Vec<f64>) -> Result<Self> {
        if values.len() != rows * columns {
            return Err(Error::config("matrix", format!("{rows} x {columns} values"), values.len()));
        }
        Ok(Self { rows, columns, values })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The values in row-major order.
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// The product `self · other`.
    ///
    /// # Errors
    /// When `other` has not as many rows as this has columns.
    pub fn times(&self, other: &Self) -> Result<Self> {
        if self.columns != other.rows {
            return Err(Error::config("matrix product", format!("{} rows", self.columns), other.rows));
        }
        let value = |at: usize| {
            let (row, column) = (at / other.columns, at % other.columns);
            (0..self.columns)
                .map(|k| self.values[row * self.columns + k] * other.values[k * other.columns + column])
                .sum()
        };
        Self::new(self.rows, other.columns, (0..self.rows * other.columns).map(value).collect())
    }

    /// The sum; an `other` of one row is added to every row.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn plus(&self, other: &Self) -> Result<Self> {
        self.zip(other, |a, b| a + b)
    }

    /// The product value by value; an `other` of one row multiplies every row.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn scale_by(&self, other: &Self) -> Result<Self> {
        self.zip(other, |a, b| a * b)
    }

    /// Every value times `factor`.
    #[must_use]
    pub fn scale(&self, factor: f64) -> Self {
        Self { values: self.values.iter().map(|value| value * factor).collect(), ..*self }
    }

    /// A function of every value.
    #[must_use]
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self { values: self.values.iter().map(|value| f(*value)).collect(), ..*self }
    }

    /// Every row with mean zero and variance one; `epsilon` is added to the variance.
    #[must_use]
    pub fn normed(&self, epsilon: f64) -> Self {
        let count = self.columns as f64;
        let rows = self.values.chunks(self.columns.max(1)).flat_map(|row| {
            let mean = row.iter().sum::<f64>() / count;
            let variance = row.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
            row.iter().map(move |value| (value - mean) / (variance + epsilon).sqrt())
        });
        Self { values: rows.collect(), ..*self }
    }

    fn zip(&self, other: &Self, f: impl Fn(f64, f64) -> f64) -> Result<Self> {
        if self.columns != other.columns || (other.rows != self.rows && other.rows != 1) {
            let expected = format!("{} x {} or 1 x {}", self.rows, self.columns, self.columns);
            return Err(Error::config("matrix", expected, format!("{} x {}", other.rows, other.columns)));
        }
        let values = self.values.iter().zip(other.values.iter().cycle()).map(|(a, b)| f(*a, *b)).collect();
        Ok(Self { values, ..*self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_and_sums() {
        let a = Matrix::new(2, 3, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let b = Matrix::new(3, 2, vec![1.0, 0.0, 0.0, 1.0, 1.0, 1.0]).unwrap();
        let row = Matrix::new(1, 2, vec![10.0, 20.0]).unwrap();
        let product = a.times(&b).unwrap();
        assert_eq!(product.values(), [4.0, 5.0, 10.0, 11.0]);
        assert_eq!(product.plus(&row).unwrap().values(), [14.0, 25.0, 20.0, 31.0]);
        assert_eq!(product.scale_by(&row).unwrap().scale(0.5).values(), [20.0, 50.0, 50.0, 110.0]);
        assert_eq!(product.map(|value| value - 4.0).scale_by(&product).unwrap().values(), [0.0, 5.0, 60.0, 77.0]);
    }

    #[test]
    fn a_normed_row_has_mean_zero_and_variance_one() {
        let a = Matrix::new(2, 2, vec![1.0, 3.0, 5.0, 5.0]).unwrap();
        assert_eq!(a.normed(0.0).values()[..2], [-1.0, 1.0]);
        assert_eq!(a.normed(3.0).values(), [-0.5, 0.5, 0.0, 0.0]);
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let a = Matrix::new(2, 3, vec![0.0; 6]).unwrap();
        assert!(a.times(&a).is_err() && a.plus(&a.times(&Matrix::new(3, 1, vec![0.0; 3]).unwrap()).unwrap()).is_err());
        assert!(Matrix::new(2, 2, vec![0.0; 3]).is_err());
    }
}
