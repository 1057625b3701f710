//! Labels and numbers for texts, tokens and pictures. `z` is what the model's head gives, `y` what it should.
//!
//! - one of `n` labels: cross-entropy, smoothed by `ε` (Szegedy et al. 2016, arXiv:1512.00567): `−(1 − ε)·log p(y) − ε/n · Σ log p`
//! - any of `n` labels: binary cross-entropy of each: `−y·log σ(z) − (1 − y)·log σ(−z)`
//! - a number: `(z − y)²`

use burn::tensor::activation::{log_sigmoid, log_softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::for_tasks;
use peft_models::Encoder;
use peft_models::heads::{Problem, Task};

use crate::confusion::confusion_matrix;
use crate::data::{Batches, Labelled, Reader, Target};
use crate::measures::{Confusion, Tally, f1_macro, f1_micro, pearson, spearman};
use crate::objective::{failed, scalar};
use crate::{Error, Evaluation, Objective, Result};

/// The labels that the data gives to texts, tokens or pictures.
#[derive(Clone, Debug)]
pub struct Labelling {
    /// What makes the model's input of rows.
    pub reader: Reader,
    task: Task,
    /// `ε`
    smoothing: f64,
}

/// What held-out data says of a model that labels.
#[derive(Clone, Debug)]
pub struct Report {
    /// In numbers.
    pub evaluation: Evaluation,
    /// How each label fared; nothing for a number.
    pub labels: Vec<(String, Tally)>,
    /// What was taken for what, where there is one label for each.
    pub confusion: Option<Confusion>,
}

impl Labelling {
    /// `task` is that of the model.
    ///
    /// # Errors
    /// When the task has no labels, or the smoothing is no fraction or has nothing to smooth.
    pub fn new(reader: Reader, task: Task, smoothing: f64) -> Result<Self> {
        if task.labels().is_empty() {
            return Err(Error::Labels { what: "the model's task has none; give it a head for labels".to_owned() });
        }
        if !(0.0..1.0).contains(&smoothing) {
            return Err(Error::setting("label_smoothing", format!("is {smoothing}; expected a fraction in 0..1")));
        }
        let one_of = !matches!(&task, Task::Classification { problem, .. } if *problem != Problem::SingleLabel);
        if smoothing > 0.0 && !one_of {
            return Err(Error::setting("label_smoothing", "is for one label of several; leave it out"));
        }
        Ok(Self { reader, task, smoothing })
    }

    /// All that one pass over `batches` says of `model`.
    ///
    /// # Errors
    /// When a picture cannot be read or the device fails.
    pub fn report(&self, model: &Encoder, batches: &Batches<Labelled>, device: &Device) -> Result<Report> {
        let device = &device.clone().without_autodiff();
        let (mut sum, mut count, mut answers) = (0.0, 0, Answers::new(&self.task));
        for batch in batches.epoch() {
            let (logits, truths) = (self.logits(model, &batch, device)?, truths(&batch));
            sum += f64::from(scalar(self.losses(logits.clone(), &truths, device)).map_err(failed)?);
            count += self.count(&batch);
            let [_, outputs] = logits.dims();
            let values: Vec<f32> = logits.try_into_data().map_err(failed)?.iter::<f32>().collect();
            values.chunks(outputs).zip(&truths).for_each(|(found, truth)| answers.count(found, truth));
        }
        Ok(answers.report(&self.task, sum, count))
    }

    /// What the head gives where an answer counts: `[answers, outputs]`.
    fn logits(&self, model: &Encoder, batch: &[Labelled], device: &Device) -> Result<Tensor<2>> {
        let input = self.reader.input(batch.iter().map(|row| &row.content), device)?;
        model.check(&input)?;
        let tasks: Vec<usize> = batch.iter().map(|row| row.task).collect();
        let logits = for_tasks(&tasks, || model.forward(&input)); // [rows, places, outputs]
        let [_, places, _] = logits.dims();
        let logits = logits.flatten::<2>(0, 1);
        if !matches!(self.task, Task::Tokens { .. }) {
            return Ok(logits);
        }
        let learnt = batch.iter().enumerate().flat_map(|(row, labelled)| {
            let Target::Each(of) = &labelled.target else { return Vec::new() };
            of.iter()
                .enumerate()
                .filter(|(_, label)| label.is_some())
                .map(|(at, _)| (row * places + at) as i64)
                .collect()
        });
        let learnt: Vec<i64> = learnt.collect();
        let count = learnt.len();
        Ok(logits.select(0, Tensor::<1, Int>::from_data(TensorData::new(learnt, [count]), device)))
    }

    /// The sum of all losses, `[1]`, of logits `[answers, outputs]`.
    fn losses(&self, logits: Tensor<2>, truths: &[Truth<'_>], device: &Device) -> Tensor<1> {
        let [answers, outputs] = logits.dims();
        let labels: Vec<i64> = truths.iter().filter_map(Truth::label).map(|label| label as i64).collect();
        if labels.len() == answers {
            let labels = Tensor::<2, Int>::from_data(TensorData::new(labels, [answers, 1]), device);
            let log = log_softmax(logits, 1);
            let right = log.clone().gather(1, labels).sum();
            let all = log.sum() / outputs as f64;
            return right * (self.smoothing - 1.0) - all * self.smoothing;
        }
        let values: Vec<f32> = truths.iter().flat_map(Truth::values).copied().collect();
        let truth = Tensor::<2>::from_data(TensorData::new(values, [answers, outputs]), device);
        if matches!(self.task, Task::Classification { problem: Problem::MultiLabel, .. }) {
            let (yes, no) = (log_sigmoid(logits.clone()), log_sigmoid(-logits));
            -(truth.clone() * yes + (-truth + 1.0) * no).sum()
        } else {
            (logits - truth).square().sum()
        }
    }
}

impl Objective for Labelling {
    type Model = Encoder;
    type Example = Labelled;

    fn count(&self, batch: &Vec<Labelled>) -> usize {
        truths(batch).iter().map(|truth| truth.values().len().max(1)).sum()
    }

    fn loss(&self, model: &Encoder, batch: &Vec<Labelled>, device: &Device) -> Result<Tensor<1>> {
        Ok(self.losses(self.logits(model, batch, device)?, &truths(batch), device))
    }

    fn evaluate(&self, model: &Encoder, batches: &Batches<Labelled>, device: &Device) -> Result<Evaluation> {
        self.report(model, batches, device).map(|report| report.evaluation)
    }

    fn pictures(
        &self,
        model: &Encoder,
        batches: &Batches<Labelled>,
        device: &Device,
    ) -> Result<Vec<(&'static str, String)>> {
        let confusion = self.report(model, batches, device)?.confusion;
        confusion.iter().map(|confusion| Ok(("confusion.svg", confusion_matrix(confusion)?))).collect()
    }
}

/// What an answer should be.
enum Truth<'a> {
    Label(usize),
    Values(&'a [f32]),
}

impl Truth<'_> {
    fn label(&self) -> Option<usize> {
        match self {
            Self::Label(label) => Some(*label),
            Self::Values(_) => None,
        }
    }

    fn values(&self) -> &[f32] {
        match self {
            Self::Label(_) => &[],
            Self::Values(values) => values,
        }
    }
}

/// One for each answer that counts.
fn truths(batch: &[Labelled]) -> Vec<Truth<'_>> {
    let mut truths = Vec::new();
    for row in batch {
        match &row.target {
            Target::Class(label) => truths.push(Truth::Label(*label)),
            Target::Values(values) => truths.push(Truth::Values(values)),
            Target::Each(labels) => truths.extend(labels.iter().flatten().map(|label| Truth::Label(*label))),
        }
    }
    truths
}

