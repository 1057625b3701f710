//! Adapters in AdapterHub's layout, on the command line.

use super::labels::{golden, ints};
use super::scaling::trained;
use super::{Workshop, deviation, json_of, logits, refused, testdata};

/// The library's own adapters with their heads give its logits; converted into PEFT's layout they still do, and converted back.
#[test]
fn adapters_of_the_library_are_used_and_converted() {
    let model = testdata("encoders/roberta_seqcls");
    let bottlenecks = ["roberta_double_seq_bn", "roberta_par_bn", "roberta_compacter"];
    let others = ["roberta_lora", "roberta_ia3", "roberta_ia3_gating", "roberta_prefix_tuning_flat", "roberta_unipelt"];
    for case in bottlenecks.into_iter().chain(others) {
        let path = format!("adapterhub/{case}/logits.safetensors");
        // Without padding in it, the first row is what the command computes.
        let tokens = ints(&path, "tokens");
        let tokens = tokens[..tokens.len() / 2].iter().map(i64::to_string).collect::<Vec<_>>().join(",");
        let expected: Vec<f64> = golden(&path, "logits")[..3].iter().map(|value| f64::from(*value)).collect();
        let near = |adapter: &str| {
            let found = json_of(&["logits", "--model", &model, "--adapter", adapter, "--tokens", &tokens]);
            let found: Vec<f64> = found["logits"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            assert!(deviation(&found, &expected) < 1e-4, "{case}: {}", deviation(&found, &expected));
        };
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let (theirs, peft, back) = (testdata(&format!("adapterhub/{case}")), path("peft"), path("back"));
        near(&theirs);
        let to_peft = json_of(&["convert", "--json", "--adapter", &theirs, "--out", &peft]);
        assert_eq!(to_peft["layout"], "PEFT");
        near(&peft);
        let to_hub = json_of(&["convert", "--json", "--adapter", &peft, "--out", &back, "--name", "mine"]);
        assert_eq!(to_hub["layout"], "AdapterHub");
        near(&back);
        let head: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("back/head_config.json")).unwrap()).unwrap();
        assert_eq!(head["name"], "mine");
        let (code, message) = refused(&["convert", "--adapter", &peft, "--out", &back]);
        assert!(code == 2 && message.contains("there is an adapter already"), "{message}");
    }
}

/// A language adapter as MAD-X has it: bottlenecks, and an invertible adapter behind the embeddings.
#[test]
fn an_invertible_adapter_is_trained_and_converted() {
    let shop = Workshop::new();
    trained(&shop, "pfeiffer", "output_adapters", &["--reduction-factor", "2", "--inv-adapter", "2"]);
    let (model, adapter, hub) = (shop.path("model"), shop.path("pfeiffer"), shop.path("hub"));
    json_of(&["convert", "--json", "--adapter", &adapter, "--out", &hub, "--name", "en"]);
    let tensors = peft_core::files::read_values(&std::path::Path::new(&hub).join("adapter.safetensors")).unwrap();
    assert!(tensors.contains_key("model.invertible_adapters.en.F.0.weight"));
    assert!(deviation(&logits(&model, Some(&hub)), &logits(&model, Some(&adapter))) < 1e-6);
    let (code, message) = refused(&["merge", "--model", &model, "--adapter", &hub, "--out", &shop.path("merged")]);
    assert!(code != 0 && message.contains("model.invertible_adapters"), "{message}");
}

#[test]
fn what_cannot_be_converted_is_refused() {
    let adapter = testdata("lora/llama/all_linear");
    let (code, message) = refused(&["convert", "--adapter", &adapter, "--out", "nowhere", "--name", "a.b"]);
    assert!(code == 2 && message.contains("part of each key"), "{message}");
    // AdapterHub has no flag for the projection behind attention.
    let (code, message) = refused(&["convert", "--adapter", &adapter, "--out", "nowhere"]);
    assert!(code != 0 && message.contains("target_modules") && message.contains("lora/llama/all_linear"), "{message}");
    // And a part of a method that is not built is named, with the folder that asks for it.
    let adapter = testdata("adapterhub/bert_compacter_own_rule");
    let (code, message) = refused(&["convert", "--adapter", &adapter, "--out", "nowhere"]);
    assert!(
        code != 0 && message.contains("factorized_phm_rule") && message.contains("bert_compacter_own_rule"),
        "{message}"
    );
    assert!(!message.contains("peft train"), "{message}");
}
