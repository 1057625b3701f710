//! Matrix products whose factors are rounded to 16 bits (bfloat16) and whose sums stay in f32.
//!
//! The frozen factor is read run by run, so it may be dense or packed. Each thread puts a block of it into the order of the processor's own instructions
//! (AMX tiles, or AVX-512 BF16) and multiplies all rows by it; a processor with neither multiplies the same rounded numbers in f32.
#![allow(
    unsafe_code,
    reason = "products into disjoint columns of one output; instructions that the processor is asked for before"
)]

#[cfg(target_arch = "x86_64")]
mod blocks;

use std::ops::Range;

use half::bf16;

use super::lanes::{sum, vectorized};
use super::product::{Columns, Matrix, Threads, Write, each_part, multiply};

/// Sides of a block of the frozen factor: in 16 bits and once more in order, it stays in the second cache.
const BLOCK_ROWS: usize = 512;
const BLOCK_COLUMNS: usize = 128;

/// Rows, columns and inner dimension that come in whole units: two tiles of 16 rows each way, and 32 numbers in a tile's row.
const UNIT: usize = 32;

/// Up to this number of rows, reading the factor takes longer than multiplying by it.
const FEW_ROWS: usize = 4;

/// Parts for each thread; a product of few rows has one, for it is over sooner than a thread is woken twice.
const PARTS: usize = 2;

/// A frozen factor: value `(r, c)` lies at `r · row + c · column`, and one of the strides is one.
pub(crate) struct Runs<'a> {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row: usize,
    pub(crate) column: usize,
    /// The values from a place on, as they lie.
    pub(crate) read: &'a (dyn Fn(usize, &mut [bf16]) + Sync),
}

/// Who multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    /// Tiles of the processor.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// Pairs of numbers in vectors.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// The same order in plain Rust, to test it where there is nothing better.
    #[cfg(all(test, target_arch = "x86_64"))]
    Blocks,
    /// Numbers in f32, by the library.
    Widened,
    /// Numbers in f32, as they are read.
    FewRows,
}

impl Engine {
    /// The fastest on this machine for so many rows.
    fn of(rows: usize) -> Self {
        match () {
            () if rows <= FEW_ROWS => Self::FewRows,
            #[cfg(target_arch = "x86_64")]
            () if blocks::has_amx() => Self::Amx,
            #[cfg(target_arch = "x86_64")]
            () if blocks::has_avx512() => Self::Avx512,
            () => Self::Widened,
        }
    }
}

/// `out = x·W` of `x` and `W` rounded to bfloat16.
///
/// # Panics
/// When the shapes do not fit.
pub(crate) fn product(out: &mut [f32], x: &Matrix<'_>, weight: &Runs<'_>) {
    product_by(Engine::of(x.rows), out, x, weight);
}

fn product_by(engine: Engine, out: &mut [f32], x: &Matrix<'_>, weight: &Runs<'_>) {
    let (m, k, n) = (x.rows, weight.rows, weight.columns);
    assert!(x.columns == k && x.fits() && out.len() == m * n, "product of [{m}, {}] and [{k}, {n}]", x.columns);
    assert!(weight.row == 1 || weight.column == 1, "a factor that can be read in runs");
    if k == 0 {
        out.fill(0.0);
    }
    if out.is_empty() || k == 0 {
        return;
    }
    let target = Columns { out: out.as_mut_ptr(), stride: n };
    let parts = if engine == Engine::FewRows { 1 } else { PARTS };
    each_part(n, k * n, parts, |part| match engine {
        Engine::FewRows => few_rows(target, x, weight, part),
        Engine::Widened => widened(target, x, weight, part),
        #[cfg(target_arch = "x86_64")]
        _ => ordered(engine, target, x, weight, part),
    });
}

