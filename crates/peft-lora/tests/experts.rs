//! LoRA on the layers of several experts against the formula, expert by expert in double precision.

#![allow(clippy::unwrap_used, reason = "everything here is a test")]

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::kernels::Groups;
use peft_core::{GroupedLinear, Peft, Targets, merge, scan};
use peft_lora::{InitWeights, LoraAdapter, LoraConfig};

/// What f32 may lose, relative to the largest value.
const ROUNDING: f64 = 1e-5;

const EXPERTS: usize = 4;
const D_IN: usize = 7;
const D_OUT: usize = 5;
const RANK: usize = 3;
const SCALE: f64 = 1.5;
/// One expert has no row, one has one.
const EXPERT_OF: [usize; 9] = [0, 2, 0, 3, 0, 2, 0, 2, 0];

#[derive(Module, Debug)]
struct Model {
    experts: GroupedLinear,
}

/// Values between -1 and 1 without a pattern that a sum could cancel.
fn values(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|at| ((at * 7919 + seed * 104_729) as f32 * 0.618).sin()).collect()
}

fn weight() -> Vec<f32> {
    values(EXPERTS * D_OUT * D_IN, 1)
}

fn model(device: &Device, dtype: DType) -> Model {
    let data = TensorData::new(weight(), [EXPERTS, D_OUT, D_IN]);
    Model { experts: GroupedLinear::new(Param::from_tensor(Tensor::from_data(data, (device, dtype)))) }
}

fn method() -> LoraConfig {
    let lora = LoraConfig::new(RANK, Targets::parameters(["experts"])).with_alpha(SCALE * RANK as f64);
    lora.with_init(InitWeights::Random)
}

fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

fn deviation(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    worst / largest
}

/// The factors as the model has them: `A` `[experts, rank, d_in]`, `B` `[experts, d_out, rank]`.
struct Factors {
    a: Vec<f64>,
    b: Vec<f64>,
}

impl Factors {
    /// `ΔW[e, o, i]` without the scale.
    fn product(&self, e: usize, o: usize, i: usize) -> f64 {
        (0..RANK).map(|k| self.b[(e * D_OUT + o) * RANK + k] * self.a[(e * RANK + k) * D_IN + i]).sum()
    }
}

/// Values and gradients, `[y, dx, dA, dB]`, for inputs `x` and the gradient `dy`.
fn reference(factors: &Factors, x: &[f64], dy: &[f64]) -> [Vec<f64>; 4] {
    let w = weight();
    let adapted =
        |e: usize, o: usize, i: usize| f64::from(w[(e * D_OUT + o) * D_IN + i]) + SCALE * factors.product(e, o, i);
    let (mut y, mut dx) = (vec![0.0; EXPERT_OF.len() * D_OUT], vec![0.0; x.len()]);
    let (mut da, mut db) = (vec![0.0; factors.a.len()], vec![0.0; factors.b.len()]);
    for (row, e) in EXPERT_OF.into_iter().enumerate() {
        for o in 0..D_OUT {
            let dy = dy[row * D_OUT + o];
            for i in 0..D_IN {
                let x = x[row * D_IN + i];
                y[row * D_OUT + o] += adapted(e, o, i) * x;
                dx[row * D_IN + i] += adapted(e, o, i) * dy;
                for k in 0..RANK {
                    let (a, b) = ((e * RANK + k) * D_IN + i, (e * D_OUT + o) * RANK + k);
                    da[a] += SCALE * factors.b[b] * dy * x;
                    db[b] += SCALE * factors.a[a] * dy * x;
                }
            }
        }
    }
    [y, dx, da, db]
}

