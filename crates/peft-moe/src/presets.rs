//! Published mixtures, with their papers' numbers where they give some.

use peft_adapter::Ia3Config;
use peft_core::Targets;
use peft_lora::LoraConfig;

use crate::{Balance, MixLoraConfig, MixtureConfig, Projection, RouterConfig};

/// `MoLoRA`: 10 `LoRA`s of rank 4, all of them as far as the router likes them. Zadouri et al. 2023, arXiv:2309.05444, section 3.
pub fn molora(targets: Targets) -> MixtureConfig<LoraConfig> {
    MixtureConfig::new(LoraConfig::new(4, targets).with_alpha(16.0), 10, RouterConfig::Soft)
}

/// `MoV`: 10 vectors of (IA)³, all of them as far as the router likes them. Zadouri et al. 2023, arXiv:2309.05444, section 3.
///
/// The router reads the layer's input, as all do here; that of the authors' library reads the vector that it scales, which is the layer's output.
pub fn mov(targets: Targets) -> MixtureConfig<Ia3Config> {
    MixtureConfig::new(Ia3Config::new(targets), 10, RouterConfig::Soft)
}

/// `LoRAMoE`: 6 `LoRA`s of rank 4 in two groups, one for the rows of each of two tasks. Dou et al. 2023, arXiv:2312.09979, section 4.
pub fn loramoe(targets: Targets) -> MixtureConfig<LoraConfig> {
    let expert = LoraConfig::new(4, targets).with_alpha(32.0).with_dropout(0.05);
    let balance = Balance { localised: 0.1, delta: 0.1, groups: 2, ..Balance::default() };
    MixtureConfig::new(expert, 6, RouterConfig::Soft).with_balance(balance)
}

/// `MixLoRA`: the best two of 8 feed-forward parts with `LoRA`s of rank 16 each. Li et al. 2024, arXiv:2404.15159, section 4; attention has a `LoRA` of its own there, by a
/// [`Union`](peft_core::Union).
pub fn mixlora(targets: Targets) -> MixLoraConfig {
    let expert = LoraConfig::new(16, targets).with_alpha(32.0).with_dropout(0.05);
    let balance = Balance { load: 0.01, ..Balance::default() };
    let mixture = MixtureConfig::new(expert, 8, RouterConfig::TopK { k: 2 }).with_balance(balance);
    MixLoraConfig { mixture, projections: Projection::ALL.to_vec() }
}

/// `MOELoRA`: 8 `LoRA`s of rank 2, with the scale and the dropout of the authors' code, mixed by the task of a row; one `LoRA` for each task afterwards, see [`task_lora`](crate::task_lora()).
/// Liu et al. 2023, arXiv:2310.18339, section 4.
pub fn moelora(targets: Targets, num_tasks: usize) -> MixtureConfig<LoraConfig> {
    let router = RouterConfig::Task { num_tasks, embedding_dim: 64 };
    MixtureConfig::new(LoraConfig::new(2, targets).with_alpha(4.0).with_dropout(0.1), 8, router)
}

/// How many experts the layers of a `MoLA` have, from the first layers to the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MolaShape {
    /// 8, 6, 4, 2
    Triangle,
    /// 2, 4, 6, 8
    Inverted,
    /// 2, 8, 8, 2
    Diamond,
    /// 5 in all
    Uniform,
}

/// `MoLA`: `LoRA`s of rank 8, the best two of as many as the layer has. Gao et al. 2024, arXiv:2402.08562, section 3.
pub fn mola(targets: Targets, shape: MolaShape, layers: usize) -> MixtureConfig<LoraConfig> {
    let quarters = match shape {
        MolaShape::Triangle => [8, 6, 4, 2],
        MolaShape::Inverted => [2, 4, 6, 8],
        MolaShape::Diamond => [2, 8, 8, 2],
        MolaShape::Uniform => [5; 4],
    };
    let expert = LoraConfig::new(8, targets).with_alpha(16.0).with_dropout(0.05);
    let balance = Balance { load: 0.001, ..Balance::default() };
    let experts_per_layer = (0..layers).map(|layer| quarters[4 * layer / layers]).collect();
    MixtureConfig {
        experts_per_layer,
        ..MixtureConfig::new(expert, 5, RouterConfig::TopK { k: 2 }).with_balance(balance)
    }
}
