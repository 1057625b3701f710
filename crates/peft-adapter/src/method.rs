//! Bottlenecks as a method: what sits at which place, and under which keys.

use std::collections::BTreeMap;

use burn::module::{Module, Reparameterization};
use burn::tensor::Tensor;
use peft_core::files::{HubFolder, Values};
use peft_core::{
    Activation, AdapterFile, Composable, End, Error, FileTensor, LayerKind, Method, Part, Result, Site, Targets,
    block_of,
};

use crate::bottleneck::Bottleneck;
use crate::config::{BottleneckConfig, InvAdapter};
use crate::hub;
use crate::invertible::Nice;

/// State of [`BottleneckConfig`] at one place.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one is in each block, the other once in a model")]
pub enum BottleneckAdapter {
    /// Where a sub-layer ends.
    Bottleneck(Bottleneck),
    /// Behind the embeddings; where a sub-layer ends it adds nothing.
    Invertible(Nice),
}

impl Method for BottleneckConfig {
    const PEFT_TYPE: &'static str = "BOTTLENECK";
    type Adapter = BottleneckAdapter;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn takes_whole_rows(&self) -> bool {
        self.use_gating
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
                matrix("gate.dense.weight", "gate.weight"),
                plain("gate.dense.bias", "gate.bias"),
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

impl Composable for BottleneckConfig {
    const COMPOSITION: &'static str = "BOTTLENECK_COMPOSITION";
    const MIXTURE: &'static str = "BOTTLENECK_MIXTURE";
    const PLACES: &'static [LayerKind] = &[LayerKind::SubLayer];

    fn check_expert(&self) -> Result<()> {
        if let Some(adapter) = self.inv_adapter {
            let expected = "none in an expert: a mixture is not behind the embeddings";
            return Err(Error::config("inv_adapter", expected, format!("{adapter:?}")));
        }
        if self.adapter_residual_before_ln && self.ln_after && !self.is_parallel {
            let expected = "false in an expert with `ln_after`, or what is normed is not its own alone";
            return Err(Error::config("adapter_residual_before_ln", expected, true));
        }
        Ok(())
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
        let (seen, residual) = self.sees(&end);
        let hidden = self.through(seen, residual);
        self.close(hidden, end)
    }

    fn embedded(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Bottleneck(_) => x,
            Self::Invertible(nice) => nice.forward(x),
        }
    }

    fn unembedded(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Bottleneck(_) => x,
            Self::Invertible(nice) => nice.back(x),
        }
    }
}

impl Part for BottleneckAdapter {
    type Experts = Vec<Self>;

    fn sees(&self, end: &End<'_>) -> (Tensor<3>, Tensor<3>) {
        match self {
            Self::Bottleneck(bottleneck) => bottleneck.sees(end),
            Self::Invertible(_) => (end.output.clone(), end.output.clone()),
        }
    }

    fn through(&self, seen: Tensor<3>, residual: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Bottleneck(bottleneck) => bottleneck.through(seen, residual),
            Self::Invertible(_) => residual,
        }
    }

    fn update(&self, seen: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Bottleneck(bottleneck) => bottleneck.update(seen),
            Self::Invertible(_) => seen.zeros_like(),
        }
    }

    fn close(&self, hidden: Tensor<3>, end: End<'_>) -> Tensor<3> {
        match self {
            Self::Bottleneck(bottleneck) => bottleneck.close(hidden, end),
            Self::Invertible(_) => End { output: hidden, ..end }.close(),
        }
    }
}
