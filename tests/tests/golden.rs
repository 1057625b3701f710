//! Equality with Hugging Face: logits of `transformers`, adapters and matching rules of PEFT. The files are made by `tools/golden/`.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_adapter::{BitFitConfig, Ia3Config, LnTuningConfig};
use peft_core::files::{CONFIG_FILE, TENSOR_FILE, read_values};
use peft_core::{AdapterFile, LayerKind, Method, Targets, load_adapter, merge, pattern_value};
use peft_lora::{Combination, LoraConfig, combine};
use peft_models::checkpoint::Checkpoint;
use peft_models::load::{Packing, Precision};
use peft_models::weights::Weights;
use peft_models::{CausalLm, ModelSource, Pretrained, Sampling, generate};
use safetensors::SafeTensors;

/// Largest difference of a logit in f32.
pub(crate) const BOUND: f32 = 1e-4;

pub(crate) fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata")
}

pub(crate) fn model(name: &str) -> CausalLm {
    let source = ModelSource::Dir(testdata().join("models").join(name));
    Pretrained::load(&source, &Device::flex()).unwrap().model
}

/// The integers of one tensor.
pub(crate) fn ints(path: &Path, name: &str) -> (Vec<usize>, Vec<i64>) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(name).unwrap();
    let values = view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
    (view.shape().to_vec(), values)
}

pub(crate) fn floats(path: &Path, name: &str) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    peft_core::files::decode(file.tensor(name).unwrap().dtype(), file.tensor(name).unwrap().data()).unwrap()
}

pub(crate) fn logits(model: &CausalLm, path: &Path) -> Vec<f32> {
    let (shape, tokens) = ints(path, "tokens");
    let ids = Tensor::<2, Int>::from_data(TensorData::new(tokens, shape), &Device::flex());
    model.forward(ids).into_data().iter::<f32>().collect()
}

pub(crate) fn deviation(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst })
}

/// Shows the name of each golden model, its logits, and those of `transformers`.
fn each_model(precision: Precision, check: impl Fn(&str, Vec<f32>, Vec<f32>)) {
    let mut seen = 0;
    for entry in std::fs::read_dir(testdata().join("models")).unwrap() {
        let dir = entry.unwrap().path();
        let golden = dir.join("logits.safetensors");
        let source = ModelSource::Dir(dir.clone());
        let loaded = Pretrained::load_with(&source, &Packing::AsStored, precision, &Device::flex()).unwrap();
        check(dir.file_name().unwrap().to_str().unwrap(), logits(&loaded.model, &golden), floats(&golden, "logits"));
        seen += 1;
    }
    assert_eq!(seen, 13, "a golden model is missing");
}

#[test]
fn logits_equal_transformers() {
    each_model(Precision::F32, |name, found, expected| {
        let found = deviation(&found, &expected);
        assert!(found < BOUND, "{name}: {found}");
    });
}

#[test]
fn logits_over_bfloat16_are_near() {
    each_model(Precision::Bf16, |name, found, expected| {
        let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let found = deviation(&found, &expected) / largest;
        // Something is rounded; PyTorch, which rounds everything in bfloat16, is off by 0.061 at most.
        assert!(found > 1e-5 && found < 0.05, "{name}: {found}");
    });
}

#[test]
fn version_4_configs_mean_the_same() {
    use peft_models::config::ModelConfig;
    for name in ["llama3_rope", "llama_linear_rope"] {
        let read = |file: &str| {
            let path = testdata().join("models").join(name).join(file);
            let json = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
            ModelConfig::from_json(&json, &path).unwrap()
        };
        assert_eq!(read("config.json"), read("config_v4.json"));
    }
}

#[test]
fn greedy_generation_equals_transformers() {
    for name in ["llama", "smollm2", "gpt2"] {
        let golden = testdata().join("models").join(name).join("logits.safetensors");
        let prompt: Vec<u32> = ints(&golden, "tokens").1[..4].iter().map(|id| *id as u32).collect();
        let expected: Vec<u32> = ints(&golden, "greedy").1.iter().map(|id| *id as u32).collect();
        let found = generate(&model(name), &prompt, 8, Sampling::default(), &[], &Device::flex(), |_| true).unwrap();
        assert_eq!(found, expected, "{name}");
    }
}

#[derive(serde::Deserialize)]
struct Case {
    path: String,
    base: String,
    merge_exact: bool,
}

/// The adapters below `testdata/<folder>`.
fn cases(folder: &str) -> Vec<Case> {
    serde_json::from_str(&std::fs::read_to_string(testdata().join(folder).join("cases.json")).unwrap()).unwrap()
}

