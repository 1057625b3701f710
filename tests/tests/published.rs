//! Mixtures in the layout of `MixLoRA`'s authors: the logits of their formulas, and files that do not fit.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use peft_core::{AdapterFile, Peft as _, Result, Strictness, load_adapter};
use peft_models::load::{Packing, Precision};
use peft_models::{CausalLm, ModelSource, Pretrained};
use peft_union::{AnyUnion, read_published};
use serde_json::{Value, json};

use crate::golden::{BOUND, deviation, floats, logits, testdata};

fn dir(case: &str) -> PathBuf {
    testdata().join("mixtures").join(case)
}

fn base() -> CausalLm {
    let source = ModelSource::Dir(testdata().join("models/llama"));
    Pretrained::load_with(&source, &Packing::AsStored, Precision::F32, &Device::flex()).unwrap().model
}

#[track_caller]
fn assert_logits(case: &str, model: &CausalLm) {
    let golden = dir(case).join("logits.safetensors");
    let found = deviation(&logits(model, &golden), &floats(&golden, "logits"));
    assert!(found < BOUND, "{case}: {found}");
}

#[test]
fn logits_are_those_of_the_formulas() {
    let cases =
        ["mixlora/plain", "mixlora/rslora", "mixlora/experts_only", "mixlora/legacy", "loramoe/plain", "mola/plain"];
    for case in cases {
        let file = read_published(&dir(case)).unwrap();
        let model = base().attach(&file.method).unwrap();
        let model = file.clone().fill(model, &dir(case), Strictness::default()).unwrap();
        assert_logits(case, &model);
        // And as a file of this project's own.
        let own = tempfile::tempdir().unwrap();
        file.write(own.path()).unwrap();
        assert_logits(case, &load_adapter::<_, AnyUnion>(base(), own.path()).unwrap().0);
    }
}

/// A copy of a case with fields of its configuration changed.
fn changed(case: &str, fields: &Value) -> Result<AdapterFile<AnyUnion>> {
    let copy = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(dir(case).join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (field, value) in fields.as_object().unwrap() {
        config[field] = value.clone();
    }
    std::fs::write(copy.path().join("adapter_config.json"), config.to_string()).unwrap();
    std::fs::copy(dir(case).join("adapter_model.bin"), copy.path().join("adapter_model.bin")).unwrap();
    read_published(copy.path())
}

fn refused(case: &str, field: &str, value: Value) -> String {
    changed(case, &json!({ field: value })).map(|_| ()).unwrap_err().to_string()
}

/// The mixture of such a copy.
fn mixture(case: &str, fields: Value) -> Value {
    let method = serde_json::to_value(changed(case, &fields).unwrap().method).unwrap();
    let mut parts = method["parts"].as_array().unwrap().iter();
    parts.find(|part| part.get("expert").is_some()).unwrap().clone()
}

#[test]
fn training_goes_on_as_the_file_says() {
    let load = |case: &str, fields: Value| mixture(case, fields)["balance"]["load"].as_f64().unwrap();
    for (case, balanced) in [("mixlora/plain", true), ("mola/plain", false)] {
        let usual = if balanced { 0.001 } else { 0.0 };
        assert_eq!(load(case, json!({})), usual);
        assert_eq!(load(case, json!({ "router_loss": true })), 0.001);
        assert_eq!(load(case, json!({ "router_aux_loss_coef": 0.5, "router_loss": true })), 0.5);
        assert_eq!(load(case, json!({ "router_aux_loss_coef": 0.5, "router_loss": false })), 0.0);
    }
    assert_eq!(load("loramoe/plain", json!({})), 0.0);
    assert_eq!(mixture("mixlora/plain", json!({}))["jitter"], json!(0.0));
    assert_eq!(mixture("mixlora/plain", json!({ "jitter_noise": 0.25 }))["jitter"], json!(0.25));
}

#[test]
fn experts_have_what_is_outside_but_for_their_own() {
    let expert = |own: Value| {
        let expert = mixture("mixlora/rslora", json!({ "expert_lora": own }))["expert"].clone();
        ["r", "lora_alpha", "lora_dropout", "use_rslora"].map(|field| expert[field].clone())
    };
    assert_eq!(expert(json!({})), [json!(4), json!(8.0), json!(0.05), json!(true)]);
    assert_eq!(expert(json!({ "lora_alpha": 6 })), [json!(4), json!(6.0), json!(0.05), json!(true)]);
    let own = json!({ "r": 2, "lora_dropout": 0.5, "use_rslora": false });
    assert_eq!(expert(own), [json!(2), json!(8.0), json!(0.5), json!(false)]);
    let found = refused("mixlora/plain", "expert_lora", json!({ "use_dora": true }));
    assert!(found.contains("expert_lora.use_dora"), "{found}");
}

#[test]
fn what_does_not_fit_is_named() {
    let case = "mixlora/plain";
    assert!(refused(case, "peft_type", json!("LORA")).contains("MIXLORA, LORAMOE, MOLA"));
    assert!(refused(case, "routing_strategy", json!("mixlora-switch")).contains("mixlora: no other way of routing"));
    assert!(refused(case, "use_dora", json!(true)).contains("DoRA is not built"));
    assert!(refused(case, "bias", json!("all")).contains("bias"));
    assert!(refused("mola/plain", "peft_type", json!("LORAMOE")).contains("routing_strategy"));
    // Five experts of which the file has four.
    let missing = refused(case, "num_experts", json!(5));
    assert!(missing.contains("model.layers.0.mlp.experts.down.lora_A.weight: expected 5 experts"), "{missing}");
    // A module without tensors, in either form of the list.
    let found = refused(case, "target_modules", json!(["q_proj", "o_proj"]));
    assert!(found.contains("target_modules") && found.contains("o_proj"), "{found}");
    let found = refused(case, "target_modules", json!({ "q_proj": true, "k_proj": false, "o_proj": true }));
    assert!(found.contains("o_proj"), "{found}");
    let missing = read_published(Path::new("nowhere")).unwrap_err().to_string();
    assert!(missing.contains("adapter_config.json"), "{missing}");
}
