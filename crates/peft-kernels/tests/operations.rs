//! The custom operations on the CPU: in f32 the paths on slices, in every other type the bodies of Burn's operations.
#![allow(deprecated, reason = "ndarray goes with Burn 0.23; until then it is a second opinion on the CPU")]

use burn::tensor::Device;
use peft_testkit::{Check, operations, table};

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