/// Each adapter gives the logits of PEFT, and merged those of PEFT's merged model.
fn give_the_logits_of_peft<M: Method>(cases: Vec<Case>) {
    for case in cases {
        let dir = testdata().join(&case.path);
        let golden = dir.join("logits.safetensors");
        let named = &case.path;
        let load = |base: CausalLm| load_adapter::<_, M>(base, &dir).unwrap_or_else(|e| panic!("{named}: {e}"));
        let (adapted, method) = load(model(&case.base));
        let found = deviation(&logits(&adapted, &golden), &floats(&golden, "logits"));
        assert!(found < BOUND, "{named}: {found}");
        let merged =
            if case.merge_exact { merge(adapted, &method) } else { merge(load(model(&case.base).untied()).0, &method) };
        // Where head and embedding are one table, PEFT merges into both; the merged model that equals the adapted one has two tables.
        let expected = if case.merge_exact { "logits_merged" } else { "logits" };
        let found = deviation(&logits(&merged.unwrap(), &golden), &floats(&golden, expected));
        assert!(found < BOUND, "{named}, merged: {found}");
    }
}

/// Saving what was loaded gives the same tensors, the same fields, and from then on the same bytes. Fields of PEFT's file that are not written are only those of `unwritten`; `None` for
/// a method of which not all is built.
fn survives_a_round_trip<M: Method>(path: &str, base: &str, unwritten: Option<&[&str]>) {
    let dir = testdata().join(path);
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let json = |dir: &Path| -> serde_json::Map<String, serde_json::Value> {
        serde_json::from_str(&std::fs::read_to_string(dir.join(CONFIG_FILE)).unwrap()).unwrap()
    };
    let name = json(&dir)["base_model_name_or_path"].as_str().unwrap().to_owned();
    for (from, to) in [(dir.as_path(), first.path()), (first.path(), second.path())] {
        let (adapted, method) = load_adapter::<_, M>(model(base), from).unwrap();
        peft_core::save_adapter(&adapted, &method, Some(&name), to).unwrap();
    }
    let read = |dir: &Path| read_values(&dir.join(TENSOR_FILE)).unwrap();
    assert_eq!(read(first.path()), read(&dir), "{path}");
    for file in [CONFIG_FILE, TENSOR_FILE] {
        let bytes = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
        assert!(bytes(first.path()) == bytes(second.path()), "{path}: {file}");
    }
    let (written, peft) = (json(first.path()), json(&dir));
    let (known, missing): (Vec<_>, Vec<_>) = peft.iter().partition(|(field, _)| written.contains_key(*field));
    for (field, value) in known {
        let ours = &written[field];
        // A number may be whole here and not there.
        let same = ours == value || (ours.is_number() && ours.as_f64() == value.as_f64());
        assert!(same, "{path}: {field} is {ours}, expected {value}");
    }
    if let Some(unwritten) = unwritten {
        assert!(missing.iter().all(|(field, _)| unwritten.contains(&field.as_str())), "{path}: {missing:?}");
    }
}

#[test]
fn adapters_of_peft_give_its_logits_and_merge() {
    let (lora, ia3, ln_tuning, beft) = (cases("lora"), cases("ia3"), cases("ln_tuning"), cases("beft"));
    assert!(lora.len() >= 20 && ia3.len() >= 12 && ln_tuning.len() >= 5 && beft.len() >= 3);
    give_the_logits_of_peft::<LoraConfig>(lora);
    give_the_logits_of_peft::<Ia3Config>(ia3);
    give_the_logits_of_peft::<LnTuningConfig>(ln_tuning);
    give_the_logits_of_peft::<BitFitConfig>(beft);
}

#[test]
fn saving_what_was_loaded_gives_the_same_files() {
    for variant in ["plain", "lora_bias", "modules_to_save", "bias_all"] {
        let base = if variant.contains("bias") { "llama_bias" } else { "llama" };
        survives_a_round_trip::<LoraConfig>(&format!("lora/{base}/{variant}"), base, None);
    }
    let unwritten = Some(&["peft_version"][..]);
    for case in cases("ia3") {
        survives_a_round_trip::<Ia3Config>(&case.path, &case.base, unwritten);
    }
    for case in cases("ln_tuning") {
        survives_a_round_trip::<LnTuningConfig>(&case.path, &case.base, unwritten);
    }
    for case in cases("beft") {
        survives_a_round_trip::<BitFitConfig>(&case.path, &case.base, unwritten);
    }
}

