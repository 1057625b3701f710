//! Products of few rows with few columns, all of which lie apart: a tile of sums at a time, in registers.

/// Rows and columns of a tile.
const ROWS: usize = 2;
const COLUMNS: usize = 4;

/// Gives the sum of products of each of `rows` with each of `columns`, all of one length, and which of them these are.
pub(crate) fn dots(rows: &[&[f32]], columns: &[&[f32]], give: impl FnMut(usize, usize, f32)) {
    pulp::Arch::new().dispatch(Dots { rows, columns, give });
}

struct Dots<'a, F> {
    rows: &'a [&'a [f32]],
    columns: &'a [&'a [f32]],
    give: F,
}

impl<F: FnMut(usize, usize, f32)> pulp::WithSimd for Dots<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(mut self, simd: S) {
        let whole = self.rows.len() / ROWS * ROWS;
        for row in (0..whole).step_by(ROWS) {
            self.along::<S, ROWS>(simd, row);
        }
        for row in whole..self.rows.len() {
            self.along::<S, 1>(simd, row);
        }
    }
}

impl<F: FnMut(usize, usize, f32)> Dots<'_, F> {
    /// Some rows with all columns.
    #[inline(always)]
    fn along<S: pulp::Simd, const R: usize>(&mut self, simd: S, row: usize) {
        let whole = self.columns.len() / COLUMNS * COLUMNS;
        for column in (0..whole).step_by(COLUMNS) {
            self.tile::<S, R, COLUMNS>(simd, row, column);
        }
        for column in whole..self.columns.len() {
            self.tile::<S, R, 1>(simd, row, column);
        }
    }

    #[inline(always)]
    fn tile<S: pulp::Simd, const R: usize, const C: usize>(&mut self, simd: S, row: usize, column: usize) {
        let left: [_; R] = std::array::from_fn(|at| S::as_simd_f32s(self.rows[row + at]));
        let right: [_; C] = std::array::from_fn(|at| S::as_simd_f32s(self.columns[column + at]));
        let mut sums = [[simd.splat_f32s(0.0); C]; R];
        let vectors = left[0].0.len();
        let (left_vectors, right_vectors) = (left.map(|(x, _)| &x[..vectors]), right.map(|(x, _)| &x[..vectors]));
        for at in 0..vectors {
            let right = right_vectors.map(|vectors| vectors[at]);
            for (sums, left) in sums.iter_mut().zip(&left_vectors) {
                sums.iter_mut().zip(right).for_each(|(sum, right)| *sum = simd.mul_add_f32s(left[at], right, *sum));
            }
        }
        for (r, (sums, (_, left))) in sums.into_iter().zip(left).enumerate() {
            for (c, (sum, (_, right))) in sums.into_iter().zip(right).enumerate() {
                let rest: f32 = left.iter().zip(right).map(|(left, right)| left * right).sum();
                (self.give)(row + r, column + c, simd.reduce_sum_f32s(sum) + rest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_double_precision() {
        let values = |count: usize| (0..count).map(|at| (at * 37 % 101) as f32 / 50.0 - 1.0).collect::<Vec<_>>();
        for [m, k, n] in [[5, 70, 6], [1, 1, 1], [2, 129, 15], [3, 0, 8]] {
            let (left, right) = (values(m * k), values(n * k));
            let [rows, columns] = [(&left, m), (&right, n)]
                .map(|(of, count)| (0..count).map(|at| &of[at * k..][..k]).collect::<Vec<_>>());
            let mut given = 0;
            dots(&rows, &columns, |at, column, sum| {
                let exact: f64 = rows[at].iter().zip(columns[column]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                assert!((f64::from(sum) - exact).abs() < 1e-4, "{m} x {k} x {n}, at {at}, {column}");
                given += 1;
            });
            assert_eq!(given, m * n);
        }
    }
}
