//! The methods of this crate, in all their forms, under the laws of `peft-testkit`.
#![allow(clippy::unwrap_used, reason = "a helper of a test should stop where it fails, as the test itself does")]

mod statement;

use burn::tensor::Device;
use peft_core::Method;
use peft_testkit::{Laws, table};

fn hold<M: Method>(laws: &Laws<M>) {
    let checks = laws.run(&Device::flex());
    assert!(checks.iter().all(|check| !check.failed()), "\n{}", table(&checks));
}

#[test]
fn prompts_obey_the_laws() {
    hold(&statement::prompt());
    hold(&statement::prefix());
}

#[test]
fn encoded_prompts_obey_the_laws() {
    let (projected, mlp, _) = statement::variants();
    hold(&statement::p_tuning());
    hold(&projected);
    hold(&mlp);
}

#[test]
fn prompts_by_task_obey_the_laws() {
    let (_, _, bank) = statement::variants();
    hold(&statement::multitask());
    hold(&bank);
}

#[test]
fn prompts_in_attention_obey_the_laws() {
    hold(&statement::llama_adapter());
}
