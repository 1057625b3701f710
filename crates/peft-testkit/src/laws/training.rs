//! Laws of gradients and optimizer steps.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{DType, Device};
use peft_core::{Method, attach};

use super::forward::output;
use super::{ROUNDING, Subject};
use crate::stack::{WIDTH, ids, input};
use crate::state::{adapter, deviation, deviation_of, frozen, gradients, trained, worse};
use crate::{Failure, Finding, Outcome, Seam, Stack, fill_adapter, read};

/// Relative deviation of half-precision layers from those in f32.
const HALF: f64 = 2e-2;

/// A device has one sequence of random numbers for all threads of a process: what draws from it, or begins it anew, does so alone.
static DRAWING: Mutex<()> = Mutex::new(());

/// Until it is dropped nothing else here draws. A law that panicked in between has left nothing half done.
fn drawing() -> MutexGuard<'static, ()> {
    DRAWING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Output, and the gradients of a fixed weighted sum of it.
pub(super) struct Run {
    output: Vec<f64>,
    /// By adapter tensor, and `x` for the input.
    grads: BTreeMap<String, Vec<f64>>,
}

impl Run {
    pub(super) fn new(model: &Stack, seam: Seam, device: &Device, dtype: DType) -> Result<Self, Failure> {
        let _alone = drawing();
        // Dropout draws the same numbers in every run.
        device.seed(0);
        let x = input(WIDTH, 3, device, dtype).require_grad();
        let y = model.forward(seam, ids(device), x.clone());
        let mut tape = (y.clone() * input(WIDTH, 4, device, dtype)).sum().backward();
        let dx = x.grad(&tape).ok_or("the input has no gradient")?;
        let params = GradientsParams::from_module(&mut tape, model);
        let mut grads = gradients(model, &params)?;
        grads.insert("x".to_owned(), read(dx)?);
        Ok(Self { output: read(y)?, grads })
    }

    pub(super) fn deviation(&self, other: &Self) -> f64 {
        worse(deviation(&self.output, &other.output), deviation_of(&self.grads, &other.grads))
    }
}

/// `steps` steps of `AdamW` towards a fixed output. Without weight decay, so that only a gradient moves a tensor.
pub(super) fn train(mut model: Stack, seam: Seam, steps: usize, device: &Device) -> Stack {
    let _alone = drawing();
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
    let (x, target) = (input(WIDTH, 3, device, DType::F32), input(WIDTH, 4, device, DType::F32));
    for _ in 0..steps {
        let loss = (model.forward(seam, ids(device), x.clone()) - target.clone()).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-2, model, grads);
    }
    model
}

/// Optimizer steps change no bit of the frozen base.
pub(super) fn base_frozen<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    let before = subject.attached()?;
    for seam in subject.seams()? {
        let after = train(before.clone(), *seam, 2, &subject.device);
        if frozen(&after)? != frozen(&before)? {
            return Err(format!("a frozen parameter moved, {seam:?} seam").into());
        }
    }
    Ok(Finding::Holds)
}

/// Every adapter tensor moves within two optimizer steps.
pub(super) fn adapter_moves<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    let model = subject.attached()?;
    let before = adapter(&model)?;
    for seam in subject.seams()? {
        let after = adapter(&train(model.clone(), *seam, 2, &subject.device))?;
        if let Some(name) = before.keys().find(|name| after.get(*name) == before.get(*name)) {
            return Err(format!("{name} did not move, {seam:?} seam").into());
        }
        if let Some((name, _)) = after.iter().find(|(_, values)| values.iter().any(|value| !value.is_finite())) {
            return Err(format!("{name} is not finite, {seam:?} seam").into());
        }
    }
    Ok(Finding::Holds)
}

/// Both seams give the same output, input gradient and adapter gradients.
pub(super) fn seams<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    if let Some(reason) = subject.weight_form_lacks()? {
        return Ok(Finding::Skipped(reason));
    }
    let model = subject.random()?;
    let run = |seam| Run::new(&model, seam, &subject.device, DType::F32);
    Ok(Finding::Measured { deviation: run(Seam::Activation)?.deviation(&run(Seam::Weight)?), bound: ROUNDING })
}

/// With a half-precision base and an f32 adapter, the output is that in f32 within the type's precision, and gradients are finite.
pub(super) fn half<M: Method>(subject: &Subject<'_, M>, dtype: DType) -> Outcome {
    if !subject.device.supports_dtype(dtype) {
        return Ok(Finding::Skipped(format!("the device has no {dtype:?}")));
    }
    let device = &subject.device;
    let model = |dtype| Ok::<_, Failure>(fill_adapter(attach(Stack::new(device, dtype, true), subject.method(), 0)?));
    let (full, half) = (model(DType::F32)?, model(dtype)?);
    let mut worst: f64 = 0.0;
    for seam in subject.seams()? {
        worst = worse(worst, deviation(&output(&half.valid(), *seam)?, &output(&full.valid(), *seam)?));
        let run = Run::new(&half, *seam, device, dtype)?;
        if let Some((name, _)) = run.grads.iter().find(|(_, grad)| grad.iter().any(|g| !g.is_finite())) {
            return Err(format!("the gradient of {name} is not finite, {seam:?} seam").into());
        }
    }
    Ok(Finding::Measured { deviation: worst, bound: HALF })
}

/// Going to inference and back keeps what is trained.
pub(super) fn valid_train<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    let model = subject.attached()?;
    let (before, after) = (trained(&model)?, trained(&model.valid().train())?);
    if before == after { Ok(Finding::Holds) } else { Err(format!("{before:?} became {after:?}").into()) }
}

/// The output is that of Burn's default CPU backend.
pub(super) fn backend<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    let cpu = subject.on(Device::flex());
    let mut worst: f64 = 0.0;
    for seam in subject.seams()? {
        let run = |subject: &Subject<'_, M>| output(&subject.random()?.valid(), *seam);
        worst = worse(worst, deviation(&run(subject)?, &run(&cpu)?));
    }
    Ok(Finding::Measured { deviation: worst, bound: ROUNDING })
}

/// Output and gradients in training are those of Burn's default CPU backend.
pub(super) fn backend_gradients<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    let cpu = subject.on(Device::flex());
    let mut worst: f64 = 0.0;
    for seam in subject.seams()? {
        let run = |subject: &Subject<'_, M>| Run::new(&subject.random()?, *seam, &subject.device, DType::F32);
        worst = worse(worst, run(subject)?.deviation(&run(&cpu)?));
    }
    Ok(Finding::Measured { deviation: worst, bound: ROUNDING })
}
