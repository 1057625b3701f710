//! A method of one's own in one file: a learnt scale on the input of a layer.
//!
//! - formula: `y = (x ⊙ l)·W + b`, `l: [d_in]`, which is the weight `diag(l)·W`
//! - trained: `d_in` values a layer
//! - at init: identity, since `l = 1`
//!
//! It gets both seams, merging, the adapter file and the laws; nothing in the workspace knows of it.

use std::error::Error;

use burn::module::{Module, Param, Reparameterization};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{DType, Device, Distribution, Tensor};
use peft::core::{Activation, Base, FileTensor, LayerKind, Method, Peft, Result, Site, Targets};
use peft::prelude::{load_adapter, merge, save_adapter};
use peft_testkit::{Check, Laws, Stack, difference, read, table};
use serde::{Deserialize, Serialize};

/// The configuration; its JSON is `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct InputScale {
    /// The value that `l` starts from.
    init_scale: f32,
    #[serde(flatten)]
    targets: Targets,
}

/// The state in one weight.
#[derive(Module, Debug)]
struct InputScaleAdapter {
    /// `[d_in]`
    l: Param<Tensor<1>>,
}

impl Method for InputScale {
    const PEFT_TYPE: &'static str = "INPUT_SCALE";
    type Adapter = InputScaleAdapter;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn check(&self) -> Result<()> {
        let expected = "a number other than zero, from which no gradient leads back";
        let good = self.init_scale.is_normal();
        if good { Ok(()) } else { Err(peft::core::Error::config("init_scale", expected, self.init_scale)) }
    }

    fn init(&self, site: &Site, _seed: u64) -> Result<InputScaleAdapter> {
        Ok(InputScaleAdapter { l: site.param([site.d_in], || self.init_scale)? })
    }

    fn tensors(_kind: LayerKind) -> &'static [FileTensor] {
        &[FileTensor { field: "l", key: "input_scale", transposed: false }]
    }

    fn activation(adapter: &InputScaleAdapter) -> Option<&dyn Activation> {
        Some(adapter)
    }
}

/// The weight form: `diag(l)·W`, taken in the adapter's precision.
impl Reparameterization for InputScaleAdapter {
    const NAME: &'static str = "input_scale";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let (dtype, mut shape) = (base.dtype(), [1; D]);
        shape[0] = base.dims()[0];
        let l = self.l.val().reshape(shape);
        (base.cast(l.dtype()) * l).cast(dtype)
    }
}

/// The activation form: one row of products instead of a new weight.
impl Activation for InputScaleAdapter {
    fn linear(&self, x: Tensor<2>, base: &Base<'_>) -> Option<Tensor<2>> {
        let (dtype, l) = (x.dtype(), self.l.val());
        Some(base.linear((x.cast(l.dtype()) * l.unsqueeze()).cast(dtype)))
    }
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let device = Device::flex().autodiff();
    let method = InputScale { init_scale: 1.0, targets: Targets::modules(["up", "down"]) };
    let base = Stack::new(&device, DType::F32, false);
    let mut model = base.clone().attach(&method)?;
    println!("{}", model.trainable());

    let x = Tensor::<2>::random([32, 16], Distribution::Normal(0.0, 1.0), &device);
    let forward = |model: &Stack| peft::core::linear(&model.down, peft::core::linear(&model.up, x.clone()));
    let target = forward(&base).detach() * 1.5;
    let mut optimizer = AdamWConfig::new().init();
    let mut losses = Vec::new();
    for _ in 0..20 {
        let loss = (forward(&model) - target.clone()).square().mean();
        losses.extend(read(loss.clone())?);
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(2e-2, model, grads);
    }
    println!("loss {:.4} to {:.4}", losses[0], losses[losses.len() - 1]);

    let dir = std::env::temp_dir().join(format!("input-scale-{}", std::process::id()));
    save_adapter(&model, &method, None, &dir)?;
    let (loaded, method) = load_adapter::<_, InputScale>(base, &dir)?;
    std::fs::remove_dir_all(&dir)?;
    let merged = merge(loaded.clone(), &method)?;
    println!("merged: {:.1e} from the adapted model", difference(&read(forward(&merged))?, &read(forward(&model))?));

    // `y = (x ⊙ l)·W + b` once more, in double precision.
    let laws = Laws::new(method, |_, site| site.d_in, ("init_scale", 0.0.into()))
        .with_reference(|_, layer| layer.base(&layer.x.scale_by(layer.field("l")?)?));
    let checks = laws.run(&device);
    print!("{}", table(&checks));
    if checks.iter().any(Check::failed) { Err("a law is broken".into()) } else { Ok(()) }
}
