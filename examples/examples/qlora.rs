//! QLoRA: a base of about four bits a value, frozen and packed during the whole step, and adapters on every linear layer.
//!
//! The recipe of the paper (Dettmers et al. 2023, arXiv:2305.14314): NF4 with double quantisation, rank 64, alpha 16, all linear layers. Its paged
//! optimizer is not needed: only the adapters have an optimizer state, and this program prints how much that is.

use std::error::Error;

use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft::models::load::{Packing, Precision};
use peft::models::{CausalLm, ModelSource, Pretrained};
use peft::prelude::*;

fn main() -> Result<(), Box<dyn Error>> {
    let device = Device::flex().autodiff();
    device.seed(1);
    // Weights are packed while they are read: the dense model never exists. `ModelSource::Dir` reads a model of your own.
    let packing = Packing::Quantize(Quantization::new(Format::NF4));
    let Pretrained { model: base, files } =
        Pretrained::load_with(&ModelSource::Tiny, &packing, Precision::F32, &device)?;
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    println!("base:  {} parameters in {:.2} MiB", base.trainable().total, mib(base.trainable().total_bytes));

    let projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let lora = LoraConfig::new(64, Targets::modules(projections)).with_alpha(16.0);
    let mut model = base.attach(&lora)?;
    let report = model.trainable();
    println!("QLoRA: {report}");
    println!(
        "optimizer state: {:.1} MiB for the adapters; AdamW on the whole model in f32 would take {:.1} MiB",
        mib(2 * report.trainable_bytes),
        mib(2 * 4 * (report.total - report.trainable))
    );

    let text = "My fellow citizens, the state of the union is a model of two million parameters.";
    let ids: Vec<i64> = files.tokenizer()?.encode(text, true)?.into_iter().map(i64::from).collect();
    let count = ids.len();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, count]), &device);
    let mut optimizer = AdamWConfig::new().init();
    let (mut first, mut last) = (f32::NAN, f32::NAN);
    for step in 0..8 {
        let loss = next_token_loss(&model, ids.clone());
        last = loss.clone().into_scalar::<f32>();
        if step == 0 {
            first = last;
        }
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-3, model, grads);
    }
    println!("loss {first:.3} to {last:.3}");
    assert!(last < 0.9 * first, "training does not lower the loss");

    // Merged into what the packed weights stand for, it computes what it computed; packing it again would be a step of its own.
    let merged = merge(model.clone(), &lora)?;
    let ids = ids.without_autodiff();
    let largest = (merged.forward(ids.clone()) - model.valid().forward(ids)).abs().max().into_scalar::<f32>();
    println!("merged: {largest:.1e} from the adapted model");
    assert!(largest < 1e-3, "merging changes the model");
    Ok(())
}

/// Mean cross-entropy of each next token.
fn next_token_loss(model: &CausalLm, ids: Tensor<2, Int>) -> Tensor<1> {
    let [_, count] = ids.dims();
    let logits = model.forward(ids.clone().narrow(1, 0, count - 1)).flatten::<2>(0, 1);
    let targets = ids.narrow(1, 1, count - 1).reshape([count - 1, 1]);
    burn::tensor::activation::log_softmax(logits, 1).gather(1, targets).mean().neg()
}