/// The numbers of some columns of `x`, its rows `width` apart.
fn each_row<T>(x: &Matrix<'_>, columns: &Range<usize>, out: &mut [T], width: usize, number: impl Fn(f32) -> T + Copy) {
    for (r, out) in out.chunks_mut(width).enumerate() {
        if x.column == 1 {
            let x = &x.values[r * x.row..][columns.clone()];
            vectorized!(out.iter_mut().zip(x).for_each(|(out, x)| *out = number(*x)));
        } else {
            columns.clone().zip(out).for_each(|(c, out)| *out = number(x.values[r * x.row + c * x.column]));
        }
    }
}

/// The nearest numbers in bfloat16.
pub(crate) fn round(values: &[f32], out: &mut [bf16]) {
    vectorized!(out.iter_mut().zip(values).for_each(|(out, x)| *out = bf16::from_bits(rounded(*x))));
}

#[inline(always)]
fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The bits of the nearest bfloat16, of two the even one.
#[inline(always)]
fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // Rounding must not make an infinity of what is no number.
    (if x.is_nan() { bits | 0x40_0000 } else { nearest } >> 16) as u16
}

/// Rows of a block, for all rows of the factor: equal counts, for a last block of a few would cost as much as a whole one.
fn heights(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let height = rows.div_ceil(rows.div_ceil(BLOCK_ROWS)).next_multiple_of(UNIT);
    (0..rows).step_by(height).map(move |top| top..(top + height).min(rows))
}

/// Columns of a block, for some columns of the factor.
fn widths(part: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = part.end;
    part.step_by(BLOCK_COLUMNS).map(move |left| left..(left + BLOCK_COLUMNS).min(end))
}

impl Runs<'_> {
    /// A block as it lies: runs of `width` numbers each.
    fn block(&self, rows: &Range<usize>, columns: &Range<usize>, width: usize, room: &mut [bf16]) {
        let (run, count, first) = if self.column == 1 {
            (columns.len(), self.row, rows.start * self.row + columns.start)
        } else {
            (rows.len(), self.column, columns.start * self.column + rows.start)
        };
        room.chunks_mut(width).enumerate().for_each(|(at, room)| (self.read)(first + at * count, &mut room[..run]));
    }
}

/// Columns of the product, the factor read once and used at once.
fn few_rows(target: Columns, x: &Matrix<'_>, weight: &Runs<'_>, part: Range<usize>) {
    /// Rows of the factor that are added up before the sums are written.
    const TOGETHER: usize = 4;
    let (k, width) = (weight.rows, part.len());
    let mut x_rows = vec![0.0; x.rows * k];
    each_row(x, &(0..k), &mut x_rows, k, |x| widen(rounded(x)));
    let mut sums = vec![0.0; x.rows * width];
    if weight.column == 1 {
        let mut room = vec![bf16::ZERO; TOGETHER * width];
        for top in (0..k).step_by(TOGETHER) {
            let count = TOGETHER.min(k - top);
            weight.block(&(top..top + count), &part, width, &mut room[..count * width]);
            for (x, sums) in x_rows.chunks_exact(k).zip(sums.chunks_exact_mut(width)) {
                let mut factors = [0.0; TOGETHER];
                factors[..count].copy_from_slice(&x[top..top + count]);
                let [a, b, c, d] = [0, 1, 2, 3].map(|row| &room[row * width..][..width]);
                vectorized! {
                    let [f, g, h, i] = factors;
                    for ((((sum, a), b), c), d) in sums.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                        let [a, b, c, d] = [a, b, c, d].map(|w| widen(w.to_bits()));
                        *sum += f * a + g * b + h * c + i * d;
                    }
                };
            }
        }
    } else {
        let (mut room, mut wide) = (vec![bf16::ZERO; k], vec![0.0; k]);
        for (at, column) in part.clone().enumerate() {
            weight.block(&(0..k), &(column..column + 1), k, &mut room);
            vectorized!(wide.iter_mut().zip(&room).for_each(|(wide, w)| *wide = widen(w.to_bits())));
            for (x, sums) in x_rows.chunks_exact(k).zip(sums.chunks_exact_mut(width)) {
                sums[at] = vectorized!(sum([x, &wide], |[x, w]| x * w));
            }
        }
    }
    for (r, sums) in sums.chunks_exact(width).enumerate() {
        // SAFETY: the columns are in this part only, and there is a row of the output for each of `x`.
        unsafe { target.at(r, part.start).copy_from_nonoverlapping(sums.as_ptr(), width) };
    }
}