#[test]
fn matching_equals_peft() {
    #[derive(serde::Deserialize)]
    struct Golden {
        targets: Vec<Target>,
        patterns: Vec<Pattern>,
    }
    #[derive(serde::Deserialize)]
    struct Target {
        key: String,
        expected: bool,
        #[serde(flatten)]
        rest: serde_json::Map<String, serde_json::Value>,
    }
    #[derive(serde::Deserialize)]
    struct Pattern {
        pattern: indexmap::IndexMap<String, f64>,
        key: String,
        default: f64,
        expected: f64,
    }
    let golden: Golden =
        serde_json::from_str(&std::fs::read_to_string(testdata().join("matching.json")).unwrap()).unwrap();
    assert!(golden.targets.len() >= 46 && golden.patterns.len() >= 20);
    for target in golden.targets {
        let rest: serde_json::Map<_, _> = target.rest.into_iter().filter(|(_, v)| !v.is_null()).collect();
        let shown = format!("{rest:?} on {}", target.key);
        let targets: Targets = serde_json::from_value(rest.into()).unwrap();
        let found = targets.matcher().unwrap().matches(&target.key, Some(LayerKind::Linear));
        assert_eq!(found, target.expected, "{shown}");
    }
    for pattern in golden.patterns {
        let found = pattern_value("rank_pattern", &pattern.pattern, &pattern.key).unwrap().copied();
        assert_eq!(found.unwrap_or(pattern.default), pattern.expected, "{:?} on {}", pattern.pattern, pattern.key);
    }
}

/// `cat` is the exact weighted sum, `svd` reaches it at full rank and is the best approximation below.
#[test]
fn combinations_are_exact() {
    let dir = testdata().join("lora/llama/combine");
    let weights: std::collections::BTreeMap<String, f64> =
        serde_json::from_str(&std::fs::read_to_string(dir.join("weights.json")).unwrap()).unwrap();
    let adapters: Vec<(AdapterFile<LoraConfig>, f64)> =
        weights.iter().map(|(name, w)| (AdapterFile::read(&dir.join(name)).unwrap(), *w)).collect();
    let delta = dir.join("delta.safetensors");
    let bytes = std::fs::read(&delta).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    for (how, bound) in
        [(Combination::Cat, 1e-6), (Combination::Svd { rank: 8 }, 1e-6), (Combination::Svd { rank: 64 }, 1e-6)]
    {
        let combined = combine(&adapters, how).unwrap();
        for name in expected.names() {
            let found = dense(&combined, name);
            let worst = deviation(&found, &floats(&delta, name));
            assert!(worst < bound, "{how:?} {name}: {worst}");
        }
        let (adapted, _) = {
            let out = tempfile::tempdir().unwrap();
            combined.write(out.path()).unwrap();
            load_adapter::<_, LoraConfig>(model("llama"), out.path()).unwrap()
        };
        let golden = dir.join("logits.safetensors");
        let found = deviation(&logits(&adapted, &golden), &floats(&golden, "logits"));
        assert!(found < BOUND, "{how:?}: {found}");
    }
    let low = combine(&adapters, Combination::Svd { rank: 2 }).unwrap();
    for name in expected.names() {
        let full = floats(&delta, name);
        let rest: f32 = dense(&low, name).iter().zip(&full).map(|(a, b)| (a - b).powi(2)).sum();
        let norm: f32 = full.iter().map(|v| v * v).sum();
        assert!(rest > 1e-6 * norm && rest < norm, "{name}: rank 2 of 8 must lose something, not everything");
    }
    let shared = combine(&[adapters[0].clone(), adapters[0].clone()], Combination::Linear).unwrap();
    let single = combine(&[(adapters[0].0.clone(), 2.0 * adapters[0].1)], Combination::Cat).unwrap();
    for name in expected.names() {
        assert!(deviation(&dense(&shared, name), &dense(&single, name)) < 1e-6);
    }
    assert!(combine(&adapters, Combination::Linear).is_err(), "cross terms must not be hidden");
}

/// `s·B·A` of one module, in the file's orientation.
fn dense(file: &AdapterFile<LoraConfig>, module: &str) -> Vec<f32> {
    let (a, b) = (&file.tensors[&format!("{module}.lora_A.weight")], &file.tensors[&format!("{module}.lora_B.weight")]);
    let (rank, d_in, d_out) = (a.shape[0], a.shape[1], b.shape[0]);
    let scale = file.method.scale_of(module).unwrap();
    let mut out = vec![0.0; d_out * d_in];
    for o in 0..d_out {
        for i in 0..d_in {
            let sum: f64 =
                (0..rank).map(|r| f64::from(b.values[o * rank + r]) * f64::from(a.values[r * d_in + i])).sum();
            out[o * d_in + i] = (scale * sum) as f32;
        }
    }
    out
}

#[test]
fn a_sharded_checkpoint_is_read_whole() {
    let checkpoint = Checkpoint::open(&testdata().join("models/llama_sharded")).unwrap();
    assert!(checkpoint.files().count() >= 2);
    assert!(checkpoint.find("lm_head.weight").is_some());
}
