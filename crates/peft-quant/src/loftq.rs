//! `LoftQ`: a packed weight and a low-rank adapter that are chosen together, `W ≈ Q + (A·B)ᵀ`. Li et al. 2023, arXiv:2310.08659, algorithm 1.
//!
//! - iteration: `Q = pack(W − (A·B)ᵀ)`, then `A·B` is the best approximation of `(W − Q)ᵀ` by its rank; `A·B = 0` at first
//! - factors: `A = U·√Σ`, `B = √Σ·Vᵀ` of the truncated SVD
//! - the SVD: a subspace iteration from random vectors. Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1

use std::collections::{BTreeMap, HashMap};

use burn::module::Module;
use nalgebra::{DMatrix, SVD};
use peft_core::{Problem, Site, scan};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use crate::quantize::quantize_with;
use crate::{Error, Format, Packed, Quantization};

/// Directions beyond the rank that the subspace iteration follows.
const OVERSAMPLING: usize = 8;

/// Rounds of the subspace iteration. What packing leaves over is close to noise, whose singular values lie near each other.
const POWERS: usize = 4;

/// Steps of the small SVD for each of its singular values; two or three are usual.
const STEPS: usize = 100;

/// A packed weight with the factors that an adapter on it starts from; made by [`loftq`].
#[derive(Clone, Debug, PartialEq)]
pub struct LoftQ {
    /// The base, `[d_out, d_in]` in row-major order.
    pub packed: Packed,
    /// `[d_in, rank]`, row-major.
    pub a: Vec<f32>,
    /// `[rank, d_out]`, row-major.
    pub b: Vec<f32>,
    /// `‖W − unpack(pack(W))‖`, the Frobenius norm of what packing alone loses.
    pub error_before: f64,
    /// `‖W − unpack(packed) − (A·B)ᵀ‖`, what is lost with the factors.
    pub error_after: f64,
}

/// Where the adapters of a model start, by path of the layer: `A` `[d_in, rank]` and `B` `[rank, d_out]`, whose product is the whole update.
pub type Factors = BTreeMap<String, (Vec<f32>, Vec<f32>)>;

/// Packs the linear layers of a model in memory, those that get an adapter of the rank that `rank_of` gives by [`loftq`]; and gives the factors that
/// these adapters start from. Experts are packed as always.
///
/// # Errors
/// As [`quantize`](crate::quantize) and [`loftq`]; or what `rank_of` refuses.
pub fn loftq_model<T: Module>(
    module: T,
    quantization: &Quantization,
    iterations: usize,
    rank_of: impl Fn(&Site) -> peft_core::Result<Option<usize>>,
) -> peft_core::Result<(T, Factors)> {
    let mut ranks = HashMap::new();
    let mut problems = Vec::new();
    for site in scan(&module).sites {
        // Those of experts are packed, and their adapters start as they always do.
        let Some(rank) = rank_of(&site)?.filter(|_| site.experts.is_none()) else { continue };
        if site.packed.is_some() {
            let what = "packed already, and what that has lost is not known; begin with the dense model".to_owned();
            problems.push(Problem::Other { path: site.path.clone(), what });
        }
        ranks.insert(site.path, rank);
    }
    if !problems.is_empty() {
        return Err(peft_core::Error::Pack { problems });
    }
    let mut factors = Factors::new();
    let module = quantize_with(module, quantization, |site, format, rows| match ranks.get(&site.path) {
        None => format.pack(rows),
        Some(rank) => {
            let LoftQ { packed, a, b, .. } = loftq(rows, [site.d_out, site.d_in], format, *rank, iterations)?;
            factors.insert(site.path.clone(), (a, b));
            Ok(packed)
        }
    })?;
    Ok((module, factors))
}

