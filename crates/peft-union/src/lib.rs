//! Methods of several kinds as one adapter: a prefix in front of the blocks, bottlenecks between them, `LoRA` or (IA)³ in their layers.
//!
//! - MAM: [`Parts::mam`], a prefix and bottlenecks beside feed-forward. He et al. 2022, arXiv:2110.04366, section 4
//! - `MixLoRA`: [`Parts::mixlora_with`], mixtures of feed-forward parts and plain `LoRA` on attention. Li et al. 2024, arXiv:2404.15159, section 3
//! - `UniPELT`: [`Parts::unipelt`], a prefix, bottlenecks after feed-forward and `LoRA`, each with a gate. Mao et al. 2022, arXiv:2110.07577, section 3.2
//!
//! Prefixes are AdapterHub's, whose folders of unions are these: the text's positions are those that it has without them.

mod published;

use peft_adapter::{BottleneckConfig, Ia3Config};
use peft_core::{Method, Targets, Union};
use peft_lora::LoraConfig;
use peft_moe::{MixLoraConfig, MixtureConfig};
use peft_prompt::{Gating, PrefixTuningConfig};

pub use self::published::{PUBLISHED, read_published};

/// A union of methods, each of them at most once; the first four are those that AdapterHub has.
pub type AnyUnion = Union<PrefixTuningConfig, Union<BottleneckConfig, Union<LoraConfig, InLayers>>>;

/// What else there is in layers.
pub type InLayers = Union<Ia3Config, Union<MixtureConfig<LoraConfig>, MixLoraConfig>>;

/// What a [`AnyUnion`] is made of.
///
/// ```
/// use burn::{module::Module, nn::{Linear, LinearConfig}, tensor::Device};
/// use peft_core::{Peft, PromptShape, Prompts, SubLayer, Targets};
/// use peft_union::Parts;
///
/// #[derive(Module, Debug)]
/// struct Model { query: Linear, output_adapters: SubLayer, prompts: Prompts, aware: peft_core::AdapterAware }
///
/// let device = Device::flex().autodiff();
/// let shape = PromptShape { width: 32, blocks: 1, kv_heads: 1, head_dim: 32, positions: 64, causal: false };
/// let model = Model {
///     query: LinearConfig::new(32, 32).init(&device),
///     output_adapters: SubLayer::new(32, &device),
///     prompts: Prompts::new(shape, &device),
///     aware: peft_core::AdapterAware,
/// };
/// let model = model.attach(&Parts::unipelt(Targets::modules(["query"])).union())?;
/// let prefix = 10 * 32 + 32 * 512 + 512 + 2 * 32 * 513;
/// let (bottleneck, lora, gates) = (2 * 32 * 2 + 2 + 32, 8 * (32 + 32), 3 * (32 + 1));
/// assert_eq!(model.trainable().trainable, prefix + bottleneck + lora + gates);
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parts {
    /// In front of the keys and values of the blocks.
    pub prefix: Option<PrefixTuningConfig>,
    /// Where sub-layers end.
    pub bottleneck: Option<BottleneckConfig>,
    /// In linear layers.
    pub lora: Option<LoraConfig>,
    /// In others.
    pub ia3: Option<Ia3Config>,
    /// In others, several `LoRA`s and a router.
    pub mixture: Option<MixtureConfig<LoraConfig>>,
    /// Around feed-forward parts.
    pub mixlora: Option<MixLoraConfig>,
}

impl Parts {
    /// MAM: a prefix of 30 through an encoder of 800, and bottlenecks of half the width beside feed-forward, times four.
    pub fn mam() -> Self {
        Self {
            prefix: Some(PrefixTuningConfig::new(30).with_projection(800).without_shift()),
            bottleneck: Some(BottleneckConfig::parallel(2.0)),
            ..Self::default()
        }
    }

    /// `UniPELT`: a prefix of 10 through an encoder of 512, Pfeiffer's bottlenecks of a sixteenth of the width, `LoRA` of rank 8 on `targets`, the projections of queries and
    /// values in the paper; all with gates, which look at whole rows, so that it is for encoders.
    pub fn unipelt(targets: Targets) -> Self {
        let prefix = PrefixTuningConfig::new(10).with_projection(512).without_shift();
        Self {
            prefix: Some(prefix.with_gating(Gating::Shared)),
            bottleneck: Some(BottleneckConfig { use_gating: true, ..BottleneckConfig::pfeiffer(16.0) }),
            lora: Some(LoraConfig { use_gating: true, ..LoraConfig::new(8, targets).with_alpha(2.0) }),
            ..Self::default()
        }
    }

    /// `MixLoRA` with its feed-forward parts and a plain `LoRA` of the same rank on `targets`, the projections of attention.
    pub fn mixlora_with(mixlora: MixLoraConfig, targets: Targets) -> Self {
        let lora = LoraConfig { targets, ..mixlora.mixture.expert.clone() };
        Self { lora: Some(lora), mixlora: Some(mixlora), ..Self::default() }
    }

    /// All of them as one method.
    pub fn union(self) -> AnyUnion {
        let routed = both(self.mixture, self.mixlora);
        let others = both(self.ia3, routed);
        let of_layers = both(self.lora, others);
        let in_blocks = both(self.bottleneck, of_layers);
        Union::new(self.prefix, in_blocks)
    }
}

/// A union of what there is; nothing of nothing.
fn both<A: Method, B: Method>(first: Option<A>, second: Option<B>) -> Option<Union<A, B>> {
    (first.is_some() || second.is_some()).then(|| Union::new(first, second))
}

/// [`Parts::mam`] as one method.
pub fn mam() -> AnyUnion {
    Parts::mam().union()
}

/// [`Parts::unipelt`] as one method.
pub fn unipelt(targets: Targets) -> AnyUnion {
    Parts::unipelt(targets).union()
}
