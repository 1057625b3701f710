//! LoRA on a model that knows nothing of it: Burn's own transformer encoder, whose layers see their adapted weights.
//!
//! A model that calls `peft::core::linear` instead of `layer.forward` computes the same in less time and memory.

use std::error::Error;

use burn::module::Module;
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Tensor};
use peft::prelude::*;

fn main() -> Result<(), Box<dyn Error>> {
    let device = Device::flex().autodiff();
    device.seed(1);
    let encoder = TransformerEncoderConfig::new(32, 64, 4, 2).with_dropout(0.0).init(&device);

    // The base is frozen; an adapter of rank 4 sits in every query, value and inner feed-forward weight.
    let lora = LoraConfig::new(4, Targets::modules(["query", "value", "linear_inner"])).with_alpha(8.0);
    let mut model = encoder.clone().attach(&lora)?;
    println!("{}", model.trainable());

    // The task: give back the sequence in reverse order.
    let x = Tensor::<3>::random([8, 6, 32], Distribution::Normal(0.0, 1.0), &device);
    let target = x.clone().flip([1]);
    let forward = |model: &TransformerEncoder| model.forward(TransformerEncoderInput::new(x.clone()));
    let mut optimizer = AdamWConfig::new().init();
    let (mut first, mut last) = (f32::NAN, f32::NAN);
    for step in 0..30 {
        let loss = (forward(&model) - target.clone()).square().mean();
        last = loss.clone().into_scalar::<f32>();
        if step == 0 {
            first = last;
        }
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-2, model, grads);
    }
    println!("loss {first:.4} to {last:.4}");
    assert!(last < 0.9 * first, "training does not lower the loss");

    // The file holds the adapter alone, in Hugging Face PEFT's layout; it goes onto any clone of the base.
    let dir = std::env::temp_dir().join(format!("any-burn-model-{}", std::process::id()));
    save_adapter(&model, &lora, None, &dir)?;
    let (loaded, lora) = load_adapter::<_, LoraConfig>(encoder, &dir)?;
    std::fs::remove_dir_all(&dir)?;

    // Merged, it is again a plain encoder, without autodiff.
    let merged = merge(loaded, &lora)?;
    let largest = (forward(&merged) - forward(&model.valid())).abs().max().into_scalar::<f32>();
    println!("merged: {largest:.1e} from the adapted model");
    assert!(largest < 1e-5, "merging changes the model");
    Ok(())
}
