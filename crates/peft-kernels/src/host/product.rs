//! Matrix products on slices, by the `gemm` crate.
#![allow(unsafe_code, reason = "the library takes pointers; shapes are checked here")]

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

/// A matrix in memory: value `(r, c)` lies at `r · row + c · column`.
#[derive(Clone, Debug)]
pub(crate) struct Matrix<'a, T: Clone = f32> {
    pub(crate) values: Cow<'a, [T]>,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row: usize,
    pub(crate) column: usize,
}

impl<'a, T: Clone> Matrix<'a, T> {
    /// Rows one after the other.
    pub(crate) fn contiguous(values: impl Into<Cow<'a, [T]>>, rows: usize, columns: usize) -> Self {
        Self { values: values.into(), rows, columns, row: columns, column: 1 }
    }

    /// Rows that begin `row` values apart.
    pub(crate) fn strided(values: &'a [T], rows: usize, columns: usize, row: usize) -> Self {
        Self { values: Cow::Borrowed(values), rows, columns, row, column: 1 }
    }

    /// The transpose of the same values.
    pub(crate) fn transposed(&self) -> Matrix<'_, T> {
        let Self { values, rows, columns, row, column } = self;
        Matrix { values: Cow::Borrowed(values), rows: *columns, columns: *rows, row: *column, column: *row }
    }

    /// Some rows and columns of the same values.
    pub(crate) fn block(&self, rows: Range<usize>, columns: Range<usize>) -> Matrix<'_, T> {
        assert!(rows.end <= self.rows && columns.end <= self.columns, "a block inside a matrix");
        let start = (rows.start * self.row + columns.start * self.column).min(self.values.len());
        let values = Cow::Borrowed(&self.values[start..]);
        Matrix { values, rows: rows.len(), columns: columns.len(), row: self.row, column: self.column }
    }

    pub(crate) fn fits(&self) -> bool {
        self.rows == 0
            || self.columns == 0
            || (self.rows - 1) * self.row + (self.columns - 1) * self.column < self.values.len()
    }
}

impl Matrix<'_> {
    /// The values row by row.
    pub(crate) fn by_rows(&self) -> Vec<f32> {
        /// Rows and columns of a tile: lines of the cache.
        const TILE: usize = 16;
        let (columns, stride) = (self.columns, self.column);
        let mut out = vec![0.0; self.rows * columns];
        out.par_chunks_mut((TILE * columns).max(1)).enumerate().for_each(|(at, out)| {
            let (top, rows) = (at * TILE, out.len() / columns);
            // Whole tiles of a matrix that lies by columns.
            let whole = if self.row == 1 && rows == TILE { columns / TILE * TILE } else { 0 };
            for left in (0..whole).step_by(TILE) {
                let line =
                    |column: usize| self.values[top + (left + column) * stride..].first_chunk().expect("a whole tile");
                let lines: [&[f32; TILE]; TILE] = std::array::from_fn(line);
                let tile: [[f32; TILE]; TILE] =
                    std::array::from_fn(|row| std::array::from_fn(|column| lines[column][row]));
                let out = out.chunks_exact_mut(columns).zip(&tile);
                out.for_each(|(out, row)| out[left..][..TILE].copy_from_slice(row));
            }
            for (row, out) in (top..).zip(out.chunks_exact_mut(columns)) {
                (whole..columns).for_each(|column| out[column] = self.values[row * self.row + column * stride]);
            }
        });
        out
    }
}

/// What a product does to what is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    /// Takes its place.
    Replace,
    /// Is added to it.
    Add,
}

/// Who computes a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread.
    This,
    /// As many as pay.
    All,
}

