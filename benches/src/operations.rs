//! The custom operations one by one, each with its gradient: ours, and the same formula of Burn's own operations, in turns on one device.

use std::time::Instant;

use burn::tensor::activation::{log_softmax, silu, softmax};
use burn::tensor::{Bool, Device, Distribution, Int, Tensor, TensorData};
use clap::Args;
use peft_kernels::{
    Nonlinearity, Sight, Weight, attention, gated, linear_cross_entropy, low_rank_linear, rms_norm, rope,
};

use crate::{Backend, Outcome};

/// One transformer layer of SmolLM2-135M, and a part of its head.
#[derive(Args)]
pub(crate) struct Operations {
    /// Times that each is run; medians are reported
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Rows of a batch
    #[arg(long, default_value_t = 2)]
    batch: usize,
    /// Tokens of a row
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// Vocabulary
    #[arg(long, default_value_t = 8192)]
    vocab: usize,
    /// Only operations whose name has this in it: a device in software compiles some kernels for minutes
    #[arg(long, default_value = "")]
    only: String,
    /// Burn's backend
    #[arg(long, value_enum, default_value_t = Backend::Flex)]
    backend: Backend,
}

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const HIDDEN: usize = HEADS * HEAD_DIM;
const INTERMEDIATE: usize = 1536;
const RANK: usize = 8;
const EPSILON: f64 = 1e-5;

/// What one pass takes: it gives a number that depends on everything.
type Pass<'a> = Box<dyn Fn() -> Tensor<1> + 'a>;

impl Operations {
    pub(crate) fn run(&self) -> Outcome<()> {
        let device = self.backend.device().autodiff();
        let inputs = Inputs::new(self, &device);
        println!("{:22} {:>12} {:>12} {:>7}", "forward and backward", "ours, ms", "Burn's, ms", "ratio");
        for (name, ours, burns) in inputs.pairs().into_iter().filter(|(name, ..)| name.contains(&self.only)) {
            let (mut fast, mut plain) = (Vec::new(), Vec::new());
            // The first of each compiles and tunes.
            for step in 0..=self.steps {
                for (pass, times) in [(&ours, &mut fast), (&burns, &mut plain)] {
                    let milliseconds = time(pass)?;
                    if step > 0 {
                        times.push(milliseconds);
                    }
                }
            }
            let (fast, plain) = (median(fast), median(plain));
            println!("{name:22} {fast:12.2} {plain:12.2} {:7.2}", fast / plain);
        }
        Ok(())
    }
}

/// Milliseconds of a pass and of its gradient.
fn time(pass: &Pass<'_>) -> Outcome<f64> {
    let started = Instant::now();
    let sum = pass();
    let grads = sum.backward();
    // Reading it waits for the device; it was made before the gradients, so something of those is read as well.
    sum.clone().inner().into_data();
    sum.device().sync().map_err(|e| format!("{e:?}"))?;
    drop(grads);
    Ok(started.elapsed().as_secs_f64() * 1e3)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 0.1), device)
}

fn trained<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    random(shape, device).require_grad()
}

struct Inputs {
    x: Tensor<3>,
    gamma: Tensor<1>,
    gate: Tensor<3>,
    up: Tensor<3>,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    angles: Tensor<4>,
    hidden: Tensor<4, Bool>,
    weight: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    head: Tensor<2>,
    targets: Tensor<1, Int>,
}

impl Inputs {
    fn new(setup: &Operations, device: &Device) -> Self {
        let Operations { batch, seq, vocab, .. } = *setup;
        // Each is a leaf of the graph, which a gradient uses up.
        let heads = |count| trained([batch, seq, count, HEAD_DIM], device);
        let hidden: Vec<bool> = (0..seq * seq).map(|at| at % seq > at / seq).collect();
        let targets: Vec<i64> = (0..batch * seq).map(|at| (at * 2_654_435_761 % vocab) as i64).collect();
        Self {
            x: trained([batch, seq, HIDDEN], device),
            gamma: random([HIDDEN], device),
            gate: trained([batch, seq, INTERMEDIATE], device),
            up: trained([batch, seq, INTERMEDIATE], device),
            q: heads(HEADS),
            k: heads(KV_HEADS),
            v: heads(KV_HEADS),
            angles: random([1, seq, 1, HEAD_DIM], device),
            hidden: Tensor::from_data(TensorData::new(hidden, [1, 1, seq, seq]), device),
            weight: random([HIDDEN, INTERMEDIATE], device),
            a: trained([HIDDEN, RANK], device),
            b: trained([RANK, INTERMEDIATE], device),
            head: random([HIDDEN, vocab], device),
            targets: Tensor::from_data(TensorData::new(targets, [batch * seq]), device),
        }
    }

