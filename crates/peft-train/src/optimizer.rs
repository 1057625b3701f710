//! AdamW over the trained parameters, with global-norm clipping and a state that outlives the process.
//!
//! `burn-optim` is not used: its `ModuleOptimizer` keys its state by ids that a new process draws anew, restores it onto whatever device is the default one,
//! and clips each parameter by itself; and its step goes through a parameter many times, where [`adamw`] goes once.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::files::Values;
use peft_core::kernels::{AdamW, AdamWStep, adamw};
use peft_core::{ParamMapper, PathStack, map_params};

/// AdamW with PyTorch's defaults, β = (0.9, 0.999) and ε = 1e-8, over the parameters of a module that have gradients.
///
/// `w = (1 − η·λ)·w − η·(m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)` with `m = β₁·m + (1 − β₁)·g` and `v = β₂·v + (1 − β₂)·g²`, of gradients `g` times the factor of
/// the step. Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2. One pass over each parameter and its moments, in place where nobody else has them;
/// moments go by the parameter's path.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::optim::GradientsParams;
/// use burn::tensor::{Device, Distribution, Tensor};
/// use peft_train::{Optimization, Rates};
///
/// let device = Device::flex().autodiff();
/// let mut layer = LinearConfig::new(4, 1).init(&device);
/// let mut optimization = Optimization::new(0.01);
/// let x = Tensor::<2>::random([8, 4], Distribution::Default, &device);
/// let loss = |layer: &burn::nn::Linear| layer.forward(x.clone()).square().mean();
/// let before: f32 = loss(&layer).into_scalar();
/// for _ in 0..10 {
///     let grads = GradientsParams::from_grads(loss(&layer).backward(), &layer);
///     layer = optimization.step(layer, grads, Rates::new(1e-2), 1.0);
/// }
/// assert!(loss(&layer).into_scalar::<f32>() < before);
/// ```
pub struct Optimization {
    adamw: AdamW,
    moments: BTreeMap<String, Moments>,
}

struct Moments {
    time: usize,
    first: Tensor<1>,
    second: Tensor<1>,
}

/// Learning rate, and the factor by which LoRA+ (arXiv:2402.12354) raises it for the adapter's fields for which `fast` holds.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// `η`
    pub base: f64,
    /// `λ` of LoRA+
    pub plus: f64,
    /// Whether a field of an adapter has the higher rate.
    pub fast: Option<fn(&str) -> bool>,
}

impl Rates {
    /// The same rate for all.
    pub fn new(base: f64) -> Self {
        Self { base, plus: 1.0, fast: None }
    }
}

impl Optimization {
    /// With `weight_decay` as `λ`, and no moments yet.
    pub fn new(weight_decay: f64) -> Self {
        let adamw = AdamW { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay };
        Self { adamw, moments: BTreeMap::new() }
    }

    /// One step, with every gradient multiplied by `factor`.
    pub fn step<M: Module>(&mut self, module: M, grads: GradientsParams, rates: Rates, factor: f64) -> M {
        map_params(module, &mut Stepper { optimization: self, grads, rates, factor })
    }

    /// The state by parameter path, as tensors for a safetensors file.
    pub(crate) fn state(&self) -> std::result::Result<BTreeMap<String, Values>, burn::tensor::ExecutionError> {
        let mut state = BTreeMap::new();
        for (path, moments) in &self.moments {
            for (name, tensor) in [("moment_1", &moments.first), ("moment_2", &moments.second)] {
                let values: Vec<f32> = tensor.clone().try_into_data()?.iter::<f32>().collect();
                state.insert(format!("{path}.{name}"), Values { shape: vec![values.len()], values });
            }
            state.insert(format!("{path}.time"), Values { shape: vec![1], values: vec![moments.time as f32] });
        }
        Ok(state)
    }

    /// The reverse of [`state`](Self::state); `None` when a tensor is missing or left over.
    pub(crate) fn restore(&mut self, mut state: BTreeMap<String, Values>, device: &Device) -> Option<()> {
        let device = &device.clone().without_autodiff();
        let paths: Vec<String> = state.keys().filter_map(|k| k.strip_suffix(".time").map(str::to_owned)).collect();
        for path in paths {
            let mut take = |name: &str| Some(state.remove(&format!("{path}.{name}"))?.values);
            let time = *take("time")?.first()? as usize;
            let (first, second) = (take("moment_1")?, take("moment_2")?);
            let tensor = |v: Vec<f32>| Tensor::<1>::from_data(TensorData::new(v.clone(), [v.len()]), device);
            self.moments.insert(path, Moments { time, first: tensor(first), second: tensor(second) });
        }
        state.is_empty().then_some(())
    }
}

struct Stepper<'a> {
    optimization: &'a mut Optimization,
    grads: GradientsParams,
    rates: Rates,
    factor: f64,
}

impl ParamMapper for Stepper<'_> {
    fn float<const D: usize>(&mut self, at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(grad) = self.grads.remove::<D>(param.id) else { return param };
        let path = at.path();
        let fast = at.locate().field.zip(self.rates.fast).is_some_and(|(field, is_fast)| is_fast(&field));
        let Optimization { adamw: settings, moments } = &mut *self.optimization;
        let count = grad.shape().num_elements();
        let Moments { time, first, second } = moments.remove(&path).unwrap_or_else(|| {
            let zeros = || Tensor::zeros([count], (&grad.device(), grad.dtype()));
            Moments { time: 0, first: zeros(), second: zeros() }
        });
        let step = AdamWStep {
            adamw: *settings,
            learning_rate: self.rates.base * if fast { self.rates.plus } else { 1.0 },
            factor: self.factor,
            time: time + 1,
        };
        param.map(|tensor| {
            let shape = tensor.shape();
            let (value, (first, second)) =
                adamw(tensor.inner().reshape([count]), grad.reshape([count]), (first, second), step);
            moments.insert(path, Moments { time: step.time, first, second });
            Tensor::from_inner(value.reshape::<D, _>(shape)).require_grad()
        })
    }
}

/// The sum of the losses of a step, and the Euclidean norm over all gradients together, as `torch.nn.utils.clip_grad_norm_` takes it. The host waits for the device here, once for
/// both, and nowhere else in a step.
pub(crate) fn sum_and_norm<M: Module>(
    losses: Vec<Tensor<1>>,
    module: &M,
    grads: &GradientsParams,
) -> std::result::Result<(f32, f32), burn::tensor::ExecutionError> {
    struct Squares<'a>(&'a GradientsParams, Vec<Tensor<1>>);
    impl ModuleVisitor for Squares<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(grad) = self.0.get::<D>(param.id) {
                self.1.push(grad.square().sum());
            }
        }
    }
    let mut squares = Squares(grads, Vec::new());
    module.visit(&mut squares);
    let sum = losses.into_iter().reduce(|sum, loss| sum + loss);
    let norm = (!squares.1.is_empty()).then(|| Tensor::cat(squares.1, 0).sum().sqrt());
    let both: Vec<Tensor<1>> = [sum, norm].into_iter().flatten().map(|value| value.cast(DType::F32)).collect();
    let read: Vec<f32> = Tensor::cat(both, 0).try_into_data()?.iter().collect();
    // Where nothing has a gradient, there is the sum alone.
    Ok((read[0], read.get(1).copied().unwrap_or_default()))
}