/// `out = scale·a·b` or `out += scale·a·b`; rows of `out` are `stride` values apart.
///
/// # Panics
/// When the shapes do not fit.
pub(crate) fn product(
    out: (&mut [f32], usize),
    a: &Matrix<'_>,
    b: &Matrix<'_>,
    scale: f32,
    write: Write,
    threads: Threads,
) {
    let ((out, stride), (m, n)) = (out, (a.rows, b.columns));
    assert!(m == 0 || n == 0 || (m - 1) * stride + n <= out.len() && n <= stride, "the product has no room");
    if a.columns == 0 && write == Write::Replace {
        out.chunks_mut(stride.max(1)).take(m).for_each(|row| row[..n].fill(0.0));
    }
    // SAFETY: the rows fit into `out`, which is borrowed alone.
    unsafe { multiply(out.as_mut_ptr(), stride, a, b, scale, write, threads) }
}

/// `scale·a·b`, in room that is not cleared first.
///
/// # Panics
/// When the shapes do not fit.
pub(crate) fn new_product(a: &Matrix<'_>, b: &Matrix<'_>, scale: f32, threads: Threads) -> Vec<f32> {
    let len = a.rows * b.columns;
    if a.columns == 0 {
        return vec![0.0; len];
    }
    let mut out = Vec::with_capacity(len);
    // SAFETY: there is room for all rows, and with an inner dimension that is not zero each value is written.
    unsafe {
        multiply(out.as_mut_ptr(), b.columns, a, b, scale, Write::Replace, threads);
        out.set_len(len);
    }
    out
}

/// [`product`] into rows that lie apart, among those of others.
///
/// # Safety
/// `out` must have room for the rows of the product, `stride` apart, which nobody else touches.
pub(crate) unsafe fn multiply(
    out: *mut f32,
    stride: usize,
    a: &Matrix<'_>,
    b: &Matrix<'_>,
    scale: f32,
    write: Write,
    threads: Threads,
) {
    /// Multiplications below which waking a thread costs more than it computes.
    const ALONE: usize = 1 << 20;
    let (m, k, n) = (a.rows, a.columns, b.columns);
    assert_eq!(k, b.rows, "inner dimension of a product");
    assert!(a.fits() && b.fits(), "a factor is too short for its shape");
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    let target = Columns { out, stride };
    let block = |rows: Range<usize>, columns: Range<usize>| {
        let (a, b) = (a.block(rows.clone(), 0..k), b.block(0..k, columns.clone()));
        // SAFETY: the factors are long enough, as blocks of such; the output is by the caller's word, and nobody else has this block of it.
        unsafe { multiply_alone(target.at(rows.start, columns.start), stride, &a, &b, scale, write) }
    };
    if threads == Threads::This || m * n * k < ALONE {
        return block(0..m, 0..n);
    }
    let (height, across) = parts(m, k, n, rayon::current_num_threads());
    rayon::scope(|scope| {
        for columns in cuts(n, across) {
            for top in (0..m).step_by(height) {
                let (block, columns) = (&block, columns.clone());
                scope.spawn(move |_| block(top..(top + height).min(m), columns));
            }
        }
    });
}

/// Rows of what a thread computes at a time, and in how many parts columns are. By columns first: the library puts all of `b` in order that a block needs, so no two
/// threads should need the same of it; but not where there is little to add up, for then it is writing that takes the time.
fn parts(m: usize, k: usize, n: usize, threads: usize) -> (usize, usize) {
    /// Parts for each thread, so that none waits long for the last.
    const PARTS: usize = 2;
    /// Fewer columns, or values in a sum, would leave the library's kernels half empty.
    const FEWEST: [usize; 2] = [48, 64];
    let parts = PARTS * threads;
    let across = if k < FEWEST[1] { 1 } else { parts.min(n / FEWEST[0]).max(1) };
    (m.div_ceil(parts.div_ceil(across)), across)
}

/// Columns that parts begin at multiples of: two of the widest vectors. The library's kernels take up to four at once, and are slower with one.
pub(crate) const UNIT: usize = 32;

/// Columns in that many parts of about the same width.
fn cuts(columns: usize, parts: usize) -> impl Iterator<Item = Range<usize>> {
    let at = move |part: usize| if part == parts { columns } else { (part * columns / parts + UNIT / 2) / UNIT * UNIT };
    (0..parts).map(move |part| at(part).min(columns)..at(part + 1).min(columns)).filter(|part| !part.is_empty())
}

