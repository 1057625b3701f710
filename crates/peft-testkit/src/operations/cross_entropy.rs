//! The output head with its cross-entropy.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use peft_core::kernels::{Scores, linear_cross_entropy};

use super::{ALL, Input, Operation, SINGLE, compare, exact, gradient, in_types, rounded};
use crate::state::{deviation, normal, worse};
use crate::{Failure, read};

pub(super) fn checks() -> Vec<Operation> {
    let head = Head { tokens: 9, width: 7, vocab: 29, smoothing: 0.0, transposed: false, trained: false };
    let cases = [
        ("linear_cross_entropy", SINGLE, head),
        ("linear_cross_entropy smoothing", ALL, Head { smoothing: 0.1, ..head }),
        ("linear_cross_entropy transposed", SINGLE, Head { transposed: true, ..head }),
        ("linear_cross_entropy of a trained head", SINGLE, Head { smoothing: 0.1, trained: true, ..head }),
        ("linear_cross_entropy of a trained table", SINGLE, Head { transposed: true, trained: true, ..head }),
        // A chunk is 128 tokens of such a vocabulary.
        ("linear_cross_entropy chunks", SINGLE, Head { tokens: 150, width: 2, vocab: 1 << 14, smoothing: 0.1, ..head }),
    ];
    let each = |(name, dtypes, head): (&str, _, Head)| {
        in_types(name, dtypes, move |dtype, device| head.deviation(dtype, device))
    };
    cases.into_iter().flat_map(each).collect()
}

#[derive(Clone, Copy)]
struct Head {
    tokens: usize,
    width: usize,
    vocab: usize,
    smoothing: f64,
    /// Whether the weight lies as a table of embeddings.
    transposed: bool,
    /// Whether the weight has a gradient too.
    trained: bool,
}

impl Head {
    fn deviation(self, dtype: DType, device: &Device) -> Result<f64, Failure> {
        let Self { tokens, width, vocab, .. } = self;
        let weight = if self.trained { Input::trained } else { Input::frozen };
        let inputs = [Input::trained(normal(tokens * width, 1.0, 1)), weight(normal(width * vocab, 1.0, 2))];
        let losses = |[x, weight]: [&[f64]; 2]| {
            let rows = x.chunks(width).enumerate();
            rows.map(|(token, row)| self.loss(row, weight, token)).collect()
        };
        let gradients = |[x, weight]: [&[f64]; 2], dy: &[f64]| {
            // A loss depends on its own row alone.
            let of_row =
                |(token, row): (usize, &[f64])| gradient(|row| dy[token] * self.loss(row, weight, token), row, 1);
            let of_all = |weight: &[f64]| {
                let rows = x.chunks(width).enumerate();
                rows.map(|(token, row)| dy[token] * self.loss(row, weight, token)).sum()
            };
            let of_weight = self.trained.then(|| gradient(of_all, weight, 1));
            [Some(x.chunks(width).enumerate().flat_map(of_row).collect()), of_weight]
        };
        let operation = |inputs| self.scores(inputs).losses;
        let of_losses = compare(&inputs, dtype, device, operation, losses, gradients)?;
        Ok(worse(of_losses, self.best(&inputs, dtype, device)?))
    }

    /// How far the logit of the entry that is found likeliest is below the highest: of two that the type cannot tell apart, either is right.
    fn best(&self, inputs: &[Input; 2], dtype: DType, device: &Device) -> Result<f64, Failure> {
        let data = inputs.each_ref().map(|input| rounded(&input.values, dtype));
        let [x, weight] = data.each_ref().map(exact);
        let best = self.scores(data.map(|data| Tensor::from_data(data, (device, dtype)))).best;
        let (mut found, mut highest) = (Vec::new(), Vec::new());
        for (row, best) in x.chunks(self.width).zip(read(best.float())?) {
            let z = self.logits(row, &weight);
            found.push(z[best as usize]);
            highest.push(z.into_iter().fold(f64::NEG_INFINITY, f64::max));
        }
        Ok(deviation(&found, &highest))
    }

    fn scores(&self, [x, weight]: [Tensor<1>; 2]) -> Scores {
        let Self { tokens, width, vocab, .. } = *self;
        let targets: Vec<i64> =
            (0..tokens).map(|token| self.target(token).map_or(-100, |target| target as i64)).collect();
        let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [tokens]), &x.device());
        let weight =
            if self.transposed { weight.reshape([vocab, width]).transpose() } else { weight.reshape([width, vocab]) };
        linear_cross_entropy(x.reshape([tokens, width]), weight, targets, self.smoothing)
    }

    /// None for every fourth token; the last entry of the vocabulary for the first token, the first for the second.
    fn target(&self, token: usize) -> Option<usize> {
        (token % 4 != 2).then(|| (token + self.vocab - 1) % self.vocab)
    }

    fn logits(&self, row: &[f64], weight: &[f64]) -> Vec<f64> {
        let Self { width, vocab, .. } = *self;
        let (along, across) = if self.transposed { (1, width) } else { (vocab, 1) };
        let mut z = vec![0.0; vocab];
        for (i, x) in row.iter().enumerate() {
            z.iter_mut().enumerate().for_each(|(at, z)| *z += x * weight[i * along + at * across]);
        }
        z
    }

    fn loss(&self, row: &[f64], weight: &[f64], token: usize) -> f64 {
        let Some(target) = self.target(token) else { return 0.0 };
        let z = self.logits(row, weight);
        let log_sum = z.iter().map(|z| z.exp()).sum::<f64>().ln();
        let mean = z.iter().sum::<f64>() / z.len() as f64;
        (1.0 - self.smoothing) * (log_sum - z[target]) + self.smoothing * (log_sum - mean)
    }
}
