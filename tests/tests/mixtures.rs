//! Mixtures of adapters: equality with PEFT, and its files both ways.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::files::{TENSOR_FILE, read_values};
use peft_core::{AdapterFile, Method, Strictness, attach, for_tasks, load_adapter, save_adapter};
use peft_lora::LoraConfig;
use peft_models::{CausalLm, Sampling, generate};
use peft_moe::{ArrowConfig, PolyConfig, XLoraConfig};

use crate::golden::{BOUND, deviation, floats, ints, logits, model, testdata};

/// The folders of golden cases of a kind.
fn cases(kind: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(testdata().join("mixtures").join(kind)).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[track_caller]
fn gives_the_logits(dir: &Path, found: &[f32]) {
    let found = deviation(found, &floats(&dir.join("logits.safetensors"), "logits"));
    assert!(found < BOUND, "{}: {found}", dir.display());
}

/// Where what was loaded from `dir` is written: `scratch`, or, for `tools/golden/mixtures_back.py` to load it with PEFT, below the folder in `MIXTURES_BACK`.
fn written(dir: &Path, scratch: &Path) -> PathBuf {
    match std::env::var_os("MIXTURES_BACK") {
        Some(back) => Path::new(&back).join(dir.strip_prefix(testdata().join("mixtures")).unwrap()),
        None => scratch.to_owned(),
    }
}

/// What is saved of the adapter is what was loaded.
fn goes_back<M: Method>(model: &CausalLm, method: &M, dir: &Path) {
    let scratch = tempfile::tempdir().unwrap();
    is_saved(model, method, dir, &written(dir, scratch.path()));
}

fn is_saved<M: Method>(model: &CausalLm, method: &M, dir: &Path, out: &Path) {
    save_adapter(model, method, Some("testdata/models/llama"), out).unwrap();
    let tensors = |dir: &Path| read_values(&dir.join(TENSOR_FILE)).unwrap();
    assert_eq!(tensors(out), tensors(dir), "{}", dir.display());
}

#[test]
fn poly_gives_the_logits_of_peft_and_goes_back() {
    let cases = cases("poly");
    assert_eq!(cases.len(), 2, "a golden case is missing");
    for dir in cases {
        let golden = dir.join("logits.safetensors");
        let of: Vec<usize> = ints(&golden, "task_ids").1.iter().map(|task| *task as usize).collect();
        let (adapted, method) = load_adapter::<_, PolyConfig>(model("llama"), &dir).unwrap();
        let found = for_tasks(&of, || logits(&adapted, &golden));
        gives_the_logits(&dir, &found);
        goes_back(&adapted, &method, &dir);
        // The row of a task is that of its plain LoRA.
        let file = AdapterFile::<PolyConfig>::read(&dir).unwrap();
        let row = found.len() / of.len();
        for (at, task) in of.iter().enumerate() {
            let lora = PolyConfig::lora_of(&file, *task).unwrap();
            let model = attach(model("llama"), &lora.method, 0).unwrap();
            let model = lora.fill(model, &dir, Strictness::default()).unwrap();
            let part = at * row..(at + 1) * row;
            let alone = deviation(&logits(&model, &golden)[part.clone()], &found[part]);
            assert!(alone < 1e-5, "{}, task {task}: {alone}", dir.display());
        }
    }
}

fn expert(name: &str) -> AdapterFile<LoraConfig> {
    AdapterFile::read(&testdata().join("mixtures/experts").join(name)).unwrap()
}

#[test]
fn arrow_gives_the_logits_of_peft() {
    let cases = cases("arrow");
    assert_eq!(cases.len(), 3, "a golden case is missing");
    let tasks = ["0", "1", "2"].map(expert);
    for dir in cases {
        let golden = dir.join("logits.safetensors");
        let arrow = ArrowConfig::read(&dir).unwrap();
        let general = if arrow.use_gks { ["general_0", "general_1"].map(expert).to_vec() } else { Vec::new() };
        let mixture = arrow.mixture(&tasks, &general).unwrap();
        for (key, weight) in mixture.tensors.iter().filter(|(key, _)| key.ends_with(".router.weight")) {
            let expected = floats(&golden, &format!("prototypes.{}", key.trim_end_matches(".router.weight")));
            for (found, expected) in weight.values.chunks(32).zip(expected.chunks(32)) {
                // A direction has no sign.
                let same: f32 = found.iter().zip(expected).map(|(a, b)| a * b).sum();
                assert!((same.abs() - 1.0).abs() < 1e-5, "{}, {key}: {same}", dir.display());
            }
        }
        let out = tempfile::tempdir().unwrap();
        mixture.write(out.path()).unwrap();
        let (adapted, _) = load_adapter::<_, peft_moe::MixtureConfig<LoraConfig>>(model("llama"), out.path()).unwrap();
        gives_the_logits(&dir, &logits(&adapted, &golden));
    }
}

#[test]
fn xlora_gives_the_logits_of_peft_and_goes_back() {
    let cases = cases("xlora");
    assert_eq!(cases.len(), 10, "a golden case is missing");
    for dir in cases {
        let golden = dir.join("logits.safetensors");
        let (adapted, method) = load_adapter::<_, XLoraConfig>(model("llama"), &dir).unwrap();
        gives_the_logits(&dir, &logits(&adapted, &golden));
        let scratch = tempfile::tempdir().unwrap();
        let out = written(&dir, scratch.path());
        is_saved(&adapted, &method, &dir, &out);
        // With experts of its own.
        let (again, _) = load_adapter::<_, XLoraConfig>(model("llama"), &out).unwrap();
        gives_the_logits(&dir, &logits(&again, &golden));
    }
}

/// Each pass has a cache of its own, so that a text goes on as if it were read anew for each token.
#[test]
fn xlora_generates_behind_two_caches() {
    let dir = testdata().join("mixtures/xlora/pass_value");
    let (adapted, _) = load_adapter::<_, XLoraConfig>(model("llama"), &dir).unwrap();
    let mut tokens = vec![5_u32, 9, 2, 7];
    let found = generate(&adapted, &tokens, 6, Sampling::default(), &[], &Device::flex(), |_| true).unwrap();
    for next in found {
        let ids: Vec<i64> = tokens.iter().map(|id| i64::from(*id)).collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, tokens.len()]), &Device::flex());
        let logits: Vec<f32> = adapted.forward(ids).into_data().iter().collect();
        let last = &logits[logits.len() - logits.len() / tokens.len()..];
        let best = last.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        assert_eq!(next as usize, best, "behind {tokens:?}");
        tokens.push(next);
    }
}
