//! Poly: an inventory of skills that tasks share, and for each task how much of every skill it has. With several splits it is multi-head routing (MHR).
//!
//! - formula: for a row of task `t`, `y = x·W + b + x·A·B / rank`, with `A_q = Σₛ m_qs·A_qs` of the inputs of split `q`, `B_q` alike of its outputs, and `m_q = z_q / Σₛ z_qs`,
//!   `z = σ(logits[t])`; during training `z` is a sample of the relaxed Bernoulli distribution of temperature 1
//! - source: Ponti et al. 2022, arXiv:2202.13914, section 3; Caccia et al. 2022, arXiv:2211.03831, section 3 (splits)
//! - trained: `n_skills · rank · (d_in + d_out) + n_tasks · n_splits · n_skills` values
//! - at init: identity, since `B = 0`, unless `init_weights` is `false`
//!
//! The model is computed inside [`for_tasks`](peft_core::for_tasks), which says of what task each row is. Factors are averaged before anything is multiplied by them, so a task costs what one `LoRA`
//! costs, and is one: [`PolyConfig::lora_of`].

use burn::module::{Module, Param, Reparameterization};
use burn::tensor::activation::sigmoid;
use burn::tensor::{Distribution, Int, Tensor};
use peft_core::files::Values;
use peft_core::{
    Activation, AdapterFile, Base, Error, FileTensor, LayerKind, Method, Result, Site, Targets, check_size, tasks,
};
use peft_lora::LoraConfig;
use serde::{Deserialize, Serialize};

use crate::mixture::{MOST_TASKS, check_count};

/// Configuration of Poly; its JSON is Hugging Face's `adapter_config.json`.
///
/// ```
/// use burn::{nn::LinearConfig, tensor::{Device, Tensor}};
/// use peft_core::{Peft, Targets, for_tasks, linear};
/// use peft_moe::PolyConfig;
///
/// #[derive(burn::module::Module, Debug)]
/// struct Model { proj: burn::nn::Linear, aware: peft_core::AdapterAware }
///
/// let device = Device::flex().autodiff();
/// let model = Model { proj: LinearConfig::new(16, 16).init(&device), aware: peft_core::AdapterAware };
/// let model = model.attach(&PolyConfig::new(4, 3, Targets::modules(["proj"])))?; // four skills, three tasks
/// assert_eq!(model.trainable().trainable, 4 * 8 * (16 + 16) + 3 * 4);
/// let y = for_tasks(&[2, 0], || linear(&model.proj, Tensor::<3>::ones([2, 5, 16], &device)));
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolyConfig {
    /// Rank of each skill.
    #[serde(rename = "r")]
    pub rank: usize,
    /// The form of the router.
    pub poly_type: PolyType,
    /// How many tasks there are.
    pub n_tasks: usize,
    /// How many skills they share.
    pub n_skills: usize,
    /// Parts of inputs and outputs, each with skills of its own.
    pub n_splits: usize,
    /// Whether a fresh adapter is the identity.
    pub init_weights: bool,
    /// Which layers.
    #[serde(flatten)]
    pub targets: Targets,
}

/// The form of the router; PEFT has one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolyType {
    /// A number for each task and skill.
    #[default]
    Poly,
}

impl Default for PolyConfig {
    fn default() -> Self {
        Self {
            rank: 8,
            poly_type: PolyType::Poly,
            n_tasks: 1,
            n_skills: 4,
            n_splits: 1,
            init_weights: true,
            targets: Targets::default(),
        }
    }
}

impl PolyConfig {
    /// So many skills of rank 8 for so many tasks.
    pub fn new(n_skills: usize, n_tasks: usize, targets: Targets) -> Self {
        Self { n_skills, n_tasks, targets, ..Self::default() }
    }