    /// Name, ours, Burn's.
    fn pairs(&self) -> Vec<(&'static str, Pass<'_>, Pass<'_>)> {
        let rows = || self.x.clone().flatten::<2>(0, 1);
        vec![
            (
                "attention",
                Box::new(|| {
                    let sight = Sight { causal: true, ..Sight::default() };
                    attention(self.q.clone(), self.k.clone(), self.v.clone(), None, sight, 0.125).sum()
                }),
                Box::new(|| self.attend().sum()),
            ),
            (
                "head, cross-entropy",
                Box::new(move || {
                    linear_cross_entropy(rows(), self.head.clone(), self.targets.clone(), 0.0).losses.mean()
                }),
                Box::new(move || {
                    let logits = log_softmax(rows().matmul(self.head.clone()), 1);
                    -logits.gather(1, self.targets.clone().unsqueeze_dim(1)).mean()
                }),
            ),
            (
                "RMSNorm",
                Box::new(|| rms_norm(self.x.clone(), self.gamma.clone(), EPSILON).sum()),
                Box::new(|| {
                    let inverse = (self.x.clone().square().mean_dim(2) + EPSILON).sqrt().recip();
                    (self.x.clone() * inverse * self.gamma.clone().unsqueeze()).sum()
                }),
            ),
            (
                "SwiGLU",
                Box::new(|| gated(self.gate.clone(), self.up.clone(), Nonlinearity::Silu).sum()),
                Box::new(|| (silu(self.gate.clone()) * self.up.clone()).sum()),
            ),
            (
                "rotary embedding",
                Box::new(|| rope(self.q.clone(), self.angles.clone()).sum()),
                Box::new(|| self.turn().sum()),
            ),
            (
                "linear with LoRA",
                Box::new(move || {
                    let weight = Weight::Dense(&self.weight);
                    low_rank_linear(rows(), weight, self.a.clone(), self.b.clone(), 2.0).sum()
                }),
                Box::new(move || {
                    let update = (rows().matmul(self.a.clone()) * 2.0).matmul(self.b.clone());
                    (rows().matmul(self.weight.clone()) + update).sum()
                }),
            ),
        ]
    }

    fn attend(&self) -> Tensor<4> {
        let [batch, seq, ..] = self.q.dims();
        let grouped = |x: &Tensor<4>| {
            let x = x.clone().swap_dims(1, 2).unsqueeze_dim::<5>(2).repeat_dim(2, HEADS / KV_HEADS);
            x.reshape([batch, HEADS, seq, HEAD_DIM])
        };
        let scores = self.q.clone().swap_dims(1, 2).matmul(grouped(&self.k).swap_dims(2, 3)) * 0.125;
        let hidden = self.hidden.clone().expand([batch, HEADS, seq, seq]);
        softmax(scores.mask_fill(hidden, f32::MIN / 2.0), 3).matmul(grouped(&self.v)).swap_dims(1, 2)
    }

    fn turn(&self) -> Tensor<4> {
        let half = HEAD_DIM / 2;
        let part = |x: &Tensor<4>, from| x.clone().narrow(3, from, half);
        let (left, right) = (part(&self.q, 0), part(&self.q, half));
        let (cos, sin) = (part(&self.angles, 0), part(&self.angles, half));
        let turned = left.clone() * cos.clone() - right.clone() * sin.clone();
        Tensor::cat(vec![turned, right * cos + left * sin], 3)
    }
}
