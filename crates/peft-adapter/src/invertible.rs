//! Invertible adapters: embeddings as another language has them, and back again before a head over the vocabulary.
//!
//! - formula: for the first half of the features `x₁: [half]` and the rest `x₂`: `y₁ = x₁ + F(x₂)`, `y₂ = x₂ + G(y₁)`; back: `x₂ = y₂ - G(y₁)`, `x₁ = y₁ - F(x₂)`; each of `F` and `G` is
//!   `f(x·D + b)·U + c`, `D: [half, m]`, `U: [m, half]`
//! - source: Pfeiffer et al. 2020, arXiv:2005.00052, section 4.2 (MAD-X); the coupling is that of Dinh et al. 2015, arXiv:1410.8516, section 3 (NICE)
//! - trained: `4·half·m + 2·m + width` values a model, `m = half / inv_adapter_reduction_factor`
//! - at init: identity, since `U = 0`, unless `init_weights` says otherwise. AdapterHub's library knows one start, `N(0, 0.02²)` for all matrices: near the identity, and not at it
//!
//! In AdapterHub's library the way back is that of its own language heads (`LlamaAdapterModel`, `GPT2AdapterModel`), and as in the paper; `LlamaForCausalLM` has none there.
//! Encoders here have no head over the vocabulary, so none of them goes back.

use burn::module::Module;
use burn::tensor::Tensor;
use peft_core::{Dense, Error, FileTensor, Result, Site};
use rand::Rng;

use crate::config::{BottleneckConfig, NonLinearity};

/// A NICE block.
#[derive(Module, Debug)]
pub struct Nice {
    first: Coupling,
    second: Coupling,
    #[module(skip)]
    non_linearity: NonLinearity,
}

/// What is added to one half, computed from the other.
#[derive(Module, Debug)]
struct Coupling {
    down: Dense,
    up: Dense,
}

impl Nice {
    pub(crate) const TENSORS: &'static [FileTensor] = &[
        FileTensor { field: "first.down.weight", key: "F.0.weight", transposed: true },
        FileTensor { field: "first.down.bias", key: "F.0.bias", transposed: false },
        FileTensor { field: "first.up.weight", key: "F.2.weight", transposed: true },
        FileTensor { field: "first.up.bias", key: "F.2.bias", transposed: false },
        FileTensor { field: "second.down.weight", key: "G.0.weight", transposed: true },
        FileTensor { field: "second.down.bias", key: "G.0.bias", transposed: false },
        FileTensor { field: "second.up.weight", key: "G.2.weight", transposed: true },
        FileTensor { field: "second.up.bias", key: "G.2.bias", transposed: false },
    ];

    /// # Errors
    /// When nothing is left between the projections.
    pub(crate) fn new(config: &BottleneckConfig, site: &Site, seed: u64) -> Result<Self> {
        let (half, mut rng) = (site.d_out / 2, site.rng(seed));
        let sides = [half, site.d_out - half];
        let mut coupling = |[to, from]: [usize; 2]| Coupling::new(config, site, [from, to], &mut rng);
        let (first, second) = (coupling(sides)?, coupling([sides[1], sides[0]])?);
        Ok(Self { first, second, non_linearity: config.non_linearity })
    }

    /// `[rows, width]` to the same.
    pub(crate) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.coupled(x, |[x1, x2]| {
            let y1 = x1 + self.first.forward(x2.clone(), self.non_linearity);
            let y2 = x2 + self.second.forward(y1.clone(), self.non_linearity);
            [y1, y2]
        })
    }

    /// The reverse of [`forward`](Self::forward).
    pub(crate) fn back(&self, y: Tensor<2>) -> Tensor<2> {
        self.coupled(y, |[y1, y2]| {
            let x2 = y2 - self.second.forward(y1.clone(), self.non_linearity);
            let x1 = y1 - self.first.forward(x2.clone(), self.non_linearity);
            [x1, x2]
        })
    }

    /// Both halves through `couple`, in the type of the adapter.
    fn coupled(&self, x: Tensor<2>, couple: impl FnOnce([Tensor<2>; 2]) -> [Tensor<2>; 2]) -> Tensor<2> {
        let ([_, width], dtype, half) = (x.dims(), x.dtype(), x.dims()[1] / 2);
        let x = x.cast(self.first.up.dtype());
        let halves = [x.clone().narrow(1, 0, half), x.narrow(1, half, width - half)];
        Tensor::cat(couple(halves).into(), 1).cast(dtype)
    }
}

impl Coupling {
    fn new(config: &BottleneckConfig, site: &Site, [from, to]: [usize; 2], rng: &mut impl Rng) -> Result<Self> {
        let factor = config.inv_adapter_reduction_factor;
        let inner = (from as f64 / factor) as usize;
        if inner == 0 {
            let expected = format!("at most half the width at {}, {from}", site.path);
            return Err(Error::config("inv_adapter_reduction_factor", expected, factor));
        }
        let [down, up] = config.init_weights.starts();
        Ok(Self { down: Dense::new(site, [from, inner], down, rng)?, up: Dense::new(site, [inner, to], up, rng)? })
    }

    fn forward(&self, x: Tensor<2>, non_linearity: NonLinearity) -> Tensor<2> {
        self.up.forward(non_linearity.apply(self.down.forward(x)))
    }
}