/// [`multiply`] by the calling thread alone, of factors that are there.
unsafe fn multiply_alone(out: *mut f32, stride: usize, a: &Matrix<'_>, b: &Matrix<'_>, scale: f32, write: Write) {
    // SAFETY: by the caller's word.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out,
            1,
            stride as isize,
            write == Write::Add,
            a.values.as_ptr(),
            a.column as isize,
            a.row as isize,
            b.values.as_ptr(),
            b.column as isize,
            b.row as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Splits the columns of a product with a matrix of so many values between the threads, `parts` for each; small matrices are not split.
pub(crate) fn each_part(columns: usize, values: usize, parts: usize, work: impl Fn(Range<usize>) + Sync) {
    /// Values below which a product is not shared between threads.
    const SHARED_FROM: usize = 1 << 18;
    let parts = if values < SHARED_FROM { 1 } else { parts * rayon::current_num_threads() };
    let mut parts = cuts(columns, parts);
    let (first, work) = (parts.next(), &work);
    // This thread has a part too, and begins at once: decoding a token, waking another takes as long as a small product.
    rayon::in_place_scope(|scope| {
        parts.for_each(|part| scope.spawn(move |_| work(part)));
        first.into_iter().for_each(work);
    });
}

/// Where the threads write: each to other columns of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct Columns {
    pub(crate) out: *mut f32,
    pub(crate) stride: usize,
}

// SAFETY: no two threads get the same columns.
unsafe impl Sync for Columns {}

impl Columns {
    /// # Safety
    /// The place must be in the matrix.
    pub(crate) unsafe fn at(&self, row: usize, column: usize) -> *mut f32 {
        // SAFETY: by the caller's word.
        unsafe { self.out.add(row * self.stride + column) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_in_strides_equal_sums() {
        let a: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let b: Vec<f32> = (0..8).map(|i| (i * i) as f32).collect();
        let (a, b) = (Matrix::contiguous(a, 3, 2), Matrix::strided(&b, 2, 3, 5));
        let mut out = vec![100.0; 3 * 4];
        product((&mut out, 4), &a, &b, 2.0, Write::Replace, Threads::This);
        product((&mut out, 4), &a, &b, 1.0, Write::Add, Threads::This);
        for r in 0..3 {
            for c in 0..3 {
                let sum: f32 = (0..2).map(|k| a.values[2 * r + k] * b.values[5 * k + c]).sum();
                assert_eq!(out[4 * r + c], 3.0 * sum);
            }
            assert_eq!(out[4 * r + 3], 100.0);
        }
        let mut square = vec![0.0; 4];
        product((&mut square, 2), &a.transposed(), &a, 1.0, Write::Replace, Threads::All);
        assert_eq!(square, [20.0, 26.0, 26.0, 35.0]);
        assert_eq!(new_product(&a.transposed(), &a, 1.0, Threads::All), square);
        let nothing = Matrix::contiguous(vec![], 2, 0);
        assert_eq!(new_product(&nothing, &nothing.transposed(), 1.0, Threads::All), [0.0; 4]);
    }

    #[test]
    fn rows_are_put_in_order() {
        for [rows, columns] in [[40, 35], [16, 16], [3, 50], [0, 4]] {
            let values: Vec<f32> = (0..rows * columns).map(|at| at as f32).collect();
            let matrix = Matrix::contiguous(values.clone(), rows, columns);
            assert_eq!(matrix.by_rows(), values);
            let transposed = matrix.transposed().by_rows();
            assert!((0..rows * columns).all(|at| transposed[at % columns * rows + at / columns] == values[at]));
        }
    }

    #[test]
    #[should_panic(expected = "no room")]
    fn an_output_that_is_too_short_is_refused() {
        let a = Matrix::contiguous(vec![1.0; 4], 2, 2);
        product((&mut [0.0; 3], 2), &a, &a, 1.0, Write::Replace, Threads::This);
    }
}
