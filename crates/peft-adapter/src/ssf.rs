//! SSF: what a frozen layer computes, scaled and shifted. Lian et al. 2022, arXiv:2210.08823, section 3.2.
//!
//! - formula: `y = γ ⊙ (x·W + b) + β`, `γ, β: [d_out]`; the same after norms and, by channel, after convolutions
//! - trained: `2 · d_out` values a layer
//! - at init: identity, since `γ = 1` and `β = 0`; the paper's code starts at `γ ~ N(1, 0.02²)`, `β ~ N(0, 0.02²)`
//!
//! The paper puts it behind the patch embedding and every linear layer and norm of a vision transformer. Hugging Face PEFT has no SSF: files
//! have its layout, with `peft_type` `SSF` and the keys `ssf_scale` and `ssf_shift`, and it will not load them. A layer with a bias merges exactly,
//! `W·diag(γ)` and `γ ⊙ b + β`; one without has nowhere to put `β`.

use burn::module::{Module, Param, Reparameterization};
use burn::tensor::Tensor;
use peft_core::{Activation, Base, FileTensor, LayerKind, Method, Result, Site, Targets};
use serde::{Deserialize, Serialize};

/// Configuration of SSF.
///
/// ```
/// use burn::{nn::{LayerNormConfig, LinearConfig}, tensor::{Device, Tensor}};
/// use peft_adapter::SsfConfig;
/// use peft_core::{AdapterAware, Peft, Targets, layer_norm, linear};
///
/// #[derive(burn::module::Module, Debug)]
/// struct Model { norm: burn::nn::LayerNorm, proj: burn::nn::Linear, aware: AdapterAware }
///
/// let device = Device::flex().autodiff();
/// let (norm, proj) = (LayerNormConfig::new(16).init(&device), LinearConfig::new(16, 8).init(&device));
/// let model = Model { norm, proj, aware: AdapterAware };
/// let model = model.attach(&SsfConfig::new(Targets::modules(["norm", "proj"])))?;
/// assert_eq!(model.trainable().trainable, 2 * (16 + 8));
/// let y = linear(&model.proj, layer_norm(&model.norm, Tensor::<2>::ones([1, 16], &device), 1e-5));
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SsfConfig {
    /// Initial values of `γ` and `β`.
    pub init_ssf_weights: InitSsf,
    /// Which layers.
    #[serde(flatten)]
    pub targets: Targets,
}

/// Initial values of SSF.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitSsf {
    /// `γ = 1`, `β = 0`.
    #[default]
    Identity,
    /// `γ ~ N(1, 0.02²)`, `β ~ N(0, 0.02²)`, as the paper's code has it.
    Paper,
}

impl SsfConfig {
    /// SSF behind `targets`.
    pub fn new(targets: Targets) -> Self {
        Self { targets, ..Self::default() }
    }

    /// Sets the initial values.
    #[must_use]
    pub fn with_init(self, init_ssf_weights: InitSsf) -> Self {
        Self { init_ssf_weights, ..self }
    }
}

/// State of [`SsfConfig`] in one weight.
#[derive(Module, Debug)]
pub struct SsfAdapter {
    /// `γ`, `[d_out]`
    pub scale: Param<Tensor<1>>,
    /// `β`, `[d_out]`
    pub shift: Param<Tensor<1>>,
}

/// Spread of the paper's initial values.
const SPREAD: f32 = 0.02;

impl Method for SsfConfig {
    const PEFT_TYPE: &'static str = "SSF";
    type Adapter = SsfAdapter;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn kinds(&self) -> &'static [LayerKind] {
        &[LayerKind::Linear, LayerKind::Conv1D, LayerKind::LayerNorm, LayerKind::RmsNorm, LayerKind::Conv2d]
    }

    fn init(&self, site: &Site, seed: u64) -> Result<SsfAdapter> {
        let (width, mut rng) = ([site.d_out], site.rng(seed));
        Ok(match self.init_ssf_weights {
            InitSsf::Identity => SsfAdapter { scale: site.param(width, || 1.0)?, shift: site.zeros(width)? },
            InitSsf::Paper => SsfAdapter {
                scale: site.normal_around(1.0, width, SPREAD, &mut rng)?,
                shift: site.normal(width, SPREAD, &mut rng)?,
            },
        })
    }

    fn tensors(_kind: LayerKind) -> &'static [FileTensor] {
        &[
            FileTensor { field: "scale", key: "ssf_scale", transposed: false },
            FileTensor { field: "shift", key: "ssf_shift", transposed: false },
        ]
    }

    fn activation(adapter: &SsfAdapter) -> Option<&dyn Activation> {
        Some(adapter)
    }

    fn needs_activation(&self, _site: &Site) -> Option<String> {
        Some("SSF adds to the layer's output".to_owned())
    }
}

impl Reparameterization for SsfAdapter {
    const NAME: &'static str = "ssf";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        // What a layer makes comes last in every weight but a convolution's.
        let output = if D == 4 { 0 } else { D - 1 };
        let mut shape = [1; D];
        shape[output] = base.dims()[output];
        let (dtype, scale) = (base.dtype(), self.scale.val());
        (base.cast(scale.dtype()) * scale.reshape(shape)).cast(dtype)
    }
}

impl Activation for SsfAdapter {
    fn linear(&self, x: Tensor<2>, base: &Base<'_>) -> Option<Tensor<2>> {
        let (y, scale) = (base.linear(x), self.scale.val());
        let dtype = y.dtype();
        let y = y.cast(scale.dtype()) * scale.unsqueeze() + self.shift.val().unsqueeze();
        Some(y.cast(dtype))
    }

    fn shift(&self, bias: Option<&Tensor<1>>) -> Option<Tensor<1>> {
        let (scale, shift) = (self.scale.val(), self.shift.val());
        Some(match bias {
            Some(bias) => bias.clone().cast(scale.dtype()) * (scale - 1.0) + shift,
            None => shift,
        })
    }
}