/// Columns of the product, in f32.
fn widened(target: Columns, x: &Matrix<'_>, weight: &Runs<'_>, part: Range<usize>) {
    let (mut room, mut wide) = (vec![bf16::ZERO; BLOCK_ROWS * BLOCK_COLUMNS], vec![0.0; BLOCK_ROWS * BLOCK_COLUMNS]);
    let mut x_rows = vec![0.0; x.rows * BLOCK_ROWS.min(x.columns)];
    for rows in heights(weight.rows) {
        let height = rows.len();
        let x_rows = &mut x_rows[..x.rows * height];
        each_row(x, &rows, x_rows, height, |x| widen(rounded(x)));
        let x = Matrix::contiguous(&*x_rows, x.rows, height);
        let write = if rows.start == 0 { Write::Replace } else { Write::Add };
        for columns in widths(part.clone()) {
            let width = columns.len();
            let (room, wide) = (&mut room[..height * width], &mut wide[..height * width]);
            let run = if weight.column == 1 { width } else { height };
            weight.block(&rows, &columns, run, room);
            vectorized!(wide.iter_mut().zip(&*room).for_each(|(wide, x)| *wide = widen(x.to_bits())));
            let block = Matrix::contiguous(&*wide, height * width / run, run);
            let block = if weight.column == 1 { block } else { block.transposed() };
            // SAFETY: the columns are in this part only.
            unsafe { multiply(target.at(0, columns.start), target.stride, &x, &block, 1.0, write, Threads::This) };
        }
    }
}

/// Columns of the product, by instructions that want the factor in their order: lines of 16 columns and two rows, `[panel, row / 2, column, row % 2]`.
#[cfg(target_arch = "x86_64")]
fn ordered(engine: Engine, target: Columns, x: &Matrix<'_>, weight: &Runs<'_>, part: Range<usize>) {
    let m = x.rows;
    let mut room = vec![bf16::ZERO; BLOCK_ROWS * BLOCK_COLUMNS];
    let mut lines = vec![[0; 16]; BLOCK_ROWS / 2 * BLOCK_COLUMNS / 16];
    let mut x_rows = vec![0; m.next_multiple_of(UNIT) * BLOCK_ROWS];
    let multiplier = blocks::Multiplier::new(engine);
    for rows in heights(weight.rows) {
        // What is beyond the last row of the factor must be zero in one of the two, and a number in both.
        let height = rows.len().next_multiple_of(UNIT);
        if height != rows.len() {
            x_rows.fill(0);
        }
        each_row(x, &rows, &mut x_rows[..m * height], height, rounded);
        for columns in widths(part.clone()) {
            let width = columns.len().next_multiple_of(UNIT);
            if (height, width) != (rows.len(), columns.len()) {
                room.fill(bf16::ZERO);
            }
            let (run, count) = if weight.column == 1 { (width, rows.len()) } else { (height, columns.len()) };
            weight.block(&rows, &columns, run, &mut room[..count * run]);
            order(&room, run, weight.column == 1, &mut lines[..height / 2 * width / 16], height / 2);
            for (top, left) in
                (0..m).step_by(UNIT).flat_map(|top| (0..columns.len()).step_by(UNIT).map(move |left| (top, left)))
            {
                let factors = (&x_rows[top * height..], height, &lines[left / 16 * height / 2..]);
                let size = (UNIT.min(m - top), UNIT.min(columns.len() - left));
                // SAFETY: the rows are there, and the columns in this part only.
                unsafe { multiplier.block(factors, target, (top, columns.start + left), size, rows.start > 0) };
            }
        }
    }
}

