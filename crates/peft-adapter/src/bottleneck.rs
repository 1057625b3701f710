//! Bottleneck adapters: a narrow network where a sub-layer of a block ends.
//!
//! - formula: `a(x) = s·f(x·D + b)·U + c` with `D: [width, m]`, `U: [m, width]`; for a sub-layer `h` of `x` that the model ends with `norm(h + x)`:
//!   - Houlsby, after attention and after feed-forward: `norm(h + a(h) + x)`
//!   - Pfeiffer, after feed-forward: `norm(h + a(norm(h + x)) + x)`
//!   - parallel, beside feed-forward: `norm(h + a(x) + x)`
//! - source: Houlsby et al. 2019, arXiv:1902.00751, section 2; Pfeiffer et al. 2021, arXiv:2005.00247, section 3; He et al. 2022, arXiv:2110.04366, section 4; the
//!   order of norms and residuals is that of AdapterHub's `adapters`
//! - trained: `2·width·m + m + width` values a place, `m = width / reduction_factor`; less with Kronecker sums (Compacter)
//! - at init: identity, since `U = 0`, unless `init_weights` says otherwise
//!
//! In a model that norms before its sub-layers there is no norm here, and the three forms differ in what the bottleneck sees: `h`, `h + x`, `x`.

use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Tensor, activation};
use peft_core::kernels::{Nonlinearity, activate, layer_norm};
use peft_core::{Dense, End, Gate, Result, Site, Start};
use serde::{Deserialize, Serialize};

use crate::config::{BottleneckConfig, InitWeights, NonLinearity, Residual, Scaling};
use crate::projection::{Phm, Projection};

/// Added to the variance in a bottleneck's own norms: PyTorch's default.
const EPSILON: f64 = 1e-5;

/// A bottleneck where a sub-layer ends.
#[derive(Module, Debug)]
pub struct Bottleneck {
    norm_before: Option<OwnNorm>,
    down: Projection,
    up: Projection,
    /// `[1]` or `[width]`, where the scale is learned.
    scale: Option<Param<Tensor<1>>>,
    norm_after: Option<OwnNorm>,
    gate: Option<Gate>,
    dropout: Dropout,
    #[module(skip)]
    form: Form,
}

/// A norm of the bottleneck's own.
#[derive(Module, Debug)]
struct OwnNorm {
    gamma: Param<Tensor<1>>,
    beta: Param<Tensor<1>>,
}

/// What a bottleneck computes, besides its values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Form {
    non_linearity: NonLinearity,
    original_ln_before: bool,
    original_ln_after: bool,
    is_parallel: bool,
    residual: Residual,
    adapter_residual_before_ln: bool,
    scale: f64,
}

impl Bottleneck {
    /// # Errors
    /// When the configuration does not fit this place.
    pub(crate) fn new(config: &BottleneckConfig, site: &Site, seed: u64) -> Result<Self> {
        let (width, inner, mut rng) = (site.d_out, config.inner_width(site)?, site.rng(seed));
        let mut projection = |shape, start| -> Result<Projection> {
            if config.phm_layer {
                let numbers = [config.phm_dim, config.phm_rank];
                return Ok(Projection::Phm(Phm::new(site, shape, numbers, start, &mut rng)?));
            }
            Ok(Projection::Dense(Dense::new(site, shape, start, &mut rng)?))
        };
        let [first, second] = config.init_weights.starts();
        let (down, up) = (projection([width, inner], first)?, projection([inner, width], second)?);
        let (scale, constant) = match config.scaling {
            Scaling::Constant(scale) => (None, scale),
            Scaling::Learned => (Some(site.param([1], || 1.0)?), 1.0),
            Scaling::Channel => (Some(site.param([width], || 1.0)?), 1.0),
        };
        Ok(Self {
            norm_before: config.ln_before.then(|| OwnNorm::new(site)).transpose()?,
            down,
            up,
            scale,
            norm_after: config.ln_after.then(|| OwnNorm::new(site)).transpose()?,
            gate: config.use_gating.then(|| Gate::new(site, [width, 1], &mut site.rng(seed ^ 1))).transpose()?,
            dropout: DropoutConfig::new(config.dropout).init(),
            form: Form {
                non_linearity: config.non_linearity,
                original_ln_before: config.original_ln_before,
                original_ln_after: config.original_ln_after,
                is_parallel: config.is_parallel,
                residual: config.residual_before_ln,
                adapter_residual_before_ln: config.adapter_residual_before_ln,
                scale: constant,
            },
        })
    }