#[test]
fn values_and_gradients_are_those_of_the_formula() {
    let device = Device::flex().autodiff();
    let model = model(&device, DType::F32).attach(&method()).unwrap();
    let rows = EXPERT_OF.len();
    let (x, dy) = (values(rows * D_IN, 2), values(rows * D_OUT, 3));
    let tensor =
        |values: &[f32], width| Tensor::<2>::from_data(TensorData::new(values.to_vec(), [rows, width]), &device);
    let input = tensor(&x, D_IN).require_grad();
    let y = model.experts.forward(input.clone(), &Groups::new(EXPERTS, &EXPERT_OF));
    let grads = (y.clone() * tensor(&dy, D_OUT)).sum().backward();
    let adapter = adapter(&model);
    let (a, b) = (adapter.a.val(), adapter.b.val());
    let factors = Factors { a: read(a.clone()), b: read(b.clone()) };
    let exact = |values: &[f32]| values.iter().map(|value| f64::from(*value)).collect::<Vec<_>>();
    let expected = reference(&factors, &exact(&x), &exact(&dy));
    let found = [y, input.grad(&grads).unwrap(), a.grad(&grads).unwrap(), b.grad(&grads).unwrap()].map(read);
    for (name, (found, expected)) in ["y", "dx", "dA", "dB"].iter().zip(found.iter().zip(&expected)) {
        assert!(deviation(found, expected) < ROUNDING, "{name}: {}", deviation(found, expected));
    }
    // The expert without rows.
    assert!(found[2][RANK * D_IN..2 * RANK * D_IN].iter().all(|value| *value == 0.0));
}

/// The adapter of the one weight.
fn adapter(model: &Model) -> LoraAdapter {
    struct Finder(Vec<Param<Tensor<2>>>);
    impl peft_core::ParamVisitor for Finder {
        fn float<const D: usize>(&mut self, at: &peft_core::PathStack, param: &Param<Tensor<D>>) {
            if at.locate().field.is_some() {
                let param: &dyn std::any::Any = param;
                self.0.push(param.downcast_ref::<Param<Tensor<2>>>().unwrap().clone());
            }
        }
    }
    let mut finder = Finder(Vec::new());
    peft_core::visit_params(model, &mut finder);
    let [a, b] = <[_; 2]>::try_from(finder.0).unwrap();
    let site = scan(model).sites.remove(0);
    LoraAdapter { a, b, ..peft_core::Method::init(&method(), &site, 0).unwrap() }
}

#[test]
fn merged_equals_unmerged_and_a_fresh_adapter_is_the_identity() {
    let device = Device::flex();
    let base = model(&device, DType::F32);
    let x = Tensor::from_data(TensorData::new(values(EXPERT_OF.len() * D_IN, 2), [EXPERT_OF.len(), D_IN]), &device);
    let forward = |model: &Model| read(model.experts.forward(x.clone(), &Groups::new(EXPERTS, &EXPERT_OF)));
    let before = forward(&base);
    let adapted = base.clone().attach(&method()).unwrap();
    let found = forward(&adapted);
    assert!(deviation(&found, &before) > 0.1);
    assert!(deviation(&forward(&merge(adapted, &method()).unwrap()), &found) < ROUNDING);
    assert_eq!(forward(&base), before);
    let without = base.trainable().total;
    let fresh = base.attach(&method().with_init(InitWeights::Kaiming)).unwrap();
    assert_eq!(forward(&fresh), before);
    assert_eq!(fresh.trainable().total - without, EXPERTS * RANK * (D_IN + D_OUT));
}

#[test]
fn a_base_in_16_bits_is_rounded_and_its_adapter_is_not() {
    let device = Device::flex().autodiff();
    let x = Tensor::from_data(TensorData::new(values(EXPERT_OF.len() * D_IN, 2), [EXPERT_OF.len(), D_IN]), &device);
    let y = |dtype| {
        let model = model(&device, dtype).attach(&method()).unwrap();
        let y = model.experts.forward(x.clone(), &Groups::new(EXPERTS, &EXPERT_OF));
        let adapter = adapter(&model);
        assert_eq!(adapter.a.val().dtype(), DType::F32);
        let grads = y.clone().sum().backward();
        (read(y), [adapter.a, adapter.b].map(|factor| read(factor.val().grad(&grads).unwrap())))
    };
    let ((half, of_half), (whole, of_whole)) = (y(DType::BF16), y(DType::F32));
    let found = deviation(&half, &whole);
    assert!(found > 1e-5 && found < 2e-2, "{found}");
    for (found, expected) in of_half.iter().zip(&of_whole) {
        assert!(deviation(found, expected) < ROUNDING);
    }
}
