//! The two projections of a bottleneck: dense, or a sum of Kronecker products.
//!
//! - dense: `y = x·W + b`
//! - PHM: `W = Σᵢ Aᵢ ⊗ (Lᵢ·Rᵢ)`, `i = 1..n`: `Aᵢ: [n, n]`, `Lᵢ: [d_in/n, rank]`, `Rᵢ: [rank, d_out/n]`
//! - source: Mahabadi et al. 2021, arXiv:2106.04647, sections 3 and 4 (Compacter)

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use peft_core::{Dense, Error, Result, Site, Start, product};
use rand::Rng;

/// A projection, `[rows, d_in]` to `[rows, d_out]`.
#[derive(Module, Debug)]
pub enum Projection {
    /// A matrix.
    Dense(Dense),
    /// A sum of Kronecker products.
    Phm(Phm),
}

/// `x·(Σᵢ Aᵢ ⊗ (Lᵢ·Rᵢ)) + b`
#[derive(Module, Debug)]
pub struct Phm {
    /// `A`, `[n, n, n]`
    rule: Param<Tensor<3>>,
    /// `L`, `[n, d_in/n, rank]`
    left: Param<Tensor<3>>,
    /// `R`, `[n, rank, d_out/n]`
    right: Param<Tensor<3>>,
    /// `[d_out]`
    bias: Param<Tensor<1>>,
}

impl Phm {
    /// # Errors
    /// When a width is no multiple of `n`.
    pub(crate) fn new(
        site: &Site,
        [d_in, d_out]: [usize; 2],
        [n, rank]: [usize; 2],
        start: Start,
        rng: &mut impl Rng,
    ) -> Result<Self> {
        if !d_in.is_multiple_of(n) || !d_out.is_multiple_of(n) {
            let expected = format!("a divisor of both widths of the projection at {}, {d_in} and {d_out}", site.path);
            return Err(Error::config("phm_dim", expected, n));
        }
        // The factors of a Kronecker sum start as Glorot's do; the rule starts near a permutation's size, so that the product is neither lost nor large.
        let glorot = |from: usize, to: usize| Start::Normal { std: (2.0 / (from + to) as f32).sqrt(), cut: false };
        let (rows, columns) = (d_in / n, d_out / n);
        let left = glorot(rows, rank).values(site, [n, rows, rank], rows, rng)?;
        let right = match start {
            Start::Zeros => site.zeros([n, rank, columns])?,
            _ => glorot(rank, columns).values(site, [n, rank, columns], rank, rng)?,
        };
        let rule = Start::Normal { std: 1.0 / n as f32, cut: false }.values(site, [n, n, n], n, rng)?;
        Ok(Self { rule, left, right, bias: site.zeros([d_out])? })
    }

    /// The matrix that the products add up to, `[d_in, d_out]`. As one side of it is narrow, it is small.
    fn weight(&self) -> Tensor<2> {
        let (rule, left, right) = (self.rule.val(), self.left.val(), self.right.val());
        let ([n, rows, _], [_, _, columns]) = (left.dims(), right.dims());
        let products = left.matmul(right).reshape([n, rows * columns]);
        let rule = rule.reshape([n, n * n]).transpose(); // [n·n, n]
        let blocks: Tensor<4> = rule.matmul(products).reshape([n, n, rows, columns]);
        blocks.swap_dims(1, 2).reshape([n * rows, n * columns])
    }
}

impl Projection {
    /// The type that is computed in.
    pub(crate) fn dtype(&self) -> DType {
        match self {
            Self::Dense(dense) => dense.dtype(),
            Self::Phm(phm) => phm.bias.val().dtype(),
        }
    }

    pub(crate) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Dense(dense) => dense.forward(x),
            Self::Phm(phm) => product(x, phm.weight()) + phm.bias.val().unsqueeze(),
        }
    }
}
