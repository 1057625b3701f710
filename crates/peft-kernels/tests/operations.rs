//! The custom operations on the CPU: in f32 the paths on slices, in every other type the bodies of Burn's operations.
#![allow(deprecated, reason = "ndarray goes with Burn 0.23; until then it is a second opinion on the CPU")]

use burn::tensor::{DType, Device, Int, Tensor};
use peft_kernels::{Sight, attention};
use peft_testkit::{Check, difference, operations, table};

fn hold(device: &Device) {
    let checks: Vec<_> = operations().into_iter().map(|(name, check)| Check::run(name, || check(device))).collect();
    assert!(checks.iter().all(|check| !check.failed()), "\n{}", table(&checks));
    println!("{}", table(&checks));
}

#[test]
fn on_flex() {
    hold(&Device::flex());
}

#[test]
fn on_ndarray() {
    hold(&Device::ndarray());
}

/// The bodies of Burn's operations, which f64 goes through, take so many scores in chunks; the path on slices has tiles of its own.
#[test]
fn attention_in_chunks_is_attention() {
    let (seq, past, heads, kv_heads, head_dim) = (70, 4100, 64, 2, 2);
    let device = Device::flex().autodiff();
    let segments: Vec<i64> = (0..seq as i64).map(|token| token / 30).collect();
    let segments = Tensor::<1, Int>::from_data(segments.as_slice(), &device).reshape([1, seq]);
    let sight = Sight { causal: true, window: Some(4000), prefix: 3 };
    for segments in [None, Some(segments)] {
        let run = |dtype: DType| -> Vec<Vec<f64>> {
            let input = |shape: [usize; 4], seed: f64| {
                let count = shape.iter().product::<usize>();
                let values: Vec<f32> = (0..count).map(|i| ((i as f64 + seed) * 0.7).sin() as f32).collect();
                Tensor::<1>::from_data(values.as_slice(), (&device, dtype)).reshape(shape)
            };
            let q = input([1, seq, heads, head_dim], 1.0).require_grad();
            let [k, v] = [2.0, 3.0].map(|seed| input([1, past + seq, kv_heads, head_dim], seed).require_grad());
            let y = attention(q.clone(), k.clone(), v.clone(), segments.clone(), sight, 2.0);
            let tape = (y.clone() * input(y.dims(), 4.0)).sum().backward();
            let values = |tensor: Tensor<4>| tensor.into_data().iter::<f64>().collect();
            let gradient = |tensor: &Tensor<4>| values(tensor.grad(&tape).unwrap());
            vec![values(y), gradient(&q), gradient(&k), gradient(&v)]
        };
        for (found, expected) in run(DType::F64).iter().zip(&run(DType::F32)) {
            let largest = expected.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
            let difference = difference(found, expected) / largest;
            assert!(difference < 1e-5, "{difference}");
        }
    }
}