/// What is kept of answers.
enum Answers {
    One(Confusion),
    Any { tallies: Vec<Tally>, right: usize, rows: usize },
    Numbers { found: Vec<f64>, truth: Vec<f64> },
}

impl Answers {
    fn new(task: &Task) -> Self {
        match task {
            Task::Classification { problem: Problem::MultiLabel, labels } => {
                Self::Any { tallies: vec![Tally::default(); labels.len()], right: 0, rows: 0 }
            }
            Task::Classification { problem: Problem::Regression, .. } => {
                Self::Numbers { found: Vec::new(), truth: Vec::new() }
            }
            _ => Self::One(Confusion::new(task.labels())),
        }
    }

    fn count(&mut self, logits: &[f32], truth: &Truth<'_>) {
        match self {
            Self::One(confusion) => {
                let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
                if let (Some(best), Some(label)) = (best, truth.label()) {
                    confusion.count(best, label);
                }
            }
            Self::Any { tallies, right, rows } => {
                let pairs: Vec<(bool, bool)> =
                    logits.iter().zip(truth.values()).map(|(logit, truth)| (*logit > 0.0, *truth > 0.5)).collect();
                *rows += 1;
                *right += usize::from(pairs.iter().all(|(found, truth)| found == truth));
                tallies.iter_mut().zip(pairs).for_each(|(tally, (found, truth))| tally.count(found, truth));
            }
            Self::Numbers { found, truth: all } => {
                found.extend(logits.iter().map(|value| f64::from(*value)));
                all.extend(truth.values().iter().map(|value| f64::from(*value)));
            }
        }
    }