    /// What the adapter is for one task, as it is after training: a plain `LoRA`, which takes no task, merges, and which any tool can use.
    ///
    /// # Errors
    /// When there is no such task, or a tensor is missing or of another shape.
    pub fn lora_of(file: &AdapterFile<Self>, task: usize) -> Result<AdapterFile<LoraConfig>> {
        let method = &file.method;
        if task >= method.n_tasks {
            return Err(Error::config("task", format!("one below {}", method.n_tasks), task));
        }
        let mut tensors = file.tensors.clone();
        for path in file.tensors.keys().filter_map(|key| Some(key.strip_suffix(A)?.strip_suffix('.')?.to_owned())) {
            let mut take = |key: &str| {
                let key = format!("{path}.{key}");
                tensors.remove(&key).ok_or_else(|| Error::config(key, "a tensor of the file", "none"))
            };
            let gates = method.gates_of(&take(LOGITS)?, task, &path)?;
            let (a, b) = (method.averaged(&take(A)?, &gates, &path)?, method.averaged(&take(B)?, &gates, &path)?);
            // `LoRA`'s file has `A` and `B` as `[rank, d_in]` and `[d_out, rank]`, and splits go along inputs and outputs.
            let (rank, d_in, d_out) = (method.rank, a.len() / method.rank, b.len() / method.rank);
            let (part, inputs) = (d_out / method.n_splits, 0..d_in);
            let a = (0..rank).flat_map(|k| inputs.clone().map(move |i| (i, k))).map(|(i, k)| a[i * rank + k]);
            let b = (0..d_out)
                .flat_map(|out| (0..rank).map(move |k| (out, k)))
                .map(|(out, k)| b[(out / part * rank + k) * part + out % part]);
            let insert = [
                ("lora_A.weight", Values { shape: vec![rank, d_in], values: a.collect() }),
                ("lora_B.weight", Values { shape: vec![d_out, rank], values: b.collect() }),
            ];
            tensors.extend(insert.map(|(key, values)| (format!("{path}.{key}"), values)));
        }
        let method = LoraConfig::new(method.rank, method.targets.clone()).with_alpha(1.0);
        let (base_model, task_type) = (file.base_model.clone(), file.task_type.clone());
        Ok(AdapterFile { method, base_model, task_type, base_fingerprint: file.base_fingerprint.clone(), tensors })
    }

    /// `m` of one task, `[splits, skills]`, from the file.
    fn gates_of(&self, logits: &Values, task: usize, path: &str) -> Result<Vec<f64>> {
        let expected = [self.n_tasks, self.n_splits * self.n_skills];
        if logits.shape != expected {
            return Err(Error::config(
                format!("{path}.{LOGITS}"),
                format!("{expected:?}"),
                format!("{:?}", logits.shape),
            ));
        }
        let row = &logits.values[task * expected[1]..(task + 1) * expected[1]];
        let open: Vec<f64> = row.iter().map(|logit| 1.0 / (1.0 + (-f64::from(*logit)).exp())).collect();
        let normed = |split: &[f64]| {
            let sum: f64 = split.iter().sum();
            split.iter().map(|open| open / (sum + NOTHING)).collect::<Vec<_>>()
        };
        Ok(open.chunks(self.n_skills).flat_map(normed).collect())
    }

    /// `Σₛ m_qs·factor_qs`, split after split.
    fn averaged(&self, factor: &Values, gates: &[f64], path: &str) -> Result<Vec<f32>> {
        let [splits, skills, rows, columns] = factor.shape[..] else {
            return Err(Error::config(path, "factors of four dimensions", format!("{:?}", factor.shape)));
        };
        if [splits, skills] != [self.n_splits, self.n_skills] || ![rows, columns].contains(&self.rank) {
            let expected = format!("{} splits of {} skills of rank {}", self.n_splits, self.n_skills, self.rank);
            return Err(Error::config(path, expected, format!("{:?}", factor.shape)));
        }
        let size = rows * columns;
        let value = |at: usize| {
            let (split, within) = (at / size, at % size);
            let skill = |skill: usize| {
                let number = split * skills + skill;
                gates[number] * f64::from(factor.values[number * size + within])
            };
            (0..skills).map(skill).sum::<f64>() as f32
        };
        Ok((0..splits * size).map(value).collect())
    }
}

/// Keys of the file.
const A: &str = "poly_lora_A";
const B: &str = "poly_lora_B";
const LOGITS: &str = "poly_router.module_logits";

/// As many skills.
const MOST_SKILLS: usize = 4096;

/// Keeps a task that has none of any skill from a division by zero.
const NOTHING: f64 = 1e-12;

/// How far from zero the logits start, as in PEFT.
const UNDECIDED: f32 = 1e-3;

/// State of [`PolyConfig`] in one weight.
#[derive(Module, Debug)]
pub struct PolyAdapter {
    /// `[splits, skills, d_in / splits, rank]`
    pub a: Param<Tensor<4>>,
    /// `[splits, skills, rank, d_out / splits]`
    pub b: Param<Tensor<4>>,
    /// `[tasks, splits · skills]`
    pub logits: Param<Tensor<2>>,
}

impl PolyAdapter {
    /// `m` of these tasks, `[tasks, splits, skills]`.
    fn gates(&self, of: &[usize], sampled: bool) -> Tensor<3> {
        let ([splits, skills, _, _], [count, _]) = (self.a.lazy_shape().dims(), self.logits.lazy_shape().dims());
        assert!(of.iter().all(|task| *task < count), "tasks {of:?} of {count}");
        let logits = self.logits.val();
        let numbers: Vec<i64> = of.iter().map(|task| *task as i64).collect();
        let numbers = Tensor::<1, Int>::from_data(&numbers[..], &logits.device());
        let mut logits = logits.select(0, numbers).reshape([of.len(), splits, skills]);
        if sampled {
            // Neither end of the interval has a logarithm.
            let uniform =
                logits.random_like(Distribution::Uniform(f64::from(f32::EPSILON), 1.0 - f64::from(f32::EPSILON)));
            logits = logits + uniform.clone().log() - (-uniform).log1p();
        }
        let open = sigmoid(logits);
        let sum = open.clone().sum_dim(2) + NOTHING;
        open / sum
    }

