//! Broken, foreign and hostile files: an error that says what and where, never a panic, never a large allocation.

use std::path::Path;

use burn::tensor::Device;
use peft_core::{
    AdapterFile, Error, Method, Peft as _, Problem, Strictness, Targets, load_adapter, load_adapter_with, save_adapter,
};
use peft_lora::LoraConfig;
use peft_models::checkpoint::Checkpoint;
use peft_models::{ModelSource, Pretrained};
use peft_moe::{MixtureConfig, PillConfig, PolyConfig, RouterConfig};
use peft_prompt::{
    MultitaskPromptTuningConfig, PTuningConfig, PrefixTuningConfig, PromptBankConfig, PromptTuningConfig,
};

use crate::golden::{model, testdata};

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

fn adapter() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy(&testdata().join("lora/llama/plain"), dir.path());
    dir
}

fn edit_config(dir: &Path, change: impl Fn(&mut serde_json::Map<String, serde_json::Value>)) {
    let path = dir.join("adapter_config.json");
    let mut json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    change(json.as_object_mut().unwrap());
    std::fs::write(path, json.to_string()).unwrap();
}

fn refused(dir: &Path) -> String {
    load_adapter::<_, LoraConfig>(model("llama"), dir).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn an_adapter_cut_short_anywhere_is_refused() {
    let dir = adapter();
    let path = dir.path().join("adapter_model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for length in (0..whole.len()).step_by(97) {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = AdapterFile::<LoraConfig>::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("adapter_model.safetensors"), "{length}: {error}");
    }
}

#[test]
fn a_field_of_another_type_is_named() {
    for (field, value, expected) in [
        ("r", serde_json::json!("x"), "r is \"x\": invalid type"),
        (
            "target_modules",
            serde_json::json!(5),
            "target_modules is 5: expected a regular expression or a list of names",
        ),
        (
            "layers_to_transform",
            serde_json::json!("last"),
            "layers_to_transform is \"last\": expected one value or a list",
        ),
    ] {
        let dir = adapter();
        edit_config(dir.path(), |config| drop(config.insert(field.to_owned(), value.clone())));
        let message = refused(dir.path());
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_model_cut_short_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    copy(&testdata().join("models/llama"), dir.path());
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 7, 8, 9, 500, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert!(Checkpoint::open(dir.path()).is_err(), "{length}");
    }
    let mut huge = u64::MAX.to_le_bytes().to_vec();
    huge.extend_from_slice(&whole[8..]);
    std::fs::write(&path, huge).unwrap();
    assert!(Checkpoint::open(dir.path()).unwrap_err().to_string().contains("cut short"));
}

#[test]
fn an_index_must_not_leave_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    copy(&testdata().join("models/llama_sharded"), dir.path());
    for path in ["../x.safetensors", "/etc/passwd", "a/b.safetensors", ".."] {
        let index = serde_json::json!({ "weight_map": { "a": path } });
        std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("not a file of this folder"), "{path}: {error}");
    }
}

#[test]
fn a_config_that_lies_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    copy(&testdata().join("models/llama"), dir.path());
    let path = dir.path().join("config.json");
    let original: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    for (field, value, expected) in [
        ("hidden_size", serde_json::json!(0), "hidden_size"),
        ("hidden_size", serde_json::json!(1u64 << 60), "hidden_size"),
        ("num_key_value_heads", serde_json::json!(3), "divisor"),
        ("vocab_size", serde_json::json!("many"), "vocab_size"),
        ("vocab_size", serde_json::json!(97), "expected shape"),
        ("num_hidden_layers", serde_json::json!(3), "missing"),
        ("num_hidden_layers", serde_json::json!(1), "not part of this model"),
        ("hidden_act", serde_json::json!("relu"), "relu"),
        ("model_type", serde_json::json!("mamba"), "mamba"),
    ] {
        let mut json = original.clone();
        json[field] = value;
        std::fs::write(&path, json.to_string()).unwrap();
        let error =
            Pretrained::load(&ModelSource::Dir(dir.path().to_owned()), &Device::flex()).unwrap_err().to_string();
        assert!(error.contains(expected), "{field}: {error}");
    }
}

