//! Attention over grouped heads.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use peft_core::kernels::{Sight, attention};

use super::{ALL, Input, Operation, SINGLE, by_differences, dot, in_types};
use crate::Failure;
use crate::state::normal;

const SCALE: f64 = 0.6;

pub(super) fn checks() -> Vec<Operation> {
    let all = Sight { causal: false, window: None, prefix: 0 };
    let causal = Sight { causal: true, ..all };
    let window = Sight { window: Some(3), ..causal };
    let case =
        Case { batch: 2, seq: 7, past: 0, heads: 4, kv_heads: 2, head_dim: 6, sight: all, segmented: false, step: 5 };
    let past = Case { past: 4, ..case };
    // More than one tile of queries and of keys, of which the narrow window leaves some out.
    let long =
        Case { batch: 1, seq: 150, past: 50, heads: 2, kv_heads: 1, head_dim: 2, sight: causal, step: 31, ..case };
    let narrow = Sight { window: Some(20), ..causal };
    // Heads as models have them, of which a tile holds fewer keys the wider they are, and one that is too wide for a kernel.
    let wide = |head_dim| Case { seq: 40, past: 0, head_dim, step: 211, ..long };
    let cases = [
        ("", SINGLE, case),
        ("causal", ALL, Case { sight: causal, ..case }),
        ("causal window", SINGLE, Case { sight: window, ..case }),
        ("window", SINGLE, Case { sight: Sight { causal: false, ..window }, ..case }),
        ("causal past", SINGLE, Case { sight: causal, ..past }),
        ("causal window past", SINGLE, Case { sight: window, ..past }),
        ("causal window prefix", ALL, Case { sight: Sight { prefix: 2, ..window }, ..past }),
        ("prefix of the sequence", ALL, Case { sight: Sight { prefix: 4, ..causal }, ..case }),
        ("segments", SINGLE, Case { sight: causal, segmented: true, ..case }),
        ("segments past", ALL, Case { sight: causal, segmented: true, ..past }),
        ("one token", SINGLE, Case { seq: 1, sight: window, ..past }),
        ("long", SINGLE, long),
        ("long window", SINGLE, Case { sight: narrow, ..long }),
        ("long window prefix", SINGLE, Case { sight: Sight { prefix: 10, ..narrow }, ..long }),
        ("long segments", SINGLE, Case { segmented: true, ..long }),
        ("heads of 64", SINGLE, wide(64)),
        ("heads of 128", SINGLE, wide(128)),
        ("heads of 264", SINGLE, wide(264)),
    ];
    let each = |(name, dtypes, case): (&str, _, Case)| {
        let name = format!("attention {name}");
        in_types(name.trim_end(), dtypes, move |dtype, device| case.deviation(dtype, device))
    };
    cases.into_iter().flat_map(each).collect()
}

#[derive(Clone, Copy)]
struct Case {
    batch: usize,
    seq: usize,
    /// Keys that were there before.
    past: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    sight: Sight,
    /// Whether rows hold two sequences.
    segmented: bool,
    /// How far apart the values are whose gradient is looked at: without a factor in common with the sizes, so that every head has some.
    step: usize,
}

impl Case {
    fn deviation(self, dtype: DType, device: &Device) -> Result<f64, Failure> {
        let Self { batch, seq, heads, kv_heads, head_dim, sight, .. } = self;
        let (new, all) = ([batch, seq, heads, head_dim], [batch, self.total(), kv_heads, head_dim]);
        // Scores are as far apart in wide heads as in narrow ones.
        let spread = (6.0 / head_dim as f32).sqrt().sqrt().min(1.0);
        let input = |shape: [usize; 4], seed| {
            let values = normal(shape.iter().product(), spread, seed);
            Input { values, step: Some(self.step) }
        };
        let inputs = [input(new, 1), input(all, 2), input(all, 3)];
        let operation = |[q, k, v]: [Tensor<1>; 3]| {
            let segments = self.segmented.then(|| {
                let values: Vec<i64> = (0..batch * seq).map(|at| self.segment(at / seq, at % seq)).collect();
                Tensor::<2, Int>::from_data(TensorData::new(values, [batch, seq]), &q.device())
            });
            attention(q.reshape(new), k.reshape(all), v.reshape(all), segments, sight, SCALE)
        };
        by_differences(&inputs, dtype, device, operation, |inputs| self.attend(inputs))
    }

    fn total(&self) -> usize {
        self.past + self.seq
    }

    /// The second sequence begins somewhere else in each row.
    fn segment(&self, row: usize, token: usize) -> i64 {
        i64::from(token > self.seq / 2 - row)
    }

    fn sees(&self, row: usize, token: usize, key: usize) -> bool {
        let (at, Sight { causal, window, prefix }) = (self.past + token, self.sight);
        let near = (!causal || key <= at) && window.is_none_or(|window| at < key + window);
        let own = !self.segmented || key < self.past || self.segment(row, key - self.past) == self.segment(row, token);
        own && (near || key < prefix)
    }

    fn attend(&self, [q, k, v]: [&[f64]; 3]) -> Vec<f64> {
        let Self { seq, heads, kv_heads, head_dim, .. } = *self;
        let head = |(at, q): (usize, &[f64])| {
            let (row, token, head) = (at / (seq * heads), at / heads % seq, at % heads);
            let place = |key: usize| ((row * self.total() + key) * kv_heads + head * kv_heads / heads) * head_dim;
            let seen: Vec<usize> = (0..self.total()).filter(|key| self.sees(row, token, *key)).map(place).collect();
            let e: Vec<f64> = seen.iter().map(|key| (SCALE * dot(q, &k[*key..key + head_dim])).exp()).collect();
            let total: f64 = e.iter().sum();
            let value = |i: usize| e.iter().zip(&seen).map(|(e, key)| e * v[key + i]).sum::<f64>() / total;
            (0..head_dim).map(value).collect::<Vec<_>>()
        };
        q.chunks(head_dim).enumerate().flat_map(head).collect()
    }
}
