//! Laws of experts that act one after the other, and of shared ones: each does what it does alone.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use peft_adapter::BottleneckConfig;
use peft_core::{AdapterFile, Method, Strictness, SubLayer, Targets, attach, linear, report};
use peft_lora::LoraConfig;
use peft_moe::{MixtureConfig, RouterConfig};
use peft_testkit::fill_adapter;

use crate::mixtures::{WIDTH, base, file, near, random, values, x};

/// Two blocks, of which a test computes the first.
#[derive(Module, Debug)]
struct Blocks {
    blocks: Vec<Block>,
}

#[derive(Module, Debug)]
struct Block {
    output_adapters: SubLayer,
}

impl Blocks {
    fn new(device: &Device) -> Self {
        let block = || Block { output_adapters: SubLayer::new(WIDTH, device) };
        Self { blocks: vec![block(), block()] }
    }

    fn output(&self, x: Tensor<3>) -> Vec<f32> {
        values(self.blocks[0].output_adapters.end(x.clone().tanh(), x, None))
    }
}

fn blocks<M: Method>(method: &M, device: &Device) -> Blocks {
    fill_adapter(attach(Blocks::new(device), method, 0).unwrap())
}

/// A gate of its own and a norm behind it, unlike the sum of plain updates.
#[test]
fn one_expert_is_that_bottleneck() {
    let device = Device::flex();
    let expert = BottleneckConfig { use_gating: true, ln_after: true, ..BottleneckConfig::pfeiffer(2.0) };
    let mixture = MixtureConfig::new(expert.clone(), 1, RouterConfig::Soft);
    let one = blocks(&mixture, &device);
    let mut alone = AdapterFile::collect(&blocks(&expert, &device), &expert).unwrap();
    for (key, values) in AdapterFile::collect(&one, &mixture).unwrap().tensors {
        if let Some((path, key)) = key.split_once(".experts.0.") {
            assert!(alone.tensors.insert(format!("{path}.{key}"), values).is_some(), "{key}");
        }
    }
    let alone = alone.fill(blocks(&expert, &device), "the values".as_ref(), Strictness::default()).unwrap();
    near(&one.output(x(&device)), &alone.output(x(&device)));
}

#[test]
fn dropout_of_experts_acts_in_training() {
    let device = Device::flex().autodiff();
    let expert = BottleneckConfig { dropout: 0.5, ..BottleneckConfig::pfeiffer(2.0) };
    let model = blocks(&MixtureConfig::new(expert, 2, RouterConfig::Soft), &device);
    assert_ne!(model.output(x(&device)), model.output(x(&device)));
    let (model, device) = (model.valid(), Device::flex());
    assert_eq!(model.output(x(&device)), model.output(x(&device)));
}

#[test]
fn dropout_of_shared_experts_acts_in_training() {
    let device = Device::flex().autodiff();
    let expert = LoraConfig::new(2, Targets::modules(["proj"])).with_dropout(0.5);
    let method = MixtureConfig::new(expert, 2, RouterConfig::Soft).with_shared(1);
    let mut learned = file(&random(&method), &method);
    // The others add nothing.
    learned.tensors.get_mut("proj.experts.lora_B.weight").unwrap().values.fill(0.0);
    let model = attach(base(&device), &method, 0).unwrap();
    let model = learned.fill(model, "the values".as_ref(), Strictness::default()).unwrap();
    let run = || values(linear(&model.proj, x(&device)));
    assert_ne!(run(), run());
    let (model, device) = (model.clone().valid(), Device::flex());
    let run = || values(linear(&model.proj, x(&device)));
    assert_eq!(run(), run());
}

/// As an expert leaves it out, so does the mixture.
#[test]
fn a_block_can_be_left_out() {
    let trained = |leave_out: Vec<usize>| {
        let expert = BottleneckConfig { leave_out, ..BottleneckConfig::pfeiffer(2.0) };
        report(&blocks(&MixtureConfig::new(expert, 2, RouterConfig::Soft), &Device::flex())).trainable
    };
    assert_eq!(2 * trained(vec![1]), trained(Vec::new()));
}