    /// `A` `[tasks, d_in, rank]` and `B` `[tasks, rank, d_out]` of tasks with these gates.
    fn factors(&self, gates: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        let count = gates.dims()[0];
        let gates = gates.swap_dims(0, 1); // [splits, tasks, skills]
        let averaged = |factor: Tensor<4>| {
            let [splits, skills, rows, columns] = factor.dims();
            let mixed = gates.clone().matmul(factor.reshape([splits, skills, rows * columns]));
            mixed.reshape([splits, count, rows, columns])
        };
        let ([splits, _, part_in, rank], [_, _, _, part_out]) =
            (self.a.lazy_shape().dims(), self.b.lazy_shape().dims());
        let a = averaged(self.a.val()).swap_dims(0, 1).reshape([count, splits * part_in, rank]);
        let b = averaged(self.b.val()).permute([1, 2, 0, 3]).reshape([count, rank, splits * part_out]);
        (a, b)
    }
}

/// Why it is no part of a weight.
const BY_TASK: &str = "each task mixes the skills in its own way; `PolyConfig::lora_of` gives that of one";

impl Method for PolyConfig {
    const PEFT_TYPE: &'static str = "POLY";
    const FAST: &'static [&'static str] = &["b"];
    type Adapter = PolyAdapter;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn num_tasks(&self) -> Option<usize> {
        Some(self.n_tasks)
    }

    fn check(&self) -> Result<()> {
        check_size("r", self.rank)?;
        check_count("n_tasks", 1..=MOST_TASKS, self.n_tasks)?;
        check_count("n_splits", 1..=MOST_TASKS, self.n_splits)?;
        check_count("n_skills", 1..=MOST_SKILLS, self.n_skills)
    }

    fn init(&self, site: &Site, seed: u64) -> Result<PolyAdapter> {
        let (splits, skills, rank) = (self.n_splits, self.n_skills, self.rank);
        if !(site.d_in.is_multiple_of(splits) && site.d_out.is_multiple_of(splits)) {
            let expected = format!("a number that divides {} and {} of {}", site.d_in, site.d_out, site.path);
            return Err(Error::config("n_splits", expected, splits));
        }
        let (mut rng, part) = (site.rng(seed), site.d_in / splits);
        let bound = |fan_in: usize| 1.0 / (fan_in as f32).sqrt();
        let a = site.uniform([splits, skills, part, rank], bound(part), &mut rng)?;
        let shape = [splits, skills, rank, site.d_out / splits];
        let b = if self.init_weights { site.zeros(shape)? } else { site.uniform(shape, bound(rank), &mut rng)? };
        Ok(PolyAdapter { a, b, logits: site.uniform([self.n_tasks, splits * skills], UNDECIDED, &mut rng)? })
    }

    fn tensors(_kind: LayerKind) -> &'static [FileTensor] {
        &[
            FileTensor { field: "a", key: A, transposed: false },
            FileTensor { field: "b", key: B, transposed: false },
            FileTensor { field: "logits", key: LOGITS, transposed: false },
        ]
    }

    fn activation(adapter: &PolyAdapter) -> Option<&dyn Activation> {
        Some(adapter)
    }

    fn needs_activation(&self, _site: &Site) -> Option<String> {
        Some(BY_TASK.to_owned())
    }

    fn unmergeable(&self, _site: &Site) -> Option<String> {
        Some(BY_TASK.to_owned())
    }
}

/// The weight form: there is none, as rows differ by task.
impl Reparameterization for PolyAdapter {
    const NAME: &'static str = "poly";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base
    }
}

impl Activation for PolyAdapter {
    fn linear(&self, x: Tensor<2>, base: &Base<'_>) -> Option<Tensor<2>> {
        let ([batch, seq], [_, d_in], trains) = (base.leading(), x.dims(), x.device().is_autodiff());
        let mut of = tasks(batch);
        if !trains && of.iter().all(|task| *task == of[0]) {
            of.truncate(1);
        }
        let (a, b) = self.factors(self.gates(&of, trains));
        let [count, _, rank] = a.dims();
        let scale = (rank as f64).recip();
        if count == 1 {
            return Some(base.low_rank(x, None, a.squeeze_dim(0), b.squeeze_dim(0), scale));
        }
        let inner = x.clone().reshape([batch, seq, d_in]).cast(a.dtype()).matmul(a) * scale;
        let (y, update) = (base.linear(x), inner.matmul(b).flatten(0, 1));
        let dtype = y.dtype();
        Some(y + update.cast(dtype))
    }
}