    /// Both projections and the scale, `[rows, width]` to the same.
    fn up(&self, x: Tensor<2>) -> Tensor<2> {
        let seen = match &self.norm_before {
            Some(norm) => norm.forward(x),
            None => x,
        };
        let up = self.up.forward(self.form.non_linearity.apply(self.down.forward(seen)));
        match &self.scale {
            Some(scale) => up * scale.val().unsqueeze(),
            None => up * self.form.scale,
        }
    }

    /// What it sees of the place, and what is added to what it makes of that.
    pub(crate) fn sees(&self, end: &End<'_>) -> (Tensor<3>, Tensor<3>) {
        let output = end.output.clone();
        if self.form.is_parallel {
            return (end.input.clone(), output);
        }
        if !self.form.original_ln_before {
            return (output.clone(), output);
        }
        let sum = output.clone() + end.input.clone();
        let normed = match end.norm {
            Some(norm) => norm(sum.clone()),
            None => sum.clone(),
        };
        let residual = match self.form.residual {
            Residual::Output => output,
            Residual::Sum => sum,
            Residual::Normed => normed.clone(),
        };
        (normed, residual)
    }

    /// What goes on.
    pub(crate) fn through(&self, x: Tensor<3>, residual: Tensor<3>) -> Tensor<3> {
        let ([batch, seq, width], dtype) = (x.dims(), x.dtype());
        let rows: Tensor<2> = x.clone().reshape([batch * seq, width]).cast(self.down.dtype());
        let residual = residual.cast(self.down.dtype());
        let mut y = self.dropout.forward(self.up(rows)).reshape([batch, seq, width]);
        if let Some(gate) = &self.gate {
            y = y * gate.forward(x);
        }
        let add_residual = |y: Tensor<3>, before_norm: bool| {
            let here = before_norm == (self.form.adapter_residual_before_ln && !self.form.is_parallel);
            if here { y + residual.clone() } else { y }
        };
        y = add_residual(y, true);
        if let Some(norm) = &self.norm_after {
            y = norm.forward(y);
        }
        add_residual(y, false).cast(dtype)
    }

    /// What it adds, without gate, dropout and norms behind it.
    pub(crate) fn update(&self, x: Tensor<3>) -> Tensor<3> {
        let ([batch, seq, width], dtype) = (x.dims(), x.dtype());
        let x: Tensor<2> = x.reshape([batch * seq, width]).cast(self.down.dtype());
        self.up(x).reshape([batch, seq, width]).cast(dtype)
    }

    /// The end of the sub-layer, after it gave `hidden`.
    pub(crate) fn close(&self, hidden: Tensor<3>, end: End<'_>) -> Tensor<3> {
        if self.form.original_ln_after { End { output: hidden, ..end }.close() } else { hidden }
    }
}

impl OwnNorm {
    fn new(site: &Site) -> Result<Self> {
        Ok(Self { gamma: site.param([site.d_out], || 1.0)?, beta: site.zeros([site.d_out])? })
    }

    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        layer_norm(x, self.gamma.val(), Some(self.beta.val()), EPSILON)
    }
}

impl NonLinearity {
    pub(crate) fn apply(self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Relu => activate(x, Nonlinearity::Relu),
            Self::Gelu => activate(x, Nonlinearity::Gelu),
            Self::GeluNew => activate(x, Nonlinearity::GeluTanh),
            Self::Swish => activate(x, Nonlinearity::Silu),
            Self::Tanh => x.tanh(),
            Self::Sigmoid => activation::sigmoid(x),
            Self::LeakyRelu => activation::leaky_relu(x, 0.01),
            Self::Linear => x,
        }
    }
}

impl InitWeights {
    /// Of the first projection and of the second.
    pub(crate) fn starts(self) -> [Start; 2] {
        match self {
            Self::Bert => [Start::Normal { std: 0.02, cut: false }; 2],
            Self::Houlsby => [Start::Normal { std: 0.01, cut: true }; 2],
            Self::MamAdapter => [Start::Kaiming, Start::Zeros],
        }
    }
}
