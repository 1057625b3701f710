//! Methods that scale and shift, on the command line.

use super::packing::with;
use super::*;

/// A short run of `method` on `targets`, which must lower the loss; gives its report.
pub(crate) fn trained(shop: &Workshop, method: &str, targets: &str, more: &[&str]) -> Value {
    let more = [&["--method", method, "--steps", "30", "--eval-every", "10"], more].concat();
    let result = json_of(&strs(&with(shop.train(method, &more), "--targets", targets)));
    let loss = |evaluation: &Value| evaluation["loss"].as_f64().unwrap();
    assert!(loss(&result["after"]) < 0.9 * loss(&result["before"]), "{method}: {result}");
    result
}

/// The adapted model is not the model, and the merged one is the adapted one.
fn merges(shop: &Workshop, method: &str) {
    let (model, adapter, merged) = (shop.path("model"), shop.path(method), shop.path("merged"));
    json_of(&["merge", "--json", "--model", &model, "--adapter", &adapter, "--out", &merged]);
    let adapted = logits(&model, Some(&adapter));
    assert!(deviation(&adapted, &logits(&merged, None)) < 1e-4);
    assert!(deviation(&adapted, &logits(&model, None)) > 0.1);
}

#[test]
fn ia3_is_trained_merged_and_inspected() {
    let shop = Workshop::new();
    let result = trained(&shop, "ia3", "k_proj,v_proj,down_proj", &["--feedforward", "down_proj"]);
    merges(&shop, "ia3");
    let inspected = json_of(&["inspect", "--json", &shop.path("ia3")]);
    assert_eq!((&inspected["method"], &inspected["known"]), (&json!("IA3"), &json!(true)));
    assert_eq!(inspected["config"]["feedforward_modules"], json!(["down_proj"]));
    assert_eq!(inspected["parameters"], result["parameters"]["trainable"]);
    let text = String::from_utf8(peft(&["inspect", &shop.path("ia3")]).stdout).unwrap();
    assert!(text.contains("down_proj.ia3_l") && !text.contains("rank"), "{text}");
}

#[test]
fn ia3_is_trained_over_packed_weights() {
    let shop = Workshop::new();
    trained(&shop, "ia3", "all-linear", &["--feedforward", "down_proj", "--quantize", "nf4"]);
}

#[test]
fn norms_are_trained_and_merged() {
    let shop = Workshop::new();
    trained(&shop, "ln-tuning", "input_layernorm,post_attention_layernorm,norm", &[]);
    merges(&shop, "ln-tuning");
}

/// No layer of this model has a bias.
#[test]
fn what_needs_a_bias_is_refused_without_one() {
    let shop = Workshop::new();
    trained(&shop, "ssf", "v_proj,norm", &[]);
    let (model, adapter, out) = (shop.path("model"), shop.path("ssf"), shop.path("out"));
    let (code, message) = refused(&["merge", "--model", &model, "--adapter", &adapter, "--out", &out]);
    assert!(code == 1 && message.contains("model.norm: the adapter adds a bias"), "{message}");
    let (code, message) = refused(&strs(&shop.train("bitfit", &["--method", "bitfit"])));
    assert!(code == 2 && message.contains("layers with a bias") && message.contains("which has none"), "{message}");
}

#[test]
fn settings_of_another_method_are_refused() {
    let shop = Workshop::new();
    let refusal = |method: &str, more: &[&str]| {
        let (code, message) = refused(&strs(&shop.train("out", &[&["--method", method], more].concat())));
        assert_eq!(code, 2, "{message}");
        message
    };
    assert!(refusal("ia3", &["--dropout", "0.1"]).contains("--dropout: ia3 has no such setting"));
    assert!(refusal("lora", &["--feedforward", "up_proj"]).contains("--feedforward: lora has no such setting"));
    let message = refusal("ssf", &["--init", "random"]);
    assert!(message.contains("--init random: ssf") && message.contains("one of kaiming, gaussian"), "{message}");
    let message = refusal("ia3", &["--targets", "up_proj", "--feedforward", "dwon_proj"]);
    assert!(message.contains("`feedforward_modules`") && message.contains("dwon_proj"), "{message}");
}
