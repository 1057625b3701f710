//! A dense layer of an adapter's own, and how its weights start.

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use rand::Rng;

use crate::{Result, Site, product};

/// `x·W + b`
#[derive(Module, Debug)]
pub struct Dense {
    /// `[d_in, d_out]`
    weight: Param<Tensor<2>>,
    /// `[d_out]`
    bias: Param<Tensor<1>>,
}

/// Initial values of a weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Start {
    /// Zeros, from which a gradient leads away as long as the other projection has none.
    Zeros,
    /// `U(±1/√d_in)`: Kaiming with `a = √5`.
    Kaiming,
    /// `N(0, std²)`, cut off at two deviations if `cut`.
    Normal {
        /// The standard deviation.
        std: f32,
        /// Whether values beyond two deviations are drawn again.
        cut: bool,
    },
}

impl Dense {
    /// The layer in the type and on the device of a site's adapters; the bias starts at zero.
    ///
    /// # Errors
    /// As [`Site::param`].
    pub fn new(site: &Site, [d_in, d_out]: [usize; 2], start: Start, rng: &mut impl Rng) -> Result<Self> {
        Ok(Self { weight: start.values(site, [d_in, d_out], d_in, rng)?, bias: site.zeros([d_out])? })
    }

    /// The type that is computed in.
    pub fn dtype(&self) -> DType {
        self.bias.val().dtype()
    }

    /// `[rows, d_in]` to `[rows, d_out]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        product(x, self.weight.val()) + self.bias.val().unsqueeze()
    }
}

impl Start {
    /// Trained values of that shape.
    ///
    /// # Errors
    /// As [`Site::param`].
    pub fn values<const D: usize>(
        self,
        site: &Site,
        shape: [usize; D],
        fan_in: usize,
        rng: &mut impl Rng,
    ) -> Result<Param<Tensor<D>>> {
        match self {
            Self::Zeros => site.zeros(shape),
            Self::Kaiming => site.uniform(shape, 1.0 / (fan_in as f32).sqrt(), rng),
            Self::Normal { std, cut: false } => site.normal(shape, std, rng),
            Self::Normal { std, cut: true } => site.cut_normal(shape, std, rng),
        }
    }
}
