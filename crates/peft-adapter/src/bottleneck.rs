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

use std::collections::BTreeMap;

use burn::module::{Module, Param, Reparameterization};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Tensor, activation};
use peft_core::files::{HubFolder, Values};
use peft_core::kernels::{Nonlinearity, activate, layer_norm};
use peft_core::{
    Activation, AdapterFile, Composable, Dense, End, FileTensor, LayerKind, Method, Part, Result, Site, Start, Targets,
};
use serde::{Deserialize, Serialize};

use crate::config::{BottleneckConfig, InitWeights, NonLinearity, Residual, Scaling, block_of};
use crate::hub;
use crate::projection::{Phm, Projection};

/// Added to the variance in a bottleneck's own norms: PyTorch's default.
const EPSILON: f64 = 1e-5;

/// State of [`BottleneckConfig`] at one place.
#[derive(Module, Debug)]
pub struct BottleneckAdapter {
    norm_before: Option<OwnNorm>,
    down: Projection,
    up: Projection,
    /// `[1]` or `[width]`, where the scale is learned.
    scale: Option<Param<Tensor<1>>>,
    norm_after: Option<OwnNorm>,
    gate: Option<Dense>,
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

impl BottleneckAdapter {
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
}

impl OwnNorm {
    fn new(site: &Site) -> Self {
        Self { gamma: site.param([site.d_out], || 1.0), beta: site.zeros([site.d_out]) }
    }

    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        layer_norm(x, self.gamma.val(), Some(self.beta.val()), EPSILON)
    }
}

impl NonLinearity {
    fn apply(self, x: Tensor<2>) -> Tensor<2> {
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

impl Method for BottleneckConfig {
    const PEFT_TYPE: &'static str = "BOTTLENECK";
    type Adapter = BottleneckAdapter;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn check(&self) -> Result<()> {
        self.check_values()
    }

    fn kinds(&self) -> &'static [LayerKind] {
        &[LayerKind::SubLayer]
    }

    fn init(&self, site: &Site, seed: u64) -> Result<BottleneckAdapter> {
        let (width, inner, mut rng) = (site.d_out, self.inner_width(site)?, site.rng(seed));
        let (first, second) = match self.init_weights {
            InitWeights::Bert => (Start::Normal { std: 0.02, cut: false }, Start::Normal { std: 0.02, cut: false }),
            InitWeights::Houlsby => (Start::Normal { std: 0.01, cut: true }, Start::Normal { std: 0.01, cut: true }),
            InitWeights::MamAdapter => (Start::Kaiming, Start::Zeros),
        };
        let mut projection = |shape, start| -> Result<Projection> {
            if self.phm_layer {
                let numbers = [self.phm_dim, self.phm_rank];
                return Ok(Projection::Phm(Phm::new(site, shape, numbers, start, &mut rng)?));
            }
            Ok(Projection::Dense(Dense::new(site, shape, start, &mut rng)))
        };
        let (down, up) = (projection([width, inner], first)?, projection([inner, width], second)?);
        let (scale, constant) = match self.scaling {
            Scaling::Constant(scale) => (None, scale),
            Scaling::Learned => (Some(site.param([1], || 1.0)), 1.0),
            Scaling::Channel => (Some(site.param([width], || 1.0)), 1.0),
        };
        Ok(BottleneckAdapter {
            norm_before: self.ln_before.then(|| OwnNorm::new(site)),
            down,
            up,
            scale,
            norm_after: self.ln_after.then(|| OwnNorm::new(site)),
            gate: self.use_gating.then(|| {
                Dense::new(site, [width, 1], Start::Normal { std: 0.02, cut: false }, &mut site.rng(seed ^ 1))
            }),
            dropout: DropoutConfig::new(self.dropout).init(),
            form: Form {
                non_linearity: self.non_linearity,
                original_ln_before: self.original_ln_before,
                original_ln_after: self.original_ln_after,
                is_parallel: self.is_parallel,
                residual: self.residual_before_ln,
                adapter_residual_before_ln: self.adapter_residual_before_ln,
                scale: constant,
            },
        })
    }

    fn tensors(_kind: LayerKind) -> &'static [FileTensor] {
        const fn plain(field: &'static str, key: &'static str) -> FileTensor {
            FileTensor { field, key, transposed: false }
        }
        const fn matrix(field: &'static str, key: &'static str) -> FileTensor {
            FileTensor { field, key, transposed: true }
        }
        &const {
            [
                plain("norm_before.gamma", "adapter_norm_before.weight"),
                plain("norm_before.beta", "adapter_norm_before.bias"),
                matrix("down.weight", "adapter_down.weight"),
                plain("down.bias", "adapter_down.bias"),
                plain("down.rule", "adapter_down.phm_rule"),
                plain("down.left", "adapter_down.W_left"),
                plain("down.right", "adapter_down.W_right"),
                matrix("up.weight", "adapter_up.weight"),
                plain("up.bias", "adapter_up.bias"),
                plain("up.rule", "adapter_up.phm_rule"),
                plain("up.left", "adapter_up.W_left"),
                plain("up.right", "adapter_up.W_right"),
                plain("scale", "scaling"),
                plain("norm_after.gamma", "adapter_norm_after.weight"),
                plain("norm_after.beta", "adapter_norm_after.bias"),
                matrix("gate.weight", "gate.weight"),
                plain("gate.bias", "gate.bias"),
            ]
        }
    }

