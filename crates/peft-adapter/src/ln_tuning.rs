//! LN tuning: the scales and shifts of norms, trained. Zhao et al. 2023, arXiv:2312.11420, section 2.
//!
//! - formula: `y = γ' ⊙ normed(x) + β'`, `γ', β': [width]`, in place of the norm's own `γ` and `β`; an RMS norm has no `β`
//! - trained: `2 · width` values a `LayerNorm`, `width` an `RmsNorm`
//! - at init: identity, since `γ' = γ` and `β' = β`
//!
//! The file holds `γ'` and `β'` themselves, so the adapter does too, and starts as a copy of what the base holds: [`Site::copy`]. Differences from
//! the base would start at zero without looking at it, but would have to be converted whenever a file is read or written.

use burn::module::{Module, Param, Reparameterization};
use burn::tensor::Tensor;
use peft_core::{Activation, Error, FileTensor, LayerKind, Method, Result, Site, Targets};
use serde::{Deserialize, Serialize};

/// Configuration of LN tuning; its JSON is Hugging Face's `adapter_config.json`.
///
/// ```
/// use burn::{nn::RmsNormConfig, tensor::{Device, Tensor}};
/// use peft_adapter::LnTuningConfig;
/// use peft_core::{Peft, Targets};
///
/// #[derive(burn::module::Module, Debug)]
/// struct Model { norm: burn::nn::RmsNorm }
///
/// let device = Device::flex().autodiff();
/// let model = Model { norm: RmsNormConfig::new(16).init(&device) };
/// let model = model.attach(&LnTuningConfig::new(Targets::modules(["norm"])))?;
/// assert_eq!(model.trainable().trainable, 16);
/// let y = model.norm.forward(Tensor::<2>::ones([1, 16], &device));
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LnTuningConfig {
    /// Which norms.
    #[serde(flatten)]
    pub targets: Targets,
}

impl LnTuningConfig {
    /// LN tuning of `targets`.
    pub fn new(targets: Targets) -> Self {
        Self { targets }
    }
}

/// State of [`LnTuningConfig`] in one norm.
#[derive(Module, Debug)]
pub struct LnTuningAdapter {
    /// `γ'`, `[width]`
    pub weight: Param<Tensor<1>>,
    /// `β'`, `[width]`
    pub bias: Option<Param<Tensor<1>>>,
}

impl Method for LnTuningConfig {
    const PEFT_TYPE: &'static str = "LN_TUNING";
    type Adapter = LnTuningAdapter;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn kinds(&self) -> &'static [LayerKind] {
        &[LayerKind::LayerNorm, LayerKind::RmsNorm]
    }

    fn init(&self, site: &Site, _seed: u64) -> Result<LnTuningAdapter> {
        let scaleless = || Error::config("target_modules", "norms with a scale", &site.path);
        Ok(LnTuningAdapter { weight: site.copy("gamma").ok_or_else(scaleless)?, bias: site.copy("beta") })
    }

    fn tensors(_kind: LayerKind) -> &'static [FileTensor] {
        &[
            FileTensor { field: "weight", key: "ln_tuning_layers.weight", transposed: false },
            FileTensor { field: "bias", key: "ln_tuning_layers.bias", transposed: false },
        ]
    }

    fn activation(adapter: &LnTuningAdapter) -> Option<&dyn Activation> {
        Some(adapter)
    }

    fn needs_activation(&self, site: &Site) -> Option<String> {
        site.has_bias.then(|| "LN tuning moves the norm's shift".to_owned())
    }
}

impl Reparameterization for LnTuningAdapter {
    const NAME: &'static str = "ln_tuning";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let shape = base.shape();
        self.weight.val().reshape::<D, _>(shape).cast(base.dtype())
    }
}

impl Activation for LnTuningAdapter {
    fn shift(&self, bias: Option<&Tensor<1>>) -> Option<Tensor<1>> {
        let trained = self.bias.as_ref()?.val();
        let dtype = trained.dtype();
        Some(trained - bias?.clone().cast(dtype))
    }
}
