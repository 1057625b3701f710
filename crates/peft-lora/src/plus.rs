//! LoRA+: `B` learns faster than `A`. Hayou et al. 2024, arXiv:2402.12354, section 4; defaults as in Hugging Face PEFT.

use burn::module::{Module, Param, ParamId};
use burn::tensor::Tensor;
use peft_core::{Method, ParamVisitor, PathStack, visit_params};

use crate::LoraConfig;

/// Parameters of a model by the learning rate that LoRA+ gives them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoraPlus {
    /// `A` factors and everything else that is trained: the base learning rate.
    pub slow: Vec<ParamId>,
    /// `B` factors and their biases: the base learning rate times the ratio.
    pub fast: Vec<ParamId>,
}

/// Sorts the trained parameters of `module`.
pub fn lora_plus<M: Module>(module: &M) -> LoraPlus {
    #[derive(Default)]
    struct Sorter(LoraPlus);
    impl ParamVisitor for Sorter {
        fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
            match at.locate().field {
                Some(field) if LoraConfig::FAST.contains(&field.as_str()) => self.0.fast.push(param.id),
                _ if param.is_require_grad() => self.0.slow.push(param.id),
                _ => {}
            }
        }
    }
    let mut sorter = Sorter::default();
    visit_params(module, &mut sorter);
    sorter.0
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;
    use peft_core::{Peft, Targets};

    use super::*;

    #[derive(Module, Debug)]
    struct Model {
        adapted: Linear,
        kept: Linear,
        frozen: Linear,
    }

    #[test]
    fn second_factors_are_fast_and_all_else_that_is_trained_is_slow() {
        let device = Device::flex().autodiff();
        let linear = || LinearConfig::new(4, 4).init(&device);
        let mut lora = LoraConfig::new(2, Targets::modules(["adapted"]));
        lora.targets.modules_to_save = Some(vec!["kept".to_owned()]);
        let model = Model { adapted: linear(), kept: linear(), frozen: linear() }.attach(&lora).unwrap();
        let adapter = model.adapted.weight.reparameterization::<crate::LoraAdapter>().unwrap();
        let groups = lora_plus(&model);
        assert_eq!(groups.fast, [adapter.b.id]);
        let kept = [model.kept.weight.id, model.kept.bias.as_ref().unwrap().id];
        assert_eq!(groups.slow, [adapter.a.id, kept[0], kept[1]]);
    }
}