#[test]
fn an_adapter_of_another_kind_or_model_is_refused() {
    let dir = adapter();
    edit_config(dir.path(), |json| json["peft_type"] = "VERA".into());
    assert!(refused(dir.path()).contains("expected LORA, found VERA"));

    let dir = adapter();
    edit_config(dir.path(), |json| json["use_dora"] = true.into());
    assert!(refused(dir.path()).contains("use_dora"));

    let dir = adapter();
    edit_config(dir.path(), |json| json["r"] = 0.into());
    assert!(refused(dir.path()).contains("`r`"));

    let dir = adapter();
    edit_config(dir.path(), |json| json["r"] = 5.into());
    assert!(refused(dir.path()).contains("expected shape [5, 32], found [4, 32]"));

    let dir = adapter();
    edit_config(dir.path(), |json| json["target_modules"] = serde_json::json!(["q_porj"]));
    let error = refused(dir.path());
    assert!(error.contains("matches no layer") && error.contains("q_proj"), "{error}");

    let dir = adapter();
    edit_config(dir.path(), |json| json["target_modules"] = serde_json::json!(["q_proj", "self_attn"]));
    let error = refused(dir.path());
    assert!(error.contains("self_attn is a "), "{error}");

    let dir = adapter();
    edit_config(dir.path(), |json| json["target_modules"] = "(".into());
    assert!(refused(dir.path()).contains("target_modules"));

    std::fs::write(dir.path().join("adapter_config.json"), "{").unwrap();
    assert!(refused(dir.path()).contains("not a JSON object"));

    let other = load_adapter::<_, LoraConfig>(model("qwen3"), adapter().path()).unwrap_err().to_string();
    assert!(other.contains("expected shape"), "{other}");
}

#[test]
fn missing_and_unknown_tensors_are_errors_unless_allowed() {
    let dir = adapter();
    let mut file = AdapterFile::<LoraConfig>::read(dir.path()).unwrap();
    let (name, values) = file.tensors.pop_first().unwrap();
    file.tensors.insert(format!("x.{name}"), values);
    file.write(dir.path()).unwrap();
    let Err(Error::Tensors { problems, .. }) = load_adapter::<_, LoraConfig>(model("llama"), dir.path()) else {
        panic!("expected an error about tensors");
    };
    assert!(matches!(&problems[..], [Problem::Missing { .. }, Problem::Unknown { .. }]), "{problems:?}");
    let lenient = Strictness { allow_missing: true, allow_unknown: true };
    assert!(load_adapter_with::<_, LoraConfig>(model("llama"), dir.path(), lenient).is_ok());
}

#[test]
fn values_that_are_not_finite_are_refused() {
    let dir = adapter();
    let mut file = AdapterFile::<LoraConfig>::read(dir.path()).unwrap();
    file.tensors.values_mut().next().unwrap().values[3] = f32::NAN;
    file.write(dir.path()).unwrap();
    assert!(refused(dir.path()).contains("not finite"));
}

/// Loads an adapter of `method` whose configuration asks for another size, where `at` says; what is made before that is noticed is little.
fn asks_for<M: Method>(method: &M, at: &str, sizes: &[u64]) {
    for size in sizes {
        let dir = tempfile::tempdir().unwrap();
        save_adapter(&model("llama").attach(method).unwrap(), method, None, dir.path()).unwrap();
        edit_config(dir.path(), |json| {
            let mut fields = at.split('.').collect::<Vec<_>>();
            let last = fields.pop().unwrap();
            let object = fields.into_iter().fold(json, |object, field| object[field].as_object_mut().unwrap());
            object.insert(last.to_owned(), (*size).into());
        });
        let found = load_adapter::<_, M>(model("llama"), dir.path()).map(|_| ());
        assert!(matches!(found, Err(Error::Config { .. })), "{at} {size} of {}: {found:?}", M::PEFT_TYPE);
    }
}

#[test]
fn sizes_that_the_file_has_no_tensors_for_are_refused() {
    const HUGE: u64 = 1 << 60;
    const LARGE: u64 = 1 << 23;
    let targets = || Targets::modules(["q_proj"]);
    asks_for(&LoraConfig::new(2, targets()), "r", &[HUGE, LARGE]);
    let large = adapter();
    edit_config(large.path(), |json| json["r"] = LARGE.into());
    let error = refused(large.path());
    assert!(error.contains("tensors of its file") && error.contains("q_proj"), "{error}");
    asks_for(&PromptTuningConfig::new(2), "num_virtual_tokens", &[HUGE, LARGE]);
    asks_for(&PTuningConfig::new(2, 3), "encoder_hidden_size", &[HUGE, LARGE]);
    asks_for(&PrefixTuningConfig::new(2).with_projection(3), "encoder_hidden_size", &[HUGE, LARGE]);
    for field in ["num_tasks", "num_ranks", "num_virtual_tokens"] {
        asks_for(&MultitaskPromptTuningConfig::new(2, 3), field, &[HUGE, LARGE]);
    }
    asks_for(&PromptBankConfig::new(2, 3), "num_tasks", &[HUGE, LARGE]);
    let mixture = MixtureConfig::new(LoraConfig::new(2, targets()), 3, RouterConfig::Soft);
    for field in ["num_experts", "num_shared", "expert.r"] {
        asks_for(&mixture, field, &[HUGE, LARGE]);
    }
    // Each is small, and all together are not.
    let wide = MixtureConfig::new(LoraConfig::new(8, targets()), 3, RouterConfig::Soft);
    asks_for(&wide, "num_shared", &[4096]);
    for field in ["n_tasks", "n_skills", "n_splits", "r"] {
        asks_for(&PolyConfig::new(3, 2, targets()), field, &[HUGE, LARGE]);
    }
    asks_for(&PillConfig::decoder(2), "adapter_dim", &[HUGE, LARGE]);
}
