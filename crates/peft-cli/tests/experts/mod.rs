//! Adapters on parameters of experts, on the command line.

use super::*;

/// The model of the workshop becomes a small Mixtral.
fn mixtral() -> Workshop {
    let shop = Workshop::new();
    let base = testdata("models-moe/mixtral");
    fs::copy(format!("{base}/model.safetensors"), shop.dir.path().join("model/model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(format!("{base}/config.json")).unwrap()).unwrap();
    config["eos_token_id"] = json!(95);
    fs::write(shop.dir.path().join("model/config.json"), config.to_string()).unwrap();
    shop
}

/// What training an adapter on parameters of these names came to, once it has learned.
fn trained(shop: &Workshop, names: &str, more: &[&str]) -> Value {
    let own = ["--target-parameters", names, "--rank", "2", "--steps", "20"];
    let mut args = shop.train("adapter", &[&own[..], more].concat());
    let at = args.iter().position(|arg| arg == "all-linear").unwrap();
    args.drain(at - 1..=at);
    let result = json_of(&strs(&args));
    let loss = |evaluation: &Value| evaluation["loss"].as_f64().unwrap();
    assert!(loss(&result["after"]) < 0.7 * loss(&result["before"]), "{result}");
    result
}

#[test]
fn experts_are_trained_used_and_merged() {
    let shop = mixtral();
    let (model, out, merged) = (shop.path("model"), shop.path("adapter"), shop.path("merged"));
    trained(&shop, "experts.gate_up_proj,experts.down_proj,gate.weight", &["--eval-every", "10"]);
    // Two layers, four experts of width 24 in a model of width 32.
    let (gate_up, down, router) = (4 * 2 * (32 + 48), 4 * 2 * (24 + 32), 2 * (32 + 4));
    let config: Value = serde_json::from_slice(&adapter_bytes(&out).1).unwrap();
    assert_eq!(config["target_modules"], json!([]));
    assert_eq!(config["target_parameters"], json!(["experts.gate_up_proj", "experts.down_proj", "gate.weight"]));
    let inspected = json_of(&["inspect", "--json", &out]);
    assert_eq!(inspected["parameters"], json!(2 * (gate_up + down + router)), "{inspected}");
    let adapted = logits(&model, Some(&out));
    assert!(deviation(&adapted, &logits(&model, None)) > 0.1);
    json_of(&["merge", "--json", "--model", &model, "--adapter", &out, "--out", &merged]);
    assert!(deviation(&logits(&merged, None), &adapted) < 1e-4);
}

/// Frozen experts are packed, and what the adapter learned over them is merged into what is left of them.
#[test]
fn packed_experts_are_trained_over_and_merged() {
    let shop = mixtral();
    let (model, out, merged) = (shop.path("model"), shop.path("adapter"), shop.path("merged"));
    let result = trained(&shop, "experts.gate_up_proj,experts.down_proj", &["--quantize", "nf4"]);
    // Even of matrices that are hardly larger than their tables.
    let (total, bytes) = (&result["parameters"]["total"], &result["parameters"]["total_bytes"]);
    assert!(bytes.as_u64().unwrap() < 3 * total.as_u64().unwrap(), "{result}");
    let adapted = ["logits", "--model", &model, "--adapter", &out, "--tokens", "3,4,5", "--quantize", "nf4"];
    let values = |found: Value| -> Vec<f64> {
        found["logits"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
    };
    let expected = values(json_of(&adapted));
    let into = ["--quantize", "nf4", "--into", "unpacked", "--out", &merged];
    let report = json_of(&[&["merge", "--json", "--model", &model, "--adapter", &out][..], &into].concat());
    let layers: Vec<&str> = report["truth"].as_array().unwrap().iter().map(|l| l["path"].as_str().unwrap()).collect();
    assert_eq!(layers.iter().filter(|path| path.contains("mlp.experts.")).count(), 4, "{report}");
    let found = values(json_of(&["logits", "--model", &merged, "--tokens", "3,4,5"]));
    assert!(deviation(&found, &expected) < 1e-4, "{}", deviation(&found, &expected));
}

/// What a file of `transformers` 4 holds for each expert reaches the merged model, whose files have the names of that time as well.
#[test]
fn an_adapter_on_layers_of_each_expert_is_merged() {
    let (model, merged) = (testdata("models-moe/mixtral"), TempDir::new().unwrap());
    let adapter = testdata("lora-moe/mixtral/per_expert");
    let merged = merged.path().join("merged").display().to_string();
    let adapted = logits(&model, Some(&adapter));
    assert!(deviation(&adapted, &logits(&model, None)) > 0.1);
    json_of(&["merge", "--json", "--model", &model, "--adapter", &adapter, "--out", &merged]);
    assert!(deviation(&logits(&merged, None), &adapted) < 1e-4);
}

#[test]
fn parameters_that_cannot_be_adapted_are_refused() {
    let shop = mixtral();
    let refusals: [(&[&str], &str); 3] = [
        (&["--target-parameters", "experts.gate_up"], "target_parameters \"experts.gate_up\" matches no layer"),
        (&["--target-parameters", "experts.down_proj", "--dropout", "0.1"], "`lora_dropout`: expected none beside"),
        (
            &["--method", "ssf", "--target-parameters", "experts.down_proj"],
            "--target-parameters: ssf has no such setting",
        ),
    ];
    for (more, expected) in refusals {
        let (_, message) = refused(&strs(&shop.train("refused", more)));
        assert!(message.contains(expected), "{message}");
    }
    let (_, message) = refused(&strs(&Workshop::new().train("refused", &["--target-parameters", "experts.down_proj"])));
    assert!(message.contains("target_parameters \"experts.down_proj\" matches no layer"), "{message}");
}
