//! The training loop.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::Device;
use indicatif::{ProgressBar, ProgressStyle};
use peft_core::files::write_atomically;
use peft_core::with_auxiliary;
use serde::Serialize;

use crate::checkpoint::{self, State};
use crate::data::Batches;
use crate::experts::{Heard, expert_load};
use crate::metrics::{EvalRecord, Metrics, Record, StepRecord};
use crate::objective::BatchOf;
use crate::optimizer::{Optimization, Rates, sum_and_norm};
use crate::{Error, Evaluation, Objective, Result, TrainConfig, Trained, loss_curve};

/// Set from another thread, for instance on Ctrl-C: the run saves a checkpoint and ends after the current step.
pub type Stop = AtomicBool;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// All steps were taken.
    Finished,
    /// The held-out loss stopped falling.
    Stopped,
    /// Somebody asked it to stop; it can be resumed.
    Interrupted,
}

/// What a run did.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// How it ended.
    pub outcome: Outcome,
    /// Optimizer steps done, earlier runs included.
    pub steps: usize,
    /// Held-out evaluation before the first step of this run.
    pub before: Option<Evaluation>,
    /// Held-out evaluation of the model that was kept.
    pub after: Option<Evaluation>,
    /// The step whose model was kept: the best on the held-out data, or the last.
    pub kept_step: usize,
    /// Wall time of this run's steps, in seconds.
    pub seconds: f64,
}

/// Trains `model`, which carries what `trained` names, for `objective`, and writes into `dir`: checkpoints, `metrics.jsonl`, `loss.svg`, and at the
/// end the trained part itself, the best on `held_out` if that is given, with the objective's pictures of it.
///
/// With `resume`, continues from the newest checkpoint in `dir`; on a CPU device the result is bit for bit that of a run without a break.
///
/// # Errors
/// When a setting makes no sense, the loss is not finite ([`Error::Diverged`]), the device fails or a file cannot be written; what was saved
/// before stays whole.
#[allow(
    clippy::too_many_arguments,
    reason = "each is one independent thing, and a struct of them would be built once and taken apart once"
)]
pub fn train<O: Objective>(
    objective: &O,
    model: O::Model,
    trained: &dyn Trained<O::Model>,
    batches: Batches<O::Example>,
    held_out: Option<&Batches<O::Example>>,
    config: &TrainConfig,
    dir: &Path,
    resume: bool,
    device: &Device,
    stop: &Stop,
) -> Result<(O::Model, Summary)> {
    config.check()?;
    if config.lora_plus != 1.0 && trained.fast().is_none() {
        return Err(Error::setting("lora_plus", "needs a method whose factors learn at different rates, such as LoRA"));
    }
    let mut optimization = Optimization::new(config.weight_decay);
    let (mut model, mut state, mut batches) = (model, State::default(), batches);
    if resume && let Some(path) = checkpoint::newest(dir)? {
        (model, state) = checkpoint::restore(&path, model, trained, &mut optimization, device)?;
        batches.seek(state.position)?;
    }
    let metrics = Metrics::open(dir, state.step)?;
    let steps = config.total_steps(&batches);
    let bar = progress_bar(config.progress, state.step, steps);
    let run = Run {
        objective,
        config,
        trained,
        held_out,
        dir,
        device,
        steps,
        optimization,
        state,
        metrics,
        heard: Heard::default(),
        bar,
    };
    run.go(model, batches, stop)
}

struct Run<'a, O: Objective> {
    objective: &'a O,
    config: &'a TrainConfig,
    trained: &'a dyn Trained<O::Model>,
    held_out: Option<&'a Batches<O::Example>>,
    dir: &'a Path,
    device: &'a Device,
    steps: usize,
    optimization: Optimization,
    state: State,
    metrics: Metrics,
    /// From the routers of mixtures.
    heard: Heard,
    bar: ProgressBar,
}

const BEST: &str = "best";

