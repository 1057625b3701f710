//! Several `LoRA`s of one layer side by side.
//!
//! - formula: `Σₑ gₑ·s·(x·Aₑ·Bₑ + βₑ)`, in one operation: [`low_rank_experts`]
//! - source: Zadouri et al. 2023, arXiv:2309.05444, section 3.2
//!
//! The factors are those of one `LoRA` whose rank is that of all together, in memory and in files: nothing has to be joined, and an optimizer has two
//! tensors to see to, however many experts there are.

use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::Tensor;
use peft_core::files::Values;
use peft_core::kernels::low_rank_experts;
use peft_core::{End, Experts};

use crate::LoraAdapter;

/// State of several [`LoraAdapter`]s of one rank.
#[derive(Module, Debug)]
pub struct LoraExperts {
    /// `[d_in, experts · rank]`
    pub a: Param<Tensor<2>>,
    /// `[experts · rank, d_out]`
    pub b: Param<Tensor<2>>,
    /// `[experts, d_out]`
    pub bias: Option<Param<Tensor<2>>>,
    scale: f64,
    dropout: Dropout,
}

/// Values of several parameters as one.
fn joined<const D: usize>(parts: Vec<Tensor<D>>, dim: usize) -> Param<Tensor<D>> {
    Param::from_tensor(Tensor::cat(parts, dim).detach())
}

/// The factors of several adapters in a file as that of all has them: `lora_A.weight` `[rank, d_in]` by rows, `lora_B.weight` `[d_out, rank]` by columns. Nothing where
/// there are none, or they have different shapes.
pub fn join_factors(key: &str, experts: &[Values]) -> Option<Values> {
    let [rows, columns] = experts.first()?.shape[..] else { return None };
    if experts.iter().any(|expert| expert.shape != [rows, columns]) {
        return None;
    }
    if key.ends_with("lora_A.weight") {
        let values = experts.iter().flat_map(|expert| expert.values.iter().copied()).collect();
        return Some(Values { shape: vec![experts.len() * rows, columns], values });
    }
    let line = |row: usize| {
        experts.iter().flat_map(move |expert| expert.values[row * columns..(row + 1) * columns].iter().copied())
    };
    Some(Values { shape: vec![rows, experts.len() * columns], values: (0..rows).flat_map(line).collect() })
}

/// `Σₑ gₑ·sₑ·(x·Aₑ·Bₑ + βₑ)` of adapters that were trained apart, so that ranks and scales differ, in one operation; no dropout acts.
///
/// # Shapes
/// `x`: `[rows, d_in]`; `gates`: `[rows, experts]`; result `[rows, d_out]`
///
/// # Panics
/// Without an expert, with one that has a gate of its own, or when shapes do not fit.
pub fn mix(experts: &[&LoraAdapter], x: Tensor<2>, gates: Tensor<2>) -> Tensor<2> {
    assert!(experts.iter().all(|expert| expert.gate.is_none()), "an expert with a gate of its own");
    let rank = experts.iter().map(|expert| expert.a.dims()[1]).max().expect("at least one expert");
    // What is missing up to the largest rank adds nothing.
    let filled = |factor: Tensor<2>, dim: usize| {
        let (mut missing, options) = (factor.dims(), (&factor.device(), factor.dtype()));
        missing[dim] = rank - missing[dim];
        if missing[dim] == 0 { factor } else { Tensor::cat(vec![factor, Tensor::zeros(missing, options)], dim) }
    };
    let a = Tensor::cat(experts.iter().map(|expert| filled(expert.a.val(), 1)).collect(), 1);
    let b = Tensor::cat(experts.iter().map(|expert| filled(expert.b.val() * expert.scale, 0)).collect(), 0);
    let gates = gates.cast(a.dtype());
    let biases = experts.iter().enumerate().filter_map(|(number, expert)| {
        let bias = expert.bias.as_ref()?.val() * expert.scale;
        Some(gates.clone().narrow(1, number, 1).matmul(bias.unsqueeze()))
    });
    let biases: Vec<Tensor<2>> = biases.collect();
    let y = low_rank_experts(x.cast(a.dtype()), a, b, gates, 1.0);
    biases.into_iter().fold(y, |y, bias| y + bias)
}

impl Experts<LoraAdapter> for LoraExperts {
    fn of(experts: Vec<LoraAdapter>) -> Self {
        let factors = |of: fn(&LoraAdapter) -> Tensor<2>, dim| joined(experts.iter().map(of).collect(), dim);
        let biases: Vec<_> =
            experts.iter().filter_map(|expert| Some(expert.bias.as_ref()?.val().unsqueeze())).collect();
        Self {
            a: factors(|expert| expert.a.val(), 1),
            b: factors(|expert| expert.b.val(), 0),
            bias: (!biases.is_empty()).then(|| joined(biases, 0)),
            scale: experts[0].scale,
            dropout: experts[0].dropout.clone(),
        }
    }

    fn sees(&self, end: &End<'_>) -> (Tensor<3>, Tensor<3>) {
        (end.input.clone(), end.output.clone())
    }

    fn mixed(&self, seen: Tensor<3>, gates: Tensor<2>) -> Tensor<3> {
        let ([batch, seq, d_in], a) = (seen.dims(), self.a.val());
        let gates = gates.cast(a.dtype());
        let x = self.dropout.forward(seen).reshape([batch * seq, d_in]).cast(a.dtype());
        let y = low_rank_experts(x, a, self.b.val(), gates.clone(), self.scale); // [batch · seq, d_out]
        let y = self.bias.iter().fold(y, |y, bias| y + gates.clone().matmul(bias.val()) * self.scale);
        let d_out = y.dims()[1];
        y.reshape([batch, seq, d_out])
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device, Distribution};
    use peft_core::{Method as _, Part as _, Targets, scan};
    use peft_testkit::{Stack, difference, read};

    use super::*;
    use crate::{InitWeights, LoraConfig};

    #[test]
    fn adapters_that_were_trained_apart_are_mixed_as_one_by_one() {
        let device = Device::flex();
        let model = Stack::new(&device, DType::F32, true);
        let site = scan(&model).sites.into_iter().find(|site| site.path == "up").unwrap();
        let adapter = |rank: usize, alpha: f64, lora_bias: bool| {
            let method = LoraConfig { lora_bias, ..LoraConfig::new(rank, Targets::modules(["up"])) };
            method.with_alpha(alpha).with_init(InitWeights::Random).init(&site, rank as u64).unwrap()
        };
        let experts = [adapter(2, 3.0, true), adapter(5, 1.0, false), adapter(1, 4.0, true)];
        let random = |shape| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
        let (x, gates) = (random([7, site.d_in]), random([7, 3]));
        // A gate that is shut.
        let gates = gates.slice_assign([2..3, 1..2], Tensor::zeros([1, 1], &device));
        let found = mix(&experts.iter().collect::<Vec<_>>(), x.clone(), gates.clone());
        let each = experts.iter().enumerate().map(|(at, expert)| {
            expert.update(x.clone().unsqueeze_dim(1)).squeeze_dim::<2>(1) * gates.clone().narrow(1, at, 1)
        });
        let expected = each.reduce(|sum, each| sum + each).unwrap();
        assert!(difference(&read(found).unwrap(), &read(expected).unwrap()) < 1e-5);
    }
}
