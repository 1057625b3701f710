//! The methods of this crate, in all their forms, under the laws of `peft-testkit`.
#![allow(clippy::unwrap_used, reason = "a helper of a test should stop where it fails, as the test itself does")]

mod bottleneck;
mod scaling;
mod statement;

use burn::tensor::Device;
use peft_core::Method;
use peft_testkit::{Laws, table};

fn hold<M: Method>(laws: &Laws<M>) {
    let checks = laws.run(&Device::flex());
    assert!(checks.iter().all(|check| !check.failed()), "\n{}", table(&checks));
}
