//! BitFit: biases trained, and nothing else. Ben Zaken et al. 2022, arXiv:2106.10199, section 3.
//!
//! - formula: `y = x·W + (b + β)`, `β: [d_out]`; the same for norms and convolutions
//! - trained: `d_out` values a layer with a bias
//! - at init: identity, since `β = 0`, unless `init_weights` is `false`
//!
//! Hugging Face PEFT knows the trained difference of a bias as BEFT, so files are of that type, and PEFT loads those for linear layers. A layer without
//! a bias is refused: BitFit trains what is there.

use burn::module::{Module, Param, Reparameterization};
use burn::tensor::Tensor;
use peft_core::{Activation, Base, Error, FileTensor, LayerKind, Method, Result, Site, Targets};
use serde::{Deserialize, Serialize};

/// Configuration of BitFit; its JSON is Hugging Face's `adapter_config.json` for BEFT.
///
/// ```
/// use burn::{nn::LinearConfig, tensor::{Device, Tensor}};
/// use peft_adapter::BitFitConfig;
/// use peft_core::{AdapterAware, Peft, Targets, linear};
///
/// #[derive(burn::module::Module, Debug)]
/// struct Model { proj: burn::nn::Linear, aware: AdapterAware }
///
/// let device = Device::flex().autodiff();
/// let model = Model { proj: LinearConfig::new(16, 8).init(&device), aware: AdapterAware };
/// let model = model.attach(&BitFitConfig::new(Targets::modules(["proj"])))?;
/// assert_eq!(model.trainable().trainable, 8);
/// let y = linear(&model.proj, Tensor::<2>::ones([1, 16], &device));
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BitFitConfig {
    /// Start as the identity; `false`, which is for tests, starts at `N(0, 1)`.
    pub init_weights: bool,
    /// Which layers.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for BitFitConfig {
    fn default() -> Self {
        Self { init_weights: true, targets: Targets::default() }
    }
}

impl BitFitConfig {
    /// BitFit of `targets`.
    pub fn new(targets: Targets) -> Self {
        Self { targets, ..Self::default() }
    }
}

/// State of [`BitFitConfig`] in one weight.
#[derive(Module, Debug)]
pub struct BitFitAdapter {
    /// `β`, `[1, d_out]`
    pub bias: Param<Tensor<2>>,
}

impl Method for BitFitConfig {
    const PEFT_TYPE: &'static str = "BEFT";
    type Adapter = BitFitAdapter;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn kinds(&self) -> &'static [LayerKind] {
        &[LayerKind::Linear, LayerKind::Conv1D, LayerKind::LayerNorm, LayerKind::Conv2d]
    }

    fn init(&self, site: &Site, seed: u64) -> Result<BitFitAdapter> {
        if !site.has_bias {
            let found = format!("{}, which has none", site.path);
            return Err(Error::config("target_modules", "layers with a bias to train", found));
        }
        let shape = [1, site.d_out];
        let random = || site.normal(shape, 1.0, &mut site.rng(seed));
        Ok(BitFitAdapter { bias: if self.init_weights { site.zeros(shape)? } else { random()? } })
    }

    fn tensors(_kind: LayerKind) -> &'static [FileTensor] {
        &[FileTensor { field: "bias", key: "beft_bias", transposed: false }]
    }

    fn activation(adapter: &BitFitAdapter) -> Option<&dyn Activation> {
        Some(adapter)
    }

    fn needs_activation(&self, _site: &Site) -> Option<String> {
        Some("BitFit adds to the layer's output".to_owned())
    }
}

impl Reparameterization for BitFitAdapter {
    const NAME: &'static str = "bitfit";

    /// The weight as it is: the adapter only sits in it.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base
    }
}

impl Activation for BitFitAdapter {
    fn linear(&self, x: Tensor<2>, base: &Base<'_>) -> Option<Tensor<2>> {
        let y = base.linear(x);
        let dtype = y.dtype();
        Some(y + self.bias.val().cast(dtype))
    }

    fn shift(&self, _bias: Option<&Tensor<1>>) -> Option<Tensor<1>> {
        Some(self.bias.val().squeeze_dim(0))
    }
}