impl<O: Objective> Run<'_, O> {
    fn go(mut self, mut model: O::Model, mut batches: Batches<O::Example>, stop: &Stop) -> Result<(O::Model, Summary)> {
        let started = Instant::now();
        let before = if self.state.step == 0 { self.evaluate(&model)? } else { None };
        let mut outcome = Outcome::Finished;
        while self.state.step < self.steps {
            model = self.step(model, &mut batches)?;
            let step = self.state.step;
            let last = step == self.steps;
            let due = |every: usize| every > 0 && step.is_multiple_of(every);
            if last || due(self.config.eval_every) {
                let failed = |e| Error::Device { step, message: format!("{e:?}") };
                if let Some(record) = self.heard.record(step).map_err(failed)? {
                    self.metrics.push(Record::Experts(record))?;
                }
                self.evaluate(&model)?;
            }
            let exhausted = self.config.patience > 0 && self.state.evaluations_since_best >= self.config.patience;
            let interrupted = stop.load(Ordering::Relaxed);
            if last || exhausted || interrupted || due(self.config.save_every) {
                checkpoint::save(self.dir, &self.state, &model, self.trained, &self.optimization, self.config.keep)?;
            }
            if !last && (exhausted || interrupted) {
                outcome = if exhausted { Outcome::Stopped } else { Outcome::Interrupted };
                break;
            }
        }
        self.bar.finish_and_clear();
        self.finish(model, before, outcome, started.elapsed())
    }

    /// One optimizer step.
    fn step(&mut self, model: O::Model, batches: &mut Batches<O::Example>) -> Result<O::Model> {
        let started = Instant::now();
        let step = self.state.step + 1;
        // Dropout is a function of the seed and the step, so a resumed run draws what an unbroken one would.
        self.device.seed(self.config.seed.wrapping_add(step as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let group: Vec<BatchOf<O>> = (0..self.config.accumulate).map(|_| batches.next_batch()).collect();
        let count: usize = group.iter().map(|batch| self.objective.count(batch)).sum();
        let failed = |e| Error::Device { step, message: format!("{e:?}") };
        let mut accumulator = GradientsAccumulator::new();
        let mut losses = Vec::with_capacity(group.len());
        for batch in &group {
            let (loss, said) = with_auxiliary(|| self.objective.loss(&model, batch, self.device));
            let loss = loss? / count as f64;
            let whole = match self.heard.add(said) {
                Some(auxiliary) => loss.clone() + auxiliary / self.config.accumulate as f64,
                None => loss.clone(),
            };
            let grads = GradientsParams::from_grads(whole.backward(), &model);
            accumulator.accumulate(&model, grads);
            losses.push(loss.inner());
        }
        let warmup = (self.config.warmup * self.steps as f64).ceil() as usize;
        let learning_rate = self.config.learning_rate * self.config.schedule.factor(step - 1, self.steps, warmup);
        let grads = accumulator.grads();
        let (sum, norm) = sum_and_norm(losses, &model, &grads).map_err(failed)?;
        if !(sum.is_finite() && norm.is_finite()) {
            let loss = if sum.is_finite() { norm } else { sum };
            return Err(Error::Diverged { step, loss, learning_rate });
        }
        let bound = self.config.max_grad_norm;
        let factor = if bound > 0.0 { (bound / (f64::from(norm) + 1e-6)).min(1.0) } else { 1.0 };
        let rates = Rates { base: learning_rate, plus: self.config.lora_plus, fast: self.trained.fast() };
        let model = self.optimization.step(model, grads, rates, factor);
        self.state.step = step;
        self.state.position = batches.position();
        let position = batches.position();
        let record = StepRecord {
            step,
            epoch: position.epoch as f64 + position.batch as f64 / batches.per_epoch() as f64,
            loss: f64::from(sum),
            learning_rate,
            grad_norm: f64::from(norm),
            count,
            seconds: started.elapsed().as_secs_f64(),
        };
        self.metrics.push(Record::Step(record))?;
        self.bar.set_message(format!("loss {sum:.4}"));
        self.bar.inc(1);
        Ok(model)
    }

    /// Evaluates, notes it, and keeps the model if it is the best so far.
    fn evaluate(&mut self, model: &O::Model) -> Result<Option<Evaluation>> {
        let Some(held_out) = self.held_out else { return Ok(None) };
        let model = model.valid();
        let evaluation = self.objective.evaluate(&model, held_out, self.device)?;
        self.metrics.push(Record::Eval(EvalRecord { step: self.state.step, evaluation: evaluation.clone() }))?;
        if self.state.best.is_none_or(|(loss, _)| evaluation.loss < loss) {
            self.state.best = Some((evaluation.loss, self.state.step));
            self.state.evaluations_since_best = 0;
            self.trained.save(&model, &self.best_dir())?;
        } else {
            self.state.evaluations_since_best += 1;
        }
        self.bar.println(format!("step {:>5}  held-out {evaluation}", self.state.step));
        Ok(Some(evaluation))
    }

    fn finish(
        self,
        model: O::Model,
        before: Option<Evaluation>,
        outcome: Outcome,
        elapsed: Duration,
    ) -> Result<(O::Model, Summary)> {
        let best = self.state.best.filter(|(_, step)| *step != self.state.step && self.best_dir().exists());
        let (model, kept_step) = match best {
            Some((_, step)) => (self.trained.restore(model, &self.best_dir())?, step),
            None => (model, self.state.step),
        };
        self.trained.save(&model, self.dir)?;
        let mut pictures = vec![("loss.svg", loss_curve(&self.metrics.records)?)];
        if let Some(held_out) = self.held_out {
            pictures.extend(self.objective.pictures(&model.valid(), held_out, self.device)?);
        }
        let experts = self.metrics.records.iter().rev().find_map(|record| match record {
            Record::Experts(experts) => Some(experts),
            Record::Step(_) | Record::Eval(_) => None,
        });
        if let Some(experts) = experts {
            pictures.push(("experts.svg", expert_load(experts)?));
        }
        let files: Vec<(&str, &[u8])> = pictures.iter().map(|(name, svg)| (*name, svg.as_bytes())).collect();
        write_atomically(self.dir, &files)?;
        let after = self.metrics.records.iter().rev().find_map(|record| match record {
            Record::Eval(e) if e.step == kept_step => Some(e.evaluation.clone()),
            _ => None,
        });
        let summary =
            Summary { outcome, steps: self.state.step, before, after, kept_step, seconds: elapsed.as_secs_f64() };
        Ok((model, summary))
    }

    fn best_dir(&self) -> PathBuf {
        self.dir.join(BEST)
    }
}

fn progress_bar(shown: bool, done: usize, steps: usize) -> ProgressBar {
    if !shown {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} steps  {msg}  {elapsed} elapsed, {eta} left");
    let bar = ProgressBar::new(steps as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_position(done as u64);
    bar.reset_eta();
    bar
}