/// Puts a block, runs of which lie `run` apart along rows or columns, in order; a panel has `pairs` lines.
#[cfg(target_arch = "x86_64")]
fn order(room: &[bf16], run: usize, along_rows: bool, lines: &mut [[u32; 16]], pairs: usize) {
    let pair = |first: bf16, second: bf16| u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16;
    for (panel, lines) in lines.chunks_mut(pairs).enumerate() {
        if along_rows {
            for (line, rows) in lines.iter_mut().zip(room.chunks(2 * run)) {
                let (first, second) = (&rows[16 * panel..][..16], &rows[run + 16 * panel..][..16]);
                line.iter_mut().zip(first.iter().zip(second)).for_each(|(line, (a, b))| *line = pair(*a, *b));
            }
        } else {
            for (column, values) in room[16 * panel * run..].chunks(run).take(16).enumerate() {
                let (pairs, _) = values.as_chunks::<2>();
                lines.iter_mut().zip(pairs).for_each(|(line, [a, b])| line[column] = pair(*a, *b));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers from -1 to 1, most of which bfloat16 does not hold.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let next = |state: &u32| Some(state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
        let states = std::iter::successors(Some(seed), next).skip(1).take(count);
        states.map(|state| (state >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    fn engines() -> Vec<Engine> {
        let mut engines = vec![Engine::Widened, Engine::FewRows];
        #[cfg(target_arch = "x86_64")]
        {
            engines.push(Engine::Blocks);
            engines.extend(blocks::has_avx512().then_some(Engine::Avx512));
            engines.extend(blocks::has_amx().then_some(Engine::Amx));
        }
        engines
    }

    #[test]
    fn products_are_those_of_rounded_numbers() {
        // Which of them there are is what a run under an emulator is for.
        println!("{:?}", engines());
        for (m, k, n) in [(1, 1, 1), (5, 33, 40), (32, 64, 32), (70, 600, 300), (40, 1100, 17), (64, 576, 1536)] {
            let (x, w) = (numbers(m * k, 1), numbers(k * n, 2));
            let half = |x: &f32| bf16::from_f32(*x);
            let (exact_x, exact_w): (Vec<_>, Vec<_>) = (x.iter().map(half).collect(), w.iter().map(half).collect());
            let sum = |r: usize, c: usize| -> f64 {
                (0..k).map(|i| exact_x[r * k + i].to_f64() * exact_w[i * n + c].to_f64()).sum()
            };
            let by_columns: Vec<bf16> = (0..k * n).map(|at| exact_w[at % k * n + at / k]).collect();
            for (values, row, column) in [(&exact_w, n, 1), (&by_columns, 1, k)] {
                let read = |start: usize, out: &mut [bf16]| out.copy_from_slice(&values[start..start + out.len()]);
                let weight = Runs { rows: k, columns: n, row, column, read: &read };
                let in_columns: Vec<f32> = (0..m * k).map(|at| x[at % m * k + at / m]).collect();
                let (in_rows, in_columns) = (Matrix::contiguous(&*x, m, k), Matrix::contiguous(in_columns, k, m));
                let forms = [in_rows.clone(), in_columns.transposed()];
                for (engine, x) in engines().into_iter().flat_map(|engine| forms.iter().map(move |x| (engine, x))) {
                    let mut out = vec![f32::NAN; m * n];
                    product_by(engine, &mut out, x, &weight);
                    for r in (0..m).step_by(7).chain([m - 1]) {
                        for c in (0..n).step_by(5).chain([n - 1]) {
                            let (found, expected) = (f64::from(out[r * n + c]), sum(r, c));
                            let close = (found - expected).abs() < 1e-5 * (k as f64).sqrt();
                            assert!(
                                close,
                                "{engine:?} {m}x{k}x{n} ({row}, {column}): {found} for {expected} at {r}, {c}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rounding_is_that_of_the_library() {
        let edges = [0.0, -0.0, 1.0, 1.003_906_3, 1.011_718_8, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, 1e-40];
        for x in edges.into_iter().chain(numbers(1000, 3)) {
            assert_eq!(rounded(x), bf16::from_f32(x).to_bits(), "{x}");
        }
        assert!(
            bf16::from_bits(rounded(f32::NAN)).is_nan()
                && bf16::from_bits(rounded(f32::from_bits(0x7f80_0001))).is_nan()
        );
    }
}
