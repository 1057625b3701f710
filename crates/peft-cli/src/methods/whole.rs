//! Training without an adapter: the whole model, or the modules that are named. The result is a model of its own.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use peft_core::{ParamMapper, PathStack, Peft, Problem, Targets, map_params};
use peft_models::load::Packing;
use peft_models::{CausalLm, Encoder, ModelFiles};
use peft_train::{Trained, WholeModel};

use super::{Adaptation, Adapts};
use crate::model::FrozenType;
use crate::settings::Settings;
use crate::{Error, Result};

/// What of a model is trained in place.
pub(super) enum Whole {
    /// Everything.
    All,
    /// `modules_to_save`.
    Modules(Targets),
}

impl Whole {
    /// Everything.
    pub(super) fn all(settings: &Settings) -> Result<Self> {
        check(settings, "full")?;
        Ok(Self::All)
    }

    /// The head, which `modules_to_save` names.
    pub(super) fn head(settings: &Settings) -> Result<Self> {
        check(settings, "head")?;
        let modules_to_save = Some(settings.modules_to_save.clone());
        Ok(Self::Modules(Targets { modules_to_save, ..Targets::default() }))
    }

    fn freeze<T: Module>(&self, model: T) -> Result<T> {
        let Self::Modules(targets) = self else { return Ok(model) };
        let model = map_params(model, &mut TrainOnly(targets.matcher()?));
        if model.trainable().trainable == 0 {
            let targets = format!("modules_to_save {:?}", targets.modules_to_save.as_deref().unwrap_or_default());
            let problems = vec![Problem::NoMatch { targets, near: Vec::new() }];
            return Err(peft_core::Error::Attach { method: "head", problems }.into());
        }
        Ok(model)
    }
}

/// Settings of adapters and of frozen weights, which would change nothing here or cannot be.
fn check(settings: &Settings, method: &str) -> Result<()> {
    super::configure::refuse_targets(settings, method)?;
    let given =
        [("quantize", settings.packing.quantize.is_some()), ("precision", settings.precision != FrozenType::F32)];
    match given.iter().find(|(_, given)| *given) {
        Some((flag, _)) => {
            let what = format!("--{flag}: {method} trains the weights themselves, without an adapter and in f32");
            Err(Error::usage(what, "leave it out"))
        }
        None => super::configure::only(settings, method, &[]),
    }
}

/// Freezes what the matcher does not name.
struct TrainOnly(peft_core::Matcher);

impl ParamMapper for TrainOnly {
    fn float<const D: usize>(&mut self, at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.set_require_grad(self.0.saves_module(&at.locate().module))
    }
}

impl Adapts<CausalLm> for Whole {
    fn attach(&self, model: CausalLm, _files: &ModelFiles, _seed: u64) -> Result<CausalLm> {
        self.freeze(model)
    }

    fn trained(&self, _model: &CausalLm, files: &ModelFiles) -> Result<Box<dyn Trained<CausalLm>>> {
        Ok(Box::new(WholeModel::of(files)?))
    }
}

impl Adapts<Encoder> for Whole {
    fn attach(&self, model: Encoder, _files: &ModelFiles, _seed: u64) -> Result<Encoder> {
        self.freeze(model)
    }

    fn trained(&self, _model: &Encoder, files: &ModelFiles) -> Result<Box<dyn Trained<Encoder>>> {
        Ok(Box::new(WholeModel::of(files)?))
    }
}

impl Adaptation for Whole {
    fn targets(&self) -> Option<&Targets> {
        None
    }

    fn packing(&self, _asked: Packing) -> Packing {
        // A weight that is to be trained, or saved with one that is, must be dense.
        Packing::Dense
    }
}