    fn leaves_out(&self, path: &str) -> bool {
        block_of(path).is_some_and(|block| self.leave_out.contains(&block))
    }

    fn from_hub(folder: &HubFolder) -> Result<Option<(Self, BTreeMap<String, Values>)>> {
        hub::read(folder).map(Some)
    }

    fn to_hub(file: &AdapterFile<Self>, name: &str) -> Result<Option<HubFolder>> {
        hub::write(file, name).map(Some)
    }

    fn activation(adapter: &BottleneckAdapter) -> Option<&dyn Activation> {
        Some(adapter)
    }

    fn needs_activation(&self, _site: &Site) -> Option<String> {
        Some("a bottleneck acts between layers".to_owned())
    }

    fn unmergeable(&self, _site: &Site) -> Option<String> {
        Some("a bottleneck is no part of any weight".to_owned())
    }
}

impl Composable for BottleneckConfig {
    const COMPOSITION: &'static str = "BOTTLENECK_COMPOSITION";
    const PLACES: &'static [LayerKind] = &[LayerKind::SubLayer];
}

/// The weight form: there is none, and what it would change is not read.
impl Reparameterization for BottleneckAdapter {
    const NAME: &'static str = "bottleneck";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base
    }
}

impl Activation for BottleneckAdapter {
    fn sub_layer(&self, end: End<'_>) -> Tensor<3> {
        let (seen, residual) = self.sees(&end);
        let hidden = self.through(seen, residual);
        self.close(hidden, end)
    }
}

impl Part for BottleneckAdapter {
    fn sees(&self, end: &End<'_>) -> (Tensor<3>, Tensor<3>) {
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

    fn through(&self, x: Tensor<3>, residual: Tensor<3>) -> Tensor<3> {
        let ([batch, seq, width], dtype) = (x.dims(), x.dtype());
        let x: Tensor<2> = x.reshape([batch * seq, width]).cast(self.down.dtype());
        let residual = residual.cast(self.down.dtype());
        let mut y = self.dropout.forward(self.up(x.clone())).reshape([batch, seq, width]);
        if let Some(gate) = &self.gate {
            // One number a sequence.
            y = y * activation::sigmoid(gate.forward(x)).reshape([batch, seq, 1]).mean_dim(1);
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

    fn update(&self, x: Tensor<3>) -> Tensor<3> {
        let ([batch, seq, width], dtype) = (x.dims(), x.dtype());
        let x: Tensor<2> = x.reshape([batch * seq, width]).cast(self.down.dtype());
        self.up(x).reshape([batch, seq, width]).cast(dtype)
    }

    fn close(&self, hidden: Tensor<3>, end: End<'_>) -> Tensor<3> {
        if self.form.original_ln_after { End { output: hidden, ..end }.close() } else { hidden }
    }
}