/// Packs `weight` and finds the factors whose product makes up for what packing loses: `W ≈ Q + (A·B)ᵀ` in `iterations` rounds.
///
/// The factors hold the whole update; an adapter that scales its product by `s` starts from `A·B / s`. With one iteration `packed` is exactly
/// the weight as it is packed without `LoftQ`; with more, the adapter belongs to a base of its own. A rank that reaches the smaller side of the
/// weight leaves roundings only, and what it has beyond that is zeros.
///
/// # Shapes
/// `weight` is `[d_out, d_in]` in row-major order
///
/// ```
/// use peft_quant::{Format, loftq};
///
/// let weight: Vec<f32> = (0..64 * 64).map(|i| (i as f32).sin()).collect();
/// let start = loftq(&weight, [64, 64], Format::NF4, 8, 1)?;
/// assert_eq!(start.packed, Format::NF4.pack(&weight)?);
/// assert!(start.error_after < start.error_before);
/// # Ok::<(), peft_quant::Error>(())
/// ```
///
/// # Errors
/// When a side, the rank or the number of iterations is 0, there are not `d_out · d_in` values, the format cannot pack them, or what packing
/// leaves over is too large to be decomposed in f32.
pub fn loftq(
    weight: &[f32],
    [d_out, d_in]: [usize; 2],
    format: Format,
    rank: usize,
    iterations: usize,
) -> Result<LoftQ, Error> {
    for (what, number) in [("d_out", d_out), ("d_in", d_in), ("rank", rank), ("iterations", iterations)] {
        if number == 0 {
            return Err(Error::Zero { what });
        }
    }
    if d_out.checked_mul(d_in) != Some(weight.len()) {
        let (expected, found) = (d_out.saturating_mul(d_in), weight.len());
        return Err(Error::Length { what: "values of a matrix", expected, found });
    }
    // Row-major `[d_out, d_in]` is column-major `[d_in, d_out]`, the order of `nalgebra` and the orientation of `A·B`.
    let rest = |packed: &Packed| DMatrix::from_vec(d_in, d_out, difference(weight, &packed.unpack()));
    let mut packed = format.pack(weight)?;
    let mut lost = rest(&packed);
    let error_before = norm(&lost);
    let (mut a, mut b) = approximate(&lost, rank)?;
    for _ in 1..iterations {
        packed = format.pack(&difference(weight, (&a * &b).as_slice()))?;
        lost = rest(&packed);
        (a, b) = approximate(&lost, rank)?;
    }
    lost.gemm(-1.0, &a, &b, 1.0);
    let (a, b) = (a.resize_horizontally(rank, 0.0), b.resize_vertically(rank, 0.0));
    Ok(LoftQ { packed, a: row_major(&a), b: row_major(&b), error_before, error_after: norm(&lost) })
}

/// `(U·√Σ, √Σ·Vᵀ)` of the truncated SVD, with as many columns and rows as the rank and the matrix allow.
fn approximate(matrix: &DMatrix<f32>, rank: usize) -> Result<(DMatrix<f32>, DMatrix<f32>), Error> {
    let (rows, columns) = matrix.shape();
    let width = rank.saturating_add(OVERSAMPLING).min(rows).min(columns);
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let random = DMatrix::from_fn(columns, width, |_, _| rng.sample(StandardNormal));
    let mut range = (matrix * random).qr().q(); // [rows, width]
    for _ in 0..POWERS {
        // `Mᵀ·Q` as `(Qᵀ·M)ᵀ`, so that only thin matrices are transposed.
        let other = (range.transpose() * matrix).transpose().qr().q(); // [columns, width]
        range = (matrix * other).qr().q();
    }
    let core = range.transpose() * matrix; // [width, columns]
    // The SVD panics at what is not a number.
    let finite = core.iter().all(|value| value.is_finite());
    let svd = finite.then(|| core.try_svd(true, true, 5.0 * f32::EPSILON, STEPS * width)).flatten();
    let Some(SVD { u: Some(u), v_t: Some(v_t), singular_values }) = svd else { return Err(Error::Decomposition) };
    let kept = rank.min(width);
    let roots = DMatrix::from_diagonal(&singular_values.rows(0, kept).map(f32::sqrt));
    Ok((range * (u.columns(0, kept) * &roots), roots * v_t.rows(0, kept)))
}

fn difference(from: &[f32], what: &[f32]) -> Vec<f32> {
    from.iter().zip(what).map(|(from, what)| from - what).collect()
}