    fn report(self, task: &Task, sum: f64, count: usize) -> Report {
        let named = |tallies: Vec<Tally>| task.labels().iter().cloned().zip(tallies).collect();
        match self {
            Self::One(confusion) => {
                let tallies = confusion.tallies();
                // Of two labels the second is what is looked for, as in scikit-learn.
                let f1 = if let [_, positive] = &tallies[..] {
                    ("f1", positive.f1())
                } else {
                    ("f1_macro", confusion.f1_macro())
                };
                let measures = [("accuracy", confusion.accuracy()), f1, ("matthews", confusion.matthews())];
                let evaluation = Evaluation::new(sum, count, measures);
                Report { evaluation, labels: named(tallies), confusion: Some(confusion) }
            }
            Self::Any { tallies, right, rows } => {
                let accuracy = right as f64 / rows.max(1) as f64;
                let measures =
                    [("f1_micro", f1_micro(&tallies)), ("f1_macro", f1_macro(&tallies)), ("accuracy", accuracy)];
                Report { evaluation: Evaluation::new(sum, count, measures), labels: named(tallies), confusion: None }
            }
            Self::Numbers { found, truth } => {
                let measures = [("pearson", pearson(&found, &truth)), ("spearman", spearman(&found, &truth))];
                Report { evaluation: Evaluation::new(sum, count, measures), labels: Vec::new(), confusion: None }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use peft_models::tokenizer::Tokenizer;

    use super::*;

    /// An objective over whatever text; its losses do not look at it.
    fn labelling(problem: Problem, outputs: usize, smoothing: f64) -> Result<Labelling> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/encoders/bert_seqcls");
        let reader = Reader::Text(Tokenizer::from_dir(&dir).unwrap().pairs(16).unwrap());
        let labels = (0..outputs).map(|at| at.to_string()).collect();
        Labelling::new(reader, Task::Classification { labels, problem }, smoothing)
    }

    fn loss(of: &Labelling, logits: &[[f32; 3]; 3], truths: &[Truth<'_>]) -> f64 {
        let device = Device::flex();
        let logits = Tensor::<2>::from_data(*logits, &device);
        let outputs = of.task.labels().len();
        f64::from(scalar(of.losses(logits.narrow(1, 0, outputs), truths, &device)).unwrap())
    }

    const LOGITS: [[f32; 3]; 3] = [[0.2, -1.3, 2.1], [1.5, 0.3, -0.4], [-2.0, 0.0, 1.0]];

    /// What PyTorch 2.15 gives for the same numbers: `cross_entropy`, `binary_cross_entropy_with_logits`, `mse_loss`, each with `reduction="sum"`.
    #[test]
    fn losses_equal_pytorch() {
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        let labels = [2, 1, 0].map(Truth::Label);
        near(loss(&labelling(Problem::SingleLabel, 3, 0.0).unwrap(), &LOGITS, &labels), 5.089_106_187_521_406);
        near(loss(&labelling(Problem::SingleLabel, 3, 0.1).unwrap(), &LOGITS, &labels), 5.082_439_520_854_739);
        let any = [[1.0, 0.0, 1.0], [0.0; 3], [1.0, 1.0, 0.0]];
        let any = any.each_ref().map(|values| Truth::Values(values));
        near(loss(&labelling(Problem::MultiLabel, 3, 0.0).unwrap(), &LOGITS, &any), 8.156_787_500_366_711);
        let numbers = [[0.5], [1.0], [-1.5]];
        let numbers = numbers.each_ref().map(|values| Truth::Values(values));
        near(loss(&labelling(Problem::Regression, 1, 0.0).unwrap(), &LOGITS, &numbers), 0.59);
    }

    #[test]
    fn huge_logits_have_finite_losses() {
        let huge = [[1e4, -1e4, 0.0]; 3];
        let any = [[0.0, 1.0, 1.0]; 3];
        let found = loss(
            &labelling(Problem::MultiLabel, 3, 0.0).unwrap(),
            &huge,
            &any.each_ref().map(|values| Truth::Values(values)),
        );
        assert!(found.is_finite() && found > 5e4, "{found}");
        let found = loss(&labelling(Problem::SingleLabel, 3, 0.0).unwrap(), &huge, &[1, 1, 1].map(Truth::Label));
        assert!(found.is_finite() && found > 5e4, "{found}");
    }

    #[test]
    fn what_smoothing_and_tasks_mean_nothing_for_is_refused() {
        let refused = |of: Result<Labelling>| of.unwrap_err().to_string();
        assert!(refused(labelling(Problem::SingleLabel, 3, 1.0)).contains("label_smoothing: is 1"));
        assert!(refused(labelling(Problem::Regression, 1, 0.1)).contains("label_smoothing: is for one label"));
        assert!(refused(labelling(Problem::SingleLabel, 0, 0.0)).contains("labels: the model's task has none"));
    }

    #[test]
    fn answers_are_measured() {
        let task = |problem, count: usize| Task::Classification {
            labels: (0..count).map(|at| at.to_string()).collect(),
            problem,
        };
        let one = task(Problem::SingleLabel, 2);
        let mut answers = Answers::new(&one);
        [(0.1, 1), (2.0, 0), (-1.0, 1)]
            .into_iter()
            .for_each(|(first, truth)| answers.count(&[first, 0.5], &Truth::Label(truth)));
        let report = answers.report(&one, 1.5, 3);
        assert_eq!(report.evaluation.to_string(), "loss 0.5000, accuracy 100.0 %, f1 1.0000, matthews 1.0000");
        assert_eq!(report.confusion.unwrap().counts(), [[1, 0], [0, 2]]);
        let any = task(Problem::MultiLabel, 2);
        let mut answers = Answers::new(&any);
        answers.count(&[1.0, -1.0], &Truth::Values(&[1.0, 0.0]));
        answers.count(&[1.0, -1.0], &Truth::Values(&[1.0, 1.0]));
        let report = answers.report(&any, 0.0, 4);
        assert_eq!(report.evaluation.to_string(), "loss 0.0000, f1 micro 0.8000, f1 macro 0.5000, accuracy 50.0 %");
        let number = task(Problem::Regression, 1);
        let mut answers = Answers::new(&number);
        [(1.0, 2.0), (2.0, 4.0), (3.0, 5.0)]
            .into_iter()
            .for_each(|(found, truth)| answers.count(&[found], &Truth::Values(&[truth])));
        let measures = answers.report(&number, 0.0, 3).evaluation.measures;
        assert!((measures["spearman"] - 1.0).abs() < 1e-12 && (measures["pearson"] - 0.981_98).abs() < 1e-5);
    }
}
