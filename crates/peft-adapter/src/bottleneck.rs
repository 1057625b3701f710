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
use peft_core::{Activation, AdapterFile, End, FileTensor, LayerKind, Method, Norm, Result, Site, Targets};
use serde::{Deserialize, Serialize};

use crate::config::{BottleneckConfig, InitWeights, InvAdapter, NonLinearity, Residual, Scaling, block_of};
use crate::hub;
use crate::invertible::Nice;
use crate::projection::{Dense, Phm, Projection, Start};

/// Added to the variance in a bottleneck's own norms: PyTorch's default.
const EPSILON: f64 = 1e-5;

/// State of [`BottleneckConfig`] at one place.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one is in each block, the other once in a model")]
pub enum BottleneckAdapter {
    /// Where a sub-layer ends.
    Bottleneck(Bottleneck),
    /// Behind the embeddings.
    Invertible(Nice),
}

/// A bottleneck where a sub-layer ends.
#[derive(Module, Debug)]
pub struct Bottleneck {
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

/// What a bottleneck makes of its input.
pub(crate) struct Through {
    /// With what is added to it: what goes on.
    pub(crate) output: Tensor<3>,
    /// Without it, and without dropout and norms: what fusion looks at.
    pub(crate) up: Tensor<3>,
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
            Ok(Projection::Dense(Dense::new(site, shape, start, &mut rng)))
        };
        let [first, second] = config.init_weights.starts();
        let (down, up) = (projection([width, inner], first)?, projection([inner, width], second)?);
        let (scale, constant) = match config.scaling {
            Scaling::Constant(scale) => (None, scale),
            Scaling::Learned => (Some(site.param([1], || 1.0)), 1.0),
            Scaling::Channel => (Some(site.param([width], || 1.0)), 1.0),
        };
        Ok(Self {
            norm_before: config.ln_before.then(|| OwnNorm::new(site)),
            down,
            up,
            scale,
            norm_after: config.ln_after.then(|| OwnNorm::new(site)),
            gate: config.use_gating.then(|| {
                Dense::new(site, [width, 1], Start::Normal { std: 0.02, cut: false }, &mut site.rng(seed ^ 1))
            }),
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

    /// What the bottleneck sees of a sub-layer that computed `output`, and what is added to what it makes of that.
    pub(crate) fn before(
        &self,
        output: Tensor<3>,
        input: &Tensor<3>,
        norm: Option<Norm<'_>>,
    ) -> (Tensor<3>, Tensor<3>) {
        if self.form.is_parallel {
            return (input.clone(), output);
        }
        if !self.form.original_ln_before {
            return (output.clone(), output);
        }
        let sum = output.clone() + input.clone();
        let normed = match norm {
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

    /// The bottleneck itself.
    pub(crate) fn through(&self, x: Tensor<3>, residual: Tensor<3>) -> Through {
        let ([batch, seq, width], dtype) = (x.dims(), x.dtype());
        let unfold = |rows: Tensor<2>| rows.reshape([batch, seq, width]);
        let x: Tensor<2> = x.reshape([batch * seq, width]).cast(self.down.dtype());
        let residual = residual.cast(self.down.dtype());
        let seen = match &self.norm_before {
            Some(norm) => norm.forward(x.clone()),
            None => x.clone(),
        };
        let up = self.up.forward(self.form.non_linearity.apply(self.down.forward(seen)));
        let up = unfold(match &self.scale {
            Some(scale) => up * scale.val().unsqueeze(),
            None => up * self.form.scale,
        });
        let mut y = self.dropout.forward(up.clone());
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
        Through { output: add_residual(y, false).cast(dtype), up: up.cast(dtype) }
    }

    /// The end of the sub-layer, after the bottleneck gave `hidden`.
    pub(crate) fn after(&self, hidden: Tensor<3>, end: End<'_>) -> Tensor<3> {
        if self.form.original_ln_after { End { output: hidden, ..end }.close() } else { hidden }
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
        Ok(match (site.kind, self.inv_adapter) {
            (LayerKind::Embedded, Some(InvAdapter::Nice)) => {
                BottleneckAdapter::Invertible(Nice::new(self, site, seed)?)
            }
            _ => BottleneckAdapter::Bottleneck(Bottleneck::new(self, site, seed)?),
        })
    }

    fn tensors(kind: LayerKind) -> &'static [FileTensor] {
        if kind == LayerKind::Embedded {
            return Nice::TENSORS;
        }
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

    fn embeds(&self) -> bool {
        self.inv_adapter.is_some()
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

/// The weight form: there is none, and what it would change is not read.
impl Reparameterization for BottleneckAdapter {
    const NAME: &'static str = "bottleneck";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base
    }
}

impl Activation for BottleneckAdapter {
    fn sub_layer(&self, end: End<'_>) -> Tensor<3> {
        let Self::Bottleneck(bottleneck) = self else { return end.close() };
        let (x, residual) = bottleneck.before(end.output.clone(), &end.input, end.norm);
        let hidden = bottleneck.through(x, residual).output;
        bottleneck.after(hidden, end)
    }

    fn embedded(&self, x: Tensor<2>) -> Tensor<2> {
        let Self::Invertible(nice) = self else { return x };
        nice.forward(x)
    }

    fn unembedded(&self, x: Tensor<2>) -> Tensor<2> {
        let Self::Invertible(nice) = self else { return x };
        nice.back(x)
    }
}