fn norm(matrix: &DMatrix<f32>) -> f64 {
    matrix.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

fn row_major(matrix: &DMatrix<f32>) -> Vec<f32> {
    matrix.transpose().as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Code;

    fn normal(count: usize) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        (0..count).map(|_| rng.sample(StandardNormal)).collect()
    }

    /// `‖W − unpack(packed) − (A·B)ᵀ‖`, from the parts as they are documented.
    fn error(weight: &[f32], [d_out, d_in]: [usize; 2], start: &LoftQ) -> f64 {
        let rank = start.a.len() / d_in;
        assert_eq!((start.a.len(), start.b.len()), (d_in * rank, rank * d_out));
        let base = start.packed.unpack();
        let mut sum = 0.0;
        for (out, row) in weight.chunks(d_in).enumerate() {
            for (at, value) in row.iter().enumerate() {
                let products = (0..rank).map(|r| start.a[at * rank + r] * start.b[r * d_out + out]);
                sum += f64::from(value - base[out * d_in + at] - products.sum::<f32>()).powi(2);
            }
        }
        sum.sqrt()
    }

    #[test]
    fn factors_make_up_for_what_packing_loses_and_more_iterations_for_more() {
        let (shape, weight) = ([96, 160], normal(96 * 160));
        for format in [Format::NF4, Format { code: Code::Int4Affine, block: 32, double_quant: false }] {
            let starts = [1, 2, 3, 5].map(|iterations| loftq(&weight, shape, format, 8, iterations).unwrap());
            assert_eq!(starts[0].packed, format.pack(&weight).unwrap());
            assert!(starts[1..].iter().all(|start| start.packed != starts[0].packed));
            for start in &starts {
                assert!(start.error_after < start.error_before, "{start:?}");
                assert!((start.error_after / error(&weight, shape, start) - 1.0).abs() < 1e-4);
                assert_eq!(start.error_before, starts[0].error_before);
            }
            for pair in starts.windows(2) {
                let (fewer, more) = (pair[0].error_after, pair[1].error_after);
                assert!(more < 1.005 * fewer, "{format}: {fewer}, then {more}");
            }
        }
    }

    #[test]
    fn a_full_rank_leaves_roundings_only() {
        for (shape, rank) in [([24, 40], 24), ([40, 24], 24), ([24, 40], 30), ([1, 40], 1), ([3, 3], 3)] {
            let weight = normal(shape[0] * shape[1]);
            let start = loftq(&weight, shape, Format::NF4, rank, 2).unwrap();
            assert!(start.error_after < 1e-5 * start.error_before, "{shape:?}: {} left", start.error_after);
            assert!(error(&weight, shape, &start) < 1e-4 * start.error_before);
        }
    }

    /// Random values are the hard case: all directions are nearly equal.
    #[test]
    fn the_approximation_is_within_a_hundredth_of_the_best() {
        for (rows, columns, rank) in [(60, 90, 4), (90, 60, 16), (64, 64, 1)] {
            let matrix = DMatrix::from_vec(rows, columns, normal(rows * columns));
            let (a, b) = approximate(&matrix, rank).unwrap();
            assert_eq!((a.shape(), b.shape()), ((rows, rank), (rank, columns)));
            let found = norm(&(&matrix - a * b));
            let values = matrix.svd(false, false).singular_values;
            let best = values.iter().skip(rank).map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
            assert!(found < 1.01 * best && found > 0.9999 * best, "{found} instead of {best}");
        }
    }

    #[test]
    fn what_packing_keeps_leaves_nothing_to_make_up_for() {
        let start = loftq(&[0.0; 64 * 32], [64, 32], Format::NF4, 4, 3).unwrap();
        assert_eq!((start.error_before, start.error_after), (0.0, 0.0));
        assert!(start.a.iter().chain(&start.b).all(|value| *value == 0.0));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let weight = normal(64);
        let refused = |shape, rank, iterations| loftq(&weight, shape, Format::NF4, rank, iterations).unwrap_err();
        assert_eq!(refused([8, 8], 0, 1), Error::Zero { what: "rank" });
        assert_eq!(refused([8, 8], 1, 0), Error::Zero { what: "iterations" });
        assert_eq!(refused([0, 8], 1, 1), Error::Zero { what: "d_out" });
        assert_eq!(refused([8, 9], 1, 1), Error::Length { what: "values of a matrix", expected: 72, found: 64 });
        assert!(matches!(refused([usize::MAX, 2], 1, 1), Error::Length { .. }));
        assert!(matches!(loftq(&[f32::NAN], [1, 1], Format::NF4, 1, 1), Err(Error::NotFinite { .. })));
        let large: Vec<f32> = weight.iter().map(|value| 1e30 * value).collect();
        assert_eq!(loftq(&large, [8, 8], Format::NF4, 2, 1), Err(Error::Decomposition));
    }
}
